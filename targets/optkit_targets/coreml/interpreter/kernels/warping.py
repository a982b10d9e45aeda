# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Sampling of images at computed places: boxes, transformations, coordinates."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.kernels.sampling import DEFAULT, grid
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray
HEIGHT_FIRST = ("CORNERS_HEIGHT_FIRST", "CENTER_SIZE_HEIGHT_FIRST")


def bilinear(image: Array, rows: Array, columns: Array, padding: str, fill: float) -> Array:
    """Return an image [C, H, W] at fractional places, [C, ...].

    Args:
        image: The image.
        rows: The places' rows.
        columns: Their columns, of the same shape.
        padding: What lies beyond the image: MIL's ``padding_mode``.
        fill: The value beyond it for ``constant``.
    """
    top, left = np.floor(rows), np.floor(columns)
    down, right = (rows - top).astype(np.float32), (columns - left).astype(np.float32)
    above = _at(image, top, left, padding, fill) * (1 - right) + _at(image, top, left + 1, padding, fill) * right
    below = (
        _at(image, top + 1, left, padding, fill) * (1 - right) + _at(image, top + 1, left + 1, padding, fill) * right
    )
    return np.asarray(above * (1 - down) + below * down)


def _at(image: Array, rows: Array, columns: Array, padding: str, fill: float) -> Array:
    """Return an image's elements at whole places."""
    height, width = image.shape[-2:]
    if padding == "constant":
        outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        return np.where(outside, np.float32(fill), image[:, _whole(rows, height), _whole(columns, width)])
    return np.asarray(image[:, _folded(rows, height, padding), _folded(columns, width, padding)])


def _whole(places: Array, length: int) -> Array:
    return np.clip(np.nan_to_num(places), 0, length - 1).astype(np.int64)


def _folded(places: Array, length: int, padding: str) -> Array:
    """Return whole places within 0..length-1: the nearest, or those that a mirror at the ends shows."""
    if padding == "reflection" and length > 1:  # the end is not repeated: 2 1 | 0 1 2 | 1 0
        period = 2 * (length - 1)
        places = np.abs(places) % period
        places = np.minimum(places, period - places)
    elif padding == "symmetric":  # it is: 1 0 | 0 1 2 | 2 1
        period = 2 * length
        places = places % period
        places = np.minimum(places, period - 1 - places)
    return _whole(places, length)


@executes("crop_resize")
def crop_resize(
    x: Array,
    roi: Array | None = None,
    boxes: Array | None = None,
    box_indices: Array | None = None,
    target_height: Array | int = 1,
    target_width: Array | int = 1,
    normalized_coordinates: Array | bool = False,
    spatial_scale: Array | float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = DEFAULT,
    pad_value: Array | float = 0.0,
) -> Array:
    """Return boxes of images [B, C, H, W] resized.

    With ``boxes`` [N, 4] (iOS 17) the result is [N, C, h, w]. With ``roi`` [N, 1, 4 or 5, 1, 1] it is
    [N, B or 1, C, h, w]: five numbers begin with the image's index, four cut a box out of every image.
    """
    if boxes is not None:
        owners = np.arange(len(boxes)) if box_indices is None else box_indices
        images = [[int(owner)] for owner in owners]
    elif roi is not None:
        flat = roi.reshape(len(roi), -1)
        boxes = flat[:, -4:]
        images = [[int(row[0])] if len(row) > 4 else list(range(len(x))) for row in flat]
    else:
        raise ValueError("crop_resize has neither roi nor boxes")
    if sampling_mode == "UNALIGN_CORNERS":  # documented for whole images alone
        raise ValueError("crop_resize with UNALIGN_CORNERS is not executed")
    height, width = x.shape[-2:]
    crops = []
    for box, chosen in zip(boxes.astype(np.float64), images, strict=True):
        top, left, bottom, right = _corners(box, box_coordinate_mode)
        if normalized_coordinates:
            top, bottom, left, right = (
                top * (height - 1),
                bottom * (height - 1),
                left * (width - 1),
                right * (width - 1),
            )
        top, left, bottom, right = (edge * float(spatial_scale) for edge in (top, left, bottom, right))
        rows = grid(sampling_mode, top, bottom - top + 1, int(target_height))
        columns = grid(sampling_mode, left, right - left + 1, int(target_width))
        outside = ((rows < 0) | (rows > height - 1))[:, None] | (columns < 0) | (columns > width - 1)
        row, column = np.broadcast_arrays(rows[:, None], columns[None])
        cut = [bilinear(x[index], row, column, "border", 0.0) for index in chosen]
        crops.append(np.where(outside, np.float32(pad_value), np.stack(cut)))
    stacked = np.stack(crops)
    return stacked if roi is not None else stacked[:, 0]


def _corners(box: Array, mode: str) -> tuple[float, float, float, float]:
    """Return a box's top, left, bottom and right."""
    first, second, third, fourth = (float(value) for value in box)
    if mode not in HEIGHT_FIRST:
        first, second, third, fourth = second, first, fourth, third
    if mode.startswith("CENTER"):
        return first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2
    return first, second, third, fourth


@executes("resample")
def resample(
    x: Array,
    coordinates: Array,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Array | float,
    coordinates_mode: str,
    align_corners: Array | bool,
) -> Array:
    """Return images [B, C, H, W] at coordinates [B, h, w, 2], x first."""
    height, width = x.shape[-2:]
    places = coordinates.astype(np.float64)
    columns = _pixels(places[..., 0], width, coordinates_mode, bool(align_corners))
    rows = _pixels(places[..., 1], height, coordinates_mode, bool(align_corners))
    samples = zip(x, rows, columns, strict=True)
    fill = float(padding_value)
    if sampling_mode == "nearest":
        found = [
            _at(image, np.floor(row + 0.5), np.floor(column + 0.5), padding_mode, fill)
            for image, row, column in samples
        ]
    else:
        found = [bilinear(image, row, column, padding_mode, fill) for image, row, column in samples]
    return np.stack(found)


def _pixels(places: Array, length: int, mode: str, align_corners: bool) -> Array:
    """Return coordinates in pixels; the ends of a normalized range are pixels' centres if corners are aligned."""
    if mode == "unnormalized":
        return places
    share = (places + 1) / 2 if mode == "normalized_minus_one_to_one" else places
    return share * (length - 1) if align_corners else share * length - 0.5


@executes("affine")
def affine(
    x: Array,
    transform_matrix: Array,
    output_height: Array,
    output_width: Array,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Array | float,
    coordinates_mode: str,
    align_corners: Array | bool,
) -> Array:
    """Return images [B, C, H, W] at places that a matrix [a0 a1 a2 b0 b1 b2] makes of the output's, in -1..1."""
    height, width = int(output_height), int(output_width)
    rows, columns = (_range(length, bool(align_corners)) for length in (height, width))
    row, column = np.broadcast_arrays(rows[:, None], columns[None])
    matrices = np.broadcast_to(transform_matrix.astype(np.float64), (len(x), transform_matrix.shape[1]))
    coordinates = np.stack(
        [
            np.stack([a0 * column + a1 * row + a2, b0 * column + b1 * row + b2], axis=-1)
            for a0, a1, a2, b0, b1, b2 in matrices
        ]
    )
    return resample(x, coordinates, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)


def _range(length: int, align_corners: bool) -> Array:
    """Return the places of an output's pixels in -1..1."""
    if align_corners:
        return np.linspace(-1, 1, length) if length > 1 else np.zeros(1)
    return (2 * np.arange(length) + 1) / length - 1
