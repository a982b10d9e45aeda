"""Gathering and scattering. From iOS 17 on, a negative index has no meaning, and is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray
COUNTS_FROM_THE_START = 17  # deployment target from which negative indices are out of bounds


def checked(indices: Array, length: int, deployment: int) -> Array:
    """Return indices within 0..length-1.

    Raises:
        ValueError: One is out of bounds.
    """
    lowest = 0 if deployment >= COUNTS_FROM_THE_START else -length
    wide = indices.astype(np.int64)
    beyond = (wide < lowest) | (wide >= length)
    if beyond.any():
        raise ValueError(f"index {int(wide[beyond][0])} is out of bounds for {length} elements")
    return np.where(wide < 0, wide + length, wide)


@executes("gather", widen=False)
def gather(
    x: Array,
    indices: Array,
    deployment: int,
    axis: Array | int = 0,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,
) -> Array:
    """Return the slices of ``x`` along ``axis`` at ``indices``, sample by sample of ``batch_dims`` leading axes."""
    at, batches = int(axis) % x.ndim, int(batch_dims)
    places = checked(indices, x.shape[at], deployment)
    if not batches:
        return np.asarray(np.take(x, places, axis=at))
    samples = x.reshape(-1, *x.shape[batches:])
    rows = places.reshape(-1, *places.shape[batches:])
    taken = [np.take(sample, row, axis=at - batches) for sample, row in zip(samples, rows, strict=True)]
    return np.stack(taken).reshape(*x.shape[:batches], *taken[0].shape)


@executes("gather_along_axis", widen=False)
def gather_along_axis(
    x: Array, indices: Array, deployment: int, axis: Array | int = 0, validate_indices: Array | bool = False
) -> Array:
    """Return the elements of ``x`` along ``axis`` at ``indices``, place by place."""
    return np.take_along_axis(x, checked(indices, x.shape[int(axis)], deployment), axis=int(axis))


@executes("gather_nd", widen=False)
def gather_nd(
    x: Array,
    indices: Array,
    deployment: int,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,
) -> Array:
    """Return the slices of ``x`` at the places that the last axis of ``indices`` names."""
    batches = int(batch_dims)
    places = _places(indices, x.shape[batches:], deployment)
    grid = np.indices(indices.shape[:-1])[:batches]
    return np.asarray(x[(*grid, *places)])


def _places(indices: Array, shape: tuple[int, ...], deployment: int) -> list[Array]:
    return [checked(indices[..., axis], shape[axis], deployment) for axis in range(indices.shape[-1])]


def _put(target: Array, index: Any, updates: Array) -> None:
    target[index] = updates


MODES: dict[str, Callable[[Array, Any, Array], None]] = {
    "update": _put,
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "div": np.divide.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


@executes("scatter")
def scatter(
    data: Array,
    indices: Array,
    updates: Array,
    deployment: int,
    axis: Array | int = 0,
    mode: str = "add",
    validate_indices: Array | bool = False,
) -> Array:
    """Return ``data`` with slices of ``updates`` put, or added and so on, at ``indices`` along ``axis``."""
    result = data.copy()
    at = int(axis) % data.ndim
    places = checked(indices, data.shape[at], deployment)
    MODES[mode](result, (*[slice(None)] * at, places), updates)
    return result


@executes("scatter_along_axis")
def scatter_along_axis(
    data: Array,
    indices: Array,
    updates: Array,
    deployment: int,
    axis: Array | int = 0,
    mode: str = "add",
    validate_indices: Array | bool = False,
) -> Array:
    """Return ``data`` with elements of ``updates`` put, or added and so on, at ``indices`` along ``axis``."""
    result = data.copy()
    index: list[Array] = list(np.indices(indices.shape, sparse=True))
    index[int(axis) % data.ndim] = checked(indices, data.shape[int(axis)], deployment)
    MODES[mode](result, tuple(index), updates)
    return result


@executes("scatter_nd")
def scatter_nd(
    data: Array,
    indices: Array,
    updates: Array,
    deployment: int,
    mode: str = "add",
    validate_indices: Array | bool = False,
) -> Array:
    """Return ``data`` with slices put, or added and so on, at the places that the last axis of ``indices`` names."""
    result = data.copy()
    MODES[mode](result, tuple(_places(indices, data.shape, deployment)), updates)
    return result
