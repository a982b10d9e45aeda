"""Comparisons, logic, choices, and types."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml.lowering.elementwise import NARROW, wrapped
from optkit_targets.coreml.lowering.forms import broadcast, check_rank, dims, dtype, is_float, wide
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import lowers
from optkit_targets.coreml.lowering.writing import Writer, number_type, read_outputs

COMPARISONS = {"Less": "less", "LessOrEqual": "less_equal", "Greater": "greater", "GreaterOrEqual": "greater_equal"}
LOGIC = {"And": "logical_and", "Or": "logical_or", "Xor": "logical_xor"}
# What MIL calls a type that ONNX casts to; the integers without a type of their own are held in int32.
TYPES = {
    **dict.fromkeys(("INT64", "UINT64", "INT32", "UINT32", "INT16", "UINT16", "INT8", "UINT8"), "int32"),
    "FLOAT": "fp32",
    "DOUBLE": "fp32",
    "FLOAT16": "fp16",
    "BOOL": "bool",
}


@lowers("Equal")
def equal(scope: Scope, node: ir.Node) -> Any:
    """Write ``x = y``; of truth values it is the opposite of their exclusive or."""
    x, y, write = wide(scope, node, 0), wide(scope, node, 1), Writer(scope, node)
    if dtype(x) == "bool":
        return write.logical_not(x=write.logical_xor(x=x, y=y))
    return write.equal(x=x, y=y)


@lowers(*COMPARISONS)
def comparison(scope: Scope, node: ir.Node) -> Any:
    """Write an order of numbers."""
    write = Writer(scope, node)
    return getattr(write, COMPARISONS[node.op_type])(x=wide(scope, node, 0), y=wide(scope, node, 1))


@lowers(*LOGIC)
def logic(scope: Scope, node: ir.Node) -> Any:
    """Write a function of two truth values."""
    return getattr(Writer(scope, node), LOGIC[node.op_type])(x=scope.input(node, 0), y=scope.input(node, 1))


@lowers("Not")
def logical_not(scope: Scope, node: ir.Node) -> Any:
    """Write the opposite."""
    return Writer(scope, node).logical_not(x=scope.input(node, 0))


@lowers("IsNaN")
def is_nan(scope: Scope, node: ir.Node) -> Any:
    """Write ``x ≠ x``, which holds for nothing else."""
    x = scope.input(node, 0)
    return Writer(scope, node).not_equal(x=x, y=x)


@lowers("IsInf")
def is_inf(scope: Scope, node: ir.Node) -> Any:
    """Write a comparison with infinity, of either sign or of both."""
    x, write = scope.input(node, 0), Writer(scope, node)
    above, below = (node.attributes.get_int(f"detect_{sign}", 1) for sign in ("positive", "negative"))
    if not above and not below:
        return scope.const(np.zeros(dims(x), bool), node.name or "never")
    value = write.abs(x=x) if above and below else x
    return write.equal(x=value, y=float("inf") if above else float("-inf"))


@lowers("Where")
def where(scope: Scope, node: ir.Node) -> Any:
    """Write a choice; MIL's select wants its three inputs in one shape."""
    inputs = [scope.input(node, 0), wide(scope, node, 1), wide(scope, node, 2)]
    shape = np.broadcast_shapes(*map(dims, inputs))
    check_rank(len(shape))
    condition, x, y = (broadcast(scope, value, shape) for value in inputs)
    return Writer(scope, node).select(cond=condition, a=x, b=y)


@lowers("Cast")
def cast(scope: Scope, node: ir.Node) -> Any:
    """Write a change of type."""
    return _to(scope, node, ir.DataType(node.attributes.get_int("to", 1)))


@lowers("CastLike")
def cast_like(scope: Scope, node: ir.Node) -> Any:
    """Write a change to the type of another value."""
    like = node.inputs[1]
    if like is None or like.dtype is None:
        raise CannotLower("the type to cast to is not known")
    return _to(scope, node, like.dtype)


def _to(scope: Scope, node: ir.Node, wanted: ir.DataType) -> Any:
    """Write a change of type; narrow integers wrap around, floats are cut toward zero, in MIL as in ONNX."""
    if wanted.name not in TYPES:
        raise CannotLower(f"MIL has no type {wanted.name} to cast to")
    x, write = wide(scope, node, 0), Writer(scope, node)
    result = write.cast(x, TYPES[wanted.name])
    source = node.inputs[0]
    fits = source is not None and _fits(source.dtype, wanted)
    return result if fits else wrapped(write, result, wanted)


def _fits(source: ir.DataType | None, wanted: ir.DataType) -> bool:
    """Return whether no number of one type wraps around in the other."""
    if source == ir.DataType.BOOL or source == wanted:
        return True
    if source not in NARROW or wanted not in NARROW:
        return False
    (count, smallest), (room, least) = NARROW[source], NARROW[wanted]
    return smallest >= least and smallest + count <= least + room


@lowers("Identity")
def identity(scope: Scope, node: ir.Node) -> Any:
    """Let the result be the input."""
    return scope.input(node, 0)


@lowers("Dropout")
def dropout(scope: Scope, node: ir.Node) -> Any:
    """Let the result be the input, and the mask, where it is read, keep everything."""
    training = scope.constant(node, 2)
    if scope.optional(node, 2) is not None and (training is None or training.any()):
        raise CannotLower("it drops elements: training_mode is set")
    x = scope.input(node, 0)
    if 1 not in read_outputs(node):
        return x
    kind: Any = bool if scope.opset >= 10 else number_type(x) if is_float(x) else np.int32
    return x, scope.const(np.ones(dims(x), kind), f"{node.name}_mask")
