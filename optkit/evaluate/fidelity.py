"""How close two models' outputs are: relative error, SQNR, cosine, largest error, top-1 agreement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optkit.errors import VerificationError

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Fidelity:
    """Agreement of a model's outputs with the original's, without labels.

    Attributes:
        sqnr_db: Signal to quantization noise, ``10 log10(sum(a^2) / sum((a - b)^2))``, worst output; inf when equal,
            -inf when shapes or non-finite values differ.
        cosine: Cosine similarity, worst output; 0 when shapes or non-finite values differ.
        max_error: Largest absolute difference over all outputs; inf when shapes or non-finite values differ.
        top1_agreement: Share of rows (all axes but the last) whose argmax is the same in the first output that holds
            scores (floats or 8-bit integers, two or more on the last axis, at most three axes), or None without one.
        samples: How many samples were compared.
    """

    sqnr_db: float
    cosine: float
    max_error: float
    top1_agreement: float | None
    samples: int


def relative_error(reference: np.ndarray, other: np.ndarray) -> float:
    """Return ``max|a - b| / max|a|`` over the finite values, or ``max|a - b|`` where those of ``a`` are all zero.

    0 when equal; inf when shapes or dtypes differ, when NaN and infinities are not the same ones in the same places,
    or when integers, booleans or strings differ at all. Sequences and maps of arrays give their largest error.
    """
    if not isinstance(reference, np.ndarray):
        return _relative_error_of_parts(reference, other)
    if not isinstance(other, np.ndarray) or reference.shape != other.shape or reference.dtype != other.dtype:
        return float("inf")
    if reference.dtype.kind != "f":
        return 0.0 if np.array_equal(reference, other) else float("inf")
    a, b = reference.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    difference = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    scale = float(np.abs(a[finite]).max(initial=0.0))
    return difference / scale if scale else difference


def _relative_error_of_parts(reference: object, other: object) -> float:
    """Compare outputs that are no tensors: ONNX sequences (lists), maps (dictionaries) and their scalars."""
    if isinstance(reference, dict) and isinstance(other, dict):
        if reference.keys() != other.keys():
            return float("inf")
        reference, other = list(reference.values()), [other[key] for key in reference]
    if isinstance(reference, list) and isinstance(other, list):
        if len(reference) != len(other):
            return float("inf")
        return max((relative_error(a, b) for a, b in zip(reference, other, strict=True)), default=0.0)
    if type(reference) is not type(other):
        return float("inf")
    return relative_error(np.asarray(reference), np.asarray(other))


class FidelityMeter:
    """Accumulates the fidelity of a stream of outputs in constant memory."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}  # per output: a.a, e.e, a.b, b.b
        self._max_error = 0.0
        self._comparable = True
        self._agree = self._rows = self._samples = 0

    def add(self, reference: Outputs, other: Outputs) -> None:
        """Add one sample's outputs. Outputs that are not tensors of numbers are left out.

        Args:
            reference: The original's outputs by name.
            other: The same outputs of the model under test.

        Raises:
            VerificationError: ``other`` lacks an output of the original.
        """
        self._samples += 1
        ranked = False
        for name, reference_value in reference.items():
            if name not in other:
                raise VerificationError(f"the output '{name}' of the original is missing", where="comparison")
            if not isinstance(reference_value, np.ndarray) or reference_value.dtype.kind not in "fiub":
                continue
            self._add_output(name, reference_value, other[name])
            if not ranked and holds_scores(reference_value):
                ranked = True
                self._add_ranking(reference_value, other[name])

    def _add_output(self, name: str, reference: np.ndarray, other: np.ndarray) -> None:
        a, b = np.asarray(reference, np.float64).ravel(), np.asarray(other, np.float64).ravel()
        finite = np.isfinite(a)
        same = reference.shape == np.shape(other) and np.array_equal(a[~finite], b[~finite], equal_nan=True)
        if not same or not np.isfinite(b[finite]).all():
            self._comparable = False
            return
        a, b = a[finite], b[finite]
        error = a - b
        self._sums[name] = self._sums.get(name, np.zeros(4)) + np.array([a @ a, error @ error, a @ b, b @ b])
        self._max_error = max(self._max_error, float(np.abs(error).max(initial=0.0)))

    def _add_ranking(self, reference: np.ndarray, other: np.ndarray) -> None:
        scores = score_rows(reference)
        self._rows += len(scores)
        if reference.shape == np.shape(other):
            other_scores = score_rows(other)
            agree = (scores.argmax(-1) == other_scores.argmax(-1)) & ~np.isnan(other_scores.astype(np.float64)).any(-1)
            self._agree += int(agree.sum())

    def result(self) -> Fidelity:
        """Return the fidelity over everything added."""
        agreement = self._agree / self._rows if self._rows else None
        if not self._comparable:
            return Fidelity(float("-inf"), 0.0, float("inf"), agreement, self._samples)
        sqnr, cosine = float("inf"), 1.0
        for aa, ee, ab, bb in self._sums.values():
            if ee:
                sqnr = min(sqnr, float(10 * np.log10(aa / ee)) if aa else float("-inf"))
                cosine = min(cosine, float(ab / (np.sqrt(aa) * np.sqrt(bb))) if aa and bb else 0.0)
        return Fidelity(sqnr, cosine, self._max_error, agreement, self._samples)


def holds_scores(value: np.ndarray) -> bool:
    """Whether an output can be ranked: floats or 8-bit integers, two or more on its last axis, at most three axes.

    Trailing axes of length 1 (``[1, 1000, 1, 1]``) do not count.
    """
    shape = _without_trailing_ones(value.shape)
    number = value.dtype.kind == "f" or (value.dtype.kind in "iu" and value.dtype.itemsize == 1)
    return number and 1 <= len(shape) <= 3 and shape[-1] >= 2


def score_rows(value: np.ndarray) -> np.ndarray:
    """Return scores as [rows, classes]; trailing axes of length 1 (``[1, 1000, 1, 1]``) are not classes."""
    shape = _without_trailing_ones(value.shape) or (1,)
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    return value.reshape(rows, shape[-1])


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def compare(reference: Sequence[Outputs] | Iterable[Outputs], other: Sequence[Outputs] | Iterable[Outputs]) -> Fidelity:
    """Return the fidelity of ``other`` against ``reference``, sample by sample.

    Raises:
        VerificationError: An output is missing, or there are more samples on one side.
    """
    meter = FidelityMeter()
    others = iter(other)
    for number, a in enumerate(reference):
        b = next(others, None)
        if b is None:
            raise VerificationError(f"outputs of sample {number} are missing", where="comparison")
        meter.add(a, b)
    if next(others, None) is not None:
        raise VerificationError(f"there are outputs for more than {meter.result().samples} samples", where="comparison")
    return meter.result()
