# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Reductions along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from optkit_targets.coreml.interpreter.elements import named
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


def _log_sum_exp(x: Array, axis: Any, keepdims: bool) -> Array:
    peak = np.max(x, axis=axis, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0)  # all of them infinite: nothing to subtract
    total = np.log(np.sum(np.exp(x - peak), axis=axis, keepdims=True)) + peak
    return total if keepdims else np.squeeze(total, axis=axis)


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "reduce_l1_norm": lambda x, **over: np.sum(np.abs(x), **over),
    "reduce_l2_norm": lambda x, **over: np.sqrt(np.sum(np.square(x), **over)),
    "reduce_log_sum": lambda x, **over: np.log(np.sum(x, **over)),
    "reduce_log_sum_exp": _log_sum_exp,
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **over: np.sum(np.square(x), **over),
}


def _enter(operator: str, function: Callable[..., Any]) -> None:
    @executes(operator)
    def reduce(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
        over = tuple(range(x.ndim)) if axes is None else tuple(int(axis) for axis in axes)
        return np.asarray(function(x, axis=over, keepdims=bool(keep_dims))).astype(x.dtype, copy=False)


for _operator, _function in REDUCTIONS.items():
    _enter(_operator, _function)


@executes("reduce_argmax", widen=False)
def reduce_argmax(
    x: Array, axis: Array | int = -1, keep_dims: Array | bool = False, output_dtype: str = "int32"
) -> Array:
    """Return where the first maximum along an axis is."""
    return np.asarray(np.argmax(x, axis=int(axis), keepdims=bool(keep_dims))).astype(named(output_dtype).dtype)


@executes("reduce_argmin", widen=False)
def reduce_argmin(
    x: Array, axis: Array | int = -1, keep_dims: Array | bool = False, output_dtype: str = "int32"
) -> Array:
    """Return where the first minimum along an axis is."""
    return np.asarray(np.argmin(x, axis=int(axis), keepdims=bool(keep_dims))).astype(named(output_dtype).dtype)
