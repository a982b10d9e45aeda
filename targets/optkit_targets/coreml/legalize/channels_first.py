"""Tokens in the engine's own layout: which operators can work in it, and how each is written there.

A value ``[B, S, ...]`` is carried with the tokens last, one of three axes with an axis of size 1 before them:
``[B, S, C]`` as ``[B, C, 1, S]``, ``[B, S, H, D]`` as ``[B, H, D, S]``, and ``[S, C]`` as ``[1, C, 1, S]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, ints, is_constant, is_unused, static_shape

UNARY = {"Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"}
UNARY |= {"Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign"}
UNARY |= {"Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"}
BROADCAST = {"Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum"}
PER_TENSOR = {"DequantizeLinear", "QuantizeLinear"}  # with a single scale
ALONG_AXIS = {"Concat": 1, "LogSoftmax": -1, "Softmax": -1, "Split": 0}  # and what an absent axis means
REDUCTIONS = {f"Reduce{name}" for name in ("L1", "L2", "Max", "Mean", "Min", "Sum", "SumSquare")}
VIEWS = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}
NORMALIZATIONS = {"LayerNormalization", "RMSNormalization"}
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16}
FEWEST_AXES, IMAGE_AXES = 2, 4


def whole(shape: Sequence[int]) -> list[int]:
    """Return a shape with the axes that the layout adds: ``[B, S, C, 1]`` of three, ``[1, S, C, 1]`` of two."""
    return [*[1] * (len(shape) == FEWEST_AXES), *shape, *[1] * (len(shape) < IMAGE_AXES)]


def carried_shape(shape: Sequence[int]) -> list[int]:
    """Return the shape of a value in the layout."""
    batch, tokens, *rest = whole(shape)
    return [batch, *rest, tokens]


def carried_axis(axis: int, rank: int) -> int:
    """Return where an axis of a value with ``rank`` axes is in the layout."""
    place = axis % rank + (rank == FEWEST_AXES)
    return 0 if place == 0 else max(rank, IMAGE_AXES) - 1 if place == 1 else place - 1


def carried_array(array: np.ndarray, rank: int) -> np.ndarray:
    """Return a constant that is broadcast to ``rank`` axes in the layout."""
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    return np.ascontiguousarray(np.moveaxis(full.reshape(whole(full.shape)), 1, -1))


def data_inputs(node: ir.Node) -> list[int]:
    """Return the places of the inputs that are in the layout, constants left out."""
    everything = node.op_type in BROADCAST or node.op_type == "Concat"
    places = range(len(node.inputs)) if everything else range(1)
    return [index for index in places if (value := argument(node, index)) is not None and constant(value) is None]


def can_carry(node: ir.Node, version: int) -> bool:
    """Return whether a node, a linear layer apart, can work in the layout."""
    if node.domain != "" or not data_inputs(node):
        return False
    ranks = set()
    for value in (*(node.inputs[index] for index in data_inputs(node)), *node.outputs):
        shape = static_shape(value)
        if value is None or shape is None or len(shape) < FEWEST_AXES or 0 in shape:
            return False
        if value.dtype not in FLOATS and node.op_type not in PER_TENSOR:
            return False
        ranks.add(len(shape))
    if node.op_type in VIEWS | {"Expand"}:
        return _keeps_tokens(node)
    if len(ranks) != 1:
        return False
    rank = ranks.pop()
    if node.op_type in UNARY:
        return len(node.outputs) == 1 and (node.op_type != "Clip" or all(map(is_constant, _bounds(node))))
    if node.op_type in BROADCAST:
        constants = [constant(value) for value in node.inputs]
        return version >= 7 and all(array is None or array.ndim <= rank for array in constants)
    if node.op_type in PER_TENSOR:
        return all(array is not None and array.size == 1 for array in map(constant, _bounds(node)))
    if node.op_type in ALONG_AXIS:
        return (version >= 13 or "Softmax" not in node.op_type) and all(
            index in data_inputs(node) for index in range(len(node.inputs)) if node.op_type == "Concat"
        )
    if node.op_type in REDUCTIONS:
        return bool(node.attributes.get_int("keepdims", 1)) and bool(ints(node, "axes", 1))
    if node.op_type == "Slice":
        return all(ints(node, name, place) is not None for place, name in ((1, "starts"), (2, "ends"), (3, "axes")))
    return node.op_type in NORMALIZATIONS and _can_write_out(node, rank)


def _bounds(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs[1:] if value is not None]


def _keeps_tokens(node: ir.Node) -> bool:
    """Whether a view has batch and tokens as its input has them, and changes only what comes behind."""
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if before is None or after is None or whole(before)[:2] != whole(after)[:2]:
        return False
    return node.op_type != "Expand" or len(before) == len(after)


def _can_write_out(node: ir.Node, rank: int) -> bool:
    """Whether a normalization is over the last axis, with constants, and nothing reads more than its result."""
    parameters = [constant(value) for value in _bounds(node)]
    last = node.attributes.get_int("axis", -1) in (-1, rank - 1)
    return last and all(map(is_unused, node.outputs[1:])) and all(a is not None and a.ndim <= rank for a in parameters)
