"""Accuracy of a compiled model against the original, with an interval, and fidelity, in one pass over the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from optkit.dataset.samples import Sample, Samples
from optkit.errors import InputError, VerificationError
from optkit.evaluate.fidelity import Fidelity, FidelityMeter, Outputs
from optkit.evaluate.metrics import IGNORED, Metric, default_metric, metric_named, scored_output
from optkit.package.contract import Run

T = TypeVar("T")
CONFIDENCE = 0.95
COUNTS_AT_ONCE = 1 << 22  # of float64: 32 MiB


@dataclass(frozen=True)
class Evaluation:
    """A metric of the original and of the compiled model on the same samples.

    Attributes:
        metric: Its name.
        n: Number of samples.
        reference: The original's value.
        candidate: The compiled model's value.
        drop: By how much the compiled model is worse, in the metric's own unit; negative where it is better.
        interval: 95 % confidence interval of ``drop``, paired bootstrap over samples.
        distinguishable: Whether the interval excludes 0. One sample distinguishes nothing.
        higher_is_better: Whether a higher value is the better one.
        note: How the scores were read.
    """

    metric: str
    n: int
    reference: float
    candidate: float
    drop: float
    interval: tuple[float, float]
    distinguishable: bool
    higher_is_better: bool = True
    note: str = ""

    def __str__(self) -> str:
        low, high = self.interval
        verdict = "" if self.distinguishable else ", not distinguishable"
        return (
            f"{self.metric} {self.reference:.4f} -> {self.candidate:.4f} (n = {self.n}, "
            f"drop {self.drop:.4f}, 95 % interval {low:.4f} to {high:.4f}{verdict})"
        )


def evaluate(
    reference: Run,
    candidate: Run,
    samples: Samples,
    metrics: Sequence[str] = (),
    *,
    chunk: int = 16,
    track: Callable[[Iterable[Sample], str, int], Iterable[Sample]] | None = None,
) -> tuple[Fidelity, tuple[Evaluation, ...]]:
    """Run two models on the same samples once, and compare their outputs with each other and with the labels.

    Args:
        reference: Runs the original.
        candidate: Runs the compiled model.
        samples: The samples; at most ``chunk`` of them, and their outputs, are held at a time.
        metrics: Metrics by name (`optkit.evaluate.metrics.metric_named`). None given: the one that suits the labels
            (`optkit.evaluate.metrics.default_metric`), or none where there are no labels.
        chunk: How many samples are run in one call.
        track: Wraps the samples in a progress display: ``track(samples, description, total)``.

    Returns:
        The fidelity, and an evaluation for each metric.

    Raises:
        InputError: A metric is unknown, needs labels that are not there, or does not fit labels and outputs.
        VerificationError: A model gave no outputs for a sample.
    """
    meter = FidelityMeter()
    chosen: list[Metric] | None = None
    rows: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
    tracked = track(samples, "evaluating", len(samples)) if track else samples
    number = 0
    for batch in _chunks(tracked, chunk):
        outputs, others = reference(batch), candidate(batch)
        if not len(outputs) == len(others) == len(batch):
            what = f"{len(outputs)} and {len(others)} outputs for {len(batch)} samples"
            raise VerificationError(what, where=samples.source)
        if chosen is None:
            chosen = _choose(metrics, samples, outputs)
            rows = [([], []) for _ in chosen]
        for sample, output, other in zip(batch, outputs, others, strict=True):
            meter.add(output, other)
            for metric, (mine, theirs) in zip(chosen, rows, strict=True):
                try:
                    label = next_tokens(sample) if metric.next_token else _label(samples, number)
                    mine.append(metric.statistics(output, label))
                    theirs.append(metric.statistics(other, label))
                except InputError as error:
                    where = f"{samples.source}: sample {number}"
                    raise InputError(error.what, where=where, hint=error.hint) from error
            number += 1
    measured = (_evaluation(metric, *both) for metric, both in zip(chosen or (), rows, strict=True))
    return meter.result(), tuple(measured)


def _choose(metrics: Sequence[str], samples: Samples, outputs: Sequence[Outputs]) -> list[Metric]:
    specs = list(metrics)
    if not specs and samples.labels is not None:
        specs = [default_metric(_label(samples, 0), np.asarray(outputs[0][scored_output(outputs[0])]))]
    return [metric_named(spec, outputs, samples.labels) for spec in specs]


def _label(samples: Samples, index: int) -> Any:
    return np.asarray(samples.labels[index]) if samples.labels is not None else None


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def next_tokens(sample: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return each position's next token: the first integer input [1, T] shifted by one; the last one has none.

    Positions whose next token the input ``attention_mask`` masks have none either.

    Raises:
        InputError: The model has no integer input of two axes.
    """
    tokens = next((array for array in sample.values() if array.dtype.kind in "iu" and array.ndim == 2), None)
    if tokens is None:
        raise InputError("labels ':next' need an integer input [1, T]", hint="give labels with the data instead")
    labels = np.full(tokens.shape, IGNORED, np.int64)
    labels[:, :-1] = tokens[:, 1:]
    mask = sample.get("attention_mask")
    if mask is not None and mask.shape == tokens.shape:
        labels[:, :-1][mask[:, 1:] == 0] = IGNORED
    return labels


def _evaluation(metric: Metric, reference: list[np.ndarray], candidate: list[np.ndarray]) -> Evaluation:
    a, b = np.stack(reference).astype(np.float64), np.stack(candidate).astype(np.float64)
    sign = 1 if metric.higher_is_better else -1
    difference, low, high = paired_bootstrap(a, b, metric.combine)
    interval = (low, high) if sign > 0 else (0.0 - high, 0.0 - low)
    return Evaluation(
        metric.name,
        len(a),
        float(metric.combine(a.sum(0))),
        float(metric.combine(b.sum(0))),
        sign * difference + 0.0,  # not -0.0
        interval,
        len(a) > 1 and not interval[0] <= 0 <= interval[1],
        metric.higher_is_better,
        metric.note,
    )


def paired_bootstrap(
    stats_a: np.ndarray,
    stats_b: np.ndarray,
    combine: Callable[[np.ndarray], np.ndarray],
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the difference of a metric between two models, and its 95 % percentile interval.

    Samples are drawn with replacement, the same ones for both models: a draw is a vector of counts, and its sums are
    ``counts [resamples, n] @ statistics [n, k]`` (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 13.3).

    Args:
        stats_a: Statistics of each sample under model a, [n, k].
        stats_b: The same under model b.
        combine: Sums [..., k] -> metric [...].
        resamples: Number of draws.
        seed: Seed of the draws: the same data gives the same interval.

    Returns:
        ``combine(sum a) - combine(sum b)``, and the interval's ends.
    """
    generator = np.random.default_rng(seed)
    n = len(stats_a)
    differences = []
    step = max(1, COUNTS_AT_ONCE // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        differences.append(combine(counts @ stats_a) - combine(counts @ stats_b))
    low, high = np.quantile(np.concatenate(differences), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(combine(stats_a.sum(0)) - combine(stats_b.sum(0))), float(low), float(high)
