"""Matrix products: with a constant weight as MIL's linear, which Core ML also has compressed, else as its matmul."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import argument
from optkit_targets.coreml.lowering.attention import fused
from optkit_targets.coreml.lowering.forms import dims, is_float, known, reshaped, wide
from optkit_targets.coreml.lowering.scope import Scope
from optkit_targets.coreml.lowering.table import lowers, operator
from optkit_targets.coreml.lowering.weights import Dense, weight_of, weight_variable
from optkit_targets.coreml.lowering.writing import Writer, number_type

LINEAR_RANKS = (2, 3)  # of linear's input: "1 <= rank <= 3", and a vector is no row


@lowers("MatMul")
def matmul(scope: Scope, node: ir.Node) -> Any:
    """Write a product; vectors are rows on the left and columns on the right, and leave no axis in the result."""
    x, write = wide(scope, node, 0), Writer(scope, node)
    value = argument(node, 1)
    if len(dims(x)) in LINEAR_RANKS and value is not None and value.shape is not None and len(value.shape) == 2:
        weight = _linear_weight(scope, node, x)
        if weight is not None:
            return _linear(scope, node, x, weight)
    y = wide(scope, node, 1)
    attention = fused(scope, node, x, y)
    if attention is not None:
        return attention
    left, right = dims(x), dims(y)
    row = reshaped(scope, x, (1, *left)) if len(left) == 1 else x
    column = reshaped(scope, y, (*right, 1)) if len(right) == 1 else y
    result = write.matmul(x=row, y=column)
    shape = list(dims(result))
    if len(left) == 1:
        del shape[-2]
    if len(right) == 1:
        del shape[-1]
    return reshaped(scope, result, shape)


def _linear(scope: Scope, node: ir.Node, x: Any, weight: Any) -> Any:
    """Return a product with a constant weight; the constant vector that the next node adds is its bias."""
    write, found = Writer(scope, node), _bias_behind(node, dims(weight)[0], len(dims(x)))
    if found is None:
        return write.linear(x=x, weight=weight)
    add, bias = found
    result = write.linear(x=x, weight=weight, bias=bias.astype(number_type(x)))
    scope.set(add.outputs[0], result)
    return result


def _bias_behind(node: ir.Node, columns: int, rank: int) -> tuple[ir.Node, np.ndarray] | None:
    """Return the Add that alone reads a node's result, and the vector [columns] that it adds to every row."""
    value = node.outputs[0]
    uses = [] if value.is_graph_output() else list(value.uses())
    if len(uses) != 1 or operator(uses[0].node) != "Add" or uses[0].node.graph is not node.graph:
        return None
    stored = weight_of(argument(uses[0].node, 1 - uses[0].idx))
    if not isinstance(stored, Dense) or stored.array.ndim > rank or stored.array.shape[-1:] != (columns,):
        return None
    return (uses[0].node, stored.array.ravel()) if stored.array.size == columns else None


def _linear_weight(scope: Scope, node: ir.Node, x: Any, *, transpose: bool = True, factor: float = 1.0) -> Any | None:
    """Return a constant second input [K, N] as linear's weight [N, K], or None where it is computed.

    A compressed weight is transposed as it is stored; of a tied one that is stored so already there is no second copy.

    Args:
        scope: The program being written.
        node: The product.
        x: The first input.
        transpose: Whether the weight is [K, N]; else it is [N, K].
        factor: A number to multiply a dense weight by.
    """
    value = argument(node, 1)
    weight = weight_of(value)
    if value is None or weight is None or not is_float(x):
        return None
    if isinstance(weight, Dense) and factor != 1.0:
        weight = Dense((weight.array * factor).astype(number_type(x)))
    else:
        stored = _untransposed(value) if transpose else value
        if stored is not None and weight_of(stored) is not None:
            return weight_variable(scope, stored)
    return (weight.transposed((1, 0)) if transpose else weight).write(scope, f"{node.name}_weight")


def _untransposed(value: ir.Value) -> ir.Value | None:
    """Return what a matrix is the transpose of, where a node transposes it."""
    node = value.producer()
    if node is None or operator(node) != "Transpose":
        return None
    perm = node.attributes.get("perm")
    return argument(node, 0) if perm is None or list(perm.as_ints()) == [1, 0] else None


@lowers("Gemm")
def gemm(scope: Scope, node: ir.Node) -> Any:
    """Write ``alpha·A'·B' + beta·C``; ``alpha`` goes into a dense weight, ``beta`` into a constant vector ``C``."""
    alpha, beta = (float(node.attributes.get_float(name, 1.0)) for name in ("alpha", "beta"))
    left, right = (bool(node.attributes.get_int(name, 0)) for name in ("transA", "transB"))
    x, write = wide(scope, node, 0), Writer(scope, node)
    factor = alpha if is_float(x) and isinstance(weight_of(argument(node, 1)), Dense) else 1.0
    weight = _linear_weight(scope, node, x, transpose=not right, factor=factor)
    rest = alpha if factor == 1.0 else 1.0
    if weight is None:
        result = write.matmul(x=x, y=wide(scope, node, 1), transpose_x=left, transpose_y=right)
        return _plus(scope, node, _times(write, result, rest), beta)
    x = write.transpose(x=x, perm=[1, 0]) if left else x
    bias = _bias(scope, node, x, dims(weight)[0], beta) if rest == 1.0 else None
    if bias is not None:
        return write.linear(x=x, weight=weight, bias=bias)
    return _plus(scope, node, _times(write, write.linear(x=x, weight=weight), rest), beta)


def _bias(scope: Scope, node: ir.Node, x: Any, columns: int, beta: float) -> np.ndarray | None:
    """Return ``beta·C`` as linear's bias [N]; None where it is left out, computed, or differs from row to row."""
    array = known(scope, node, 2)
    if array is None or array.size not in (1, columns) or (array.size > 1 and array.shape[-1] != columns):
        return None
    return np.broadcast_to(array.ravel() * beta, columns).astype(number_type(x))


def _times(write: Writer, x: Any, factor: float) -> Any:
    """Return ``factor·x``; integers are cut toward zero."""
    if factor == 1.0:
        return x
    if is_float(x):
        return write.mul(x=x, y=factor)
    return write.cast(write.mul(x=write.cast(x, "fp32"), y=factor), "int32")


def _plus(scope: Scope, node: ir.Node, x: Any, beta: float) -> Any:
    """Return ``x + beta·C``."""
    if argument(node, 2) is None or beta == 0.0:
        return x
    write = Writer(scope, node)
    return write.add(x=x, y=_times(write, wide(scope, node, 2), beta))
