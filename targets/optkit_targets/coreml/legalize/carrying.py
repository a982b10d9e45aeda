"""Operators written in the engine's own layout; see `optkit_targets.coreml.legalize.channels_first`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from optkit.graph import argument, constant, ints, static_shape
from optkit_targets.coreml.legalize.channels_first import (
    ALONG_AXIS,
    BROADCAST,
    FEWEST_AXES,
    NORMALIZATIONS,
    REDUCTIONS,
    VIEWS,
    carried_array,
    carried_axis,
    carried_shape,
    data_inputs,
)
from optkit_targets.coreml.legalize.writing import Writer

Constants = dict[tuple[ir.Value, int], ir.Value]


def carry(
    node: ir.Node, carried: Mapping[ir.Value, ir.Value], constants: Constants, writer: Writer
) -> Sequence[ir.Value]:
    """Write a node in the layout, and return its results there.

    Args:
        node: A node that `can_carry`.
        carried: What it reads in the layout.
        constants: Those of the graph in the layout, by the axes that they are broadcast to; grows.
        writer: Writes in front of the node.
    """
    shape = _shape(node.outputs[0])
    rank, x = len(shape), carried.get(node.inputs[0]) if node.inputs[0] is not None else None
    if node.op_type in NORMALIZATIONS:
        assert x is not None
        return [_normalized(node, x, rank, constants, writer)]
    if node.op_type in VIEWS:
        assert x is not None
        return [writer.reshape(x, carried_shape(shape))]
    inputs = list(node.inputs)
    for index in data_inputs(node):
        value = node.inputs[index]
        assert value is not None
        inputs[index] = carried[value]
    attributes = dict(node.attributes)
    if node.op_type in BROADCAST:
        for index, value in enumerate(node.inputs):
            array = constant(value)
            if array is not None and array.ndim:
                inputs[index] = _constant(value, rank, constants, writer)
    elif node.op_type == "Expand":
        inputs[1] = writer.ints("shape", carried_shape(shape))
    elif node.op_type in ALONG_AXIS:
        axis = node.attributes.get_int("axis", ALONG_AXIS[node.op_type])
        attributes["axis"] = ir.AttrInt64("axis", carried_axis(axis, rank))
    elif node.op_type in REDUCTIONS or node.op_type == "Slice":
        place = 3 if node.op_type == "Slice" else 1
        axes = [carried_axis(axis, rank) for axis in ints(node, "axes", place) or ()]
        if "axes" in attributes:
            attributes["axes"] = ir.AttrInt64s("axes", axes)
        else:
            inputs[place] = writer.ints("axes", axes)
    copy = ir.Node("", node.op_type, inputs, list(attributes.values()), num_outputs=len(node.outputs))
    writer.insert(copy)
    results = copy.outputs
    for new, old in zip(results, node.outputs, strict=True):
        new.type, new.shape = old.type, ir.Shape(carried_shape(_shape(old)))
    return results


def _constant(value: ir.Value | None, rank: int, constants: Constants, writer: Writer) -> ir.Value:
    """Return a constant in the layout, the same one for all that read it."""
    array = constant(value)
    assert value is not None
    assert array is not None
    if (value, rank) not in constants:
        constants[value, rank] = writer.constant("carried", carried_array(array, rank))
    return constants[value, rank]


def _normalized(node: ir.Node, x: ir.Value, rank: int, constants: Constants, writer: Writer) -> ir.Value:
    """Write a normalization over channels, which ONNX's operators, over the last axes alone, have no form for.

    ``c * (1 / sqrt(mean(c^2) + epsilon)) * scale + bias``, where c is ``x - mean(x)``, or x of an RMS normalization.
    In this form and order coremltools knows it for a ``layer_norm`` over channels, as ml-ane-transformers writes it.
    """
    axis, shape = carried_axis(-1, rank), static_shape(x) or []
    single = [1 if place == axis else size for place, size in enumerate(shape)]
    centered = x
    if node.op_type == "LayerNormalization":
        centered = writer.add("Sub", x, _mean(writer, x, axis, single), shape=shape)
    squares = writer.add("Mul", centered, centered, shape=shape)
    epsilon = writer.like("epsilon", node.attributes.get_float("epsilon", 1e-5), x)
    variance = writer.add("Add", _mean(writer, squares, axis, single), epsilon, shape=single)
    inverse = writer.add("Reciprocal", writer.add("Sqrt", variance, shape=single), shape=single)
    result = writer.add("Mul", centered, inverse, shape=shape)
    for op_type, index in (("Mul", 1), ("Add", 2)):
        parameter = argument(node, index)
        if parameter is not None:
            result = writer.add(op_type, result, _constant(parameter, rank, constants, writer), shape=shape)
    return result


def _mean(writer: Writer, value: ir.Value, axis: int, shape: Sequence[int]) -> ir.Value:
    mean = writer.reduce_mean(value, axis)
    mean.shape = ir.Shape(shape)
    return mean


def enter(value: ir.Value, writer: Writer) -> ir.Value:
    """Return a value in the layout, through a transpose where its axes do move; one before it is merged with that."""
    source, shape = value, _shape(value)
    perm = _forth(len(shape))
    before = transpose_of(value)
    if before is not None and before.inputs[0] is not None:
        source, first = before.inputs[0], perm_of(before)
        perm, shape = [first[axis] for axis in perm], _shape(source)
    return writer.reshape(writer.transpose(source, perm, shape), carried_shape(_shape(value)))


def leave(carried: ir.Value, shape: Sequence[int], writer: Writer, behind: Sequence[int] | None = None) -> ir.Value:
    """Return a value out of the layout, or what a transpose behind it would make of it.

    Args:
        carried: The value in the layout.
        shape: Its shape out of it.
        writer: Writes in front of a node behind it.
        behind: The permutation of the transpose.
    """
    moved = [shape[axis] for axis in _forth(len(shape))]
    return writer.transpose(writer.reshape(carried, moved), _back(len(shape), behind), moved)


def _forth(rank: int) -> list[int]:
    """Return the permutation that puts tokens last; the axes that are missing to four, a reshape adds."""
    return [1, 0] if rank == FEWEST_AXES else [0, *range(2, rank), 1]


def _back(rank: int, behind: Sequence[int] | None) -> list[int]:
    """Return the permutation that undoes it, and then permutes further."""
    forth = _forth(rank)
    back = [forth.index(axis) for axis in range(rank)]
    return back if behind is None else [back[axis] for axis in behind]


def transpose_of(value: ir.Value) -> ir.Node | None:
    """Return the transpose, of known shapes, that a value comes from."""
    node = value.producer()
    if node is None or (node.domain, node.op_type) != ("", "Transpose") or static_shape(value) is None:
        return None
    return node if static_shape(node.inputs[0]) is not None else None


def perm_of(node: ir.Node) -> list[int]:
    """Return the permutation of a transpose of known rank."""
    rank = len(_shape(node.outputs[0]))
    return list(node.attributes.get_ints("perm") or range(rank)[::-1])


def moves(shape: Sequence[int], perm: Sequence[int]) -> bool:
    """Whether a permutation moves any element of a tensor: more than axes of size 1."""
    order = [axis for axis in perm if shape[axis] != 1]
    return order != sorted(order)


def transposes_to_enter(value: ir.Value) -> bool:
    """Whether a value, or what a transpose made it of, must be transposed to enter the layout."""
    shape = _shape(value)
    perm, before = _forth(len(shape)), transpose_of(value)
    if before is not None:
        first = perm_of(before)
        perm, shape = [first[axis] for axis in perm], _shape(before.inputs[0])
    return moves(shape, perm)


def transposes_to_leave(shape: Sequence[int], behind: Sequence[int] | None = None) -> bool:
    """Whether a value must be transposed to leave the layout, for a transpose behind it or for anything else."""
    return moves([shape[axis] for axis in _forth(len(shape))], _back(len(shape), behind))


def _shape(value: ir.Value | None) -> list[int]:
    shape = static_shape(value)
    assert shape is not None
    return shape
