"""Resizing: sampling grids along axes, and interpolation on them."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray
DEFAULT = "DEFAULT"


def grid(mode: str, begin: float, length: float, count: int) -> Array:
    """Return where ``count`` samples of an interval lie (coremltools, documentation of ``resize_bilinear``).

    Args:
        mode: One of MIL's sampling modes.
        begin: The first element of the interval.
        length: Its elements.
        count: Samples.
    """
    places = np.arange(count, dtype=np.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            return np.array([begin + (length - 1) / 2 if mode == "ALIGN_CORNERS" else begin])
        return begin + places * ((length - 1) / (count - 1))
    if mode == "OFFSET_CORNERS":
        delta = max(1.0, length - 1) / count
        return begin + delta / 2 + places * delta
    spacing = length / count
    return begin + (places * spacing if mode == DEFAULT else (places + 0.5) * spacing - 0.5)


def linear(x: Array, axis: int, places: Array) -> Array:
    """Return ``x`` at fractional places along an axis, interpolated; places beyond its ends are at its ends."""
    length = x.shape[axis]
    inside = np.clip(places, 0, length - 1)
    lower = np.floor(inside).astype(np.int64)
    upper = np.minimum(lower + 1, length - 1)
    share = (inside - lower).astype(np.float32).reshape((-1,) + (1,) * (x.ndim - 1 - axis))
    below, above = np.take(x, lower, axis), np.take(x, upper, axis)
    return np.asarray(below + (above - below) * share)


def nearest(x: Array, axis: int, places: Array) -> Array:
    """Return ``x`` at the elements nearest to fractional places, the upper one where both are as near."""
    return np.asarray(np.take(x, np.clip(np.floor(places + 0.5), 0, x.shape[axis] - 1).astype(np.int64), axis))


def resized(x: Array, sizes: dict[int, int], interpolation: str, mode: str) -> Array:
    """Return ``x`` resized along axes."""
    for axis, size in sizes.items():
        length = x.shape[axis]
        if interpolation == "LINEAR":
            x = linear(x, axis, grid(mode, 0, length, size))
        else:
            # Core ML's default for nearest neighbours has half-pixel centres: coremltools writes TensorFlow's
            # ResizeNearestNeighbor(half_pixel_centers=True) so.
            x = nearest(x, axis, grid("UNALIGN_CORNERS" if mode == DEFAULT else mode, 0, length, size))
    return x


def last_two(x: Array, height: Array | float, width: Array | float) -> dict[int, int]:
    """Return the sizes of the last two axes, by axis."""
    return {x.ndim - 2: int(height), x.ndim - 1: int(width)}


@executes("resize_bilinear")
def resize_bilinear(
    x: Array, target_size_height: Array | int = 1, target_size_width: Array | int = 1, sampling_mode: str = DEFAULT
) -> Array:
    """Return ``x`` with its last two axes resized by linear interpolation."""
    return resized(x, last_two(x, target_size_height, target_size_width), "LINEAR", sampling_mode)


@executes("resize_nearest_neighbor", widen=False)
def resize_nearest_neighbor(x: Array, target_size_height: Array, target_size_width: Array) -> Array:
    """Return ``x`` with its last two axes resized to the nearest elements."""
    return resized(x, last_two(x, target_size_height, target_size_width), "NEAREST_NEIGHBOR", DEFAULT)


@executes("resize")
def resize(
    x: Array, shape: Array, resized_dims: Array, interpolation_mode: str = "LINEAR", sampling_mode: str = DEFAULT
) -> Array:
    """Return ``x`` with its last ``resized_dims`` axes resized to the end of ``shape``; 0 leaves one as it is."""
    count = int(resized_dims)
    wanted = [int(size) for size in shape][len(shape) - count :]
    sizes = {x.ndim - count + index: size for index, size in enumerate(wanted) if size}
    result = resized(x, sizes, interpolation_mode, sampling_mode)
    return result.astype(x.dtype) if x.dtype.kind in "iu" else result


@executes("upsample_bilinear")
def upsample_bilinear(
    x: Array,
    scale_factor_height: Array | float = 1,
    scale_factor_width: Array | float = 1,
    align_corners: Array | bool = True,
    half_pixel_centers: Array | bool | None = None,
) -> Array:
    """Return ``x`` with its last two axes scaled by linear interpolation, at the ratio of the sizes that result."""
    centred = not align_corners if half_pixel_centers is None else bool(half_pixel_centers)
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if centred else DEFAULT
    return resized(x, _scaled(x, scale_factor_height, scale_factor_width), "LINEAR", mode)


@executes("upsample_nearest_neighbor", widen=False)
def upsample_nearest_neighbor(
    x: Array, scale_factor_height: Array | float = 1, scale_factor_width: Array | float = 1
) -> Array:
    """Return ``x`` with its last two axes scaled, each element that of the input at ``floor(i * in / out)``."""
    for axis, size in _scaled(x, scale_factor_height, scale_factor_width).items():
        x = np.take(x, np.arange(size) * x.shape[axis] // size, axis)
    return x


def _scaled(x: Array, height: Array | float, width: Array | float) -> dict[int, int]:
    # Float32 factors such as 1.9999999 and products such as 5.9999995 must not lose a row.
    return last_two(
        x, *(np.floor(size * float(s) + 1e-6) for size, s in zip(x.shape[-2:], (height, width), strict=True))
    )
