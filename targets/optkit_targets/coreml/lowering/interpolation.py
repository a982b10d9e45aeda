"""Where the elements of a resized axis come from, as plain numbers: ONNX's rules, and those of Core ML's own resizers.

Resizing is separable and linear: along each axis the result is a matrix [out, in] times the tensor. ONNX's rules are
those of the operator Resize, opset 19 (https://onnx.ai/onnx/operators/onnx__Resize.html); Core ML's those of MIL's
``resize_bilinear`` (coremltools 9, ``iOS15.image_resizing``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SAMPLING_MODES = ("UNALIGN_CORNERS", "STRICT_ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "ALIGN_CORNERS")
ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda points: np.ceil(points - 0.5),
    "round_prefer_ceil": lambda points: np.floor(points + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@dataclass(frozen=True)
class Axis:
    """One axis that is resized.

    Attributes:
        axis: Which.
        before: Its length.
        after: Its length in the result.
        scale: ``after / before`` before rounding.
        start: Where the region that is resized begins, as a part of the length less one.
        end: Where it ends.
    """

    axis: int
    before: int
    after: int
    scale: float
    start: float = 0.0
    end: float = 1.0


def points(axis: Axis, mode: str) -> np.ndarray | None:
    """Return the coordinate in the input of every element of the result; None where the mode is not known."""
    place, last = np.arange(axis.after, dtype=np.float64), axis.before - 1
    length = axis.scale * axis.before  # before rounding
    half_pixel = (place + 0.5) / axis.scale - 0.5
    region = axis.end - axis.start
    modes: dict[str, Callable[[], np.ndarray]] = {
        "half_pixel": lambda: half_pixel,
        "half_pixel_symmetric": lambda: axis.before / 2 * (1 - axis.after / length) + half_pixel,
        "pytorch_half_pixel": lambda: half_pixel if length != 1 else np.full(axis.after, -0.5),
        "align_corners": lambda: place * last / (length - 1) if length != 1 else place * 0,
        "asymmetric": lambda: place / axis.scale,
        "tf_half_pixel_for_nn": lambda: half_pixel + 0.5,
        "tf_crop_and_resize": lambda: (
            axis.start * last + (place * region * last / (length - 1) if length != 1 else place * 0 + region * last / 2)
        ),
    }
    return modes[mode]() if mode in modes else None


def outside(axis: Axis, coordinates: np.ndarray) -> np.ndarray:
    """Return which elements ``tf_crop_and_resize`` takes from beyond the input."""
    return (coordinates < 0) | (coordinates > axis.before - 1)


def nearest(axis: Axis, coordinates: np.ndarray, rounding: str) -> np.ndarray:
    """Return the index of the element that each element of the result copies."""
    found: np.ndarray = np.clip(ROUNDINGS[rounding](coordinates), 0, axis.before - 1).astype(np.int32)
    return found


def copies(axis: Axis, indices: np.ndarray) -> np.ndarray:
    """Return the matrix [out, in] that copies elements."""
    matrix: np.ndarray = np.eye(axis.before)[indices]
    return matrix


def _triangle(distance: np.ndarray) -> np.ndarray:
    height: np.ndarray = np.clip(1 - np.abs(distance), 0, 1)
    return height


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Return Keys' kernel (IEEE Trans. ASSP 29(6), 1981, eq. 4) with ONNX's free parameter."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def weights(
    axis: Axis,
    coordinates: np.ndarray,
    *,
    cubic: float | None = None,
    antialias: bool = False,
    exclude_outside: bool = False,
) -> np.ndarray:
    """Return the matrix [out, in] of an interpolation.

    Args:
        axis: The axis.
        coordinates: Where each element of the result lies in the input.
        cubic: The cubic kernel's parameter; None is linear.
        antialias: Whether the kernel is as wide as the step where the result is smaller.
        exclude_outside: Whether elements beyond the input count nothing, instead of as the nearest one inside.
    """
    scale = min(axis.scale, 1.0) if antialias else 1.0
    radius = 1 if cubic is None else 2
    first = int(np.floor(-radius / scale)) + 1
    offsets = np.arange(first, 2 - first)
    center = np.ceil(coordinates).astype(np.int64) - 1  # the element on the left, of whole coordinates too
    distance = (offsets[None, :] - (coordinates - center)[:, None]) * scale
    parts = _triangle(distance) if cubic is None else _cubic(distance, cubic)
    sources = center[:, None] + offsets[None, :]
    if exclude_outside:
        parts = np.where((sources < 0) | (sources >= axis.before), 0.0, parts)
    if exclude_outside or antialias:
        parts = parts / parts.sum(axis=1, keepdims=True)
    matrix = np.zeros((axis.after, axis.before))
    rows = np.broadcast_to(np.arange(axis.after)[:, None], sources.shape)
    np.add.at(matrix, (rows, np.clip(sources, 0, axis.before - 1)), parts)
    return matrix


def sampled(mode: str, before: int, after: int) -> np.ndarray:
    """Return the matrix [out, in] of Core ML's bilinear resizer in a sampling mode, along one axis."""
    place = np.arange(after, dtype=np.float64)
    apart = max(after - 1, 1)
    delta = max(1, before - 1) / after
    formulas = {
        "STRICT_ALIGN_CORNERS": place * (before - 1) / apart,
        "ALIGN_CORNERS": place * (before - 1) / apart if after > 1 else np.array([(before - 1) / 2]),
        "DEFAULT": place * before / after,
        "OFFSET_CORNERS": 0.5 * delta + place * delta,
        "UNALIGN_CORNERS": (place + 0.5) * before / after - 0.5,
    }
    axis = Axis(0, before, after, after / before)
    return weights(axis, np.clip(formulas[mode], 0, before - 1))
