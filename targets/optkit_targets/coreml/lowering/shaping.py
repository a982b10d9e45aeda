"""Operators that change the shape, the order of elements or how often they appear, and no value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import argument
from optkit_targets.coreml.lowering.forms import (
    attribute_or_input,
    axes_of,
    axis_of,
    broadcast,
    check_filled,
    check_rank,
    dims,
    known,
    label,
    required,
    reshaped,
    setting,
    transposed,
    volume,
)
from optkit_targets.coreml.lowering.scope import MAX_RANK, CannotLower, Folded, Scope
from optkit_targets.coreml.lowering.table import lowers


@lowers("Reshape")
def reshape(scope: Scope, node: ir.Node) -> Any:
    """Write a reshape: 0 copies a dimension (unless ``allowzero``), -1 takes what is left."""
    data = _held(scope, node)
    shape, own = required(attribute_or_input(scope, node, "shape", 1), "shape"), data.shape
    if not node.attributes.get_int("allowzero", 0):
        shape = [own[axis] if size == 0 else size for axis, size in enumerate(shape)]
    if -1 in shape:
        rest = volume([size for size in shape if size != -1])
        shape[shape.index(-1)] = volume(own) // max(rest, 1)
    return _unfolded(scope, data.value, shape, label(scope, node))


def _held(scope: Scope, node: ir.Node) -> Folded:
    """Return a node's first input, of however many axes."""
    value = argument(node, 0)
    found = scope.input(node, 0) if value is None else scope.held(value)
    return found if isinstance(found, Folded) else Folded(found, dims(found))


def _unfolded(scope: Scope, value: Any, shape: Sequence[int], name: str) -> Any:
    """Return a variable in a shape, or what holds it where MIL has no such shape."""
    if len(shape) > MAX_RANK:
        return Folded(value, tuple(shape))
    return reshaped(scope, value, shape, name=name)


@lowers("Flatten")
def flatten(scope: Scope, node: ir.Node) -> Any:
    """Write a matrix: the axes before ``axis`` by those from it on."""
    data = scope.input(node, 0)
    own = dims(data)
    axis = node.attributes.get_int("axis", 1)
    axis += len(own) if axis < 0 else 0
    return reshaped(scope, data, [volume(own[:axis]), volume(own[axis:])], name=label(scope, node))


@lowers("Squeeze")
def squeeze(scope: Scope, node: ir.Node) -> Any:
    """Write a tensor without some axes of length 1, or without any."""
    data = _held(scope, node)
    own, axes = data.shape, attribute_or_input(scope, node, "axes", 1)
    gone = [axis for axis, size in enumerate(own) if size == 1] if axes is None else axes_of(axes, len(own))
    if len(own) > MAX_RANK:
        left = [size for axis, size in enumerate(own) if axis not in gone]
        return _unfolded(scope, data.value, left, label(scope, node))
    return scope.mb.squeeze(x=data.value, axes=gone, name=label(scope, node)) if gone else data.value


@lowers("Unsqueeze")
def unsqueeze(scope: Scope, node: ir.Node) -> Any:
    """Write a tensor with new axes of length 1, counted in the result."""
    data = _held(scope, node)
    axes = required(attribute_or_input(scope, node, "axes", 1), "axes")
    rank = len(data.shape) + len(axes)
    if rank > MAX_RANK:
        rest, new = iter(data.shape), axes_of(axes, rank)
        return Folded(data.value, tuple(1 if axis in new else next(rest) for axis in range(rank)))
    return scope.mb.expand_dims(x=data.value, axes=axes_of(axes, rank), name=label(scope, node)) if axes else data.value


@lowers("Transpose")
def transpose(scope: Scope, node: ir.Node) -> Any:
    """Write a tensor with its axes in another order, reversed by default; more axes than MIL has, joined."""
    array = scope.constant(node, 0)
    if array is not None and array.ndim <= MAX_RANK:
        return scope.const(array.transpose(scope.ints(node, "perm")), node.name or "")
    data = _held(scope, node)
    perm = scope.ints(node, "perm") or list(range(len(data.shape)))[::-1]
    if len(perm) <= MAX_RANK:
        return transposed(scope, data.value, perm, name=label(scope, node))
    value, shape = data.value, list(data.shape)
    for order in moves(shape, perm):
        groups = joined(shape, order)
        sizes = [volume([shape[axis] for axis in group]) for group in sorted(groups)]
        place = {group: index for index, group in enumerate(sorted(groups))}
        value = transposed(scope, reshaped(scope, value, sizes), [place[group] for group in groups])
        shape = [shape[axis] for axis in order]
    return Folded(value, tuple(shape))


def joined(shape: Sequence[int], perm: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the axes of a transpose's result, those that stay neighbours in one, those of length 1 with any."""
    groups: list[tuple[int, ...]] = []
    filled = [axis for axis in range(len(shape)) if shape[axis] != 1]
    follower = dict(pairwise(filled))
    for axis in perm:
        if shape[axis] == 1:
            continue
        if groups and follower.get(groups[-1][-1]) == axis:
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    return groups or [(0,)]


def moves(shape: Sequence[int], perm: Sequence[int]) -> list[list[int]]:
    """Return transposes one after the other that make one, each of at most 5 joined axes."""
    if len(joined(shape, perm)) <= MAX_RANK:
        return [list(perm)]
    steps, now = [], list(range(len(perm)))
    for place, axis in enumerate(perm):
        at = now.index(axis)
        if at != place:  # [before, between, axis, after] becomes [before, axis, between, after]
            step = [*range(place), at, *range(place, at), *range(at + 1, len(now))]
            steps.append(step)
            now = [now[index] for index in step]
    return steps


@lowers("Expand")
def expand(scope: Scope, node: ir.Node) -> Any:
    """Write a tensor repeated along axes of length 1; both shapes broadcast."""
    data = scope.input(node, 0)
    shape = np.broadcast_shapes(dims(data), tuple(required(setting(scope, node, 1, "shape"), "shape")))
    check_rank(len(shape))
    check_filled(shape)
    return broadcast(scope, data, shape)


@lowers("Tile")
def tile(scope: Scope, node: ir.Node) -> Any:
    """Write a tensor repeated along its axes."""
    data = scope.input(node, 0)
    if len(node.inputs) > 2:
        raise CannotLower("Tile of opset 1 repeats one axis: raise the opset to 6 or later")
    repeats = required(setting(scope, node, 1, "repeats"), "repeats")
    check_filled(repeats)
    return scope.mb.tile(x=data, reps=repeats, name=label(scope, node)) if set(repeats) - {1} else data


@lowers("DepthToSpace")
def depth_to_space(scope: Scope, node: ir.Node) -> Any:
    """Write blocks of channels as space: ``DCR`` has the block's axes before the channels, ``CRD`` behind them."""
    size, order = node.attributes.get_int("blocksize", 0), node.attributes.get_string("mode", "DCR")
    data, name = scope.input(node, 0), label(scope, node)
    if order == "CRD":
        return scope.mb.pixel_shuffle(x=data, upscale_factor=size, name=name)
    return scope.mb.depth_to_space(x=data, block_size=size, name=name)


@lowers("SpaceToDepth")
def space_to_depth(scope: Scope, node: ir.Node) -> Any:
    """Write blocks of space as channels."""
    size = node.attributes.get_int("blocksize", 0)
    data, name = scope.input(node, 0), label(scope, node)
    if node.attributes.get_string("mode", "DCR") == "CRD":
        return _space_to_depth_by_channel(scope, data, size)
    return scope.mb.space_to_depth(x=data, block_size=size, name=name)


def _space_to_depth_by_channel(scope: Scope, data: Any, size: int) -> Any:
    """Return ``CRD``: MIL's form, then block and channel change places."""
    count, channels, height, width = dims(data)
    blocks = scope.mb.space_to_depth(x=data, block_size=size)
    split = reshaped(scope, blocks, [count, size * size, channels, height // size, width // size])
    shape = [count, channels * size * size, height // size, width // size]
    return reshaped(scope, transposed(scope, split, [0, 2, 1, 3, 4]), shape)


@lowers("Shape")
def shape(scope: Scope, node: ir.Node) -> Any:
    """Write the shape, which is constant here."""
    own = dims(scope.input(node, 0))
    found = own[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(own))]
    check_filled([len(found)])
    return scope.const(np.array(found, np.int32), node.name or "shape")


@lowers("Size")
def size(scope: Scope, node: ir.Node) -> Any:
    """Write the number of elements, which is constant here."""
    return scope.const(np.array(volume(dims(scope.input(node, 0))), np.int32), node.name or "size")


@lowers("ConstantOfShape")
def constant_of_shape(scope: Scope, node: ir.Node) -> Any:
    """Write a tensor of one value."""
    wanted = required(setting(scope, node, 0, "shape"), "shape")
    check_filled(wanted)
    given = node.attributes.get("value")
    value = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
    return scope.const(np.full(wanted, value.ravel()[0]), node.name or "fill")


@lowers("Constant")
def constant(scope: Scope, node: ir.Node) -> Any:
    """Write numbers that stand in the node itself: most have become initializers before."""
    name, attribute = next(iter(node.attributes.items()))
    if name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise CannotLower(f"its {name} is no dense tensor of numbers")
    if name == "value":
        return scope.const(attribute.as_tensor().numpy(), node.name or "constant")
    kind = np.float32 if "float" in name else np.int32
    return scope.const(np.array(attribute.value, kind), node.name or "constant")


@lowers("EyeLike")
def eye_like(scope: Scope, node: ir.Node) -> Any:
    """Write a diagonal of ones, which is constant here."""
    rows, columns = dims(scope.input(node, 0))
    given = node.outputs[0].dtype or (node.inputs[0] and node.inputs[0].dtype) or ir.DataType.FLOAT
    diagonal = np.eye(rows, columns, node.attributes.get_int("k", 0), dtype=given.numpy())
    return scope.const(diagonal, node.name or "eye")


@lowers("Range")
def range_(scope: Scope, node: ir.Node) -> Any:
    """Write a sequence of numbers with constant ends."""
    ends = [known(scope, node, index) for index in range(3)]
    if any(end is None for end in ends):
        raise CannotLower("its ends are computed at run time, so that its length is not static")
    start, limit, step = (np.asarray(end).ravel()[0] for end in ends)
    values = np.arange(start, limit, step, dtype=np.asarray(ends[0]).dtype)
    check_filled(values.shape)
    return scope.const(values, node.name or "range")


def concatenated(scope: Scope, values: list[Any], axis: int, **name: str) -> Any:
    """Return values side by side along an axis; one alone is itself."""
    return values[0] if len(values) == 1 else scope.mb.concat(values=values, axis=axis, **name)


@lowers("Concat")
def concat(scope: Scope, node: ir.Node) -> Any:
    """Write tensors side by side; constants without elements add nothing."""
    arrays = [known(scope, node, index) for index in range(len(node.inputs))]
    filled = [index for index, array in enumerate(arrays) if array is None or array.size]
    check_filled([len(filled)])
    values = [scope.input(node, index) for index in filled]
    rank = len(dims(values[0]))
    return concatenated(scope, values, axis_of(node.attributes.get_int("axis", 0), rank), name=label(scope, node))
