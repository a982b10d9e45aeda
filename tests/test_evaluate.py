"""Metrics against their definitions, the paired bootstrap, the one pass that does it all, and real models."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.dataset.samples import Lazy, Samples, read_samples
from optkit.errors import InputError, VerificationError
from optkit.evaluate.evaluation import evaluate, next_tokens, paired_bootstrap
from optkit.evaluate.metrics import are_probabilities, default_metric, metric_named, ratio
from optkit.model.loading import load
from optkit.session import Session

SPECS = Path(__file__).parent / "data_specs"
seeds = st.integers(0, 2**32 - 1)


def refused(sentence: str):
    return pytest.raises(InputError, match=re.escape(sentence))


def value_of(spec: str, outputs: list[np.ndarray], labels: list[np.ndarray] | np.ndarray) -> float:
    """The metric of the outputs of some samples, each under the name y."""
    metric = metric_named(spec, [{"y": output} for output in outputs], labels)
    rows = [metric.statistics({"y": output}, np.asarray(label)) for output, label in zip(outputs, labels, strict=True)]
    return float(metric.combine(np.sum(rows, 0)))


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def logits(seed: int, *shape: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


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


# --- bootstrap ---


@given(seeds)
def test_a_model_is_not_distinguishable_from_itself(seed):
    rows = np.random.default_rng(seed).random((20, 2)) + 0.1
    assert paired_bootstrap(rows, rows, ratio, resamples=50) == (0.0, 0.0, 0.0)


@given(seeds)
def test_swapping_the_models_mirrors_the_interval(seed):
    a, b = np.random.default_rng(seed).random((2, 20, 2)) + 0.1
    difference, low, high = paired_bootstrap(a, b, ratio, resamples=100)
    mirrored = paired_bootstrap(b, a, ratio, resamples=100)
    np.testing.assert_allclose(mirrored, (-difference, -high, -low), atol=1e-12)
    assert low <= high


def test_the_interval_of_a_mean_is_the_normal_one():
    rng = np.random.default_rng(1)
    n = 2000
    a = np.stack([rng.standard_normal(n), np.ones(n)], 1)
    b = np.stack([a[:, 0] - 0.3 + 0.5 * rng.standard_normal(n), np.ones(n)], 1)
    difference, low, high = paired_bootstrap(a, b, lambda sums: sums[..., 0] / sums[..., 1])
    paired = a[:, 0] - b[:, 0]
    error = paired.std() / math.sqrt(n)
    assert difference == pytest.approx(paired.mean())
    assert low == pytest.approx(paired.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(paired.mean() + 1.96 * error, abs=0.15 * error)


def test_the_interval_equals_resampling_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 7, 2)) + 0.1
    draws = np.random.default_rng(0).integers(0, 7, (300, 7))
    by_hand = [ratio(a[draw].sum(0)) - ratio(b[draw].sum(0)) for draw in draws]
    _, low, high = paired_bootstrap(a, b, ratio, resamples=300)
    np.testing.assert_allclose((low, high), np.quantile(by_hand, [0.025, 0.975]))


# --- one pass ---


def echo(samples):
    return [{"y": sample["x"]} for sample in samples]


def noisy(samples):
    return [{"y": sample["x"] + np.float32(0.1)} for sample in samples]


def classified(n: int = 50) -> Samples:
    """Samples that a model which echoes them gets right, all but the first five."""
    scores = logits(3, n, 1, 4)
    labels = scores.argmax(-1)[:, 0]
    labels[:5] = (labels[:5] + 1) % 4
    return Samples([{"x": row} for row in scores], "data", labels)


def always_zero(samples):
    return [{"y": np.array([[1, 0, 0, 0]], np.float32)} for _ in samples]


def test_metric_fidelity_and_interval_in_one_pass():
    fidelity, (top1,) = evaluate(echo, always_zero, classified())
    assert fidelity.samples == 50
    assert fidelity.sqnr_db < 3
    assert (top1.metric, top1.n, top1.reference) == ("top1", 50, 0.9)
    assert top1.drop == pytest.approx(0.9 - top1.candidate)
    assert 0.4 < top1.interval[0] < top1.drop < top1.interval[1] < 0.9
    assert top1.distinguishable
    assert top1.note == "scores read as logits"
    assert str(top1).startswith("top1 0.9000 -> ")
    assert "not distinguishable" not in str(top1)


def test_models_that_agree_are_not_distinguishable():
    fidelity, (top1,) = evaluate(echo, noisy, classified())
    assert fidelity.max_error == pytest.approx(0.1, abs=1e-6)
    assert (top1.drop, top1.interval, top1.distinguishable) == (0, (0, 0), False)
    assert (
        str(top1) == "top1 0.9000 -> 0.9000 (n = 50, drop 0.0000, 95 % interval 0.0000 to 0.0000, not distinguishable)"
    )


def test_a_loss_that_rises_is_a_drop():
    _, (nll,) = evaluate(echo, always_zero, classified(), ["nll"])
    assert not nll.higher_is_better
    assert nll.drop == pytest.approx(nll.candidate - nll.reference)
    assert nll.interval[0] < nll.drop < nll.interval[1]


def test_one_sample_distinguishes_nothing():
    _, (top1,) = evaluate(echo, always_zero, Samples([{"x": np.array([[0, 1.0]])}], "data", np.array([1])))
    assert (top1.drop, top1.interval, top1.distinguishable) == (1, (1, 1), False)


def test_without_labels_there_is_only_fidelity():
    samples = Samples([{"x": logits(0, 1, 4)}])
    fidelity, evaluations = evaluate(echo, echo, samples)
    assert fidelity.sqnr_db == math.inf
    assert evaluations == ()
    with refused("the metric 'top1' needs labels"):
        evaluate(echo, echo, samples, ["top1"])


def test_several_metrics_in_one_pass():
    _, evaluations = evaluate(echo, echo, classified(), ["top1", "top5", "f1", "nll"])
    assert [e.metric for e in evaluations] == ["top1", "top5", "f1 (macro)", "nll"]
    assert evaluations[1].reference == 1.0


def test_samples_are_streamed_and_chunks_do_not_matter():
    samples = classified(10)
    alive: list[int] = []

    def reading(samples):
        alive.append(len(samples))
        return always_zero(samples)

    seen = []
    lazy = Samples(Lazy(10, lambda i: (seen.append(i), samples[i])[1]), "data", samples.labels)
    tracked = []

    def track(items, description, total):
        tracked.append((description, total))
        return items

    result = evaluate(reading, noisy, lazy, chunk=4, track=track)
    assert alive == [4, 4, 2]
    assert seen == list(range(10))
    assert tracked == [("evaluating", 10)]
    assert result == evaluate(always_zero, noisy, samples, chunk=3)


def test_a_model_that_gives_too_few_outputs_is_an_error():
    with pytest.raises(VerificationError, match="data: 10 and 9 outputs for 10 samples"):
        evaluate(echo, lambda samples: echo(samples)[1:], classified(10))


def test_next_tokens_are_the_input_shifted():
    ids = np.array([[5, 6, 7]])
    assert next_tokens({"x": np.zeros((1, 3)), "ids": ids}).tolist() == [[6, 7, -100]]
    assert next_tokens({"ids": ids, "attention_mask": np.array([[1, 1, 0]])}).tolist() == [[6, -100, -100]]
    with refused("labels ':next' need an integer input [1, T]"):
        next_tokens({"x": np.zeros((1, 3))})


def test_next_token_metrics_need_no_labels():
    def model(samples):
        return [{"y": logits(0, 1, sample["ids"].shape[1], 9)} for sample in samples]

    samples = Samples([{"ids": np.array([[1, 2, 3]])}, {"ids": np.array([[4, 5]])}])
    _, (nll, ppl) = evaluate(model, model, samples, ["nll:next", "perplexity:next"])
    picked = [(0, 2), (1, 3)], [(0, 5)]
    logs = [
        np.log(softmax(logits(0, 1, length, 9).astype(np.float64)))[0][place]
        for length, places in zip((3, 2), picked, strict=True)
        for place in places
    ]
    assert nll.metric == "nll:next"
    assert nll.reference == pytest.approx(-np.mean(logs))
    assert ppl.reference == pytest.approx(math.exp(-np.mean(logs)))


USER_METRICS = """
import numpy as np
from optkit.evaluate.metrics import Metric

def first_score(outputs, label):
    return outputs["y"][0, 0]

def distance(outputs, label):
    return abs(float(outputs["y"].argmax()) - label)

distance.higher_is_better = False

def fails(outputs, label):
    return outputs["z"]

rms = Metric(
    "rms",
    lambda outputs, label: np.array([float((outputs["y"] ** 2).sum()), outputs["y"].size]),
    lambda sums: np.sqrt(sums[..., 0] / sums[..., 1]),
)
"""


def test_metrics_of_the_user(tmp_path):
    file = tmp_path / "my_metrics.py"
    file.write_text(USER_METRICS)
    samples = classified()
    _, (first, distance, rms) = evaluate(
        echo, always_zero, samples, [f"{file}:first_score", f"{file}:distance", f"{file}:rms"]
    )
    scores = np.stack([sample["x"] for sample in samples])
    assert first.metric == "first_score"
    assert (first.reference, first.candidate) == (pytest.approx(scores[:, 0, 0].mean()), 1.0)
    assert first.higher_is_better
    assert distance.reference == pytest.approx(np.abs(scores[:, 0].argmax(-1) - samples.labels).mean())
    assert not distance.higher_is_better
    assert (rms.reference, rms.candidate) == (pytest.approx(math.sqrt((scores**2).mean())), 0.5)
    with refused(f"data: sample 0: the metric '{file}:fails' raised KeyError: 'z'"):
        evaluate(echo, echo, samples, [f"{file}:fails"])


# --- real models: the figures of their READMEs ---


def measured(shared: Path, model: str, data: str, preprocess: str | None, metrics: list[str]) -> list[float]:
    path = shared / "data" / model
    spec = f"{SPECS}/{data}" if ".py:" in data else str(shared / "data" / data)
    samples = read_samples(spec, load(path), preprocess=preprocess and SPECS / preprocess)
    session = Session(path, optimize=True)
    outputs = []

    def run(samples):
        outputs[:] = [session.run(sample) for sample in samples]
        return list(outputs)

    return [e.reference for e in evaluate(run, lambda _: list(outputs), samples, metrics)[1]]


@pytest.mark.parametrize(
    ("model", "data", "preprocess", "figures"),
    [
        ("mnist/mnist_cntk8.onnx", "mnist/test.npz", "mnist_cntk8.toml", {"top1": 0.989}),
        ("mnist/mnist_burn_cnn.onnx", "mnist/test.npz", "mnist_burn_cnn.toml", {"top1": 0.993}),
        ("sst2/sst2_relu_encoder.onnx", "text_models.py:sst2_eval", None, {"top1": 0.8234}),
        ("magika_v3_3/magika_v3_3.onnx", "text_models.py:magika_eval", None, {"top1": 0.9737}),
        ("ad_autoencoder/ad_autoencoder.onnx", "text_models.py:autoencoder_eval", None, {"mse": 9.4913}),
        ("silero_vad/silero_vad.onnx", "text_models.py:silero_vad_eval", None, {"mse": 0.0}),
    ],
)
def test_figures_of_small_models(shared, model, data, preprocess, figures):
    assert measured(shared, model, data, preprocess, list(figures)) == pytest.approx(list(figures.values()), abs=6e-5)


RESNET20, RESNET56 = "resnet20_cifar10/resnet20_cifar10.onnx", "resnet56_cifar10/resnet56_cifar10.onnx"
MOBILENET, SQUEEZENET = "mobilenet_v1_075/mobilenet_v1_075.onnx", "squeezenet1_1/squeezenet1_1.onnx"
STORIES = "stories260k/stories260k.onnx"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "preprocess", "figures"),
    [
        (RESNET20, "cifar10_jpeg/test.npz", "resnet_cifar10.toml", {"top1": 0.8195}),
        (RESNET56, "cifar10_jpeg/test.npz", "resnet_cifar10.toml", {"top1": 0.841}),
        (MOBILENET, "imagenet_sample", "mobilenet_v1_075.toml", {"top1": 0.822, "top5": 0.95}),
        (SQUEEZENET, "imagenet_sample", "squeezenet1_1.toml", {"top1": 0.62, "top5": 0.818}),
        ("relu_lm/relu_lm.onnx", "text_models.py:relu_lm_eval", None, {"nll": 1.7896}),
        (STORIES, "text_models.py:stories260k_eval", None, {"nll:next": 1.4618, "perplexity:next": 4.3138}),
        (STORIES, "stories260k/tokens.npz", None, {"nll:next": 1.4618}),
    ],
)
def test_figures_of_large_models(shared, model, data, preprocess, figures):
    assert measured(shared, model, data, preprocess, list(figures)) == pytest.approx(list(figures.values()), abs=6e-5)
