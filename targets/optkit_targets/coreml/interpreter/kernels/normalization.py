# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Normalizations."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.kernels.activations import per_channel
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


@executes("batch_norm")
def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """Return ``gamma * (x - mean) / sqrt(variance + epsilon) + beta``, by channel, axis 1."""
    scale = 1 / np.sqrt(variance + np.float32(epsilon)) * (np.float32(1) if gamma is None else gamma)
    shift = np.float32(0) if beta is None else per_channel(beta, x.ndim)
    return (x - per_channel(mean, x.ndim)) * per_channel(scale, x.ndim) + shift


@executes("instance_norm")
def instance_norm(
    x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Array | float = 1e-5
) -> Array:
    """Return each sample's channels normalized over their spatial axes."""
    normalized = _normalized(x, tuple(range(2, x.ndim)), epsilon)
    return _scaled(
        normalized,
        None if gamma is None else per_channel(gamma, x.ndim),
        None if beta is None else per_channel(beta, x.ndim),
    )


@executes("layer_norm")
def layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """Return ``x`` normalized over ``axes``, all by default; ``gamma`` and ``beta`` have the shape of these axes."""
    chosen = tuple(range(x.ndim)) if axes is None else tuple(sorted(int(axis) % x.ndim for axis in axes))
    shape = [size if axis in chosen else 1 for axis, size in enumerate(x.shape)]
    return _scaled(
        _normalized(x, chosen, epsilon),
        None if gamma is None else gamma.reshape(shape),
        None if beta is None else beta.reshape(shape),
    )


@executes("l2_norm")
def l2_norm(x: Array, epsilon: Array | float = 1e-6) -> Array:
    """Return ``x / sqrt(sum(x^2) + epsilon)`` over the last three axes."""
    axes = tuple(range(-min(3, x.ndim), 0))
    return x / np.sqrt(np.sum(np.square(x), axis=axes, keepdims=True) + np.float32(epsilon))


@executes("local_response_norm")
def local_response_norm(
    x: Array, size: Array, alpha: Array | float = 1e-4, beta: Array | float = 0.75, k: Array | float = 1.0
) -> Array:
    """Return ``x / (k + alpha / size * sum(x^2))^beta``, the sum over ``size`` channels around each.

    Of an even size, the sum is over one channel less, as many before as after (apple/coremltools, tests of the
    operator).
    """
    side = (int(size) - 1) // 2
    widths = [(0, 0)] * x.ndim
    widths[1] = (side, side)
    squares = np.pad(np.square(x), widths)
    total = sum((squares[:, offset : offset + x.shape[1]] for offset in range(2 * side + 1)), start=np.zeros_like(x))
    return x / np.power(np.float32(k) + np.float32(alpha) / np.float32(size) * total, np.float32(beta))


def _normalized(x: Array, axes: tuple[int, ...], epsilon: Array | float) -> Array:
    centred = x - np.mean(x, axis=axes, keepdims=True)
    return centred / np.sqrt(np.mean(np.square(centred), axis=axes, keepdims=True) + np.float32(epsilon))


def _scaled(x: Array, gamma: Array | None, beta: Array | None) -> Array:
    scaled = x if gamma is None else x * gamma
    return scaled if beta is None else scaled + beta
