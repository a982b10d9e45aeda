from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optkit.errors import InputError
from optkit.model.loading import load_text
from optkit.quant.calibrate import SAMPLED, estimate_range, observe
from optkit.quant.histogram import (
    BINS,
    Histogram,
    average_range,
    entropy_range,
    merged,
    minmax_range,
    mse_range,
    percentile_range,
)
from optkit.quant.integers import choose_qparams, dequantize, integer_grid, quantize

UINT8 = integer_grid("uint8", symmetric=False)
INT8 = integer_grid("int8", symmetric=True)
METHODS = ["minmax", "average", "percentile", "entropy", "mse"]

finite = st.floats(-(2.0**66), 2.0**66, width=32)
chunks = st.lists(hnp.arrays(np.float32, st.integers(1, 40), elements=finite), min_size=1, max_size=5)


def filled(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part.ravel(), float(part.min()), float(part.max()))
    return histogram


def bells(count: int = 200_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def squared_error(values: np.ndarray, low: float, high: float) -> float:
    params = choose_qparams(low, high, UINT8)
    return float(((dequantize(quantize(values, params), params) - values) ** 2).mean())


# histograms


@given(chunks)
def test_every_value_lands_in_its_bin_whatever_the_order(parts: list[np.ndarray]) -> None:
    histogram, values = filled(*parts), np.concatenate(parts)
    assert histogram.counts.shape == (BINS,)
    assert histogram.counts.sum() + histogram.zeros == values.size
    assert histogram.zeros == (values == 0).sum()
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    if histogram.width:
        nonzero = values[values != 0].astype(np.float64)
        expected = np.bincount(np.floor(nonzero / histogram.width).astype(int) + BINS // 2, minlength=BINS)
        assert np.array_equal(histogram.counts, expected)
        backwards = filled(*reversed(parts))
        assert np.array_equal(histogram.counts, backwards.counts)
        assert np.log2(histogram.width) % 1 == 0


@given(chunks, chunks)
def test_merging_equals_adding_everything_to_one(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    one, total = filled(*a, *b), merged([filled(*a), filled(*b)])
    assert (one.low, one.high, one.zeros) == (total.low, total.high, total.zeros)
    if one.width == total.width:
        assert np.array_equal(one.counts, total.counts)
    assert total.counts.sum() == one.counts.sum()


def test_bins_are_at_least_a_quarter_used_by_the_largest_value() -> None:
    histogram = filled(np.array([0.7], np.float32))
    assert histogram.width * BINS / 2 / 0.7 < 2.0001


# estimators


def test_minmax_is_exact() -> None:
    values = bells()
    assert minmax_range(filled(values)) == (values.min(), values.max())


@given(chunks, st.floats(0.5, 1.0))
def test_average_is_the_recurrence_without_its_bias_to_the_first_sample(
    parts: list[np.ndarray], momentum: float
) -> None:
    histogram = Histogram(momentum=momentum)
    for part in parts:
        histogram.add(part.ravel(), float(part.min()), float(part.max()))
    weights = momentum ** np.arange(len(parts))[::-1]
    lows, highs = (np.array([float(getattr(part, end)()) for part in parts]) for end in ("min", "max"))
    low, high = average_range(histogram)
    assert low == pytest.approx(float(weights @ lows / weights.sum()), rel=1e-6, abs=1e-6 * np.abs(lows).max())
    assert high == pytest.approx(float(weights @ highs / weights.sum()), rel=1e-6, abs=1e-6 * np.abs(highs).max())
    assert histogram.low - 1e-9 * abs(histogram.low) <= low
    assert high <= histogram.high + 1e-9 * abs(histogram.high)


def test_average_without_momentum_is_the_mean_and_with_it_forgets_the_first() -> None:
    samples = [np.array([-1.0, 1.0]), np.array([-3.0, 5.0])]
    assert average_range(filled(*samples)) == (-2.0, 3.0)
    forgetting = Histogram(momentum=0.5)
    for sample in samples:
        forgetting.add(sample, float(sample.min()), float(sample.max()))
    low, high = average_range(forgetting)
    assert low == pytest.approx(-7 / 3)
    assert high == pytest.approx(11 / 3)


def test_merged_average_holds_both() -> None:
    low, high = average_range(merged([filled(np.array([-1.0, 1.0])), Histogram(), filled(np.array([0.0, 4.0]))]))
    assert (low, high) == (-1.0, 4.0)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_leaves_out_half_the_rest_at_either_end(percentile: float) -> None:
    values = bells()
    histogram = filled(values)
    low, high = percentile_range(histogram, percentile)
    tail = (100 - percentile) / 2
    assert low == pytest.approx(np.percentile(values, tail), abs=2 * histogram.width)
    assert high == pytest.approx(np.percentile(values, 100 - tail), abs=2 * histogram.width)


def test_percentile_counts_zeros() -> None:
    values = np.concatenate([np.zeros(9_900, np.float32), np.linspace(1, 2, 100, dtype=np.float32)])
    low, high = percentile_range(filled(values), 99.0)
    assert low == 0.0
    assert high == pytest.approx(1.5, abs=0.02)


def test_percentile_100_is_minmax() -> None:
    histogram = filled(bells())
    low, high = percentile_range(histogram, 100.0)
    assert (low, high) == minmax_range(histogram)


def test_mse_range_is_near_the_best_of_an_exhaustive_search() -> None:
    generator = np.random.default_rng(1)
    values = generator.laplace(size=60_000).astype(np.float32) + np.float32(0.5)
    low, high = mse_range(filled(values), UINT8.steps, symmetric=False)
    lows, highs = np.linspace(values.min(), -0.5, 25), np.linspace(0.5, values.max(), 25)
    best = min(squared_error(values, a, b) for a in lows for b in highs)
    assert squared_error(values, low, high) <= 1.03 * best
    assert squared_error(values, low, high) < 0.9 * squared_error(values, values.min(), values.max())


def test_mse_range_of_a_symmetric_grid_is_symmetric_and_clips_outliers() -> None:
    values = np.concatenate([bells(), np.array([60.0], np.float32)])
    low, high = mse_range(filled(values), INT8.steps, symmetric=True)
    assert low == -high
    assert 3 < high < 30


def test_mse_range_keeps_what_is_uniform() -> None:
    values = np.random.default_rng(0).uniform(-1, 2, 100_000).astype(np.float32)
    low, high = mse_range(filled(values), UINT8.steps, symmetric=False)
    assert low == pytest.approx(values.min(), abs=0.02)
    assert high == pytest.approx(values.max(), abs=0.02)


def test_entropy_clips_far_outliers_and_keeps_the_body() -> None:
    values = np.concatenate([bells(), np.full(3, 20.0, np.float32)])
    low, high = entropy_range(filled(values), UINT8.steps, symmetric=False)
    assert 3 < high < 12
    assert -5 <= low <= -0.1
    low, high = entropy_range(filled(values), INT8.steps, symmetric=True)
    assert low == -high
    assert 3 < high < 12


def test_entropy_of_rectified_values_stays_at_zero() -> None:
    low, high = entropy_range(filled(np.maximum(bells(), 0)), UINT8.steps, symmetric=False)
    assert low == 0.0
    assert high > 2.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", [UINT8, INT8], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(
    "values",
    [
        np.zeros(100),
        np.array([0.0, 1.0] * 500),
        np.array([-1.0, 0.0, 1.0] * 300),
        np.full(64, 3.5),
        np.full(64, -2.0),
        np.array([1e-30, 2e-30]),
    ],
    ids=["zeros", "binary", "ternary", "one value", "one negative value", "tiny"],
)
def test_few_values_survive_every_estimator(method: Any, grid: Any, values: np.ndarray) -> None:
    values = values.astype(np.float32)
    low, high = estimate_range(filled(values), method, grid, 99.99)
    assert np.isfinite([low, high]).all()
    assert low <= high
    params = choose_qparams(low, high, grid)
    error = np.abs(dequantize(quantize(values, params), params) - values).max()
    assert error <= max(np.abs(values).max() * 0.01, 1e-18)


@given(chunks, st.sampled_from(METHODS), st.sampled_from([UINT8, INT8]))
def test_no_estimator_leaves_the_exact_range(parts: list[np.ndarray], method: Any, grid: Any) -> None:
    histogram = filled(*parts)
    low, high = estimate_range(histogram, method, grid, 99.9)
    largest = max(abs(histogram.low), abs(histogram.high))
    assert -largest <= low <= high <= largest


# observation

MODEL = """
<ir_version: 8, opset_import: ["" : 13]>
main (float[N,4] x, float[N,4] z) => (float[N,4] y) { a = Add(x, z) r = Relu(a) y = Exp(r) }
"""


@pytest.fixture
def model() -> ir.Model:
    return load_text(MODEL)


def test_observes_inputs_and_computed_tensors(model: ir.Model) -> None:
    samples = [{"x": np.full((i + 1, 4), i - 1, np.float32), "z": np.ones((i + 1, 4), np.float32)} for i in range(3)]
    found = observe(model, ["x", "a", "r"], samples)
    assert (found["x"].low, found["x"].high) == (-1, 1)
    assert (found["a"].low, found["a"].high) == (0, 2)
    assert found["a"].counts.sum() + found["a"].zeros == 24
    assert found["a"].zeros == 4


def test_reads_every_sample_once_and_reports_progress(model: ir.Model) -> None:
    class Stream(list[dict[str, np.ndarray]]):
        passes = 0

        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            self.passes += 1
            return super().__iter__()

    seen: list[tuple[str, int | None]] = []

    def track(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
        seen.append((description, total))
        return items

    samples = Stream([{"x": np.ones((1, 4), np.float32), "z": np.ones((1, 4), np.float32)}] * 3)
    observe(model, ["a"], samples, track=track)
    assert samples.passes == 1
    assert seen == [("Calibrating", 3)]


def test_extremes_are_exact_though_counts_are_sampled() -> None:
    model = load_text('<ir_version: 8, opset_import: ["" : 13]> main (float[N] x) => (float[N] y) { y = Relu(x) }')
    values = np.zeros(10 * SAMPLED, np.float32)
    values[12345], values[54321] = -7, 9
    found = observe(model, ["x", "y"], [{"x": values}])
    assert (found["x"].low, found["x"].high) == (-7, 9)
    assert found["y"].low == 0
    assert SAMPLED / 2 <= found["x"].counts.sum() + found["x"].zeros <= SAMPLED


def test_without_counts_only_extremes_are_found(model: ir.Model) -> None:
    samples = [{"x": np.full((1, 4), i, np.float32), "z": np.ones((1, 4), np.float32)} for i in range(3)]
    found = observe(model, ["a"], samples, counts=False)
    assert (found["a"].low, found["a"].high) == (1, 3)
    assert not found["a"].counts.any()


def test_empty_tensors_leave_the_histogram_empty(model: ir.Model) -> None:
    found = observe(model, ["a"], [{"x": np.zeros((0, 4), np.float32), "z": np.zeros((0, 4), np.float32)}])
    assert found["a"].empty


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_values_that_are_not_finite_name_tensor_and_sample(model: ir.Model, value: float, kind: str) -> None:
    good, bad = np.ones((1, 4), np.float32), np.ones((1, 4), np.float32)
    bad[0, 2] = value
    with pytest.raises(InputError) as error:
        observe(model, ["a"], [{"x": good, "z": good}, {"x": bad, "z": good}])
    assert str(error.value) == (
        f"calibration sample 1: tensor 'a' has {kind} values; "
        "leave the sample out, or keep the nodes that read the tensor in float with a rule"
    )


@pytest.mark.parametrize(
    ("samples", "given"), [(None, "none was given"), ([], "the data given holds no samples")], ids=["none", "empty"]
)
def test_no_samples_says_what_to_pass(model: ir.Model, samples: Any, given: str) -> None:
    with pytest.raises(InputError) as error:
        observe(model, ["a"], samples)
    assert str(error.value) == (
        f"static quantization needs calibration data and {given}; "
        "pass --calibration DATA: an .npz, a folder of arrays or images, or module:function"
    )


def test_a_sample_the_model_rejects_is_named(model: ir.Model) -> None:
    good = np.ones((1, 4), np.float32)
    with pytest.raises(InputError, match=r"^calibration sample 1: the model does not run on the given inputs"):
        observe(model, ["a"], [{"x": good, "z": good}, {"x": good}])
    with pytest.raises(InputError, match=r"^calibration sample 0: it has no array for input 'x'$"):
        observe(model, ["x"], [{"z": good}])
