"""Look-up tables for weights: one-dimensional k-means, weighted by importance, apart from any graph.

``weight ~ lut[block][index]``. In one dimension clusters are intervals of the sorted values, so that a partition is a
list of cuts and, with prefix sums of ``s``, ``s x`` and ``s x^2``, the mean and the squared error of any interval take
constant time (Wang & Song, "Ckmeans.1d.dp", R Journal 3/2, 2011). Dynamic programming finds the best cuts between a few
hundred cells, Lloyd's rounds (1982) then move them among all values. Up to ``CELLS`` distinct values the result is the
global optimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from optkit.errors import InputError

CELLS = 256  # or twice as many as there are levels
WIDEST = 16  # cells of an interval, in multiples of the average
CAPPINGS = 20  # of the gaps before outliers, at most
ROUNDS = 300  # of Lloyd's iteration, at most
ENOUGH = 1e-6  # a round that gains less than this share of the error is the last

Zeros = Literal["free", "entry", "apart"]
MOST_ENTRIES = 256  # of a LUT: indices are uint8


def codebook(
    weight: np.ndarray,
    bits: int,
    *,
    axis: int = 0,
    channels_per_lut: int = 0,
    importance: np.ndarray | None = None,
    zeros: Zeros = "free",
    name: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """Return LUTs and indices with the smallest (importance-weighted) squared error that was found.

    Deterministic. A block with at most ``2**bits`` distinct values is represented exactly; one with fewer repeats its
    largest.

    Args:
        weight: float16 or float32, any shape.
        bits: 1 to 8; a LUT has ``2**bits`` entries.
        axis: The channels' axis; read only with ``channels_per_lut``.
        channels_per_lut: How many neighbouring channels share a LUT; the last block may be short. 0: all do.
        importance: What an error at each weight costs, not negative, broadcastable to ``weight``. With the second
            moments E[x^2] of the inputs that weights are multiplied with, the error of the product is minimized as far
            as inputs are uncorrelated. All 0 counts as all 1.
        zeros: What weights that are exactly 0, a pruned layer's, become: ``free``: what is nearest; ``entry``: 0, which
            is one of the entries; ``apart``: 0, the first of ``2**bits + 1`` entries (256 with 8 bits), which no other
            weight takes.
        name: The tensor, for the error.

    Returns:
        The LUTs, [blocks, 2**bits] in the weight's type, ascending but for a 0 set apart, and the indices, uint8 in the
        weight's shape.

    Raises:
        InputError: ``bits`` or ``channels_per_lut`` is out of range, a weight or an importance is not finite, or an
            importance is negative or of another shape.
    """
    where = f"tensor '{name}'" if name else ""
    if not 1 <= bits <= 8:
        raise InputError(f"a LUT of {bits} bits is not possible", where=where, hint="choose 1 to 8 bits")
    if channels_per_lut < 0:
        raise InputError(f"{channels_per_lut} channels cannot share a LUT", where=where, hint="0 means all")
    if not np.isfinite(weight).all():
        hint = "keep the nodes that read it in float with a rule"
        raise InputError("it holds values that are not finite and no LUT has", where=where, hint=hint)
    spread = None if importance is None else _spread(importance, weight, where)
    blocks = lut_blocks(weight, axis, channels_per_lut)
    first = int(zeros == "apart")  # entry that weights other than 0 may take
    luts = np.zeros((len(blocks), min((1 << bits) + first, MOST_ENTRIES)), weight.dtype)
    indices = np.empty(weight.shape, np.uint8)
    for number, block in enumerate(blocks):
        values = weight[block].astype(np.float64).ravel()
        counted = values != 0 if zeros != "free" else np.ones(values.size, bool)
        weights = None if spread is None else spread[block].ravel()[counted]
        own = levels(values[counted], luts.shape[1] - (zeros != "free"), weights)
        luts[number, first:] = np.sort(np.append(own, 0.0)) if zeros == "entry" else own
        entries = luts[number, first:].astype(np.float64)
        nearest = first + np.searchsorted(_middles(entries), values)
        indices[block] = np.where(counted | (zeros == "entry"), nearest, 0).reshape(weight[block].shape)
    return luts, indices


def reconstruct(lut: np.ndarray, indices: np.ndarray, *, axis: int = 0, channels_per_lut: int = 0) -> np.ndarray:
    """Return the weights that LUTs [blocks, entries] and indices stand for, in the indices' shape and the LUTs' type.

    Raises:
        InputError: The number of LUTs is not that of the blocks.
    """
    blocks = lut_blocks(indices, axis, channels_per_lut)
    if len(blocks) != len(lut):
        raise InputError(f"{len(lut)} LUTs cannot serve {len(blocks)} blocks of channels")
    weight = np.empty(indices.shape, lut.dtype)
    for entries, block in zip(lut, blocks, strict=True):
        weight[block] = entries[indices[block]]
    return weight


def lut_blocks(array: np.ndarray, axis: int, channels_per_lut: int) -> list[tuple[slice, ...]]:
    """Return where the weights of each LUT lie; one block with everything in it for 0 channels or an empty tensor."""
    if not channels_per_lut or not array.ndim or not array.size:
        return [(slice(None),) * array.ndim]
    before = (slice(None),) * (axis % array.ndim)
    starts = range(0, array.shape[axis], channels_per_lut)
    return [(*before, slice(start, start + channels_per_lut)) for start in starts]


def levels(values: np.ndarray, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the ``count`` real levels, float64 and ascending, to which values move with the least squared error.

    Two starts are improved and the better result is taken: dynamic programming over cells, and evenly spaced levels.

    Args:
        values: float64 [n], finite.
        count: How many levels.
        weights: What each value's squared error counts, float64 [n], not negative.
    """
    points = _points(values, weights)
    if points.at.size <= count:
        last = points.at[-1] if points.at.size else 0.0
        return np.concatenate([points.at, np.full(count - points.at.size, last)])
    points, middle = points.weighted().centered()
    if points.at.size <= count:  # the others count nothing
        return np.concatenate([points.at, np.full(count - points.at.size, points.at[-1])]) + middle
    step = (points.at[-1] - points.at[0]) / count
    even = points.at[0] + step * (np.arange(count) + 0.5)
    starts = (np.sort(points.means(_best_cuts(points, count), even)), even)
    results = [_improve(points, start) for start in starts]
    return results[int(np.argmin([error for _, error in results]))][0] + middle


@dataclass(frozen=True)
class _Points:
    """Distinct values and prefix sums over them.

    Attributes:
        at: The values, ascending, float64 [n].
        weight: What each counts.
        sums: [3, n + 1], of s, s x and s x^2.
    """

    at: np.ndarray
    weight: np.ndarray
    sums: np.ndarray

    @staticmethod
    def of(at: np.ndarray, weight: np.ndarray) -> _Points:
        sums = np.zeros((3, at.size + 1))
        for row, moment in zip(sums, (weight, weight * at, weight * at**2), strict=True):
            np.cumsum(moment, out=row[1:])
        return _Points(at, weight, sums)

    def weighted(self) -> _Points:
        """Return the points that count anything; all of them, equally, where none does."""
        counts = self.weight > 0
        return (
            _Points.of(self.at[counts], self.weight[counts]) if counts.any() else _Points.of(self.at, self.weight + 1.0)
        )

    def centered(self) -> tuple[_Points, float]:
        """Return the points around 0, where variances do not cancel, and how far they were moved."""
        middle = float(self.sums[1, -1] / self.sums[0, -1])
        return _Points.of(self.at - middle, self.weight), middle

    def within(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the three sums over each interval between neighbouring edges."""
        weight, first, second = np.diff(self.sums[:, edges], axis=1)
        return weight, first, second

    def means(self, edges: np.ndarray, empty: np.ndarray) -> np.ndarray:
        """Return the mean of each interval; where it holds nothing, what ``empty`` has there."""
        weight, first, _ = self.within(edges)
        return np.asarray(np.divide(first, weight, out=empty.copy(), where=weight > 0))


def _points(values: np.ndarray, weights: np.ndarray | None) -> _Points:
    order = None if weights is None else np.argsort(values, kind="stable")
    ascending = np.sort(values) if order is None else values[order]
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]])) if values.size else np.arange(0)
    if weights is None or order is None:
        counts = np.diff(np.append(starts, values.size)).astype(np.float64)
    else:
        counts = np.add.reduceat(weights[order], starts) if values.size else np.zeros(0)
    return _Points.of(ascending[starts], counts)


def _best_cuts(points: _Points, count: int) -> np.ndarray:
    """Return the edges [count + 1] of the best partition whose cuts lie between cells.

    With D_k(j) the least error of the first j cells in k intervals, D_k(j) = min over i of D_{k-1}(i) + error(i, j).
    Where cells are not points, an interval has at most ``WIDEST`` times as many of them as on average.
    """
    cells = _cells(points, max(CELLS, 2 * count))
    last = cells.size - 1
    widest = last if last == points.at.size else min(last, WIDEST * -(-last // count))
    to = np.arange(last + 1)[:, None]
    start = to - np.arange(widest, -1, -1)  # [to, widest + 1]: first cells of the intervals that end at `to`
    weight, first, second = points.sums[:, cells[to]] - points.sums[:, cells[np.maximum(start, 0)]]
    explained = np.divide(first**2, weight, out=np.zeros_like(first), where=weight > 0)
    error = np.where(start < 0, np.inf, np.maximum(second - explained, 0.0))  # 0 for an empty interval
    least = np.concatenate([np.full(widest, np.inf), [0.0], np.full(last, np.inf)])  # D_0, infinite below 0 cells
    before = sliding_window_view(least, widest + 1)  # [to, widest + 1]: D_{k-1} at each start
    choices, cut_before = np.empty_like(error), np.empty((count, last + 1), np.int32)
    for number in range(count):
        np.add(error, before, out=choices)
        chosen = choices.argmin(axis=1)
        cut_before[number] = start[to[:, 0], chosen]
        least[widest:] = choices[to[:, 0], chosen]
    edges = np.full(count + 1, last)
    for number in range(count - 1, -1, -1):
        edges[number] = cut_before[number, edges[number + 1]]
    return np.asarray(cells[edges])


def _cells(points: _Points, most: int) -> np.ndarray:
    """Return the edges of at most ``most`` cells, narrow where the optimal levels lie close together.

    Those have a density proportional to the cube root of that of the values (Panter & Dite, Proc. IRE 39/1, 1951).
    Between neighbours dx apart that count s, density is s / dx, and its cube root times dx is s^(1/3) dx^(2/3). A gap
    before an outlier counts no more than one cell: it holds nothing to divide.
    """
    size = points.at.size
    if size <= most:
        return np.arange(size + 1)
    measure = np.cbrt((points.weight[1:] + points.weight[:-1]) / 2 * np.diff(points.at) ** 2)
    for _ in range(CAPPINGS):
        total = np.cumsum(measure)
        cuts = np.searchsorted(total, np.linspace(0.0, total[-1], most + 1)[1:-1]) + 1
        cells = np.unique(np.concatenate([[0], np.minimum(cuts, size - 1), [size]]))
        if 2 * cells.size > most:
            break
        measure = np.minimum(measure, total[-1] / most)
    return cells


def _improve(points: _Points, centers: np.ndarray) -> tuple[np.ndarray, float]:
    """Return levels after Lloyd's rounds from ``centers``, and their squared error."""
    least = np.inf
    for _ in range(ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(points.at, _middles(centers)), [points.at.size]])
        weight, first, second = points.within(edges)
        centers = np.divide(first, weight, out=centers.copy(), where=weight > 0)
        error = float((second - first * np.where(weight > 0, centers, 0.0)).sum())
        if not error < least * (1 - ENOUGH):
            break
        least = error
    return centers, error


def _middles(ascending: np.ndarray) -> np.ndarray:
    """Return the values halfway between neighbours: above one, the next is nearer."""
    return np.asarray((ascending[1:] + ascending[:-1]) / 2)


def _spread(importance: np.ndarray, weight: np.ndarray, where: str) -> np.ndarray:
    try:
        spread = np.broadcast_to(importance.astype(np.float64), weight.shape)
    except ValueError as error:
        shapes = f"{list(importance.shape)} does not fit weights of shape {list(weight.shape)}"
        raise InputError(f"importance of shape {shapes}", where=where) from error
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise InputError("an importance is negative or not finite", where=where)
    largest = float(importance.max(initial=0.0))
    return spread / largest if largest > 0 else spread  # squares of huge or tiny moments stay in range
