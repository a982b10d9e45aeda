"""Arithmetic on every element, with ONNX's broadcasting, which is MIL's."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import argument
from optkit_targets.coreml.lowering.forms import dims, dtype, is_float, wide
from optkit_targets.coreml.lowering.scope import Scope
from optkit_targets.coreml.lowering.table import lowers
from optkit_targets.coreml.lowering.writing import Writer

BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul"}
VARIADIC = {"Min": "minimum", "Max": "maximum", "Sum": "add", "Mean": "add"}
UNARY = {
    name: name.lower()
    for name in (
        *("Abs", "Sign", "Sqrt", "Exp", "Erf", "Ceil", "Floor"),
        "Round",  # half to even in both
        *("Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Atanh"),
    )
}
WITH_EPSILON = {"Log": "log", "Reciprocal": "inverse"}
UNSIGNED = (ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64)
# Integers that MIL holds in int32 and that wrap around before: their count of values, and the smallest.
NARROW = {
    ir.DataType.UINT8: (1 << 8, 0),
    ir.DataType.INT8: (1 << 8, -(1 << 7)),
    ir.DataType.UINT16: (1 << 16, 0),
    ir.DataType.INT16: (1 << 16, -(1 << 15)),
}


def wrapped(write: Writer, x: Any, kind: ir.DataType | None) -> Any:
    """Return the int32 results of arithmetic on narrower integers, wrapped around as those are."""
    if kind not in NARROW:
        return x
    count, smallest = NARROW[kind]
    if not smallest:
        return write.mod(x=x, y=np.int32(count))  # MIL's modulo has the divisor's sign
    return write.add(x=write.mod(x=write.sub(x=x, y=np.int32(smallest)), y=np.int32(count)), y=np.int32(smallest))


def element_type(node: ir.Node, index: int = 0) -> ir.DataType | None:
    """Return the ONNX type of what a node reads at ``index``."""
    value = node.inputs[index]
    return None if value is None else value.dtype


@lowers(*BINARY)
def binary(scope: Scope, node: ir.Node) -> Any:
    """Write ``x op y``, unless the product in front has taken it for its bias."""
    if scope.written(node.outputs[0]):
        return scope.variable(node.outputs[0])
    write = Writer(scope, node)
    result = getattr(write, BINARY[node.op_type])(x=wide(scope, node, 0), y=wide(scope, node, 1))
    return wrapped(write, result, element_type(node))


@lowers(*VARIADIC)
def variadic(scope: Scope, node: ir.Node) -> Any:
    """Write an operator of any number of inputs two by two."""
    write = Writer(scope, node)
    operation = getattr(write, VARIADIC[node.op_type])
    values = [wide(scope, node, index) for index in range(len(node.inputs))]
    result = reduce(lambda x, y: operation(x=x, y=y), values)
    return write.mul(x=result, y=1 / len(values)) if node.op_type == "Mean" and len(values) > 1 else result


@lowers("Div")
def div(scope: Scope, node: ir.Node) -> Any:
    """Write a division: integers toward zero as in C, where MIL's floor_div rounds down."""
    x, y, write = wide(scope, node, 0), wide(scope, node, 1), Writer(scope, node)
    if is_float(x):
        return write.real_div(x=x, y=y)
    if element_type(node) in UNSIGNED:
        return write.floor_div(x=x, y=y)
    quotient = write.floor_div(x=write.abs(x=x), y=write.abs(x=y))
    return write.mul(x=quotient, y=write.mul(x=write.sign(x=x), y=write.sign(x=y)))


@lowers("Mod")
def mod(scope: Scope, node: ir.Node) -> Any:
    """Write a remainder: with ``fmod`` it has the dividend's sign, else the divisor's, as MIL's."""
    x, y, write = wide(scope, node, 0), wide(scope, node, 1), Writer(scope, node)
    if not node.attributes.get_int("fmod", 0):
        return write.mod(x=x, y=y)
    return write.mul(x=write.sign(x=x), y=write.mod(x=write.abs(x=x), y=write.abs(x=y)))


@lowers("Pow")
def power(scope: Scope, node: ir.Node) -> Any:
    """Write a power in the type of its base; integers to a power of floats are computed in floats and cut."""
    x, y, write = wide(scope, node, 0), wide(scope, node, 1), Writer(scope, node)
    if is_float(x):
        return write.pow(x=x, y=write.cast(y, dtype(x)))
    if not is_float(y):
        return wrapped(write, write.pow(x=x, y=y), element_type(node))
    return wrapped(write, write.cast(write.pow(x=write.cast(x, dtype(y)), y=y), "int32"), element_type(node))


@lowers(*UNARY)
def unary(scope: Scope, node: ir.Node) -> Any:
    """Write a function of one element."""
    return getattr(Writer(scope, node), UNARY[node.op_type])(x=wide(scope, node, 0))


@lowers(*WITH_EPSILON)
def with_epsilon(scope: Scope, node: ir.Node) -> Any:
    """Write a function to whose argument MIL adds a number by default.

    The inverse of a root that nothing else reads is MIL's rsqrt, which coremltools looks for in normalizations.
    """
    x, write = scope.input(node, 0), Writer(scope, node)
    read = argument(node, 0)
    alone = read is not None and len(read.uses()) == 1 and not read.is_graph_output()
    if node.op_type == "Reciprocal" and alone and x.op is not None and x.op.op_type == "sqrt":
        result = write.rsqrt(x=x.op.x, epsilon=0.0)
        x.op.enclosing_block.remove_ops([x.op])
        return result
    return getattr(write, WITH_EPSILON[node.op_type])(x=x, epsilon=0.0)


@lowers("Neg")
def negative(scope: Scope, node: ir.Node) -> Any:
    """Write ``-x``."""
    x, write = wide(scope, node, 0), Writer(scope, node)
    return wrapped(write, write.mul(x=x, y=-1.0 if is_float(x) else np.int32(-1)), element_type(node))


@lowers("Asinh")
def asinh(scope: Scope, node: ir.Node) -> Any:
    """Write ``asinh(x)``, which MIL lacks, without overflow or cancellation.

    With ``|x| < 1`` it is ``atanh(x / sqrt(x² + 1))``, elsewhere ``sign(x)·(log|x| + log(1 + sqrt(1 + 1/x²)))``.
    """
    x, write = scope.input(node, 0), Writer(scope, node)
    magnitude = write.abs(x=x)
    small = write.clip(x=x, alpha=-1.0, beta=1.0)
    near = write.atanh(x=write.real_div(x=small, y=write.sqrt(x=write.add(x=write.square(x=small), y=1.0))))
    far = write.mul(x=write.sign(x=x), y=_log_twice(write, write.maximum(x=magnitude, y=1.0), 1.0))
    return write.select(cond=write.less(x=magnitude, y=1.0), a=near, b=far)


@lowers("Acosh")
def acosh(scope: Scope, node: ir.Node) -> Any:
    """Write ``acosh(x)``, which MIL lacks, without overflow or cancellation.

    With ``x < 2`` it is ``2·atanh(sqrt((x - 1) / (x + 1)))``, elsewhere ``log x + log(1 + sqrt(1 - 1/x²))``.
    """
    x, write = scope.input(node, 0), Writer(scope, node)
    small = write.minimum(x=x, y=2.0)
    ratio = write.real_div(x=write.sub(x=small, y=1.0), y=write.add(x=small, y=1.0))
    near = write.mul(x=write.atanh(x=write.sqrt(x=ratio)), y=2.0)
    far = _log_twice(write, write.maximum(x=x, y=2.0), -1.0)
    return write.select(cond=write.less(x=x, y=2.0), a=near, b=far)


def _log_twice(write: Writer, x: Any, sign: float) -> Any:
    """Return ``log(x + sqrt(x² ± 1))`` as ``log x + log(1 + sqrt(1 ± 1/x²))``, so that no square overflows."""
    square = write.square(x=write.inverse(x=x, epsilon=0.0))
    root = write.sqrt(x=write.add(x=write.mul(x=square, y=sign), y=1.0))
    return write.add(x=write.log(x=x, epsilon=0.0), y=write.log(x=write.add(x=root, y=1.0), epsilon=0.0))


@lowers("BitShift")
def bit_shift(scope: Scope, node: ir.Node) -> Any:
    """Write a shift as a product with a power of two, or a quotient rounded down: in two steps, as 2³¹ is no int32.

    A shift by as many places as there are bits, or by less than none, leaves the sign (opset 28).
    """
    x, y, write = wide(scope, node, 0), wide(scope, node, 1), Writer(scope, node)
    kind, two = element_type(node), np.int32(2)
    width = 32 if kind is None else min(int(kind.bitwidth), 32)
    inside = write.logical_and(x=write.greater_equal(x=y, y=np.int32(0)), y=write.less(x=y, y=np.int32(width)))
    if node.attributes.get_string("direction", "") == "RIGHT":
        places = write.select(cond=inside, a=y, b=np.full(dims(y), 31, np.int32))
        first = write.minimum(x=places, y=np.int32(16))
        half = write.floor_div(x=x, y=write.pow(x=two, y=first))
        return write.floor_div(x=half, y=write.pow(x=two, y=write.sub(x=places, y=first)))
    nothing = np.zeros(dims(y), np.int32)
    factor = write.pow(x=two, y=write.select(cond=inside, a=y, b=nothing))
    return wrapped(write, write.mul(x=x, y=write.select(cond=inside, a=factor, b=nothing)), kind)


@lowers("BitwiseNot")
def bitwise_not(scope: Scope, node: ir.Node) -> Any:
    """Write ``-1 - x``, which in unsigned integers is ``largest - x``."""
    kind = element_type(node)
    last = NARROW[kind][0] - 1 if kind in UNSIGNED and kind in NARROW else -1
    return Writer(scope, node).sub(x=np.int32(last), y=wide(scope, node, 0))
