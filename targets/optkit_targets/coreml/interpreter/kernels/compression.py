# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Compressed constants, executed from the form they are stored in.

Two generations: iOS 16's take flat bytes and a shape, iOS 18's tensors of narrow types, one scale or palette per block.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from optkit_targets.coreml.interpreter.elements import named, unpack
from optkit_targets.coreml.interpreter.kernels.quantization import along
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


def _repeated(parameter: Array, shape: tuple[int, ...]) -> Array:
    """Return one number per block so that it applies to each element: [.., n, ..] to [.., n * block, ..]."""
    for axis, (count, size) in enumerate(zip(parameter.shape, shape, strict=True)):
        if size % count:
            raise ValueError(f"{count} blocks do not divide {size} elements along axis {axis}")
        if count > 1:  # one block is broadcast
            parameter = np.repeat(parameter, size // count, axis)
    return parameter


@executes("constexpr_affine_dequantize")
def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """Return ``scale * (data - zero_point)``, along ``axis`` where they are vectors."""
    rank = quantized_data.ndim
    shifted = quantized_data.astype(np.float32) - along(zero_point, axis, rank).astype(np.float32)
    return along(scale, axis, rank) * shifted


@executes("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """Return ``scale * (data - offset)``, one scale for each block."""
    shifted = data.astype(np.float32)
    if offset is not None:
        shifted = shifted - _repeated(offset.astype(np.float32), data.shape)
    return _repeated(scale, data.shape) * shifted


@executes("constexpr_cast")
def constant_cast(source_val: Array, output_dtype: str) -> Array:
    """Return the constant in another float type."""
    return source_val.astype(named(output_dtype).dtype)


@executes("constexpr_lut_to_dense", widen=False)
def lut_to_dense(indices: Array, lut: Array, shape: Array | None = None, vector_axis: Array | None = None) -> Array:
    """Return the palettes' values at the indices.

    Args:
        indices: Packed bytes (iOS 16, with ``shape``), or a tensor [D...] of indices (iOS 18).
        lut: One palette [P], or one for each block, [blocks along D..., P, V].
        shape: The result's shape where the indices are bytes.
        vector_axis: The axis along which a palette's vectors of V elements lie.
    """
    if shape is not None:
        sizes = tuple(int(size) for size in shape)
        bits = int(lut.size - 1).bit_length()
        return lut[unpack(indices, bits, int(np.prod(sizes, dtype=np.int64)))].reshape(sizes)
    places: list[Any] = []
    for axis, (count, size) in enumerate(zip(lut.shape[:-2], indices.shape, strict=True)):
        if size % count:
            raise ValueError(f"{count} palettes do not divide {size} indices along axis {axis}")
        blocks = np.arange(size) // (size // count) if size else np.zeros(0, np.int64)
        places.append(blocks.reshape((-1,) + (1,) * (indices.ndim - 1 - axis)) if count > 1 else 0)
    vectors = lut[(*places, indices)]  # [D..., V]
    if vectors.shape[-1] == 1:
        return np.asarray(vectors[..., 0])
    if vector_axis is None:
        raise ValueError("palettes of vectors need vector_axis")
    at = int(vector_axis) % indices.ndim
    result = list(indices.shape)
    result[at] *= vectors.shape[-1]
    return np.moveaxis(vectors, -1, at + 1).reshape(result)


@executes("constexpr_sparse_to_dense", widen=False)
def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Return zeros with the data where the mask is set: packed bits (iOS 16, with ``shape``), or a tensor (iOS 18)."""
    if shape is not None:
        sizes = tuple(int(size) for size in shape)
        mask = unpack(mask, 1, int(np.prod(sizes, dtype=np.int64))).reshape(sizes)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


@executes("constexpr_lut_to_sparse", widen=False)
def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    """Return the mask and the palettes' values at the indices that it sets, both as they are in the dense tensor."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, None, vector_axis)
    mask = indices_mask
    if dense.shape != mask.shape and vector_axis is not None:
        mask = np.repeat(mask, lut.shape[-1], int(vector_axis))
    return mask, dense[mask != 0]


@executes("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """Return the mask and ``scale * (data - offset)`` where it is set."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]
