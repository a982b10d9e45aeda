"""Images in another size: Resize, Upsample, GridSample.

Core ML's own resizers are written where they compute the same numbers; their matrices are compared with ONNX's.
Else the elements are picked by constant indices (nearest), or the axes are multiplied by constant matrices, which is
exact for every mode that ONNX has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml.lowering import interpolation
from optkit_targets.coreml.lowering.forms import (
    axis_of,
    check_filled,
    dims,
    dtype,
    known,
    label,
    reshaped,
    setting,
    through,
    transposed,
)
from optkit_targets.coreml.lowering.interpolation import Axis
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.slicing import picked, sliced
from optkit_targets.coreml.lowering.table import lowers

TOLERANCE = 1e-6
FLOATS = ("fp16", "fp32")
PADDING = {"zeros": "constant", "border": "border", "reflection": "reflection"}
SAMPLING = {"bilinear": "bilinear", "linear": "bilinear", "nearest": "nearest"}


@lowers("Resize")
def resize(scope: Scope, node: ir.Node) -> Any:
    """Write a tensor resized along some axes, by scales or to sizes."""
    first = 1 if len(node.inputs) == 2 else 2  # opset 10 has no region
    axes = _axes(scope, node, dims(scope.input(node, 0)), first)
    old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} if first == 1 else {}
    return _resized(scope, node, axes, old)


@lowers("Upsample")
def upsample(scope: Scope, node: ir.Node) -> Any:
    """Write a tensor enlarged by scales, as Resize of opset 10 does."""
    shape = dims(scope.input(node, 0))
    scales = node.attributes.get_floats("scales", []) or _floats(scope, node, 1, "scales")
    axes = [
        Axis(place, size, int(size * scale), float(scale))
        for place, (size, scale) in enumerate(zip(shape, scales, strict=True))
    ]
    return _resized(scope, node, axes, {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"})


def _floats(scope: Scope, node: ir.Node, index: int, what: str) -> list[float]:
    array = known(scope, node, index)
    if array is None and scope.optional(node, index) is not None:
        raise CannotLower(f"its {what} are computed at run time")
    return [] if array is None else [float(item) for item in array.ravel()]


def _axes(scope: Scope, node: ir.Node, shape: tuple[int, ...], first: int) -> list[Axis]:
    """Return how each axis is resized."""
    places = [axis_of(axis, len(shape)) for axis in scope.ints(node, "axes") or range(len(shape))]
    lengths = [shape[place] for place in places]
    scales = _floats(scope, node, first, "scales")
    sizes = setting(scope, node, first + 1, "sizes") or []
    if sizes:
        scales = [size / length for size, length in zip(sizes, lengths, strict=True)]
        policy = node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            scale = min(scales) if policy == "not_larger" else max(scales)
            scales = [scale] * len(scales)
            sizes = [int(scale * length + 0.5) for length in lengths]
    else:
        sizes = [int(scale * length) for scale, length in zip(scales, lengths, strict=True)]
    check_filled(sizes)
    region = _floats(scope, node, 1, "region") if first == 2 else []
    if not region or node.attributes.get_string("coordinate_transformation_mode", "") != "tf_crop_and_resize":
        region = [0.0] * len(places) + [1.0] * len(places)
    ends = zip(region[: len(places)], region[len(places) :], strict=True)
    rows = zip(places, lengths, sizes, scales, ends, strict=True)
    return [Axis(place, length, size, scale, *end) for place, length, size, scale, end in rows]


def _resized(scope: Scope, node: ir.Node, axes: list[Axis], old: dict[str, str]) -> Any:
    """Return the tensor with every axis in its new size."""
    given = node.attributes
    mode = given.get_string("coordinate_transformation_mode", old.get("coordinate_transformation_mode", "half_pixel"))
    kind = given.get_string("mode", "nearest")
    axes = [axis for axis in axes if axis.before != axis.after or (axis.start, axis.end) != (0.0, 1.0)]
    places = {axis: interpolation.points(axis, str(mode)) for axis in axes}
    if any(point is None for point in places.values()):
        raise CannotLower(f"coordinate_transformation_mode '{mode}' is not known")
    data = scope.input(node, 0)
    crops = mode == "tf_crop_and_resize"
    found = {axis: np.asarray(point) for axis, point in places.items()}
    if kind == "nearest":
        rounding = str(given.get_string("nearest_mode", old.get("nearest_mode", "round_prefer_floor")))
        indices = {axis: interpolation.nearest(axis, point, rounding) for axis, point in found.items()}
        if not crops:
            return _nearest(scope, data, indices, label(scope, node))
        matrices = {axis: interpolation.copies(axis, order) for axis, order in indices.items()}
    else:
        matrices = {axis: _weights(node, axis, point, str(kind)) for axis, point in found.items()}
    if crops:
        return _cropped(scope, node, data, matrices, found)
    return through(scope, data, FLOATS, "fp32", lambda x: _interpolated(scope, x, matrices, label(scope, node)))


def _weights(node: ir.Node, axis: Axis, point: np.ndarray, kind: str) -> np.ndarray:
    if kind not in ("linear", "bilinear", "cubic"):
        raise CannotLower(f"mode '{kind}' is not known")
    return interpolation.weights(
        axis,
        point,
        cubic=node.attributes.get_float("cubic_coeff_a", -0.75) if kind == "cubic" else None,
        antialias=bool(node.attributes.get_int("antialias", 0)),
        exclude_outside=bool(node.attributes.get_int("exclude_outside", 0)),
    )


def _nearest(scope: Scope, data: Any, indices: dict[Axis, np.ndarray], name: str) -> Any:
    """Return copies: Core ML's upsampling by whole factors on the last two axes, a stride, or picked elements."""
    rank, factors, rest = len(dims(data)), [1, 1], dict(indices)
    for axis, order in indices.items():
        factor = axis.after // axis.before
        if axis.axis >= rank - 2 and np.array_equal(order, np.arange(axis.after) // max(factor, 1)) and factor:
            factors[axis.axis - rank + 2] = factor
            del rest[axis]
    for axis, order in rest.items():
        step = int(order[1] - order[0]) if len(order) > 1 else 1
        if step > 0 and np.array_equal(order, order[0] + step * np.arange(axis.after)):
            parts = [slice(None)] * rank
            parts[axis.axis] = slice(int(order[0]), int(order[-1]) + 1, step)
            data = sliced(scope, data, parts)
        else:
            data = picked(scope, data, order, axis.axis)
    if factors == [1, 1]:
        return data

    def work(values: Any) -> Any:
        shape = dims(values)
        filled = reshaped(scope, values, (1,) * (3 - rank) + shape)
        larger = scope.mb.upsample_nearest_neighbor(
            x=filled, scale_factor_height=factors[0], scale_factor_width=factors[1], name=name
        )
        return reshaped(scope, larger, dims(larger)[-rank:])

    return through(scope, data, FLOATS, "fp32", work) if rank > 1 else picked(scope, data, *_only(indices))


def _only(indices: dict[Axis, np.ndarray]) -> tuple[np.ndarray, int]:
    axis, order = next(iter(indices.items()))
    return order, axis.axis


def _interpolated(scope: Scope, data: Any, matrices: dict[Axis, np.ndarray], name: str) -> Any:
    """Return ``data`` multiplied along each axis, by Core ML's bilinear resizer where that has the same matrices."""
    shape = dims(data)
    if not matrices:
        return data
    mode = _sampling_mode(matrices, shape)
    if mode:
        height, width = (next((a.after for a in matrices if a.axis == len(shape) + k), shape[k]) for k in (-2, -1))
        return scope.mb.resize_bilinear(
            x=data, target_size_height=height, target_size_width=width, sampling_mode=mode, name=name
        )
    for axis, matrix in matrices.items():
        data = _multiplied(scope, data, matrix, axis.axis)
    return data


def _sampling_mode(matrices: dict[Axis, np.ndarray], shape: tuple[int, ...]) -> str:
    """Return the sampling mode in which Core ML's resizer of the last two axes has these matrices, or nothing."""
    rank = len(shape)
    if rank < 3 or any(axis.axis < rank - 2 for axis in matrices):
        return ""
    wanted = {rank - 2: np.eye(shape[-2]), rank - 1: np.eye(shape[-1])}
    wanted |= {axis.axis: matrix for axis, matrix in matrices.items()}
    for mode in interpolation.SAMPLING_MODES:
        own = [interpolation.sampled(mode, shape[place], len(matrix)) for place, matrix in wanted.items()]
        if all(np.allclose(x, y, atol=TOLERANCE) for x, y in zip(own, wanted.values(), strict=True)):
            return mode
    return ""


def _multiplied(scope: Scope, data: Any, matrix: np.ndarray, axis: int) -> Any:
    """Return ``data`` with a constant matrix [out, in] applied along an axis."""
    rank = len(dims(data))
    half = np.float16 if dtype(data) == "fp16" else np.float32
    matrix = matrix.astype(half)
    if rank == 1:
        return reshaped(scope, scope.mb.matmul(x=reshaped(scope, data, (1, *dims(data))), y=matrix.T), [len(matrix)])
    perm = [*(place for place in range(rank) if place != axis), axis]
    product = scope.mb.matmul(x=transposed(scope, data, perm), y=np.ascontiguousarray(matrix.T))
    return transposed(scope, product, np.argsort(perm).tolist())


def _cropped(
    scope: Scope, node: ir.Node, data: Any, matrices: dict[Axis, np.ndarray], found: dict[Axis, np.ndarray]
) -> Any:
    """Return ``tf_crop_and_resize``: what lies beyond the input has a value of its own."""
    beyond, shape = np.zeros((1,) * len(dims(data)), np.bool_), [1] * len(dims(data))
    for axis, point in found.items():
        gone = interpolation.outside(axis, point)
        matrices[axis] = np.where(gone[:, None], 0.0, matrices[axis])
        shape[axis.axis] = axis.after
        beyond = beyond | gone.reshape([axis.after if place == axis.axis else 1 for place in range(len(shape))])
    value = node.attributes.get_float("extrapolation_value", 0.0)

    def work(values: Any) -> Any:
        result = _interpolated(scope, values, matrices, label(scope, node))
        half = np.float16 if dtype(values) == "fp16" else np.float32
        return scope.mb.add(x=result, y=(beyond * value).astype(half)) if value and beyond.any() else result

    return through(scope, data, FLOATS, "fp32", work)


@lowers("GridSample")
def grid_sample(scope: Scope, node: ir.Node) -> Any:
    """Write an image sampled at points between -1 and 1."""
    data, grid = scope.input(node, 0), scope.input(node, 1)
    mode, padding = node.attributes.get_string("mode", "linear"), node.attributes.get_string("padding_mode", "zeros")
    corners = bool(node.attributes.get_int("align_corners", 0))
    if mode not in SAMPLING:
        raise CannotLower(f"mode '{mode}': MIL samples by the nearest element or bilinearly")
    if len(dims(data)) != 4:
        raise CannotLower(f"{len(dims(data)) - 2} axes of space: MIL samples two")
    reflects = padding == "reflection" and not corners  # about the border elements' edges, which MIL calls symmetric
    nearest = SAMPLING[str(mode)] == "nearest"
    return scope.mb.resample(
        x=data,
        coordinates=_elements(scope, grid, dims(data), corners) if nearest else grid,
        sampling_mode=SAMPLING[str(mode)],
        padding_mode="symmetric" if reflects else PADDING[str(padding)],
        padding_value=np.float16(0) if dtype(data) == "fp16" else np.float32(0),
        coordinates_mode="unnormalized" if nearest else "normalized_minus_one_to_one",
        align_corners=corners,
        name=label(scope, node),
    )


def _elements(scope: Scope, grid: Any, shape: tuple[int, ...], corners: bool) -> Any:
    """Return points as the elements next to them, halves to even as in ONNX: how Core ML rounds is not documented."""
    kind = np.float16 if dtype(grid) == "fp16" else np.float32
    size = np.array([shape[3], shape[2]])
    moved = scope.mb.add(x=grid, y=kind(1))
    if corners:  # ((g + 1) / 2) · (size - 1)
        places = scope.mb.mul(x=scope.mb.mul(x=moved, y=kind(0.5)), y=(size - 1).astype(kind))
    else:  # ((g + 1) · size - 1) / 2
        places = scope.mb.mul(x=scope.mb.sub(x=scope.mb.mul(x=moved, y=size.astype(kind)), y=kind(1)), y=kind(0.5))
    return scope.mb.round(x=places)


@lowers("AffineGrid")
def affine_grid(scope: Scope, node: ir.Node) -> Any:
    """Write the points between -1 and 1 that affine maps [samples, axes, axes + 1] take a regular grid to."""
    maps, size = scope.input(node, 0), setting(scope, node, 1, "size")
    if size is None:
        raise CannotLower("it has no size")
    corners, space = node.attributes.get_int("align_corners", 0) == 1, size[2:]
    ticks = [np.linspace(-1, 1, length) if corners else (2 * np.arange(length) + 1) / length - 1 for length in space]
    grid = np.stack([*np.meshgrid(*ticks, indexing="ij")[::-1], np.ones(space)], axis=-1)  # x first, then 1
    kind = np.float16 if dtype(maps) == "fp16" else np.float32
    points = grid.reshape(1, -1, len(space) + 1).astype(kind)
    found = scope.mb.matmul(x=points, y=maps, transpose_y=True)
    return reshaped(scope, found, [size[0], *space, len(space)], name=label(scope, node))
