"""Normalizations."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml.lowering.forms import axis_of, dims, dtype, reshaped
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import lowers
from optkit_targets.coreml.lowering.writing import Writer, number_type, parameter, read_outputs, refuse_outputs

IMAGES = (3, 4, 5)  # ranks of batch_norm's input
PLANES = (3, 4)  # ranks of instance_norm's and local_response_norm's


def _epsilon(node: ir.Node, default: float = 1e-5) -> float:
    return float(node.attributes.get_float("epsilon", default))


def _by_channel(scope: Scope, node: ir.Node, index: int, rank: int) -> Any:
    """Return an input [C] in a shape that broadcasts along the second axis."""
    array = scope.constant(node, index)
    if array is not None:
        return scope.const(array.reshape(-1, *[1] * (rank - 2)), f"{node.name}_{index}")
    vector = scope.input(node, index)
    return reshaped(scope, vector, [*dims(vector), *[1] * (rank - 2)])


@lowers("BatchNormalization")
def batch_norm(scope: Scope, node: ir.Node) -> Any:
    """Write ``scale·(x - mean) / sqrt(variance + epsilon) + bias`` of known statistics."""
    x, write = scope.input(node, 0), Writer(scope, node)
    if node.attributes.get_int("training_mode", 0):
        raise CannotLower("it computes the statistics of its input: training_mode is set")
    if not node.attributes.get_int("spatial", 1):
        raise CannotLower("it has statistics for every place: spatial is 0")
    refuse_outputs(node, 1, "statistics")
    epsilon, rank = _epsilon(node), len(dims(x))
    arrays = [parameter(scope, node, index, x) for index in range(1, 5)]
    if rank in IMAGES and all(array is not None for array in arrays):
        gamma, beta, mean, variance = arrays
        return write.batch_norm(x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=epsilon)
    scale, bias, mean, variance = (_by_channel(scope, node, index, max(rank, 2)) for index in range(1, 5))
    deviation = write.sqrt(x=write.add(x=variance, y=epsilon))
    scaled = write.mul(x=write.sub(x=x, y=mean), y=write.real_div(x=scale, y=deviation))
    return write.add(x=scaled, y=bias)


@lowers("InstanceNormalization")
def instance_norm(scope: Scope, node: ir.Node) -> Any:
    """Write a normalization of every channel of every image."""
    x, write = scope.input(node, 0), Writer(scope, node)
    rank = len(dims(x))
    gamma, beta = (parameter(scope, node, index, x) for index in (1, 2))
    if rank in PLANES and gamma is not None and beta is not None:
        return write.instance_norm(x=x, gamma=gamma, beta=beta, epsilon=_epsilon(node))
    normal = _normalized(write, x, list(range(2, rank)), _epsilon(node))
    scaled = write.mul(x=normal, y=_by_channel(scope, node, 1, rank))
    return write.add(x=scaled, y=_by_channel(scope, node, 2, rank))


def _normalized(write: Writer, x: Any, axes: list[int], epsilon: float) -> Any:
    """Return ``(x - mean) / sqrt(variance + epsilon)`` over some axes."""
    centered = write.sub(x=x, y=write.reduce_mean(x=x, axes=axes, keep_dims=True))
    variance = write.reduce_mean(x=write.square(x=centered), axes=axes, keep_dims=True)
    return write.mul(x=centered, y=write.rsqrt(x=variance, epsilon=epsilon))


@lowers("LayerNormalization")
def layer_norm(scope: Scope, node: ir.Node) -> Any:
    """Write a normalization over the axes from ``axis`` on, and the mean and 1/deviation where they are read.

    MIL wants constant scale and bias, in the shape of these axes.
    """
    x, write = scope.input(node, 0), Writer(scope, node)
    shape = dims(x)
    axes = list(range(axis_of(node.attributes.get_int("axis", -1), len(shape)), len(shape)))
    inner = shape[axes[0] :]
    gamma, beta = (_filled(parameter(scope, node, index, x), inner) for index in (1, 2))
    constant = gamma is not None and (beta is not None or scope.optional(node, 2) is None)
    affine = {name: array for name, array in (("gamma", gamma), ("beta", beta)) if constant and array is not None}
    result = write.layer_norm(x=x, axes=axes, **affine, epsilon=_epsilon(node))
    if not constant:
        result = write.mul(x=result, y=scope.input(node, 1))
        bias = scope.optional(node, 2)
        result = result if bias is None else write.add(x=result, y=bias)
    if max(read_outputs(node), default=0) == 0:
        return result
    mean = write.reduce_mean(x=x, axes=axes, keep_dims=True)
    variance = write.reduce_mean(x=write.square(x=write.sub(x=x, y=mean)), axes=axes, keep_dims=True)
    return result, mean, write.rsqrt(x=variance, epsilon=_epsilon(node))


def _filled(array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return a constant repeated to a shape; None where it has more axes than that."""
    if array is None:
        return None
    outer = max(array.ndim - len(shape), 0)
    if math.prod(array.shape[:outer]) != 1:
        return None
    return np.broadcast_to(array.reshape(array.shape[outer:]), shape).copy()


@lowers("GroupNormalization")
def group_norm(scope: Scope, node: ir.Node) -> Any:
    """Write a normalization of blocks of channels, with scale and bias by channel as from opset 21 on."""
    x, write = scope.input(node, 0), Writer(scope, node)
    shape, count = dims(x), node.attributes.get_int("num_groups", 1)
    if scope.opset < 21:
        raise CannotLower("before opset 21 its scale was one of every block: raise the opset")
    blocks = write.reshape(x=x, shape=[shape[0], count, math.prod(shape[1:]) // count])
    normal = write.reshape(x=write.layer_norm(x=blocks, axes=[2], epsilon=_epsilon(node)), shape=list(shape))
    scale, bias = (_by_channel(scope, node, index, len(shape)) for index in (1, 2))
    return write.add(x=write.mul(x=normal, y=scale), y=bias)


@lowers("RMSNormalization")
def rms_norm(scope: Scope, node: ir.Node) -> Any:
    """Write ``scale·x / sqrt(mean(x²) + epsilon)`` over the axes from ``axis`` on."""
    x, write = scope.input(node, 0), Writer(scope, node)
    rank = len(dims(x))
    axes = list(range(axis_of(node.attributes.get_int("axis", -1), rank), rank))
    mean = write.reduce_mean(x=write.square(x=x), axes=axes, keep_dims=True)
    normal = write.mul(x=x, y=write.rsqrt(x=mean, epsilon=_epsilon(node)))
    return write.mul(x=normal, y=write.cast(scope.input(node, 1), dtype(x)))


@lowers("LpNormalization")
def lp_norm(scope: Scope, node: ir.Node) -> Any:
    """Write ``x / ‖x‖`` along an axis; where the norm is 0, so is the result."""
    x, write = scope.input(node, 0), Writer(scope, node)
    axis = axis_of(node.attributes.get_int("axis", -1), len(dims(x)))
    reduction = write.reduce_l1_norm if node.attributes.get_int("p", 2) == 1 else write.reduce_l2_norm
    norm = reduction(x=x, axes=[axis], keep_dims=True)
    ones = np.ones(dims(norm), number_type(x))
    return write.real_div(x=x, y=write.select(cond=write.equal(x=norm, y=0.0), a=ones, b=norm))


@lowers("LRN")
def local_response_norm(scope: Scope, node: ir.Node) -> Any:
    """Write ``x / (bias + alpha/size·Σx²)^beta``, the sum over neighbouring channels.

    MIL's own is for windows with a middle; of an even size ONNX has one channel more behind than in front.
    """
    x, write = scope.input(node, 0), Writer(scope, node)
    shape, size = dims(x), node.attributes.get_int("size", 1)
    names = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0}
    alpha, beta, bias = (float(node.attributes.get_float(name, default)) for name, default in names.items())
    if len(shape) in PLANES and size % 2:
        return write.local_response_norm(x=x, size=size, alpha=alpha, beta=beta, k=bias)
    before, behind = (size - 1) // 2, size - 1 - (size - 1) // 2
    padding = [before, behind, *[0] * 2 * (len(shape) - 2)]
    padded = write.pad(x=write.square(x=x), pad=padding, mode="constant", constant_val=0.0)
    parts = [
        write.slice_by_size(x=padded, begin=[0, place, *[0] * (len(shape) - 2)], size=list(shape))
        for place in range(size)
    ]
    total = reduce(lambda a, b: write.add(x=a, y=b), parts)
    base = write.add(x=write.mul(x=total, y=alpha / size), y=bias)
    return write.real_div(x=x, y=write.pow(x=base, y=beta))


@lowers("MeanVarianceNormalization")
def mean_variance_norm(scope: Scope, node: ir.Node) -> Any:
    """Write ``(x - mean) / (deviation + 1e-9)`` over some axes, as ONNX's function body has it."""
    x, write = scope.input(node, 0), Writer(scope, node)
    axes = scope.ints(node, "axes", [0, 2, 3]) or []
    centered = write.sub(x=x, y=write.reduce_mean(x=x, axes=axes, keep_dims=True))
    variance = write.reduce_mean(x=write.square(x=centered), axes=axes, keep_dims=True)
    deviation = write.sqrt(x=variance)
    constant = write.equal(x=deviation, y=0.0)  # there in float16, where 1e-9 is 0, it would be 0 / 0
    ones = np.ones(dims(deviation), number_type(x))
    return write.real_div(x=centered, y=write.select(cond=constant, a=ones, b=write.add(x=deviation, y=1e-9)))
