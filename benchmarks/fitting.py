"""What the fits of cost models share."""

from __future__ import annotations

from collections.abc import Callable

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
