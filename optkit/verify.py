"""How close two models' outputs are: relative error, SQNR, cosine, largest error, top-1 agreement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Fidelity:
    """Agreement of a model's outputs with the original's, without labels.

    Attributes:
        sqnr_db: Signal to quantization noise, ``10 log10(sum(a^2) / sum((a - b)^2))``, worst output; inf when equal.
        cosine: Cosine similarity, worst output.
        max_error: Largest absolute difference over all outputs.
        top1_agreement: Share of rows (all axes but the last) whose argmax is the same in the first output, or None
            where that output has no axis to rank (fewer than two scores).
        samples: How many samples were compared.
    """

    sqnr_db: float
    cosine: float
    max_error: float
    top1_agreement: float | None
    samples: int


def relative_error(reference: np.ndarray, other: np.ndarray) -> float:
    """Return ``max|a - b| / max|a|``: 0 when equal, inf when shapes, dtypes or non-finite values differ."""
    if reference.shape != other.shape or reference.dtype != other.dtype:
        return float("inf")
    if reference.size == 0:
        return 0.0
    if reference.dtype.kind not in "fc" or reference.dtype == object:
        return 0.0 if np.array_equal(reference, other) else float("inf")
    a, b = reference.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    difference = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    scale = float(np.abs(a[finite]).max(initial=0.0))
    return difference / scale if difference and scale else difference


class FidelityMeter:
    """Accumulates the fidelity of a stream of outputs in constant memory."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}  # per output: a.a, e.e, a.b, b.b
        self._max_error = 0.0
        self._agree = self._rows = self._samples = 0

    def add(self, reference: Outputs, other: Outputs) -> None:
        """Add one sample's outputs.

        Args:
            reference: The original's outputs by name.
            other: The same outputs of the model under test.
        """
        self._samples += 1
        ranked = False
        for name, reference_value in reference.items():
            if reference_value.dtype.kind not in "fiub":
                continue
            a = reference_value.astype(np.float64).ravel()
            b = other[name].astype(np.float64).ravel()
            if a.shape != b.shape:
                a, b = np.ones(1), np.full(1, np.nan)
            error = a - b
            sums = np.array([a @ a, error @ error, a @ b, b @ b])
            self._sums[name] = self._sums.get(name, np.zeros(4)) + sums
            self._max_error = max(self._max_error, float(np.abs(error).max(initial=0.0)), key=_nan_largest)
            scores, other_scores = (_scores(value) for value in (reference_value, other[name]))
            if not ranked and scores.shape[-1] >= 2 and scores.shape == other_scores.shape:
                ranked = True
                self._agree += int((scores.argmax(-1) == other_scores.argmax(-1)).sum())
                self._rows += scores.shape[0]

    def result(self) -> Fidelity:
        """Return the fidelity over everything added."""
        sqnr, cosine = float("inf"), 1.0
        for aa, ee, ab, bb in self._sums.values():
            if ee:
                sqnr = min(sqnr, float(10 * np.log10(aa / ee)) if aa else float("-inf"), key=_nan_smallest)
                norm = float(np.sqrt(aa * bb))
                cosine = min(cosine, float(ab) / norm if norm else 0.0, key=_nan_smallest)
        agreement = self._agree / self._rows if self._rows else None
        return Fidelity(sqnr, cosine, self._max_error, agreement, self._samples)


def _nan_smallest(value: float) -> float:
    return float("-inf") if np.isnan(value) else value


def _nan_largest(value: float) -> float:
    return float("inf") if np.isnan(value) else value


def _scores(value: np.ndarray) -> np.ndarray:
    """Return scores as [rows, classes]; trailing axes of length 1 (``[1, 1000, 1, 1]``) are not classes."""
    while value.ndim > 1 and value.shape[-1] == 1:
        value = value[..., 0]
    return value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)


def compare(reference: Sequence[Outputs] | Iterable[Outputs], other: Sequence[Outputs] | Iterable[Outputs]) -> Fidelity:
    """Return the fidelity of ``other`` against ``reference``, sample by sample."""
    meter = FidelityMeter()
    for a, b in zip(reference, other, strict=True):
        meter.add(a, b)
    return meter.result()
