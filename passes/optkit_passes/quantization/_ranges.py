"""Chooses the ranges of activations: by one estimator, or for each tensor the one that moves the outputs least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from optkit.errors import InputError
from optkit.graph import constant
from optkit.quant.calibrate import RangeMethod, estimate_range
from optkit.quant.histogram import Histogram, merged
from optkit.quant.integers import IntegerGrid, QuantParams, choose_qparams

from ._comparison import compare_ranges
from ._regions import Plan

Method = RangeMethod | Literal["auto"]

CANDIDATES: tuple[RangeMethod, ...] = ("minmax", "average", "percentile", "mse", "entropy")


@dataclass(frozen=True)
class RangeChoice:
    """How ranges are read from histograms.

    Attributes:
        method: An estimator, or ``auto``.
        percentile: Per cent of the values that the ``percentile`` estimator keeps.
    """

    method: Method
    percentile: float

    def params(
        self,
        model: ir.Model,
        plan: Plan,
        histograms: Mapping[str, Histogram],
        grid: IntegerGrid,
        samples: Sequence[Mapping[str, np.ndarray]],
        track: Callable[..., Any],
    ) -> dict[ir.Value, QuantParams]:
        """Return scale and zero point of every value to quantize.

        Args:
            model: The model, not yet changed.
            plan: What is to be quantized.
            histograms: What calibration saw, by name.
            grid: The integers of activations.
            samples: The calibration samples.
            track: Wraps the samples in a progress display.
        """
        if self.method != "auto":
            return {value: self._estimate(value, plan, histograms, grid, self.method) for value in plan.quantized}
        groups = list({id(group): group for group in plan.groups.values()}.values())
        estimates = [
            [self._estimate(group[0], plan, histograms, grid, method) for method in CANDIDATES] for group in groups
        ]
        chosen = compare_ranges(model, plan, groups, estimates, samples, track)
        return {value: params for group, params in zip(groups, chosen, strict=True) for value in group}

    def _estimate(
        self,
        value: ir.Value,
        plan: Plan,
        histograms: Mapping[str, Histogram],
        grid: IntegerGrid,
        method: RangeMethod,
    ) -> QuantParams:
        seen = [histogram_of(source, histograms) for source in plan.sources[value]]
        histogram = seen[0] if len(seen) == 1 else merged(seen)
        return choose_qparams(*estimate_range(histogram, method, grid, self.percentile), grid, name=value.name or "")


def histogram_of(value: ir.Value, histograms: Mapping[str, Histogram]) -> Histogram:
    """Return what calibration saw of a value, or the histogram of a constant.

    Raises:
        InputError: The constant holds NaN or infinity.
    """
    array = constant(value)
    if array is None:
        return histograms[value.name or ""]
    histogram = Histogram()
    low, high = float(array.min(initial=0.0)), float(array.max(initial=0.0))
    if not np.isfinite(high - low):
        raise InputError("it holds values that are not finite and cannot be quantized", where=f"tensor '{value.name}'")
    histogram.add(array.ravel(), low, high)
    return histogram
