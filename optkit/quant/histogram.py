"""Histograms that widen themselves, and the ranges that estimators read from them.

Bins lie on both sides of 0 and their width is a power of two. A value beyond the last bin doubles the width: pairs of
bins merge, so that one pass over the data suffices and the memory never grows. Exact zeros are counted apart, because
every quantizer represents them without error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

BINS = 8192  # both sides of 0 together


@dataclass
class Histogram:
    """Exact minimum and maximum of everything added, and counts of the values that were sampled.

    Attributes:
        low: Smallest value; inf while nothing was added.
        high: Largest value.
        zeros: How many of the sampled values are exactly 0.
        width: Width of a bin; 0 while all values are 0.
        counts: int64 [BINS]; bin i holds values in [(i - BINS/2) * width, (i + 1 - BINS/2) * width).
        momentum: What a sample's smallest and largest value weigh, against the next sample's; 1: all weigh alike.
        size: Number of elements of the largest tensor added.
        moving: Sums of the smallest and of the largest value of every sample, so weighted, and of the weights.
    """

    low: float = np.inf
    high: float = -np.inf
    zeros: int = 0
    width: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    momentum: float = 1.0
    moving: tuple[float, float, float] = (0.0, 0.0, 0.0)
    size: int = 0

    @property
    def empty(self) -> bool:
        """Whether no value was added."""
        return self.low > self.high

    def add(self, sampled: np.ndarray, low: float, high: float) -> None:
        """Add the values of one sample.

        Args:
            sampled: The values to count, one axis, finite; a subset of all values is enough.
            low: Smallest of all values.
            high: Largest of all values.
        """
        self.low, self.high = min(self.low, low), max(self.high, high)
        lows, highs, weight = (self.momentum * total for total in self.moving)
        self.moving = (lows + low, highs + high, weight + 1)
        self._reach(max(-low, high, 0.0))
        nonzero = sampled[sampled != 0]
        self.zeros += sampled.size - nonzero.size
        if nonzero.size:
            index = np.floor(nonzero.astype(np.float64) / self.width).astype(np.int64) + BINS // 2
            self.counts += np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Add everything that another histogram counted; the other may be widened to the same bins.

        The average range becomes the one that holds those of both.
        """
        averages = [average_range(each) for each in (self, other) if not each.empty]
        if averages:
            self.moving = (min(low for low, _ in averages), max(high for _, high in averages), 1.0)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        largest = max(self.width, other.width) * (BINS // 2) * 0.75  # widths are powers of two: reaches both
        for histogram in (self, other):
            histogram._reach(largest)
        self.zeros += other.zeros
        self.counts = self.counts + other.counts

    def _reach(self, magnitude: float) -> None:
        """Widen the bins until ``magnitude`` lies inside the last one."""
        if magnitude == 0.0:
            return
        exponent = np.frexp(magnitude)[1] - int(np.log2(BINS // 2))  # magnitude < 2^e = width * BINS/2
        needed = float(np.ldexp(1.0, max(int(exponent), -1000)))
        if self.width == 0.0:
            self.width = needed
        while self.width < needed:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
            self.width *= 2

    def edges(self) -> np.ndarray:
        """Return the bins' edges, float64 [BINS + 1]."""
        return (np.arange(BINS + 1) - BINS // 2) * self.width


Range = tuple[float, float]


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """Return one histogram over all the given ones' values."""
    total = Histogram()
    for histogram in histograms:
        copy = replace(histogram, counts=histogram.counts.copy())
        total.merge(copy)
    return total


def minmax_range(histogram: Histogram) -> Range:
    """Return the exact smallest and largest value."""
    return histogram.low, histogram.high


def average_range(histogram: Histogram) -> Range:
    """Return the moving averages of the samples' smallest and largest values, as moving-average observers keep them.

    ``sum(m^(n - i) x_i) / sum(m^(n - i))`` over samples i = 1 ... n with momentum m: the recurrence of Jacob et al.
    2018 ("Quantization and training of neural networks", section 3.1) without its bias to the first sample.
    """
    low, high, weight = histogram.moving
    return low / weight, high / weight


def percentile_range(histogram: Histogram, percentile: float) -> Range:
    """Return the range that leaves ``(100 - percentile) / 2`` per cent of the values out at either end."""
    counts, edges = histogram.counts, histogram.edges()
    total = int(counts.sum()) + histogram.zeros
    tail = total * (100.0 - percentile) / 200.0
    negative = np.cumsum(counts)  # values below each bin's upper edge, zeros not yet in
    negative[BINS // 2 :] += histogram.zeros
    first = int(np.searchsorted(negative, tail, side="right"))  # the bin in which the lower tail ends
    last = int(np.searchsorted(negative, total - tail, side="left"))
    low, high = edges[min(first, BINS)], edges[min(last, BINS - 1) + 1]
    return max(histogram.low, float(low)), min(histogram.high, float(high))


def mse_range(histogram: Histogram, steps: int, *, symmetric: bool) -> Range:
    """Return the range with the smallest mean squared error after rounding to ``steps`` steps.

    Inside the range rounding costs ``scale^2 / 12`` per value (uniform rounding error, zeros excepted), outside a value
    costs its squared distance to the range. Both are sums over bins, so every bin edge is tried as a bound; the two
    bounds are improved in turn until neither moves.
    """
    counts, edges = histogram.counts.astype(np.float64), histogram.edges()
    center = (edges[:-1] + edges[1:]) / 2
    half = BINS // 2
    if symmetric:
        magnitude = counts[half:] + counts[:half][::-1]
        bound = _mse_bound(magnitude, center[half:], edges[half + 1 :], 0.0, 0.0, steps / 2)
        bound = min(bound, max(-histogram.low, histogram.high))
        return -bound, bound
    above, below = counts[half:], counts[:half][::-1]
    low, high = max(-histogram.low, 0.0), max(histogram.high, 0.0)
    for _ in range(4):
        previous = low, high
        for side in (0, 1):
            own, other, fixed = (above, below, low) if side else (below, above, high)
            inside = float(other[center[half:] <= fixed].sum())
            bound = _mse_bound(own, center[half:], edges[half + 1 :], fixed, inside, steps)
            low, high = (
                (low, min(bound, max(histogram.high, 0.0))) if side else (min(bound, max(-histogram.low, 0.0)), high)
            )
        if (low, high) == previous:
            break
    return -low, high


def _mse_bound(
    counts: np.ndarray, center: np.ndarray, edges: np.ndarray, fixed: float, inside: float, steps: float
) -> float:
    """Return the bound of one side, among the edges, with the smallest error while the other side stays ``fixed``."""
    if not counts.any():
        return 0.0
    # sums over the bins beyond each edge of n, n*c and n*c^2
    beyond = [total.sum() - np.cumsum(total) for total in (counts, counts * center, counts * center**2)]
    clipped = beyond[2] - 2 * edges * beyond[1] + edges**2 * beyond[0]
    scale = (edges + fixed) / steps
    rounding = scale**2 / 12 * (np.cumsum(counts) + inside)
    return float(edges[np.argmin(clipped + rounding)])


ENTROPY_BINS, ENTROPY_CANDIDATES = 2048, 128  # resolution, and ranges tried


def entropy_range(histogram: Histogram, steps: int, *, symmetric: bool) -> Range:
    """Return the range whose quantized distribution loses the least information: the smallest KL divergence.

    As in TensorRT's calibration (Migacz, GTC 2017): the reference distribution carries what lies outside the range in
    its outermost bins, the quantized one is built without it and spreads each level's count over those of its bins that
    are occupied. Zeros are left out of both, and the counts are smoothed: a value that occurs often by itself (the
    bound of a Clip, the response to an even background) is no loss to whoever rounds it. Thresholds on the magnitude
    are tried, from one bin per level up to the exact range. Where fewer bins are occupied than there are levels the
    divergence says nothing: the exact range.
    """
    counts, width = histogram.counts.astype(np.float64), histogram.width
    if symmetric:
        counts = (counts + counts[::-1]) / 2
    while _extent(counts[: counts.size // 2][::-1]) + _extent(counts[counts.size // 2 :]) > ENTROPY_BINS:
        counts, width = counts.reshape(-1, 2).sum(axis=1), width * 2
    if np.count_nonzero(counts) <= steps + 1:
        return minmax_range(histogram)
    half = counts.size // 2
    below, above = _extent(counts[:half][::-1]), _extent(counts[half:])
    counts[half - below : half + above] = _smooth(counts[half - below : half + above], steps)
    smallest = max((steps + 1) // 2, steps + 1 - min(below, above))
    thresholds = np.unique(np.linspace(smallest, max(below, above, smallest), ENTROPY_CANDIDATES).astype(int))
    bins = [(min(below, int(threshold)), min(above, int(threshold))) for threshold in thresholds]
    low, high = bins[int(np.argmin([_divergence(counts, *pair, steps) for pair in bins]))]
    bound = max(-histogram.low, histogram.high)
    if symmetric:
        return -min(bound, high * width), min(bound, high * width)
    return max(histogram.low, -low * width), min(histogram.high, high * width)


def _extent(counts: np.ndarray) -> int:
    """Return how many bins, from 0 outwards, reach the outermost occupied one."""
    occupied = np.flatnonzero(counts)
    return int(occupied[-1]) + 1 if occupied.size else 0


def _smooth(counts: np.ndarray, steps: int) -> np.ndarray:
    """Return a moving average over twice the widest level, mirrored at the ends so that no count is lost."""
    reach = -(-counts.size // (steps + 1))
    padded = np.pad(counts, reach, mode="symmetric")
    return np.convolve(padded, np.full(2 * reach + 1, 1 / (2 * reach + 1)), mode="valid")


def _divergence(counts: np.ndarray, below: int, above: int, steps: int) -> float:
    """Return KL(reference || quantized) for the range of ``below`` bins under 0 and ``above`` bins over it."""
    first, last = counts.size // 2 - below, counts.size // 2 + above
    inside = counts[first:last]
    if not inside.any():
        return np.inf
    reference = inside.copy()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    level = np.rint((np.arange(inside.size) + 0.5) * (steps / inside.size)).astype(np.int64)
    occupied = np.bincount(level, inside > 0)
    spread = np.bincount(level, inside) / np.maximum(occupied, 1)
    quantized = np.where(inside > 0, spread[level], 0.0)
    p, q = reference / reference.sum(), quantized / quantized.sum()
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))).sum())
