"""Elements by their indices, and indices by their elements: Gather, Scatter, OneHot, TopK, ArgMax.

Negative indices count from the end in ONNX; MIL's operations of iOS 17 and later do not take them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml.lowering.forms import (
    axis_of,
    cast,
    check_filled,
    check_rank,
    counted,
    dims,
    dtype,
    known,
    label,
    needs,
    required,
    reshaped,
    setting,
    through,
    volume,
    wide,
)
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.slicing import sliced
from optkit_targets.coreml.lowering.table import lowers

COUNTS_FROM_FRONT = 17  # the first deployment target whose gather takes no negative indices
NUMBERS = ("fp16", "fp32", "int32")
MODES = {"none": "update", "add": "add", "mul": "mul", "max": "max", "min": "min"}


@lowers("Gather")
def gather(scope: Scope, node: ir.Node) -> Any:
    """Write slices picked along an axis."""
    data = wide(scope, node, 0)
    axis = axis_of(node.attributes.get_int("axis", 0), len(dims(data)))
    indices = scope.input(node, 1)
    if scope.deployment >= COUNTS_FROM_FRONT or indices.val is not None:
        indices = counted(scope, indices, dims(data)[axis])
    check_rank(len(dims(data)) - 1 + len(dims(indices)))

    def work(values: Any) -> Any:
        return scope.mb.gather(x=values, indices=cast(scope, indices, "int32"), axis=axis, name=label(scope, node))

    return through(scope, data, NUMBERS, "int32", work)


@lowers("GatherElements")
def gather_elements(scope: Scope, node: ir.Node) -> Any:
    """Write elements picked along an axis, one index each; ONNX's indices may cover less of the other axes."""
    data, indices = wide(scope, node, 0), scope.input(node, 1)
    own, covered = dims(data), dims(indices)
    axis = axis_of(node.attributes.get_int("axis", 0), len(own))
    indices = counted(scope, indices, own[axis])
    part = [slice(None) if place == axis else slice(size) for place, size in enumerate(covered)]

    def work(values: Any) -> Any:
        values = sliced(scope, values, part)
        return scope.mb.gather_along_axis(x=values, indices=indices, axis=axis, name=label(scope, node))

    return through(scope, data, NUMBERS, "int32", work)


@lowers("GatherND")
def gather_nd(scope: Scope, node: ir.Node) -> Any:
    """Write slices picked by tuples of indices."""
    data, indices = wide(scope, node, 0), scope.input(node, 1)
    batch, depth = node.attributes.get_int("batch_dims", 0), dims(indices)[-1]
    if batch:
        needs(scope, 16, "GatherND with batch_dims")
    indices = counted(scope, indices, np.array(dims(data)[batch : batch + depth]))

    def work(values: Any) -> Any:
        batches = {"batch_dims": batch} if batch else {}
        return scope.mb.gather_nd(x=values, indices=indices, **batches, name=label(scope, node))

    return through(scope, data, NUMBERS, "int32", work)


def _mode(node: ir.Node) -> str:
    mode = node.attributes.get_string("reduction", "none")
    if mode not in MODES:
        raise CannotLower(f"reduction '{mode}' is not known")
    return MODES[mode]


@lowers("ScatterElements", "Scatter")
def scatter_elements(scope: Scope, node: ir.Node) -> Any:
    """Write updates along an axis, one index each; as points where they cover less of the other axes."""
    data, indices, updates = wide(scope, node, 0), scope.input(node, 1), wide(scope, node, 2)
    own, covered, mode = dims(data), dims(indices), _mode(node)
    axis = axis_of(node.attributes.get_int("axis", 0), len(own))
    indices = counted(scope, indices, own[axis])
    check_filled(covered, "its indices")

    def work(values: Any) -> Any:
        given, name = cast(scope, updates, dtype(values)), label(scope, node)
        if own[:axis] + own[axis + 1 :] == covered[:axis] + covered[axis + 1 :]:
            return scope.mb.scatter_along_axis(
                data=values, indices=indices, updates=given, axis=axis, mode=mode, name=name
            )
        points = _points(scope, indices, axis)
        flat = reshaped(scope, given, [volume(covered)])
        return scope.mb.scatter_nd(data=values, indices=points, updates=flat, mode=mode, name=name)

    return through(scope, data, NUMBERS, "int32", work)


def _points(scope: Scope, indices: Any, axis: int) -> Any:
    """Return the coordinates that indices along one axis mean: [elements, axes]."""
    covered = dims(indices)
    count = volume(covered)
    grid = np.indices(covered).reshape(len(covered), count, 1).astype(np.int32)
    columns: list[Any] = [scope.mb.const(val=column) for column in grid]
    columns[axis] = reshaped(scope, indices, [count, 1])
    return scope.mb.concat(values=columns, axis=1)


@lowers("ScatterND")
def scatter_nd(scope: Scope, node: ir.Node) -> Any:
    """Write updates at tuples of indices."""
    data, indices, updates = wide(scope, node, 0), scope.input(node, 1), wide(scope, node, 2)
    depth, mode = dims(indices)[-1], _mode(node)
    indices = counted(scope, indices, np.array(dims(data)[:depth]))

    def work(values: Any) -> Any:
        given = cast(scope, updates, dtype(values))
        return scope.mb.scatter_nd(data=values, indices=indices, updates=given, mode=mode, name=label(scope, node))

    return through(scope, data, NUMBERS, "int32", work)


@lowers("TensorScatter")
def tensor_scatter(scope: Scope, node: ir.Node) -> Any:
    """Write what is new into a cache, from a place of each sample's own on; a circular cache begins anew at its end."""
    data, updates = scope.input(node, 0), scope.input(node, 1)
    own, covered = dims(data), dims(updates)
    axis = axis_of(node.attributes.get_int("axis", -2), len(own))
    steps = np.arange(covered[axis], dtype=np.int32).reshape([-1 if place == axis else 1 for place in range(len(own))])
    starts = scope.optional(node, 2)
    places: Any = steps
    if starts is not None:
        column = reshaped(scope, cast(scope, starts, "int32"), [own[0]] + [1] * (len(own) - 1))
        places = scope.mb.add(x=column, y=steps)
        if node.attributes.get_string("mode", "linear") == "circular":
            places = scope.mb.mod(x=places, y=np.int32(own[axis]))
    indices = scope.mb.add(x=places, y=np.zeros(covered, np.int32))  # one index for each element

    def work(values: Any) -> Any:
        given, name = cast(scope, updates, dtype(values)), label(scope, node)
        return scope.mb.scatter_along_axis(
            data=values, indices=indices, updates=given, axis=axis, mode="update", name=name
        )

    return through(scope, data, NUMBERS, "int32", work)


@lowers("OneHot")
def one_hot(scope: Scope, node: ir.Node) -> Any:
    """Write rows that are ``on`` at their index and ``off`` elsewhere."""
    depth, values = required(setting(scope, node, 1, "depth"), "depth")[0], known(scope, node, 2)
    if values is None:
        raise CannotLower("its values are computed at run time")
    indices = counted(scope, scope.input(node, 0), depth)
    rank = len(dims(indices)) + 1
    check_rank(rank)
    off, on = scope.const(values, "values").val
    return scope.mb.one_hot(
        indices=indices,
        one_hot_vector_size=np.int32(depth),
        axis=axis_of(node.attributes.get_int("axis", -1), rank),
        on_value=on,
        off_value=off,
        name=label(scope, node),
    )


@lowers("TopK")
def top_k(scope: Scope, node: ir.Node) -> Any:
    """Write the largest or smallest elements along an axis, and where they are."""
    data = scope.input(node, 0)
    found = [node.attributes.get_int("k", 0)] if "k" in node.attributes else setting(scope, node, 1, "k")
    count, axis = required(found, "k")[0], axis_of(node.attributes.get_int("axis", -1), len(dims(data)))
    check_filled([count])
    return scope.mb.topk(
        x=data, k=count, axis=axis, ascending=not node.attributes.get_int("largest", 1), name=label(scope, node)
    )


@lowers("ArgMax", "ArgMin")
def arg_extreme(scope: Scope, node: ir.Node) -> Any:
    """Write the index of the largest or smallest element along an axis, the first or, reversed, the last of equals."""
    data = scope.input(node, 0)
    own, keep = dims(data), bool(node.attributes.get_int("keepdims", 1))
    axis = axis_of(node.attributes.get_int("axis", 0), len(own))
    data = cast(scope, data, "int32") if dtype(data) == "bool" else data
    last = node.attributes.get_int("select_last_index", 0)
    operation = scope.mb.reduce_argmax if node.op_type == "ArgMax" else scope.mb.reduce_argmin
    values = scope.mb.reverse(x=data, axes=[axis]) if last else data
    found = operation(x=values, axis=axis, keep_dims=keep, name=label(scope, node))
    return scope.mb.sub(x=np.int32(own[axis] - 1), y=found) if last else found


@lowers("NonZero")
def non_zero(scope: Scope, node: ir.Node) -> Any:
    """Write where a constant is not zero."""
    array = known(scope, node, 0)
    if array is None:
        raise CannotLower("how many elements are not zero is known at run time only, and shapes must be static")
    found = np.stack(np.nonzero(np.atleast_1d(array))).astype(np.int32)
    check_filled(found.shape)
    return scope.const(found, node.name or "non_zero")


@lowers("ReverseSequence")
def reverse_sequence(scope: Scope, node: ir.Node) -> Any:
    """Write sequences with their first elements in reverse order."""
    return scope.mb.reverse_sequence(
        x=scope.input(node, 0),
        lengths=cast(scope, scope.input(node, 1), "int32"),
        seq_axis=node.attributes.get_int("time_axis", 0),
        batch_axis=node.attributes.get_int("batch_axis", 1),
        name=label(scope, node),
    )
