"""What the fits of cost models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


def least_squares(errors: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """Minimize a sum of squares by Levenberg's and Marquardt's method, derivatives by differences."""
    point, damping, step = start, 1e-2, 1e-5
    now = errors(point)
    for _ in range(100):
        slopes = np.column_stack([(errors(point + step * unit) - now) / step for unit in np.eye(len(point))])
        normal, downhill = slopes.T @ slopes, -slopes.T @ now
        while True:
            trial = point + np.linalg.solve(normal + damping * np.diag(np.diag(normal)), downhill)
            value = errors(trial)
            if value @ value < now @ now or damping > 1e9:
                break
            damping *= 4
        gained = now @ now - value @ value
        if gained < 1e-9 * (now @ now):
            break
        point, now, damping = trial, value, damping / 5
    return point


class Timed(Protocol):
    """A published run."""

    @property
    def seconds(self) -> float:
        """What it took."""


def band(pairs: Sequence[tuple[Timed, float]]) -> tuple[float, float, float]:
    """Return the 10th, 50th and 90th centile of measured / predicted."""
    low, median, high = np.percentile([run.seconds / seconds for run, seconds in pairs], [10, 50, 90])
    return round(float(low), 2), round(float(median), 2), round(float(high), 2)


def summarize(label: str, pairs: Sequence[tuple[Timed, float]]) -> None:
    """Print error figures of predicted runs, where there are any."""
    if pairs:
        off = float(np.median([abs(seconds / run.seconds - 1) for run, seconds in pairs]))
        low, median, high = band(pairs)
        print(f"  {label:28s} n={len(pairs):3d}  median error {100 * off:4.1f} %  10/50/90 %: {low} {median} {high}")
