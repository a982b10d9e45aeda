# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Activation functions."""

from __future__ import annotations

import math

import numpy as np

from optkit_targets.coreml.interpreter.kernels.sessions import run
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


def per_channel(parameter: Array, rank: int) -> Array:
    """Return a vector [C] so that it applies to axis 1 of a tensor of ``rank`` dimensions."""
    return parameter.reshape((-1,) + (1,) * (rank - 2)) if parameter.ndim == 1 and rank > 1 else parameter


@executes("relu")
def relu(x: Array) -> Array:
    """Return ``max(x, 0)``."""
    return np.maximum(x, 0)


@executes("relu6")
def relu6(x: Array) -> Array:
    """Return ``min(max(x, 0), 6)``."""
    return np.minimum(np.maximum(x, 0), 6)


@executes("leaky_relu")
def leaky_relu(x: Array, alpha: Array) -> Array:
    """Return ``x`` where it is positive, else ``alpha * x``."""
    return np.where(x >= 0, x, alpha * x)


@executes("prelu")
def prelu(x: Array, alpha: Array) -> Array:
    """Return ``x`` where it is positive, else its channel's ``alpha * x``."""
    return np.where(x >= 0, x, per_channel(alpha, x.ndim) * x)


@executes("clamped_relu")
def clamped_relu(x: Array, alpha: Array, beta: Array) -> Array:
    """Return ``min(x, beta)`` where ``x`` is positive, else ``min(alpha * x, beta)``."""
    return np.minimum(np.where(x >= 0, x, alpha * x), beta)


@executes("thresholded_relu")
def thresholded_relu(x: Array, alpha: Array) -> Array:
    """Return ``x`` where it reaches ``alpha``, else 0."""
    return np.where(x >= alpha, x, np.float32(0))


@executes("elu")
def elu(x: Array, alpha: Array) -> Array:
    """Return ``x`` where it is positive, else ``alpha * (exp(x) - 1)``."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


@executes("gelu")
def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Return the Gaussian error linear unit, exactly or by one of two approximations."""
    if mode == "TANH_APPROXIMATION":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.float32(0.5) * x * (1 + np.tanh(inner))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    return np.float32(0.5) * x * (1 + run("Erf", x * np.float32(math.sqrt(0.5))))


@executes("linear_activation")
def linear_activation(x: Array, alpha: Array, beta: Array | float = 0.0) -> Array:
    """Return ``alpha * x + beta``."""
    return alpha * x + np.float32(beta)


@executes("sigmoid")
def sigmoid(x: Array) -> Array:
    """Return ``1 / (1 + exp(-x))``, without overflow on either side."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


@executes("sigmoid_hard")
def sigmoid_hard(x: Array, alpha: Array | float = 0.2, beta: Array | float = 0.5) -> Array:
    """Return ``min(max(alpha * x + beta, 0), 1)``."""
    return np.minimum(np.maximum(np.float32(alpha) * x + np.float32(beta), 0), 1)


@executes("scaled_tanh")
def scaled_tanh(x: Array, alpha: Array | float = 1.0, beta: Array | float = 1.0) -> Array:
    """Return ``alpha * tanh(beta * x)``."""
    return np.float32(alpha) * np.tanh(np.float32(beta) * x)


@executes("silu")
def silu(x: Array) -> Array:
    """Return ``x * sigmoid(x)``."""
    return x * sigmoid(x)


@executes("softplus")
def softplus(x: Array) -> Array:
    """Return ``log(1 + exp(x))``."""
    return np.logaddexp(x, np.float32(0))


@executes("softplus_parametric")
def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    """Return ``alpha * log(1 + exp(beta * x))``, by channel."""
    return per_channel(alpha, x.ndim) * softplus(per_channel(beta, x.ndim) * x)


@executes("softsign")
def softsign(x: Array) -> Array:
    """Return ``x / (1 + |x|)``."""
    return x / (1 + np.abs(x))


@executes("softmax")
def softmax(x: Array, axis: Array | int = -1) -> Array:
    """Return ``exp(x) / sum(exp(x))`` along an axis."""
    shifted = np.exp(x - np.max(x, axis=int(axis), keepdims=True))
    return shifted / np.sum(shifted, axis=int(axis), keepdims=True)
