"""Operators that trade space for channels or for samples."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


@executes("depth_to_space", widen=False)
def depth_to_space(x: Array, block_size: Array) -> Array:
    """Return [N, C / b^2, H b, W b]; the block's place is the slow part of a channel's number, as in TensorFlow."""
    b = int(block_size)
    samples, channels, height, width = x.shape
    parts = x.reshape(samples, b, b, channels // (b * b), height, width)
    return parts.transpose(0, 3, 4, 1, 5, 2).reshape(samples, channels // (b * b), height * b, width * b)


@executes("space_to_depth", widen=False)
def space_to_depth(x: Array, block_size: Array) -> Array:
    """Return [N, C b^2, H / b, W / b], the inverse of ``depth_to_space``."""
    b = int(block_size)
    samples, channels, height, width = x.shape
    parts = x.reshape(samples, channels, height // b, b, width // b, b)
    return parts.transpose(0, 3, 5, 1, 2, 4).reshape(samples, channels * b * b, height // b, width // b)


@executes("pixel_shuffle", widen=False)
def pixel_shuffle(x: Array, upscale_factor: Array) -> Array:
    """Return [N, C / f^2, H f, W f]; the block's place is the fast part of a channel's number, as in PyTorch."""
    f = int(upscale_factor)
    samples, channels, height, width = x.shape
    parts = x.reshape(samples, channels // (f * f), f, f, height, width)
    return parts.transpose(0, 1, 4, 2, 5, 3).reshape(samples, channels // (f * f), height * f, width * f)


@executes("pixel_unshuffle", widen=False)
def pixel_unshuffle(x: Array, downscale_factor: Array) -> Array:
    """Return [N, C f^2, H / f, W / f], the inverse of ``pixel_shuffle``."""
    f = int(downscale_factor)
    samples, channels, height, width = x.shape
    parts = x.reshape(samples, channels, height // f, f, width // f, f)
    return parts.transpose(0, 1, 3, 5, 2, 4).reshape(samples, channels * f * f, height // f, width // f)


@executes("space_to_batch", widen=False)
def space_to_batch(x: Array, block_shape: Array, paddings: Array) -> Array:
    """Return [N bh bw, C, H / bh, W / bw] of the padded input; a sample's number begins with the block's place."""
    rows, columns = (int(size) for size in block_shape)
    padded = np.pad(x, [(0, 0), (0, 0), *((int(before), int(after)) for before, after in paddings)])
    samples, channels, height, width = padded.shape
    parts = padded.reshape(samples, channels, height // rows, rows, width // columns, columns)
    shape = (samples * rows * columns, channels, height // rows, width // columns)
    return parts.transpose(3, 5, 0, 1, 2, 4).reshape(shape)


@executes("batch_to_space", widen=False)
def batch_to_space(x: Array, block_shape: Array, crops: Array) -> Array:
    """Return [N / (bh bw), C, H bh, W bw] without its edges, the inverse of ``space_to_batch``."""
    rows, columns = (int(size) for size in block_shape)
    samples, channels, height, width = x.shape
    parts = x.reshape(rows, columns, samples // (rows * columns), channels, height, width)
    shape = (samples // (rows * columns), channels, height * rows, width * columns)
    whole = parts.transpose(2, 3, 4, 0, 5, 1).reshape(shape)
    (top, bottom), (left, right) = ((int(before), int(after)) for before, after in crops)
    return whole[:, :, top : shape[2] - bottom, left : shape[3] - right]
