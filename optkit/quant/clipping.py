"""Scales of smallest squared rounding error: a few large values may be clipped so that the many are rounded finer."""

from __future__ import annotations

import numpy as np

from optkit.errors import InputError
from optkit.quant.integers import (
    SMALLEST_SCALE,
    Granularity,
    IntegerGrid,
    QuantParams,
    dequantize,
    quantize,
    reduce_per_scale,
    weight_qparams,
)
from optkit.quant.rows import from_rows, row_slices, row_values, to_rows

# Beside shrunk ranges wider ones: a few values in many levels happen to lie near the steps of some scale.
FACTORS = np.linspace(1.25, 0.35, 37)  # of a symmetric range
SIDES = np.linspace(1.2, 0.4, 9)  # of either side of an asymmetric range: all pairs
NEARBY = (0.97, 0.985, 1.015, 1.03)  # of the best scale
ROUNDS = 3  # of refinement


def search_qparams(
    weight: np.ndarray,
    grid: IntegerGrid,
    granularity: Granularity,
    *,
    importance: np.ndarray | None = None,
    name: str = "",
) -> QuantParams:
    """Return the scale and zero point that round a constant tensor with the smallest squared error.

    Ranges narrower than the exact one are tried (Choukroun et al. 2019, "Low-bit quantization of neural networks for
    efficient inference", section 3: the clipping of least squared error), some wider, and both signs where the grid
    has a step more on one side. The best is refined in turns: the scale that fits the chosen integers by least
    squares, and neighbouring zero points. No scale's error exceeds that of the exact range.

    Args:
        weight: The tensor.
        grid: The integers to use.
        granularity: What one scale covers.
        importance: What an error of each value costs, not negative; broadcasts to the tensor. Without, all cost alike.
        name: The tensor, for the errors.

    Raises:
        InputError: The tensor or its importance holds NaN or infinity, or an importance is negative.
    """
    exact = weight_qparams(weight, grid, granularity, name=name)
    costs = None if importance is None else _costs(weight, importance, granularity, name)
    rows = to_rows(weight, granularity)
    unit = row_values(np.abs(exact.scale), granularity)
    factor, zero = np.empty(len(rows), np.float32), np.empty(len(rows), np.float32)
    for part in row_slices(rows):
        best = _Best(rows[part].astype(np.float32) / unit[part, None], None if costs is None else costs[part], grid)
        (_try_symmetric if grid.symmetric else _try_sides)(best)
        _refine(best)
        factor[part], zero[part] = best.factor, best.zero
    scale = factor * unit
    scale = np.where(np.abs(scale) < SMALLEST_SCALE, unit, scale)
    scale, zero_point = (from_rows(values, weight.shape, granularity) for values in (scale, zero.astype(grid.dtype)))
    found = QuantParams(scale, zero_point, grid, granularity)
    # judged once more as it will be used: float32 may round what lies near the middle of two steps the other way
    better = _squared_error(weight, found, importance) < _squared_error(weight, exact, importance)
    scale, zero_point = np.where(better, found.scale, exact.scale), np.where(better, found.zero_point, exact.zero_point)
    return QuantParams(scale, zero_point, grid, granularity)


class _Best:
    """The best scale and zero point found so far for every row.

    Args:
        values: float32 [rows, n], in steps of the row's exact range.
        costs: float32 of the same shape, or None.
        grid: The integers to use.

    Attributes:
        error: Squared error of each row.
        factor: The scale, in those of the exact range.
        zero: The zero point.
    """

    def __init__(self, values: np.ndarray, costs: np.ndarray | None, grid: IntegerGrid) -> None:
        self.values, self.costs, self.grid = values, costs, grid
        self.error = np.full(len(values), np.inf, np.float32)
        self.factor = np.ones(len(values), np.float32)
        self.zero = np.full(len(values), grid.middle, np.float32)

    def offer(self, factor: np.ndarray | float, zero: np.ndarray | float) -> None:
        """Take a row's scale and zero point where they are better than the best."""
        factor, zero = (np.broadcast_to(np.float32(value), self.error.shape) for value in (factor, zero))
        difference = self.integers(factor, zero)
        difference *= factor[:, None]
        difference -= self.values
        if self.costs is None:
            error = np.einsum("rn,rn->r", difference, difference)
        else:
            difference *= difference
            error = np.einsum("rn,rn->r", difference, self.costs)
        better = error < self.error
        for best, new in ((self.error, error), (self.factor, factor), (self.zero, zero)):
            np.copyto(best, new, where=better)

    def integers(self, factor: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """Return the integers less their zero point, float32 [rows, n]."""
        steps: np.ndarray = self.values / factor[:, None]
        np.rint(steps, out=steps)
        if self.grid.symmetric:
            np.clip(steps, self.grid.low - self.grid.middle, self.grid.high - self.grid.middle, out=steps)
        else:
            np.clip(steps, self.grid.low - zero[:, None], self.grid.high - zero[:, None], out=steps)
        return steps


def _try_symmetric(best: _Best) -> None:
    for factor in FACTORS:
        best.offer(factor, best.grid.middle)
        if best.grid.full_range:
            best.offer(-factor, best.grid.middle)


def _try_sides(best: _Best) -> None:
    below, above = -best.values.min(axis=1, initial=0.0), best.values.max(axis=1, initial=0.0)
    empty = below + above == 0
    for low in SIDES:
        for high in SIDES:
            factor = np.where(empty, 1, (low * below + high * above) / best.grid.steps)
            zero = np.rint(best.grid.low + low * below / factor)
            best.offer(factor, np.clip(zero, best.grid.low, best.grid.high))


def _refine(best: _Best) -> None:
    """Try scales beside the best, the one that fits its integers by least squares, and zero points beside the best."""
    for _ in range(ROUNDS):
        found = best.factor.copy()
        for factor in NEARBY:
            best.offer(found * np.float32(factor), best.zero)
        integers = best.integers(best.factor, best.zero)
        weighted = integers if best.costs is None else integers * best.costs
        dot, square = (np.einsum("rn,rn->r", weighted, other) for other in (best.values, integers))
        fits = (square > 0) & (dot != 0)
        best.offer(np.where(fits, dot / np.where(fits, square, 1), best.factor), best.zero)
        if not best.grid.symmetric:
            for step in (-1, 1):
                best.offer(best.factor, np.clip(best.zero + step, best.grid.low, best.grid.high))


def _costs(weight: np.ndarray, importance: np.ndarray, granularity: Granularity, name: str) -> np.ndarray:
    """Return the importance as rows, the largest of each row 1."""
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise InputError("the importance of its values is negative or not finite", where=f"tensor '{name}'")
    rows = to_rows(np.broadcast_to(importance, weight.shape), granularity)
    largest = rows.max(axis=1, initial=0.0)[:, None]
    return np.asarray(rows / np.where(largest > 0, largest, 1), np.float32)


def _squared_error(weight: np.ndarray, params: QuantParams, importance: np.ndarray | None) -> np.ndarray:
    """Return the squared error of each scale's values, float64."""
    error = np.square(dequantize(quantize(weight, params), params).astype(np.float64) - weight)
    return reduce_per_scale(np.add, error if importance is None else error * importance, params.granularity)
