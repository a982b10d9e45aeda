"""Accuracy with an interval: the bootstrap, and both models in one pass over the samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given

from optkit.dataset.samples import Lazy, Samples
from optkit.errors import VerificationError
from optkit.evaluate.evaluation import evaluate, next_tokens, paired_bootstrap
from optkit.evaluate.metrics import ratio
from refusals import refused
from scores import echo, logits, seeds, softmax

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
