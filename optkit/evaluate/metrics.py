"""Accuracy metrics as sums: each sample gives a few numbers, and their sum over samples gives the metric.

Because a metric is a function of sums, resampling it a thousand times is one matrix product
(`optkit.evaluate.evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from optkit.dataset.samples import Labels
from optkit.dataset.usercode import load_object
from optkit.errors import InputError, did_you_mean
from optkit.evaluate.fidelity import Outputs, score_rows

SMALLEST_PROBABILITY = 1e-12  # a class that a quantized model gives exactly 0 would cost infinitely much
LARGEST_PSNR_DB = 100.0  # of an image without error
IGNORED = -100  # the label that training code gives to padding; all negative labels count nowhere


@dataclass(frozen=True)
class Metric:
    """A number over a data set.

    Attributes:
        name: For reports.
        statistics: (outputs by name, label) of one sample -> numbers that can be added up, [k].
        combine: Sums of these [..., k] -> the metric [...].
        higher_is_better: Whether a fall of the number is a loss.
        next_token: Labels are the model's own first integer input, shifted by one position.
        note: How the scores were read, for reports.
    """

    name: str
    statistics: Callable[[Outputs, Any], np.ndarray]
    combine: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool = True
    next_token: bool = False
    note: str = ""


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the first sum over the second: a mean where the second counts; 0 where it is 0."""
    return np.asarray(np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0))


def top_k(k: int, output: str, probabilities: bool) -> Metric:
    """Share of rows whose label is among the ``k`` highest scores.

    Of equal scores the lower class ranks first, as argmax has it; a row with NaN is wrong.
    """

    def statistics(outputs: Outputs, label: np.ndarray) -> np.ndarray:
        scores, classes = labelled_rows(outputs[output], label, probabilities)
        own, lower = _of_class(scores, classes), np.arange(scores.shape[1]) < classes[:, None]
        ahead = (scores > own).sum(1) + ((scores == own) & lower).sum(1)
        right = (ahead < k) & ~np.isnan(scores).any(1)
        return np.array([right.sum(), len(classes)], np.float64)

    return Metric(f"top{k}", statistics, ratio)


def f1(output: str, probabilities: bool, classes: int) -> Metric:
    """F1 = 2 tp / (2 tp + fp + fn): of class 1 among two classes, else the mean over the classes that occur.

    A class occurs where it is a label or was predicted; the mean over classes is scikit-learn's macro average.
    """

    def statistics(outputs: Outputs, label: np.ndarray) -> np.ndarray:
        scores, true = labelled_rows(outputs[output], label, probabilities)
        predicted = scores.argmax(1)
        hits = 2 * np.bincount(true[predicted == true], minlength=classes)
        total = np.bincount(true, minlength=classes) + np.bincount(predicted, minlength=classes)
        table = np.stack([hits, total])  # 2 tp, 2 tp + fp + fn: [2, classes]
        return (table if classes > 2 else table[:, 1:]).astype(np.float64).ravel()

    def combine(sums: np.ndarray) -> np.ndarray:
        hits, total = np.moveaxis(sums.reshape(*sums.shape[:-1], 2, -1), -2, 0)
        scores = np.divide(hits, total, out=np.zeros(hits.shape), where=total > 0)
        return np.asarray(scores.sum(-1) / np.maximum((total > 0).sum(-1), 1))

    return Metric("f1" if classes == 2 else "f1 (macro)", statistics, combine)


def nll(output: str, probabilities: bool) -> Metric:
    """Negative log-likelihood of the labels in nats, the mean over rows.

    Scores go through a softmax unless they are ``probabilities``, which count as at least 1e-12.
    """

    def statistics(outputs: Outputs, label: np.ndarray) -> np.ndarray:
        scores, classes = labelled_rows(outputs[output], label, probabilities)
        own = _of_class(scores, classes)[:, 0]
        if probabilities:
            logs = np.log(np.maximum(own, SMALLEST_PROBABILITY))
        else:
            top = scores.max(1, initial=-np.inf)
            with np.errstate(invalid="ignore"):  # inf - inf: NaN, which counts as the smallest probability
                logs = own - top - np.log(np.exp(scores - top[:, None]).sum(1))
        logs = np.where(np.isfinite(logs), logs, math.log(SMALLEST_PROBABILITY))
        return np.array([-logs.sum(), len(classes)])

    return Metric("nll", statistics, ratio, higher_is_better=False)


def perplexity(output: str, probabilities: bool) -> Metric:
    """The exponential of the negative log-likelihood."""
    return replace(nll(output, probabilities), name="perplexity", combine=lambda sums: np.exp(ratio(sums)))


def mse(output: str) -> Metric:
    """Mean of the squared differences between output and label, over all elements of all samples."""

    def statistics(outputs: Outputs, label: np.ndarray) -> np.ndarray:
        error = outputs[output] - alike(label, outputs[output])
        return np.array([(error**2).sum(), error.size])

    return Metric("mse", statistics, ratio, higher_is_better=False)


def psnr(output: str, peak: float) -> Metric:
    """Mean over samples of ``10 log10(peak^2 / mse)``, in dB; a sample without error counts as 100 dB."""

    def statistics(outputs: Outputs, label: np.ndarray) -> np.ndarray:
        error = outputs[output] - alike(label, outputs[output])
        smallest = peak**2 / 10 ** (LARGEST_PSNR_DB / 10)
        return np.array([10 * math.log10(peak**2 / max(float(np.mean(error**2)), smallest)), 1.0])

    return Metric("psnr", statistics, ratio, note=f"peak {peak:g}")


def labelled_rows(output: np.ndarray, label: np.ndarray, probabilities: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return scores [rows, classes] and class indices [rows] of one sample, without the rows labelled negative.

    The class axis is the last one, or the second one (images, [1, classes, height, width]) where only so there are as
    many rows as labels. One score per row becomes the scores of classes 0 and 1: ``1 - p, p`` or ``0, x``.

    Raises:
        InputError: There are more or fewer labels than rows, or a label is not the index of a class.
    """
    if label.dtype.kind not in "iub":
        raise InputError(f"the metric needs class indices as labels, not {label.dtype}")
    scores = score_rows(output)
    if len(scores) != label.size and output.ndim > 2 and output.size == label.size * output.shape[1]:
        scores = score_rows(np.moveaxis(output, 1, -1))
    if len(scores) != label.size:
        what = f"labels of shape {list(label.shape)} do not fit an output of shape {list(output.shape)}"
        raise InputError(what, hint="each row of scores takes one class index; 'METRIC@OUTPUT' scores another output")
    scores = scores.astype(np.float64)
    if scores.shape[1] == 1:
        scores = np.hstack([1 - scores if probabilities else np.zeros_like(scores), scores])
    classes = label.astype(np.int64).ravel()
    if classes.size and classes.max() >= scores.shape[1]:
        raise InputError(
            f"the label {classes.max()} is not one of {scores.shape[1]} classes", hint="labels count from 0"
        )
    return scores[classes >= 0], classes[classes >= 0]


def _of_class(scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return np.take_along_axis(scores, classes[:, None], 1)


def alike(label: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Return the label as float64 in the output's shape, from which only axes of length 1 may differ.

    Raises:
        InputError: It has another shape.
    """
    if [n for n in label.shape if n != 1] != [n for n in output.shape if n != 1]:
        raise InputError(f"labels of shape {list(label.shape)} do not fit an output of shape {list(output.shape)}")
    return label.astype(np.float64).reshape(output.shape)


def are_probabilities(output: np.ndarray) -> bool:
    """Whether scores are probabilities: none negative, and rows that sum to 1 within 1 %; one score: none above 1.

    Logarithms of probabilities need no telling from logits: the softmax of the former is the identity.
    """
    if not output.size or output.dtype.kind != "f" or not np.all(output >= 0):
        return False
    views = [score_rows(output), *([score_rows(np.moveaxis(output, 1, -1))] if output.ndim > 3 else [])]
    if views[0].shape[1] == 1:
        return bool(np.all(output <= 1))
    return any(bool(np.all(np.abs(view.sum(1, dtype=np.float64) - 1) < 1e-2)) for view in views)


def default_metric(label: np.ndarray, output: np.ndarray) -> str:
    """Return the metric that suits a label and the output that is scored.

    Integers: one per sample is ``top1``; one for each position of a sequence [1, T, classes] is ``nll``; one for each
    pixel is ``top1``. Floats of the output's shape: ``mse``.

    Raises:
        InputError: Nothing suits.
    """
    if label.dtype.kind in "iub":
        is_sequence = label.size > 1 and output.ndim == 3 and len(score_rows(output)) == label.size
        return "nll" if is_sequence else "top1"
    if [n for n in label.shape if n != 1] == [n for n in output.shape if n != 1]:
        return "mse"
    what = f"no metric suits {label.dtype} labels of shape {list(label.shape)} and an output of {list(output.shape)}"
    raise InputError(what, hint="give --metric, one of its names or module:function")


NAMES = ("top1", "top5", "f1", "mse", "psnr", "nll", "perplexity")


def metric_named(spec: str, outputs: Sequence[Outputs], labels: Labels | None) -> Metric:
    """Return the metric that ``--metric`` names.

    Args:
        spec: A name, with ``@OUTPUT`` to score another output than the first of floats, and ``:next`` where the labels
            are the input's next tokens; or ``module:name`` of a function ``(outputs, label) -> float``, which is
            averaged and may carry ``higher_is_better = False``, or of a `Metric`.
        outputs: The original model's outputs for the first few samples; they decide whether scores are probabilities.
        labels: All labels, or None.

    Raises:
        InputError: There is no such metric or output, or it needs labels and there are none.
    """
    base, shifted = spec.removesuffix(":next"), spec.endswith(":next")
    name, _, output = base.partition("@")
    if name not in NAMES:
        if ":" not in spec:
            raise InputError(f"no metric '{name}'", hint=did_you_mean(name, NAMES))
        return _from_user(spec)
    if labels is None and not shifted:
        raise InputError(
            f"the metric '{spec}' needs labels", hint="see docs/data.md, or 'nll:next' for language models"
        )
    output = output or scored_output(outputs[0])
    if output not in outputs[0]:
        raise InputError(f"no output '{output}' to score", hint=did_you_mean(output, outputs[0]))
    metric = _built_in(name, output, [np.asarray(sample[output]) for sample in outputs], labels)
    return replace(metric, name=spec if name != "f1" else metric.name, next_token=shifted)


def scored_output(outputs: Outputs) -> str:
    """Return the first output of floats, else the first one."""
    floats = (name for name, value in outputs.items() if isinstance(value, np.ndarray) and value.dtype.kind == "f")
    return next(floats, next(iter(outputs)))


def _built_in(name: str, output: str, scores: Sequence[np.ndarray], labels: Labels | None) -> Metric:
    if name == "mse":
        return mse(output)
    if name == "psnr":
        return psnr(output, _peak(labels if labels is not None else []))
    probabilities = all(are_probabilities(sample) for sample in scores)
    makers: Mapping[str, Callable[[], Metric]] = {
        "top1": lambda: top_k(1, output, probabilities),
        "top5": lambda: top_k(5, output, probabilities),
        "f1": lambda: f1(output, probabilities, max(score_rows(scores[0]).shape[1], 2)),
        "nll": lambda: nll(output, probabilities),
        "perplexity": lambda: perplexity(output, probabilities),
    }
    return replace(makers[name](), note=f"scores read as {'probabilities' if probabilities else 'logits'}")


def _peak(labels: Labels) -> float:
    """Return the span of pixel values that the labels show: 1 for 0..1, 2 for -1..1, 255 for 0..255, else max - min."""
    low = min(float(np.min(label)) for label in labels)
    high = max(float(np.max(label)) for label in labels)
    if low >= 0:
        return next((peak for peak in (1.0, 255.0) if high <= peak), high)
    return 2.0 if low >= -1 and high <= 1 else high - low


def _from_user(spec: str) -> Metric:
    thing = load_object(spec)
    if isinstance(thing, Metric):
        return thing
    if not callable(thing):
        raise InputError(f"'{spec}' is neither a function (outputs, label) -> float nor an optkit.Metric")

    def statistics(outputs: Outputs, label: Any) -> np.ndarray:
        try:
            return np.array([float(thing(outputs, label)), 1.0])
        except InputError:
            raise
        except Exception as error:  # user code
            raise InputError(f"the metric '{spec}' raised {type(error).__name__}: {error}") from error

    return Metric(spec.rpartition(":")[2], statistics, ratio, getattr(thing, "higher_is_better", True))
