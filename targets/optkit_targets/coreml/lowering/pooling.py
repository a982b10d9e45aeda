"""Poolings over windows and over whole images."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml.lowering.forms import dims, is_float, wide
from optkit_targets.coreml.lowering.padding import Windows, windows
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import lowers
from optkit_targets.coreml.lowering.writing import Writer, number_type, refuse_outputs

AXES = (1, 2, 3)


def _windows(scope: Scope, node: ir.Node, x: Any) -> Windows:
    """Return how a pooling's windows move."""
    lengths = dims(x)[2:]
    if len(lengths) not in AXES:
        raise CannotLower(f"it moves along {len(lengths)} axes, MIL along one to three")
    return windows(scope, node, lengths, scope.ints(node, "kernel_shape") or [])


@lowers("MaxPool")
def max_pool(scope: Scope, node: ir.Node) -> Any:
    """Write the largest element of each window; padding is never the largest.

    ``ceil_mode`` becomes padding: MIL's own wants the same padding in front and behind.
    """
    refuse_outputs(node, 1, "indices")
    given, write = wide(scope, node, 0), Writer(scope, node)
    x = given if is_float(given) else write.cast(given, "fp32")
    moves = _windows(scope, node, x)
    if set(moves.dilations) == {1}:
        result = write.max_pool(**_settings(x, moves))
    else:
        result = _by_slices(write, x, moves, -math.inf, lambda a, b: write.maximum(x=a, y=b))
    return result if is_float(given) else write.cast(result, "int32")


def _settings(x: Any, moves: Windows) -> dict[str, Any]:
    """Return MIL's settings of a pooling."""
    pads = moves.mil_pads
    padding = {"pad_type": "custom", "pad": pads} if any(pads) else {"pad_type": "valid"}
    return {"x": x, "kernel_sizes": list(moves.kernel), "strides": list(moves.strides), **padding}


def _by_slices(write: Writer, x: Any, moves: Windows, fill: float, combine: Callable[[Any, Any], Any]) -> Any:
    """Return a pooling with dilations, which MIL's have not: slices of the padded input, combined axis by axis."""
    pads = moves.mil_pads
    if any(pads):
        x = write.pad(x=x, pad=pads, mode="constant", constant_val=fill)
    for axis, count in enumerate(moves.counts):
        step, dilation = moves.strides[axis], moves.dilations[axis]
        slices = []
        for place in range(moves.kernel[axis]):
            begin, end, stride = [0] * len(dims(x)), list(dims(x)), [1] * len(dims(x))
            begin[axis + 2] = place * dilation
            end[axis + 2] = place * dilation + (count - 1) * step + 1
            stride[axis + 2] = step
            slices.append(write.slice_by_index(x=x, begin=begin, end=end, stride=stride))
        x = reduce(combine, slices)
    return x


@lowers("AveragePool")
def average_pool(scope: Scope, node: ir.Node) -> Any:
    """Write the mean of each window, of the elements inside the input or, with ``count_include_pad``, the padding too.

    A window of ``ceil_mode`` that reaches beyond the padding counts nothing there: where that makes a difference, the
    sum is divided by constant counts.
    """
    x, write = scope.input(node, 0), Writer(scope, node)
    moves = _windows(scope, node, x)
    include = bool(node.attributes.get_int("count_include_pad", 0))
    counts = _counts(moves, include)
    if set(moves.dilations) != {1}:
        total = _by_slices(write, x, moves, 0.0, lambda a, b: write.add(x=a, y=b))
        return write.mul(x=total, y=(1 / counts).astype(number_type(x)))
    whole = math.prod(moves.kernel)
    if not include:
        return write.avg_pool(**_settings(x, moves), exclude_padding_from_average=True)
    mean = write.avg_pool(**_settings(x, moves), exclude_padding_from_average=False)
    return mean if (counts == whole).all() else write.mul(x=mean, y=(whole / counts).astype(number_type(x)))


def _counts(moves: Windows, include: bool) -> np.ndarray:
    """Return how many elements each window divides by, [1, 1, *counts of windows]."""
    along = []
    for axis, count in enumerate(moves.counts):
        begin = moves.begins[axis]
        low, high = (
            (0, begin + moves.lengths[axis] + moves.ends[axis]) if include else (begin, begin + moves.lengths[axis])
        )
        starts = np.arange(count) * moves.strides[axis]
        places = starts[:, None] + np.arange(moves.kernel[axis]) * moves.dilations[axis]
        along.append(((places >= low) & (places < high)).sum(axis=1))
    total = reduce(np.multiply.outer, along)
    return np.asarray(total, np.float64)[None, None]


@lowers("LpPool")
def lp_pool(scope: Scope, node: ir.Node) -> Any:
    """Write ``(Σ|x|^p)^(1/p)`` of each window, as a mean times the window's size: padding adds nothing."""
    x, write = scope.input(node, 0), Writer(scope, node)
    moves, p = _windows(scope, node, x), float(node.attributes.get_int("p", 2))
    powers = _power(write, x, p)
    if set(moves.dilations) != {1}:
        total = _by_slices(write, powers, moves, 0.0, lambda a, b: write.add(x=a, y=b))
    else:
        mean = write.avg_pool(**_settings(powers, moves), exclude_padding_from_average=False)
        total = write.mul(x=mean, y=float(math.prod(moves.kernel)))
    return _root(write, total, p)


def _power(write: Writer, x: Any, p: float) -> Any:
    """Return ``|x|^p``."""
    if p == 2.0:
        return write.square(x=x)
    magnitude = write.abs(x=x)
    return magnitude if p == 1.0 else write.pow(x=magnitude, y=p)


def _root(write: Writer, x: Any, p: float) -> Any:
    """Return ``x^(1/p)``."""
    return x if p == 1.0 else write.sqrt(x=x) if p == 2.0 else write.pow(x=x, y=1 / p)


@lowers("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(scope: Scope, node: ir.Node) -> Any:
    """Write a reduction over all spatial axes, which stay with length 1."""
    x, write = scope.input(node, 0), Writer(scope, node)
    axes = list(range(2, len(dims(x))))
    if node.op_type == "GlobalAveragePool":
        return write.reduce_mean(x=x, axes=axes, keep_dims=True)
    if node.op_type == "GlobalMaxPool":
        return write.reduce_max(x=x, axes=axes, keep_dims=True)
    p = float(node.attributes.get_int("p", 2))
    return _root(write, write.reduce_sum(x=_power(write, x, p), axes=axes, keep_dims=True), p)
