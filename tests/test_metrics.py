"""Metrics against their definitions, and how the one that suits the labels is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.dataset.samples import Samples
from optkit.evaluate.evaluation import evaluate
from optkit.evaluate.metrics import are_probabilities, default_metric, metric_named
from refusals import refused
from scores import echo, logits, seeds, softmax


def value_of(spec: str, outputs: list[np.ndarray], labels: list[np.ndarray] | np.ndarray) -> float:
    """The metric of the outputs of some samples, each under the name y."""
    metric = metric_named(spec, [{"y": output} for output in outputs], labels)
    rows = [metric.statistics({"y": output}, np.asarray(label)) for output, label in zip(outputs, labels, strict=True)]
    return float(metric.combine(np.sum(rows, 0)))


# --- metrics ---


@given(seeds)
def test_top_k_counts_labels_among_the_k_highest(seed):
    scores = logits(seed, 20, 1, 7)
    labels = np.random.default_rng(seed).integers(0, 7, 20)
    ranks = [
        int((-row[0]).argsort(kind="stable").tolist().index(label)) for row, label in zip(scores, labels, strict=True)
    ]
    assert value_of("top1", list(scores), labels) == np.mean([rank < 1 for rank in ranks])
    assert value_of("top5", list(scores), labels) == np.mean([rank < 5 for rank in ranks])


def test_of_equal_scores_the_lower_class_ranks_first():
    flat = [np.zeros((1, 8), np.float32)] * 8
    assert value_of("top1", flat, np.arange(8)) == 1 / 8
    assert value_of("top5", flat, np.arange(8)) == 5 / 8


def test_a_row_with_nan_is_wrong():
    assert value_of("top1", [np.array([[1, np.nan]], np.float32)], np.array([0])) == 0
    assert value_of("nll", [np.array([[1, np.nan]], np.float32)], np.array([0])) == pytest.approx(-math.log(1e-12))


@given(seeds, st.integers(2, 5))
def test_f1_is_twice_the_hits_over_labels_and_predictions(seed, classes):
    scores, labels = logits(seed, 30, 1, classes), np.random.default_rng(seed).integers(0, classes, 30)
    predicted = scores[:, 0].argmax(-1)
    by_class = []
    for c in [1] if classes == 2 else range(classes):
        hits, total = ((predicted == c) & (labels == c)).sum(), (predicted == c).sum() + (labels == c).sum()
        by_class += [2 * hits / total] if total else []
    assert value_of("f1", list(scores), labels) == pytest.approx(np.mean(by_class) if by_class else 0)


def test_f1_is_named_after_its_average():
    assert metric_named("f1", [{"y": logits(0, 1, 2)}], np.array([0])).name == "f1"
    assert metric_named("f1", [{"y": logits(0, 1, 3)}], np.array([0])).name == "f1 (macro)"


@given(seeds)
def test_nll_takes_logits_logarithms_and_probabilities(seed):
    scores, labels = logits(seed, 5, 3, 6), np.random.default_rng(seed).integers(0, 6, (5, 3))
    expected = -np.mean(np.log(np.take_along_axis(softmax(scores.astype(np.float64)), labels[..., None], 2)))
    for given_scores in (scores, np.log(softmax(scores)), softmax(scores)):
        assert value_of("nll", list(given_scores), labels) == pytest.approx(expected, rel=1e-4)
        assert value_of("perplexity", list(given_scores), labels) == pytest.approx(math.exp(expected), rel=1e-4)


def test_a_probability_of_zero_counts_as_the_smallest():
    assert value_of("nll", [np.array([[1, 0]], np.float32)], np.array([1])) == pytest.approx(-math.log(1e-12))


def test_one_score_speaks_about_two_classes():
    probabilities = [np.array([[p]], np.float32) for p in (0.9, 0.2, 0.6)]
    labels = np.array([1, 0, 0])
    assert value_of("top1", probabilities, labels) == pytest.approx(2 / 3)
    assert value_of("f1", probabilities, labels) == pytest.approx(2 / 3)
    assert value_of("nll", probabilities, labels) == pytest.approx(-np.mean(np.log([0.9, 0.8, 0.4])), rel=1e-5)
    scores = [np.array([math.log(p / (1 - p))], np.float32) for p in (0.9, 0.2, 0.6)]  # logits of the same
    assert value_of("top1", scores, labels) == pytest.approx(2 / 3)
    assert value_of("nll", scores, labels) == pytest.approx(-np.mean(np.log([0.9, 0.8, 0.4])), rel=1e-5)


def test_negative_labels_count_nowhere():
    scores = np.array([[[0, 1], [0, 1], [1, 0]]], np.float32)
    assert value_of("top1", [scores], [np.array([1, -100, 1])]) == 0.5
    assert value_of("nll", [scores], [np.array([-1, -1, -1])]) == 0


def test_pixels_are_classified_over_the_second_axis():
    scores = logits(0, 1, 3, 4, 5)
    assert value_of("top1", [scores], [scores.argmax(1)[0]]) == 1
    assert value_of("top1", [softmax(scores.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)], [scores.argmax(1)]) == 1


def test_mse_and_psnr():
    outputs, labels = [np.array([[1.0, 3.0]], np.float32)] * 2, [np.array([1.0, 1.0]), np.array([1.0, 3.0])]
    assert value_of("mse", outputs, labels) == pytest.approx(1)
    peak = 10 * math.log10(255**2 / 2)
    assert value_of("psnr", outputs, labels) == pytest.approx((peak + 100) / 2)


@pytest.mark.parametrize(
    ("low", "high", "peak"),
    [(0, 1, "1"), (0, 0.2, "1"), (0, 200, "255"), (-1, 1, "2"), (-3, 5, "8"), (0, 1000, "1000")],
)
def test_the_peak_of_psnr_follows_the_labels(low, high, peak):
    labels = np.array([[low, high]], np.float64)
    assert metric_named("psnr", [{"y": labels}], labels).note == f"peak {peak}"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (np.array([[0.25, 0.75]]), True),
        (np.array([[0.25, 0.751]]), True),  # rounded to fp16 or int8
        (np.array([[0.25, 0.9]]), False),
        (np.array([[-0.5, 1.5]]), False),
        (np.array([[0.4]]), True),
        (np.array([[1.4]]), False),
        (np.full((1, 4, 2, 2), 0.25), True),
        (np.zeros((1, 0)), False),
        (np.array([[0, 1]]), False),
    ],
)
def test_probabilities_are_told_from_logits(scores, expected):
    assert are_probabilities(scores) is expected


@pytest.mark.parametrize(
    ("label", "output", "expected"),
    [
        (np.int64(3), np.zeros((1, 10)), "top1"),
        (np.array([3], np.uint8), np.zeros((1, 10, 1, 1)), "top1"),
        (np.array([1, 2, 3]), np.zeros((1, 3, 10)), "nll"),
        (np.zeros((4, 5), np.uint8), np.zeros((1, 3, 4, 5)), "top1"),
        (np.zeros(10), np.zeros((1, 10)), "mse"),
        (np.float32(1), np.zeros((1, 1)), "mse"),
    ],
)
def test_the_default_metric_follows_from_labels_and_output(label, output, expected):
    assert default_metric(np.asarray(label), output) == expected


def test_no_default_metric():
    with refused("no metric suits float64 labels of shape [3] and an output of [1, 10]; give --metric"):
        default_metric(np.zeros(3), np.zeros((1, 10)))


@pytest.mark.parametrize(
    ("spec", "labels", "sentence"),
    [
        ("top2", [0], "no metric 'top2'; did you mean 'top5' or 'top1'?"),
        ("top1", None, "the metric 'top1' needs labels; see docs/data.md, or 'nll:next' for language models"),
        ("top1@scoers", [0], "no output 'scoers' to score; did you mean 'scores'?"),
        (
            "os:sep",
            None,
            "'os:sep' is neither a function (outputs, label) -> float nor an optkit.Metric",
        ),
        ("os:nothing", None, "no 'nothing' in 'os'"),
        ("no_such_module:f", None, "no module 'no_such_module'"),
    ],
)
def test_metrics_that_cannot_be_had(spec, labels, sentence):
    with refused(sentence):
        metric_named(spec, [{"scores": logits(0, 1, 3)}], labels if labels is None else np.array(labels))


@pytest.mark.parametrize(
    ("spec", "label", "sentence"),
    [
        ("top1", np.array(3), "the label 3 is not one of 3 classes; labels count from 0"),
        ("top1", np.array(0.5), "the metric needs class indices as labels, not float64"),
        ("nll", np.array([0, 1]), "labels of shape [2] do not fit an output of shape [1, 3]"),
        ("mse", np.array([0.5, 1]), "labels of shape [2] do not fit an output of shape [1, 3]"),
        ("psnr", np.array([0.5, 1]), "labels of shape [2] do not fit an output of shape [1, 3]"),
    ],
)
def test_labels_that_do_not_fit(spec, label, sentence):
    samples = Samples([{"x": logits(0, 1, 3)}], "data", [label])
    with refused(f"data: sample 0: {sentence}"):
        evaluate(echo, echo, samples, [spec])


def test_the_first_output_of_floats_is_scored_unless_another_is_named():
    outputs = {"class": np.array([1]), "scores": np.array([[0.1, 0.9]], np.float32), "rest": np.array([[9, 1.0]])}
    label = np.array(1)
    assert metric_named("top1", [outputs], label[None]).statistics(outputs, label).tolist() == [1, 1]
    other = metric_named("top1@rest", [outputs], label[None])
    assert other.name == "top1@rest"
    assert other.statistics(outputs, label).tolist() == [0, 1]
