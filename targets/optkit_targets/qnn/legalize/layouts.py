"""Which operators can work in another layout of the same tensors, and how each is written there.

Everywhere ``y = Transpose(x, perm)``: axis ``i`` of y is axis ``perm[i]`` of x, so that what a node does along axis
``i`` of y it does along axis ``perm[i]`` of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, ints, static_shape
from optkit_targets.rewriting import BROADCAST, UNARY, Writer

ALONG_AXIS = {"Concat": 1, "LogSoftmax": -1, "Softmax": -1, "Split": 0}  # and what an absent axis means
REDUCTIONS = {f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum")}
REDUCTIONS |= {"ReduceSumSquare"}


def inverse(perm: Sequence[int]) -> list[int]:
    """Return the permutation that takes y back to x."""
    return [list(perm).index(axis) for axis in range(len(perm))]


def bytes_of(value: ir.Value) -> int | None:
    """Return the bytes of a value; None where its shape or type is not known."""
    shape = static_shape(value)
    return None if shape is None or value.dtype is None else max(1, prod(shape) * value.dtype.bitwidth // 8)


def data_inputs(node: ir.Node) -> list[int]:
    """Return the places of the inputs that are in the layout: all but settings such as starts, pads and axes."""
    if node.op_type in BROADCAST or node.op_type == "Concat":
        return [index for index, value in enumerate(node.inputs) if value is not None]
    return [0]


def can_change(node: ir.Node, rank: int, version: int) -> bool:
    """Return whether the node can work in another layout of tensors with ``rank`` axes."""
    if node.domain != "" or not node.outputs or any(not _fits(value, rank) for value in node.outputs if value.name):
        return False
    for index in data_inputs(node):
        value = argument(node, index)
        if value is None or value.dtype is None or value.shape is None:
            return False
        exact = node.op_type not in BROADCAST
        free = constant(value) is not None or len(value.shape) == 0
        if len(value.shape) > rank or (len(value.shape) < rank and (exact or not free)):
            return False
    if node.op_type in UNARY | BROADCAST:
        return node.op_type in UNARY or version >= 7  # before, operands were aligned by an attribute
    if node.op_type in ALONG_AXIS:
        return node.op_type not in ("Softmax", "LogSoftmax") or version >= 13
    if node.op_type in REDUCTIONS:
        return bool(node.attributes.get_int("keepdims", 1)) and ints(node, "axes", 1) is not None
    if node.op_type == "Pad":
        return ints(node, "pads", 1) is not None and argument(node, 3) is None
    if node.op_type == "Slice":
        return all(ints(node, name, place) is not None for place, name in ((1, "starts"), (2, "ends"), (3, "axes")))
    return False


def _fits(value: ir.Value, rank: int) -> bool:
    return value.shape is not None and len(value.shape) == rank and bytes_of(value) is not None


def change(node: ir.Node, perm: Sequence[int], writer: Writer) -> None:
    """Let a node work on x in place of y, its settings and constants too; its other inputs must already be x."""
    rank, back = len(perm), inverse(perm)
    for index in data_inputs(node):
        value = argument(node, index)
        array = constant(value)
        if value is not None and array is not None and array.ndim > 0:
            full = array.reshape((1,) * (rank - array.ndim) + array.shape)
            node.replace_input_with(index, writer.constant("transposed", np.transpose(full, back).copy()))
    if node.op_type in ALONG_AXIS:
        axis = node.attributes.get_int("axis", ALONG_AXIS[node.op_type]) or 0
        node.attributes.add(ir.AttrInt64("axis", perm[axis % rank]))
    elif node.op_type in REDUCTIONS or node.op_type == "Slice":
        place = 3 if node.op_type == "Slice" else 1
        axes = [perm[axis % rank] for axis in ints(node, "axes", place) or ()]
        if "axes" in node.attributes:
            node.attributes.add(ir.AttrInt64s("axes", axes))
        else:
            node.replace_input_with(place, writer.ints("axes", axes))
    elif node.op_type == "Pad":
        pads = ints(node, "pads", 1) or []
        moved = [pads[side + back[axis]] for side in (0, rank) for axis in range(rank)]
        if "pads" in node.attributes:
            node.attributes.add(ir.AttrInt64s("pads", moved))
        else:
            node.replace_input_with(1, writer.ints("pads", moved))
    for value in node.outputs:
        if value.shape is not None and len(value.shape) == rank:
            value.shape = ir.Shape([value.shape[axis] for axis in back])
