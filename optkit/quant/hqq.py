"""Half-quadratic quantization: zero points and scales for the many small errors rather than for the few large ones.

Badri & Shaji 2023, "Half-quadratic quantization of large machine learning models": the error of rounding is measured
by ``sum |w - w_q|^p`` with p < 1, which forgives what outliers lose. Split into ``e``, an estimate of the outliers'
errors, and what is left, it is minimised in turns: ``e = shrink(w - w_q)`` by a generalised soft threshold, and the
zero point as the mean that fits ``w - e`` best, under a growing weight beta of the second term. Theirs keeps the scale;
here it is fitted to ``w - e`` in the same way, which is all that can move where zero points are integers.
"""

from __future__ import annotations

import numpy as np

from optkit.quant.clipping import search_qparams
from optkit.quant.integers import SMALLEST_SCALE, Granularity, IntegerGrid, QuantParams, quantize, weight_qparams
from optkit.quant.rows import from_rows, row_slices, row_values, to_rows

NORM = 0.7  # p
ROUNDS, BETA, GROWTH = 20, 10.0, 1.01  # the authors' defaults; errors are in steps here, whatever the weight's scale


def hqq_qparams(
    weight: np.ndarray, grid: IntegerGrid, granularity: Granularity, *, float_zero: bool = False, name: str = ""
) -> tuple[np.ndarray, QuantParams]:
    """Return integers and parameters of small error ``sum |w - w_q|^0.7``, for every scale's values.

    That sum is never above that of rounding to nearest in the exact range, which is one of the starts; the others are
    the range of least squared error and, for float zero points, the range that need not include 0. The squared error
    may well be larger: it is not what is minimised.

    Args:
        weight: The tensor.
        grid: The integers to use. Where it is symmetric only the scale is fitted.
        granularity: What one scale covers.
        float_zero: Return float32 zero points, for runtimes that take them: finer, but 0 is no longer exact. Otherwise
            they are rounded, and each round is judged by the rounded ones.
        name: The tensor, for the error.

    Raises:
        InputError: The tensor holds NaN or infinity.
    """
    float_zero = float_zero and not grid.symmetric
    exact = weight_qparams(weight, grid, granularity, name=name)
    rows, members = to_rows(weight, granularity), None
    if rows.size != weight.size:  # what fills up a short last block counts for nothing
        members = to_rows(np.ones(weight.shape, np.float32), granularity)
    starts = [
        (row_values(params.scale, granularity), row_values(params.zero_point, granularity).astype(np.float32))
        for params in (exact, search_qparams(weight, grid, granularity, name=name))
    ]
    if float_zero and weight.size:
        starts.append(_tight(rows, members, grid, *starts[0]))
    scale, zero = (np.empty(len(rows), np.float32) for _ in range(2))
    for part in row_slices(rows):
        values, mask = rows[part].astype(np.float32), None if members is None else members[part]
        best = np.full(len(values), np.inf, np.float32)
        for start in starts:
            unit = start[0][part]
            norm, factor, offset = _solve(values / unit[:, None], mask, grid, start[1][part], float_zero=float_zero)
            norm *= np.abs(unit / starts[0][0][part]) ** np.float32(
                NORM
            )  # from steps of one start to those of the first
            better = norm < best
            for kept, new in ((best, norm), (scale[part], factor * unit), (zero[part], offset)):
                np.copyto(kept, new, where=better)
    scale = np.copysign(np.maximum(np.abs(scale), np.float32(SMALLEST_SCALE)), scale)
    shaped = from_rows(scale, weight.shape, granularity), from_rows(zero, weight.shape, granularity)
    params = QuantParams(shaped[0], shaped[1] if float_zero else shaped[1].astype(grid.dtype), grid, granularity)
    return quantize(weight, params, name=name), params


def _tight(
    rows: np.ndarray, members: np.ndarray | None, grid: IntegerGrid, scale: np.ndarray, zero: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point of each row's exact range, not widened to 0."""
    inside = True if members is None else members > 0
    low = rows.min(axis=1, initial=np.inf, where=inside).astype(np.float32)
    high = rows.max(axis=1, initial=-np.inf, where=inside).astype(np.float32)
    size = (high - low) / np.float32(grid.steps)
    fine = size > 2.0**-20 * np.maximum(np.abs(low), np.abs(high))  # beyond, the zero point would leave no digits
    size = np.where(fine, size, scale)
    return size, np.where(fine, grid.low - low / size, zero)


def _solve(
    values: np.ndarray, mask: np.ndarray | None, grid: IntegerGrid, zero: np.ndarray, *, float_zero: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the smallest norm met in the rounds from one start, and its scale and zero point, for each row.

    Args:
        values: float32 [rows, n], in steps of the start.
        mask: 1 where there is a value, else 0; None where all are.
        grid: The integers to use.
        zero: Zero points to begin with.
        float_zero: Whether zero points need not be integers.
    """
    factor, beta = np.ones(len(values), np.float32), BETA
    count = np.float32(max(values.shape[1], 1)) if mask is None else mask.sum(axis=1)
    best = np.full(len(values), np.inf, np.float32), factor.copy(), zero.copy()
    for _ in range(ROUNDS):
        used = zero if float_zero else np.clip(np.rint(zero), grid.low, grid.high)
        centered = values / factor[:, None]
        steps = np.rint(centered + used[:, None])
        np.clip(steps, grid.low, grid.high, out=steps)
        steps -= used[:, None]
        error = (values - steps * factor[:, None]) if mask is None else (values - steps * factor[:, None]) * mask
        size = np.abs(error)
        slope = np.maximum(size, np.float32(1e-8)) ** np.float32(NORM - 1)
        norm = np.einsum("rn,rn->r", size, slope)
        better = norm < best[0]
        for kept, new in zip(best, (norm, factor, used), strict=True):
            np.copyto(kept, new, where=better)
        if not better.any():
            break
        outliers = np.copysign(np.maximum(size - slope / np.float32(beta), 0), error)
        beta *= GROWTH
        target = values - outliers
        weighted = steps if mask is None else steps * mask
        dot, square = (np.einsum("rn,rn->r", weighted, other) for other in (target, steps))
        fits = (square > 0) & (dot > 0)
        factor = np.where(fits, dot / np.where(fits, square, 1), factor)
        if not grid.symmetric:
            steps -= target / factor[:, None]
            zero = used + (steps if mask is None else steps * mask).sum(axis=1) / count
    return best
