"""Parts of tensors, and tensors with a rim: Slice, Split, Pad, Trilu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import NO_LIMIT, static_shape
from optkit_targets.coreml.lowering.forms import (
    as_type,
    attribute_or_input,
    axes_of,
    axis_of,
    cast,
    check_filled,
    dims,
    dtype,
    empty,
    is_float,
    known,
    label,
    required,
    setting,
    through,
)
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.shaping import concatenated
from optkit_targets.coreml.lowering.table import lowers
from optkit_targets.coreml.lowering.writing import number_type

PAD_MODES = {"reflect": "reflect", "edge": "replicate"}
NUMPY_MODES = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


@lowers("Slice")
def slice_(scope: Scope, node: ir.Node) -> Any:
    """Write a slice: numpy's rules, with ends beyond the tensor clamped."""
    data = scope.input(node, 0)
    own = dims(data)
    old = "starts" in node.attributes
    axes = scope.ints(node, "axes") if old else setting(scope, node, 3, "axes")
    steps = None if old else setting(scope, node, 4, "steps")
    if not old and known(scope, node, 1) is None:
        return _moving(scope, node, data, axes, steps)
    starts = required(attribute_or_input(scope, node, "starts", 1), "starts")
    ends = required(attribute_or_input(scope, node, "ends", 2), "ends")
    slices = [slice(None)] * len(own)
    for place, axis in enumerate(axes or range(len(starts))):
        end = None if abs(ends[place]) >= NO_LIMIT and (ends[place] > 0) else ends[place]
        slices[axis_of(axis, len(own))] = slice(starts[place], end, steps[place] if steps else 1)
    return sliced(scope, data, slices, name=label(scope, node))


def sliced(scope: Scope, data: Any, slices: Sequence[slice], **name: str) -> Any:
    """Return ``data[slices]``; all of it is itself.

    An empty one is a constant.
    """
    own = dims(data)
    spans = [range(*part.indices(size)) for part, size in zip(slices, own, strict=True)]
    if not all(spans):
        return empty(scope, data, [len(span) for span in spans])
    if spans == [range(size) for size in own]:
        return data
    return scope.mb.slice_by_index(
        x=data,
        begin=[span.start for span in spans],
        end=[max(span.stop, 0) for span in spans],
        stride=[span.step for span in spans],
        end_mask=[span.stop < 0 for span in spans],  # a negative step down to the first element
        **name,
    )


def _moving(scope: Scope, node: ir.Node, data: Any, axes: list[int] | None, steps: list[int] | None) -> Any:
    """Return a slice whose start is computed, as in a cache's window: its length must be known."""
    own, wanted = dims(data), static_shape(node.outputs[0])
    if wanted is None:
        raise CannotLower("its starts are computed at run time, so that the length of the slice is not static")
    if steps and set(steps) != {1}:
        raise CannotLower("its starts are computed at run time, and its steps are not 1")
    check_filled(wanted)
    starts = cast(scope, scope.input(node, 1), "int32")
    places = [axis_of(axis, len(own)) for axis in axes or range(dims(starts)[0])]
    parts = scope.mb.split(x=starts, split_sizes=[1] * len(places), axis=0) if len(places) > 1 else [starts]
    begin: list[Any] = [scope.mb.const(val=np.zeros(1, np.int32)) for _ in own]
    for axis, start in zip(places, parts, strict=True):
        behind = scope.mb.add(x=start, y=np.int32(own[axis]))
        counted = scope.mb.select(cond=scope.mb.less(x=start, y=np.int32(0)), a=behind, b=start)
        last = np.int32(own[axis] - wanted[axis])
        begin[axis] = scope.mb.minimum(x=scope.mb.maximum(x=counted, y=np.int32(0)), y=last)
    return scope.mb.slice_by_size(
        x=data, begin=concatenated(scope, begin, 0), size=np.array(wanted, np.int32), name=label(scope, node)
    )


@lowers("Split")
def split(scope: Scope, node: ir.Node) -> Any:
    """Write the parts along an axis: sizes as given, or equal ones with a smaller last."""
    data = scope.input(node, 0)
    axis = axis_of(node.attributes.get_int("axis", 0), len(dims(data)))
    sizes = attribute_or_input(scope, node, "split", 1)
    if sizes is None:
        length, count = dims(data)[axis], node.attributes.get_int("num_outputs", len(node.outputs))
        size = -(-length // count)
        sizes = [size] * (count - 1) + [length - size * (count - 1)]
    filled, own = [size for size in sizes if size], list(dims(data))
    if len(filled) < 2:
        parts = [data]
    else:
        parts = list(scope.mb.split(x=data, split_sizes=filled, axis=axis, name=label(scope, node)))
    return [parts.pop(0) if size else empty(scope, data, [*own[:axis], 0, *own[axis + 1 :]]) for size in sizes]


@lowers("Pad")
def pad(scope: Scope, node: ir.Node) -> Any:
    """Write a rim on every side; negative pads cut."""
    data = scope.input(node, 0)
    own, mode = dims(data), node.attributes.get_string("mode", "constant")
    pads = required(attribute_or_input(scope, node, "pads", 1), "pads")
    axes = setting(scope, node, 3, "axes")
    places = list(range(len(own))) if axes is None else [axis_of(axis, len(own)) for axis in axes]
    rims = [(0, 0)] * len(own)
    for place, axis in enumerate(places):
        rims[axis] = (pads[place], pads[place + len(places)])
    cuts = [slice(max(-low, 0), size - max(-high, 0)) for (low, high), size in zip(rims, own, strict=True)]
    data = sliced(scope, data, cuts)
    rims = [(max(low, 0), max(high, 0)) for low, high in rims]
    if not any(low or high for low, high in rims):
        return data
    if mode == "constant":
        return _pad_value(scope, data, rims, _value(scope, node), label(scope, node))
    return _pad_copies(scope, data, rims, mode, label(scope, node))


@lowers("CenterCropPad")
def center_crop_pad(scope: Scope, node: ir.Node) -> Any:
    """Write a tensor cut or padded with zeros on both sides to a shape."""
    data = scope.input(node, 0)
    own, wanted = dims(data), required(setting(scope, node, 1, "shape"), "shape")
    places = [axis_of(axis, len(own)) for axis in scope.ints(node, "axes") or range(len(own))]
    cuts, rims = [slice(None)] * len(own), [(0, 0)] * len(own)
    for axis, size in zip(places, wanted, strict=True):
        begin = abs(own[axis] - size) // 2
        if size < own[axis]:
            cuts[axis] = slice(begin, begin + size)
        else:
            rims[axis] = (begin, size - own[axis] - begin)
    data = sliced(scope, data, cuts, name=label(scope, node))
    return _pad_value(scope, data, rims, 0.0, label(scope, node)) if any(map(any, rims)) else data


def _value(scope: Scope, node: ir.Node) -> float:
    if "value" in node.attributes:
        return node.attributes.get_float("value", 0.0)
    array = known(scope, node, 2)
    if array is None and scope.optional(node, 2) is not None:
        raise CannotLower("the value to pad with is computed at run time")
    return 0.0 if array is None or not array.size else array.ravel()[0].item()


def _pad_value(scope: Scope, data: Any, rims: list[tuple[int, int]], value: float, name: str) -> Any:
    """Return a rim of one value; MIL pads floats alone, other types get constants beside them."""
    if is_float(data):
        kind = np.float16 if dtype(data) == "fp16" else np.float32
        return scope.mb.pad(x=data, pad=[width for rim in rims for width in rim], constant_val=kind(value), name=name)
    data = as_type(scope, data, ("bool", "int32"), "int32")
    whole = np.bool_ if dtype(data) == "bool" else np.int32
    for axis, rim in enumerate(rims):
        own = dims(data)
        sides = [
            [scope.mb.const(val=np.full((*own[:axis], width, *own[axis + 1 :]), value, whole))] if width else []
            for width in rim
        ]
        data = concatenated(scope, [*sides[0], data, *sides[1]], axis)
    return data


def _pad_copies(scope: Scope, data: Any, rims: list[tuple[int, int]], mode: str, name: str) -> Any:
    """Return a rim of copies: MIL's own on the last two axes of floats, else elements picked along each axis."""
    inner = all(rim == (0, 0) for rim in rims[:-2])
    own = dims(data)
    # MIL reflects at most the length less one, once; numpy's modes go on reflecting.
    short = all(max(rim) < size for rim, size in zip(rims, own, strict=True))
    if inner and short and is_float(data) and mode in PAD_MODES:
        widths = [width for rim in rims[-2:] for width in rim]
        unused = number_type(data)(0)  # left out, coremltools takes it for a float32
        return scope.mb.pad(x=data, pad=widths, mode=PAD_MODES[mode], constant_val=unused, name=name)
    if mode not in NUMPY_MODES:
        raise CannotLower(f"pad mode '{mode}' is not known")
    for axis, rim in enumerate(rims):
        if rim != (0, 0):
            order = np.pad(np.arange(own[axis]), rim, mode=NUMPY_MODES[mode])  # type: ignore[call-overload]
            data = picked(scope, data, order, axis)
    return data


def picked(scope: Scope, data: Any, order: np.ndarray, axis: int, **name: str) -> Any:
    """Return the elements along an axis in a constant order."""

    def work(values: Any) -> Any:
        return scope.mb.gather(x=values, indices=order.astype(np.int32), axis=axis, **name)

    return through(scope, data, ("fp16", "fp32", "int32"), "int32", work)


@lowers("Trilu")
def trilu(scope: Scope, node: ir.Node) -> Any:
    """Write the upper or lower triangle: MIL's band where it includes the diagonal, else a constant mask."""
    data = scope.input(node, 0)
    found = setting(scope, node, 1, "k")
    diagonal, upper = (found[0] if found else 0), node.attributes.get_int("upper", 1)
    edge = -diagonal if upper else diagonal
    if edge >= 0:
        band = {"lower": edge, "upper": -1} if upper else {"lower": -1, "upper": edge}
        return scope.mb.band_part(x=data, **band, name=label(scope, node))
    own = dims(data)
    kept = (np.triu if upper else np.tril)(np.ones(own, np.bool_), diagonal)

    def work(values: Any) -> Any:
        kind = {"fp16": np.float16, "fp32": np.float32}.get(dtype(values), np.int32)
        return scope.mb.select(cond=kept, a=values, b=np.zeros(own, kind), name=label(scope, node))

    return through(scope, data, ("fp16", "fp32", "int32"), "int32", work)


@lowers("Compress")
def compress(scope: Scope, node: ir.Node) -> Any:
    """Write the elements that a constant condition keeps."""
    kept = setting(scope, node, 1, "condition")
    data, order = scope.input(node, 0), np.flatnonzero(required(kept, "condition"))
    check_filled(order.shape)
    if "axis" in node.attributes:
        axis = axes_of([node.attributes.get_int("axis", 0)], len(dims(data)))[0]
        return picked(scope, data, order, axis, name=label(scope, node))
    flat = scope.mb.reshape(x=data, shape=[-1])
    return picked(scope, flat, order, 0, name=label(scope, node))
