"""Scales of smallest squared rounding error: a few large values may be clipped so that the many are rounded finer."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product

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
FACTORS = np.linspace(1.25, 0.35, 19)  # of a symmetric range
BETWEEN = 0.025  # beside the best of them
SIDES = np.linspace(1.2, 0.4, 5)  # of either side of an asymmetric range: all pairs
BESIDE = 0.1  # beside the best of them
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

    def search(part: slice) -> None:
        best = _Best(rows[part] / unit[part, None], None if costs is None else costs[part], grid)
        (_try_symmetric if grid.symmetric else _try_sides)(best)
        _refine(best)
        factor[part], zero[part] = best.factor, best.zero

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy lets go of the interpreter's lock
        list(threads.map(search, row_slices(rows)))
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
        values: [rows, n], in steps of the row's exact range.
        costs: Of the same shape, or None.
        grid: The integers to use.

    Attributes:
        error: Squared error of each row.
        factor: The scale, in those of the exact range.
        zero: The zero point.
    """

    def __init__(self, values: np.ndarray, costs: np.ndarray | None, grid: IntegerGrid) -> None:
        self.grid = grid
        count, length = values.shape
        # NumPy is quick along the last axis: many short rows lie side by side
        self._axis = 0 if length < count else 1
        self.values = self._laid(values)
        self.costs = None if costs is None else self._laid(costs)
        self.error = np.full(count, np.inf, np.float32)
        self.factor = np.ones(count, np.float32)
        self.zero = np.full(count, grid.middle, np.float32)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Magnitude of each row's smallest value below 0, and its largest above."""
        return -self.values.min(axis=self._axis, initial=0.0), self.values.max(axis=self._axis, initial=0.0)

    def offer(self, factor: np.ndarray | float, zero: np.ndarray | float) -> np.ndarray:
        """Take a row's scale and zero point where they are better than the best; return where they are."""
        factor, zero = (np.broadcast_to(np.float32(value), self.error.shape) for value in (factor, zero))
        difference = self._integers(factor, zero)
        difference *= np.expand_dims(factor, self._axis)
        difference -= self.values
        error = self._sums(difference, difference)
        better = error < self.error
        for best, new in ((self.error, error), (self.factor, factor), (self.zero, zero)):
            np.copyto(best, new, where=better)
        return better

    def fitted(self) -> np.ndarray:
        """Return each row's scale that fits the integers of the best by least squares."""
        integers = self._integers(self.factor, self.zero)
        dot, square = self._sums(self.values, integers), self._sums(integers, integers)
        fits = (square > 0) & (dot != 0)
        return np.where(fits, dot / np.where(fits, square, 1), self.factor)

    def _laid(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(rows.T if self._axis == 0 else rows, np.float32)

    def _sums(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return the sum of products for each row, weighted by the costs."""
        products = one * other
        if self.costs is not None:
            products *= self.costs
        return np.asarray(products.sum(axis=self._axis))

    def _integers(self, factor: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """Return the integers less their zero point, float32."""
        steps: np.ndarray = self.values / np.expand_dims(factor, self._axis)
        np.rint(steps, out=steps)
        offset = np.float32(self.grid.middle) if self.grid.symmetric else np.expand_dims(zero, self._axis)
        np.maximum(steps, self.grid.low - offset, out=steps)
        np.minimum(steps, self.grid.high - offset, out=steps)
        return steps


def _try_symmetric(best: _Best) -> None:
    for factor in FACTORS:
        best.offer(factor, best.grid.middle)
        if best.grid.full_range:
            best.offer(-factor, best.grid.middle)
    found = best.factor.copy()
    for step in (-BETWEEN, BETWEEN):
        best.offer(found + np.sign(found) * np.float32(step), best.grid.middle)


def _try_sides(best: _Best) -> None:
    below, above = best.bounds
    empty = below + above == 0
    lows, highs = np.ones_like(below), np.ones_like(above)

    def offer(low: np.ndarray | float, high: np.ndarray | float) -> None:
        factor = np.where(empty, 1, (low * below + high * above) / best.grid.steps)
        zero = np.rint(best.grid.low + low * below / factor)
        better = best.offer(factor, np.clip(zero, best.grid.low, best.grid.high))
        np.copyto(lows, low, where=better)
        np.copyto(highs, high, where=better)

    for low, high in product(SIDES, SIDES):
        offer(low, high)
    low_found, high_found = lows.copy(), highs.copy()
    for low, high in product((-BESIDE, 0, BESIDE), repeat=2):
        if low or high:
            offer(low_found + low, high_found + high)


def _refine(best: _Best) -> None:
    """Try scales beside the best, the one that fits its integers by least squares, and zero points beside the best."""
    for _ in range(ROUNDS):
        found = best.factor.copy()
        for factor in NEARBY:
            best.offer(found * np.float32(factor), best.zero)
        best.offer(best.fitted(), best.zero)
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
