"""Activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml.lowering.forms import dims, is_float, known, wide
from optkit_targets.coreml.lowering.scope import Scope
from optkit_targets.coreml.lowering.table import lowers
from optkit_targets.coreml.lowering.writing import Writer, number_type, parameter

PLAIN = {"Sigmoid": "sigmoid", "Tanh": "tanh", "Softplus": "softplus", "Softsign": "softsign"}
# MIL operator, and ONNX's attributes with their defaults in the order of MIL's alpha and beta.
WITH_ALPHA: dict[str, tuple[str, dict[str, float]]] = {
    "LeakyRelu": ("leaky_relu", {"alpha": 0.01}),
    "Elu": ("elu", {"alpha": 1.0}),
    "HardSigmoid": ("sigmoid_hard", {"alpha": 0.2, "beta": 0.5}),
}
GELU_MODES = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}
SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875  # ONNX's own defaults
LARGEST = float(np.finfo(np.float32).max)  # Clip of opset 6 writes "no bound" so


@lowers(*PLAIN)
def plain(scope: Scope, node: ir.Node) -> Any:
    """Write an activation without parameters."""
    return getattr(Writer(scope, node), PLAIN[node.op_type])(x=scope.input(node, 0))


@lowers(*WITH_ALPHA)
def with_alpha(scope: Scope, node: ir.Node) -> Any:
    """Write an activation whose parameters MIL has under the same names."""
    operation, defaults = WITH_ALPHA[node.op_type]
    given = {name: float(node.attributes.get_float(name, default)) for name, default in defaults.items()}
    return getattr(Writer(scope, node), operation)(x=scope.input(node, 0), **given)


@lowers("Relu")
def relu(scope: Scope, node: ir.Node) -> Any:
    """Write ``max(x, 0)``, of integers too."""
    x, write = wide(scope, node, 0), Writer(scope, node)
    return write.relu(x=x) if is_float(x) else write.maximum(x=x, y=np.int32(0))


@lowers("PRelu")
def prelu(scope: Scope, node: ir.Node) -> Any:
    """Write ``x`` where it is positive, ``slope·x`` elsewhere.

    MIL's prelu has one slope for each channel of an image, leaky_relu one for all; any other slope is arithmetic.
    """
    x, write = wide(scope, node, 0), Writer(scope, node)
    slope = parameter(scope, node, 1, x) if is_float(x) else None
    if slope is not None and slope.size == 1:
        return write.leaky_relu(x=x, alpha=slope.ravel()[0])
    rank, shape = len(dims(x)), dims(x)
    if slope is not None and rank == 4 and _by_channel(slope.shape, shape):
        return write.prelu(x=x, alpha=slope.ravel())
    positive = write.relu(x=x) if is_float(x) else write.maximum(x=x, y=np.int32(0))
    negative = write.minimum(x=x, y=0.0 if is_float(x) else np.int32(0))
    scaled = write.mul(x=negative, y=wide(scope, node, 1))
    return write.add(x=positive, y=scaled)


def _by_channel(slope: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether a slope, aligned with the last axes, varies along the second axis alone."""
    aligned = (1,) * (len(shape) - len(slope)) + slope
    return aligned == (1, shape[1], *(1,) * (len(shape) - 2))


@lowers("ThresholdedRelu")
def thresholded_relu(scope: Scope, node: ir.Node) -> Any:
    """Write ``x`` where ``x > alpha``, else 0: MIL's thresholded_relu keeps ``x = alpha`` as well."""
    x, write = scope.input(node, 0), Writer(scope, node)
    above = write.greater(x=x, y=float(node.attributes.get_float("alpha", 1.0)))
    return write.select(cond=above, a=x, b=np.zeros(dims(x), number_type(x)))


@lowers("Clip")
def clip(scope: Scope, node: ir.Node) -> Any:
    """Write ``min(max(x, low), high)``: as MIL's clip where both are known and in order."""
    x, write = wide(scope, node, 0), Writer(scope, node)
    low, high = _bound(scope, node, 1, "min"), _bound(scope, node, 2, "max")
    if is_float(x) and isinstance(low, float) and isinstance(high, float) and low < high:
        return write.relu6(x=x) if (low, high) == (0.0, 6.0) else write.clip(x=x, alpha=low, beta=high)
    if low is not None:
        x = write.maximum(x=x, y=low)
    return x if high is None else write.minimum(x=x, y=high)


def _bound(scope: Scope, node: ir.Node, index: int, attribute: str) -> Any | None:
    """Return a bound: a float, an int32, a variable, or None where there is none."""
    if scope.opset < 11:
        value = float(node.attributes.get_float(attribute, LARGEST))
        return None if abs(value) >= LARGEST else value
    array = known(scope, node, index)
    if array is None:
        return scope.optional(node, index)
    item = array.ravel()[0]
    if array.dtype.kind == "f":
        return None if np.isinf(item) else float(item)
    limits = np.iinfo(np.int32)
    return np.int32(min(max(int(item), limits.min), limits.max))


@lowers("Gelu")
def gelu(scope: Scope, node: ir.Node) -> Any:
    """Write GELU, exact or by tanh."""
    mode = GELU_MODES[node.attributes.get_string("approximate", "none")]
    return Writer(scope, node).gelu(x=scope.input(node, 0), mode=mode)


@lowers("HardSwish")
def hard_swish(scope: Scope, node: ir.Node) -> Any:
    """Write ``x·max(0, min(1, x/6 + 1/2))``."""
    x, write = scope.input(node, 0), Writer(scope, node)
    return write.mul(x=x, y=write.sigmoid_hard(x=x, alpha=1 / 6, beta=0.5))


@lowers("Selu")
def selu(scope: Scope, node: ir.Node) -> Any:
    """Write ``gamma·elu(x, alpha)``."""
    write = Writer(scope, node)
    alpha = float(node.attributes.get_float("alpha", SELU_ALPHA))
    curve = write.elu(x=scope.input(node, 0), alpha=alpha)
    return write.mul(x=curve, y=float(node.attributes.get_float("gamma", SELU_GAMMA)))


@lowers("Celu")
def celu(scope: Scope, node: ir.Node) -> Any:
    """Write ``max(0, x) + min(0, alpha·(exp(x/alpha) - 1))``, which is ``alpha·elu(x/alpha, 1)`` for every alpha."""
    x, write = scope.input(node, 0), Writer(scope, node)
    alpha = float(node.attributes.get_float("alpha", 1.0))
    if alpha == 1.0:
        return write.elu(x=x, alpha=1.0)
    if alpha < 0.0:  # then x/alpha turns the halves around: both terms as the definition has them
        curve = write.mul(x=write.sub(x=write.exp(x=write.mul(x=x, y=1 / alpha)), y=1.0), y=alpha)
        return write.add(x=write.relu(x=x), y=write.minimum(x=curve, y=0.0))
    return write.mul(x=write.elu(x=write.mul(x=x, y=1 / alpha), alpha=1.0), y=alpha)


@lowers("Mish")
def mish(scope: Scope, node: ir.Node) -> Any:
    """Write ``x·tanh(softplus(x))``."""
    x, write = scope.input(node, 0), Writer(scope, node)
    return write.mul(x=x, y=write.tanh(x=write.softplus(x=x)))


@lowers("Swish")
def swish(scope: Scope, node: ir.Node) -> Any:
    """Write ``x·sigmoid(alpha·x)``."""
    x, write = scope.input(node, 0), Writer(scope, node)
    alpha = float(node.attributes.get_float("alpha", 1.0))
    if alpha == 1.0:
        return write.silu(x=x)
    return write.mul(x=x, y=write.sigmoid(x=write.mul(x=x, y=alpha)))


@lowers("Softmax", "LogSoftmax")
def softmax(scope: Scope, node: ir.Node) -> Any:
    """Write a softmax along an axis; before opset 13 it ran over all axes from ``axis`` on, as one."""
    x, write = scope.input(node, 0), Writer(scope, node)
    shape, rank = dims(x), len(dims(x))
    recent = scope.opset >= 13
    axis = int(node.attributes.get_int("axis", -1 if recent else 1))
    axis += rank if axis < 0 else 0
    if recent or (math.prod(shape[axis + 1 :]) == 1 and axis < rank):
        return SOFT[node.op_type](write, x, axis)
    flat = write.reshape(x=x, shape=[math.prod(shape[:axis]), math.prod(shape[axis:])])
    return write.reshape(x=SOFT[node.op_type](write, flat, 1), shape=list(shape))


def _softmax(write: Writer, x: Any, axis: int) -> Any:
    return write.softmax(x=x, axis=axis)


def _log_softmax(write: Writer, x: Any, axis: int) -> Any:
    """Return ``x - max - log(sum(exp(x - max)))``: the logarithm of a softmax loses what is small."""
    shifted = write.sub(x=x, y=write.reduce_max(x=x, axes=[axis], keep_dims=True))
    total = write.reduce_sum(x=write.exp(x=shifted), axes=[axis], keep_dims=True)
    return write.sub(x=shifted, y=write.log(x=total, epsilon=0.0))


SOFT = {"Softmax": _softmax, "LogSoftmax": _log_softmax}
