"""Operators that move elements and compute nothing: shapes, slices, joins, paddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray
MATCHES_FROM_THE_RIGHT = 17  # deployment target from which a 0 in reshape's shape counts dimensions from the right


@executes("reshape", widen=False)
def reshape(x: Array, shape: Array, deployment: int) -> Array:
    """Return ``x`` in another shape: -1 is what is left, 0 the dimension that ``x`` has there."""
    wanted = [int(size) for size in shape]
    for index, size in enumerate(wanted):
        if size == 0:
            source = index
            if deployment >= MATCHES_FROM_THE_RIGHT:
                source = index - len(wanted) + x.ndim
            elif len(wanted) != x.ndim:
                raise ValueError("a shape with 0 must have as many dimensions as the input")
            wanted[index] = x.shape[source] if source >= 0 else 1
    return x.reshape(wanted)


@executes("reshape_like", widen=False)
def reshape_like(
    x: Array,
    ref_tensors: tuple[Array, ...],
    begins: tuple[Array, ...],
    ends: tuple[Array, ...],
    end_masks: tuple[Array, ...],
) -> Array:
    """Return ``x`` in the shape that parts of other tensors' shapes make."""
    shape: list[int] = []
    for reference, begin, end, to_the_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += reference.shape[int(begin) : None if to_the_end else int(end)]
    return x.reshape(shape)


@executes("transpose", widen=False)
def transpose(x: Array, perm: Array) -> Array:
    """Return ``x`` with its axes permuted."""
    return np.transpose(x, [int(axis) for axis in perm])


@executes("expand_dims", widen=False)
def expand_dims(x: Array, axes: Array) -> Array:
    """Return ``x`` with axes of size 1."""
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


@executes("squeeze", widen=False)
def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Return ``x`` without axes of size 1; an axis of another size stays, as in PyTorch."""
    chosen = range(x.ndim) if axes is None else [int(axis) % x.ndim for axis in axes]
    return np.squeeze(x, tuple(axis for axis in chosen if x.shape[axis] == 1))


@executes("flatten2d", widen=False)
def flatten2d(x: Array, axis: Array | int = 1) -> Array:
    """Return ``x`` as a matrix, its rows what lies before ``axis``."""
    rows = int(np.prod(x.shape[: int(axis)], dtype=np.int64))
    return x.reshape(rows, int(np.prod(x.shape[int(axis) :], dtype=np.int64)))


@executes("concat", widen=False)
def concat(values: tuple[Array, ...], axis: Array, interleave: Array | bool = False) -> Array:
    """Return the values one after another along an axis, or in turn."""
    if not interleave:
        # A scalar is a vector of one element here: coremltools joins the numbers of a shape so.
        return np.concatenate([np.atleast_1d(value) for value in values], axis=int(axis))
    at = int(axis) % values[0].ndim
    stacked = np.stack(values, axis=at + 1)
    shape = list(values[0].shape)
    shape[at] *= len(values)
    return stacked.reshape(shape)


@executes("stack", widen=False)
def stack(values: tuple[Array, ...], axis: Array) -> Array:
    """Return the values along a new axis."""
    return np.stack(values, axis=int(axis))


@executes("split", widen=False)
def split(
    x: Array, axis: Array, num_splits: Array | None = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    """Return parts of ``x`` along an axis, of the sizes given or of the same size."""
    if split_sizes is not None:
        return tuple(np.split(x, np.cumsum(split_sizes)[:-1], axis=int(axis)))
    if num_splits is None:
        raise ValueError("split has neither num_splits nor split_sizes")
    return tuple(np.split(x, int(num_splits), axis=int(axis)))


def slices(
    rank: int,
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[Any, ...]:
    """Return the NumPy index of a slice: a masked bound is open, a squeezed axis is indexed."""
    index: list[Any] = []
    for axis in range(rank):
        if squeeze_mask is not None and squeeze_mask[axis]:
            index.append(int(begin[axis]) if begin_mask is None or not begin_mask[axis] else 0)
            continue
        first = None if begin_mask is not None and begin_mask[axis] else int(begin[axis])
        last = None if end_mask is not None and end_mask[axis] else int(end[axis])
        index.append(slice(first, last, 1 if stride is None else int(stride[axis])))
    return tuple(index)


@executes("slice_by_index", widen=False)
def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """Return ``x[begin:end:stride]``."""
    return np.asarray(x[slices(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)])


@executes("slice_update", widen=False)
def slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """Return ``x`` with ``x[begin:end:stride]`` replaced."""
    index = slices(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    updated = x.copy()
    updated[index] = update.reshape(updated[index].shape)
    return updated


@executes("slice_by_size", widen=False)
def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """Return ``size`` elements from ``begin`` on along each axis, or all that are left where it is -1."""
    index = []
    for first, count, length in zip(begin, size, x.shape, strict=True):
        start = int(first) + (length if first < 0 else 0)
        index.append(slice(start, length if count == -1 else start + int(count)))
    return x[tuple(index)]


@executes("pad", widen=False)
def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Array | float = 0.0) -> Array:
    """Return ``x`` padded along its last axes, of which ``pad`` has before and after each."""
    widths = [(0, 0)] * (x.ndim - pad.size // 2) + [(int(a), int(b)) for a, b in pad.reshape(-1, 2)]
    if mode == "constant":
        return np.pad(x, widths, constant_values=np.asarray(constant_val).astype(x.dtype))
    return np.pad(x, widths, mode="edge" if mode == "replicate" else "reflect")


@executes("crop", widen=False)
def crop(x: Array, crop_height: Array, crop_width: Array) -> Array:
    """Return ``x`` without rows and columns at its edges."""
    height, width = x.shape[-2:]
    rows = slice(int(crop_height[0]), height - int(crop_height[1]))
    return x[..., rows, int(crop_width[0]) : width - int(crop_width[1])]


@executes("tile", widen=False)
def tile(x: Array, reps: Array) -> Array:
    """Return ``x`` repeated along its axes."""
    return np.tile(x, [int(count) for count in reps])


@executes("reverse", widen=False)
def reverse(x: Array, axes: Array | None = None) -> Array:
    """Return ``x`` in reverse along axes, all of them by default."""
    return np.flip(x, None if axes is None else tuple(int(axis) for axis in axes))


@executes("reverse_sequence", widen=False)
def reverse_sequence(x: Array, lengths: Array, seq_axis: Array | int = 0, batch_axis: Array | int = 0) -> Array:
    """Return ``x`` with the first ``lengths[i]`` elements of sample ``i`` in reverse."""
    moved = np.moveaxis(x, (int(batch_axis), int(seq_axis)), (0, 1)).copy()
    for sample, length in zip(moved, lengths, strict=True):
        sample[: int(length)] = sample[: int(length)][::-1].copy()
    return np.moveaxis(moved, (0, 1), (int(batch_axis), int(seq_axis)))


@executes("sliding_windows", widen=False)
def sliding_windows(x: Array, axis: Array, size: Array, stride: Array | int = 1) -> Array:
    """Return every window along an axis, [..., windows, size, ...]."""
    at = int(axis) % x.ndim
    starts = np.arange(0, x.shape[at] - int(size) + 1, int(stride))
    return np.take(x, starts[:, None] + np.arange(int(size)), axis=at)
