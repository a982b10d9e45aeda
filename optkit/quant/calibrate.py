"""Streaming observation of a model's tensors over calibration samples, and the ranges that estimators read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from optkit.dataset.ahead import read_ahead
from optkit.errors import InputError
from optkit.model.loading import graph_inputs
from optkit.quant.histogram import (
    Histogram,
    Range,
    average_range,
    entropy_range,
    minmax_range,
    mse_range,
    percentile_range,
)
from optkit.quant.integers import IntegerGrid
from optkit.quant.walk import require_finite, require_samples
from optkit.session import CannotRunError, Session, with_outputs

RangeMethod = Literal["minmax", "average", "percentile", "entropy", "mse"]

SAMPLED = 8192  # values of one tensor that one sample adds to its histogram


def observe(
    model: ir.Model,
    names: Iterable[str],
    samples: Sequence[Mapping[str, np.ndarray]] | None,
    *,
    counts: bool = True,
    momentum: float = 1.0,
    track: Callable[..., Any] | None = None,
) -> dict[str, Histogram]:
    """Run the model over the samples and return a histogram of every named tensor.

    One sample is in flight at a time and memory is bounded by tensors times bins. Minimum and maximum are exact; the
    counts are taken from an evenly strided, deterministic subset of each tensor. onnxruntime may optimize the graph
    around the observed tensors, which moves their values by rounding only.

    Args:
        model: The model.
        names: Inputs and computed values of its main graph.
        samples: Calibration samples; each maps input names to arrays.
        counts: Count values in bins; without, only minima and maxima are found, which is all that ``minmax`` and
            ``average`` need.
        momentum: That of the moving average over samples; 1: their plain mean.
        track: Wraps the samples in a progress display: ``track(items, description, total)``.

    Returns:
        A histogram for every name; empty where the tensor had no elements in any sample.

    Raises:
        InputError: No samples, a sample the model does not take, or a tensor with NaN or infinite values.
    """
    samples = require_samples(samples, "static quantization")
    found = {name: Histogram(momentum=momentum) for name in names}
    fed = {value.name for value in graph_inputs(model)}
    computed = [name for name in found if name not in fed]
    session = Session(with_outputs(model, computed), optimize=True) if computed else None
    items = read_ahead(samples)
    for index, sample in enumerate(track(items, "Calibrating", len(samples)) if track else items):
        try:
            values = session.run(sample, computed) if session else {}
        except CannotRunError as error:
            raise InputError(str(error), where=f"calibration sample {index}") from error
        for name, histogram in found.items():
            value = values.pop(name, None) if name not in fed else sample.get(name)
            if value is None:
                raise InputError(f"it has no array for input '{name}'", where=f"calibration sample {index}")
            _add(histogram, value, name, index, SAMPLED if counts else 0)
    return found


def _add(histogram: Histogram, value: np.ndarray, name: str, index: int, sampled: int) -> None:
    if not value.size:
        return
    low, high = require_finite(value, name, index)
    histogram.size = max(histogram.size, value.size)
    flat = value.ravel()
    step = -(-flat.size // max(sampled, 1)) | 1  # odd: no common factor with the usual widths and channel counts
    histogram.add(flat[index * 7919 % step :: step] if sampled else flat[:0], low, high)


def estimate_range(histogram: Histogram, method: RangeMethod, grid: IntegerGrid, percentile: float) -> Range:
    """Return the real range to quantize, by the named estimator.

    Args:
        histogram: What was observed; not empty.
        method: ``minmax``, ``average``, ``percentile``, ``entropy`` or ``mse``.
        grid: The integers that the range will be spread over.
        percentile: Share of the values, in per cent, that the ``percentile`` method keeps inside.
    """
    if method == "average":
        return average_range(histogram)
    if method == "percentile":
        return percentile_range(histogram, percentile)
    if method == "entropy":
        return entropy_range(histogram, grid.steps, symmetric=grid.symmetric)
    if method == "mse":
        return mse_range(histogram, grid.steps, symmetric=grid.symmetric)
    return minmax_range(histogram)
