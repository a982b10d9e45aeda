# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Operators that make tensors out of shapes and numbers."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


@executes("fill", widen=False)
def fill(shape: Array, value: Array | float = 0.0) -> Array:
    """Return a tensor of one value."""
    return np.full([int(size) for size in shape], value, _dtype(value))


@executes("fill_like", widen=False)
def fill_like(ref_tensor: Array, value: Array | float = 0.0) -> Array:
    """Return a tensor of one value in another's shape."""
    return np.full(ref_tensor.shape, value, _dtype(value))


@executes("shape", widen=False)
def shape_of(x: Array) -> Array:
    """Return a tensor's shape."""
    return np.array(x.shape, np.int32)


@executes("range_1d")
def range_1d(start: Array, end: Array, step: Array) -> Array:
    """Return ``start``, ``start + step``, ... below ``end``."""
    count = max(0, int(np.ceil((float(end) - float(start)) / float(step))))
    return (start + step * np.arange(count, dtype=step.dtype)).astype(start.dtype)


@executes("one_hot", widen=False)
def one_hot(
    indices: Array,
    one_hot_vector_size: Array,
    axis: Array | int = -1,
    on_value: Array | int = 1,
    off_value: Array | int = 0,
) -> Array:
    """Return ``on_value`` where a new axis' index is the one given, else ``off_value``.

    An index that is not in 0..size-1 is met nowhere.
    """
    hit = np.expand_dims(indices, -1) == np.arange(int(one_hot_vector_size))
    on, off = np.asarray(on_value, _dtype(on_value)), np.asarray(off_value, _dtype(off_value))
    return np.moveaxis(np.where(hit, on, off), -1, int(axis))


@executes("band_part", widen=False)
def band_part(x: Array, lower: Array | int = -1, upper: Array | int = -1) -> Array:
    """Return matrices with zeros outside of a band of diagonals; -1 keeps all of a side."""
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    band = ((lower < 0) | (rows - columns <= lower)) & ((upper < 0) | (columns - rows <= upper))
    return np.where(band, x, np.zeros((), x.dtype))


def _dtype(value: Array | float) -> np.dtype:
    """Return the type of a parameter; MIL's defaults are float32 and int32."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype
    return np.dtype(np.int32 if isinstance(value, int) else np.float32)
