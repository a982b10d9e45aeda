"""Fidelity: what each number says, and what it says about NaN, infinities, integers, nothing, and other shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from optkit.errors import VerificationError
from optkit.evaluate.fidelity import FidelityMeter, compare, relative_error, score_rows

INF, NAN = float("inf"), float("nan")


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@given(arrays(np.float32, array_shapes(max_dims=3), elements=st.floats(-100, 100, width=32)))
def test_equal_outputs_have_no_error(array):
    assert relative_error(array, array.copy()) == 0.0
    fidelity = compare([{"y": array}], [{"y": array.copy()}])
    assert (fidelity.sqnr_db, fidelity.cosine, fidelity.max_error, fidelity.samples) == (INF, 1.0, 0.0, 1)
    assert fidelity.top1_agreement in (1.0, None)


@given(arrays(np.float32, st.integers(2, 20), elements=st.floats(1, 100, width=32)), st.floats(0.5, 2, width=32))
def test_scaling_by_s_gives_sqnr_of_one_minus_s_and_cosine_one(array, scale):
    if scale == 1:
        return
    fidelity = compare([{"y": array}], [{"y": array * np.float32(scale)}])
    assert fidelity.cosine == pytest.approx(1, abs=1e-6)
    if abs(scale - 1) > 1e-3:  # else rounding to float32 is the larger part of the error
        assert fidelity.sqnr_db == pytest.approx(-20 * math.log10(abs(1 - scale)), abs=0.1)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (f32(1, -4), f32(1, -3), 0.25),
        (f32(0, 0), f32(0, 0.5), 0.5),  # no scale: absolute
        (f32(1, NAN, INF, -INF), f32(1, NAN, INF, -INF), 0.0),
        (f32(1, NAN), f32(1, 2), INF),
        (f32(1, 2), f32(1, NAN), INF),
        (f32(1, INF), f32(1, -INF), INF),
        (f32(1), f32(1).astype(np.float64), INF),
        (f32(1, 2), f32(1, 2).reshape(1, 2), INF),
        (np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32), 0.0),
        (np.zeros((0, 4), np.float32), np.zeros((1, 4), np.float32), INF),
        (np.array(2.0, np.float16), np.array(1.0, np.float16), 0.5),
        (np.array([60000], np.float16), np.array([-60000], np.float16), 2.0),  # the difference exceeds fp16
        (np.array([1, 2]), np.array([1, 2]), 0.0),
        (np.array([1, 2]), np.array([1, 3]), INF),
        (np.array([True]), np.array([False]), INF),
        (np.array(["a"], object), np.array(["a"], object), 0.0),
        (np.array(["a"], object), np.array(["b"], object), INF),
        ([f32(1), f32(2)], [f32(1), f32(1)], 0.5),  # an ONNX sequence
        ([f32(1)], [f32(1), f32(1)], INF),
        ([{"cat": 0.5}], [{"cat": 0.25}], 0.5),  # a sequence of maps, as ZipMap gives
        ([{"cat": 0.5}], [{"dog": 0.5}], INF),
        (f32(1), [f32(1)], INF),
        ([f32(1)], f32(1), INF),
    ],
)
def test_relative_error(a, b, expected):
    assert relative_error(a, b) == pytest.approx(expected)


def test_sqnr_is_signal_over_noise_of_the_worst_output():
    reference = {"good": f32(3, 4), "bad": f32(1, 0)}
    other = {"good": f32(3, 4), "bad": f32(1, 0.1)}
    fidelity = compare([reference], [other])
    assert fidelity.sqnr_db == pytest.approx(20, abs=1e-4)
    assert fidelity.cosine == pytest.approx(1 / math.sqrt(1.01), abs=1e-6)
    assert fidelity.max_error == pytest.approx(0.1)


def test_sums_run_over_the_whole_stream():
    fidelity = compare([{"y": f32(1)}, {"y": f32(0)}], [{"y": f32(1)}, {"y": f32(0.1)}])
    assert fidelity.sqnr_db == pytest.approx(20, abs=1e-4)
    assert fidelity.samples == 2


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (f32(1, 2), f32(1, NAN)),
        (f32(1, NAN), f32(1, 2)),
        (f32(1, INF), f32(1, -INF)),
        (f32(1, 2), f32(1, INF)),
        (f32(1, 2), f32(1, 2, 3)),
        (np.zeros((0, 4), np.float32), np.zeros((1, 4), np.float32)),
    ],
)
def test_what_cannot_be_compared_is_the_worst_there_is(a, b):
    fidelity = compare([{"y": f32(1, 2)}, {"y": a}], [{"y": f32(1, 2)}, {"y": b}])
    assert (fidelity.sqnr_db, fidelity.cosine, fidelity.max_error) == (-INF, 0.0, INF)


def test_equal_infinities_and_nans_do_not_count():
    fidelity = compare([{"y": f32(1, -INF, NAN)}], [{"y": f32(1, -INF, NAN)}])
    assert (fidelity.sqnr_db, fidelity.max_error) == (INF, 0.0)


def test_a_zero_reference_has_no_signal():
    fidelity = compare([{"y": f32(0, 0)}], [{"y": f32(0, 1)}])
    assert (fidelity.sqnr_db, fidelity.cosine, fidelity.max_error) == (-INF, 0.0, 1.0)


def test_fp16_is_compared_beyond_its_own_range():
    a = np.full((1, 1000), 300, np.float16)  # its sum of squares exceeds 65504
    fidelity = compare([{"y": a}], [{"y": a * np.float16(0.5)}])
    assert fidelity.sqnr_db == pytest.approx(6.02, abs=0.01)


def test_integers_and_booleans_count_as_numbers():
    fidelity = compare(
        [{"i": np.array([3, 4]), "b": np.array([True])}], [{"i": np.array([3, 4]), "b": np.array([True])}]
    )
    assert fidelity.sqnr_db == INF
    assert compare([{"i": np.array([10])}], [{"i": np.array([9])}]).sqnr_db == pytest.approx(20)


def test_outputs_without_numbers_are_left_out():
    labels = np.array(["cat"], object)
    fidelity = compare(
        [{"label": labels, "maps": [{1: 0.5}], "y": f32(1)}], [{"label": labels, "maps": [], "y": f32(1)}]
    )
    assert fidelity.sqnr_db == INF


def test_top1_agreement_counts_rows_of_the_first_output_with_scores():
    reference = {"class": np.array([1]), "scores": np.array([[[0.1, 0.9], [0.8, 0.2]]], np.float32)}
    other = {"class": np.array([1]), "scores": np.array([[[0.2, 0.8], [0.3, 0.7]]], np.float32)}
    assert compare([reference], [other]).top1_agreement == 0.5


@pytest.mark.parametrize(
    "output",
    [
        np.array(0.5, np.float32),  # a scalar
        np.array([[0.5]], np.float32),  # one score
        np.zeros((1, 3, 8, 8), np.float32),  # an image
        np.array([[5, 6]], np.int64),  # token ids
        np.array([True, False]),
    ],
)
def test_outputs_that_are_no_scores_are_not_ranked(output):
    assert compare([{"y": output}], [{"y": output}]).top1_agreement is None


def test_uint8_scores_and_trailing_ones_are_ranked():
    assert compare([{"y": np.array([[3, 9]], np.uint8)}], [{"y": np.array([[9, 3]], np.uint8)}]).top1_agreement == 0
    image_scores = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)
    assert score_rows(image_scores).shape == (1, 4)
    assert compare([{"y": image_scores}], [{"y": image_scores + 1}]).top1_agreement == 1


def test_a_row_with_nan_or_of_another_shape_agrees_with_nothing():
    reference = {"y": f32(9, 1)}
    assert compare([reference], [{"y": f32(NAN, 1)}]).top1_agreement == 0
    assert compare([reference], [{"y": f32(9, 1, 0)}]).top1_agreement == 0


@pytest.mark.parametrize("shape", [(0,), (1, 0), (0, 4), (1, 0, 4)])
def test_empty_outputs_agree(shape):
    empty = np.zeros(shape, np.float32)
    fidelity = compare([{"y": empty}], [{"y": empty}])
    assert (fidelity.sqnr_db, fidelity.max_error, fidelity.top1_agreement) == (INF, 0.0, None)


def test_no_samples_give_no_error():
    assert compare([], []).samples == 0


def test_a_missing_output_is_an_error():
    with pytest.raises(VerificationError, match="comparison: the output 'y' of the original is missing"):
        FidelityMeter().add({"y": f32(1)}, {"z": f32(1)})


def test_streams_of_different_length_are_an_error():
    one = {"y": f32(1)}
    with pytest.raises(VerificationError, match="outputs of sample 1 are missing"):
        compare([one, one], [one])
    with pytest.raises(VerificationError, match="there are outputs for more than 1 samples"):
        compare([one], [one, one])
