"""A tensor as a matrix with one row per scale, for searches that treat every scale's values alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optkit.quant.integers import Granularity, PerBlock, PerChannel, scale_shape

CACHED = 1 << 18  # values of one slice of rows: what a search reads again and again stays in a core's own cache


def to_rows(values: np.ndarray, granularity: Granularity) -> np.ndarray:
    """Return the values as [scales, values of one scale]; a short last block is filled up with 0."""
    if isinstance(granularity, PerChannel):
        moved = np.moveaxis(values, granularity.axis, 0)
        return moved.reshape(len(moved), moved[:1].size)
    if not isinstance(granularity, PerBlock):
        return values.reshape(1, -1)
    moved = np.moveaxis(values, granularity.axis, -1)
    spare = -moved.shape[-1] % granularity.size
    if spare:
        moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, spare)])
    return moved.reshape(moved.size // granularity.size, granularity.size)


def from_rows(per_row: np.ndarray, shape: tuple[int, ...], granularity: Granularity) -> np.ndarray:
    """Return one value per row of ``to_rows`` shaped like the scales of a tensor of the given shape."""
    target = scale_shape(shape, granularity)
    if not isinstance(granularity, PerBlock):
        return per_row.reshape(target)
    axis = range(len(shape))[granularity.axis]
    moved = (*target[:axis], *target[axis + 1 :], target[axis])
    return np.ascontiguousarray(np.moveaxis(per_row.reshape(moved), -1, axis))


def row_values(per_scale: np.ndarray, granularity: Granularity) -> np.ndarray:
    """Return scales, or what is shaped like them, as one value per row of ``to_rows``."""
    if isinstance(granularity, PerBlock):
        per_scale = np.moveaxis(per_scale, granularity.axis, -1)
    return per_scale.reshape(-1)


def row_slices(rows: np.ndarray) -> Iterator[slice]:
    """Yield slices of rows that fit in a cache, at least one row each."""
    step = max(CACHED // max(rows.shape[1], 1), 1)
    for first in range(0, len(rows), step):
        yield slice(first, first + step)
