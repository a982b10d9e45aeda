from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optkit.errors import InputError
from optkit.quant.integers import (
    SMALLEST_SCALE,
    IntegerGrid,
    PerChannel,
    PerTensor,
    bias_scale_floor,
    choose_qparams,
    dequantize,
    integer_grid,
    pair_scale_floor,
    quantize,
    quantize_bias,
    weight_qparams,
    with_scale,
)

grids = st.builds(
    integer_grid,
    st.sampled_from(["int8", "uint8", "int16", "uint16"]),
    symmetric=st.booleans(),
    reduced_range=st.booleans(),
)
reals = st.floats(-1e6, 1e6, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=8), elements=reals)


@pytest.mark.parametrize(
    ("dtype", "symmetric", "reduced", "low", "high"),
    [
        ("int8", True, False, -127, 127),
        ("int8", False, False, -128, 127),
        ("int8", True, True, -63, 63),
        ("int8", False, True, -64, 63),
        ("uint8", False, False, 0, 255),
        ("uint8", True, False, 1, 255),
        ("uint8", False, True, 0, 127),
        ("int16", True, False, -32767, 32767),
        ("uint16", False, False, 0, 65535),
    ],
)
def test_grid(dtype: str, symmetric: bool, reduced: bool, low: int, high: int) -> None:
    grid = integer_grid(dtype, symmetric=symmetric, reduced_range=reduced)
    assert (grid.low, grid.high, str(grid.dtype)) == (low, high, dtype)


@given(arrays, grids)
def test_error_is_at_most_half_a_step_inside_the_range(values: np.ndarray, grid: IntegerGrid) -> None:
    params = choose_qparams(values.min(), values.max(), grid)
    low, high = params.limits()
    inside = values[(values >= low) & (values <= high)]
    error = np.abs(dequantize(quantize(inside, params), params).astype(np.float64) - inside)
    assert (error <= params.scale * 0.5 * (1 + 1e-5) + np.abs(inside) * 1e-6).all()


@given(arrays, grids)
def test_the_range_reaches_what_it_was_chosen_for_within_half_a_step(values: np.ndarray, grid: IntegerGrid) -> None:
    params = choose_qparams(values.min(), values.max(), grid)
    low, high = params.limits()
    slack = float(params.scale) * 0.5001
    assert low <= float(values.min()) + slack
    assert high >= float(values.max()) - slack


@given(reals, reals, grids)
def test_zero_is_exact(a: float, b: float, grid: IntegerGrid) -> None:
    params = choose_qparams(min(a, b), max(a, b), grid)
    zero = np.zeros(1, np.float32)
    assert quantize(zero, params) == params.zero_point
    assert dequantize(quantize(zero, params), params) == 0.0


@given(arrays, grids)
def test_quantize_is_monotone_and_stays_on_the_grid(values: np.ndarray, grid: IntegerGrid) -> None:
    params = choose_qparams(values.min() / 2, values.max() / 2, grid)
    integers = quantize(np.sort(values.ravel()), params)
    assert integers.dtype == grid.dtype
    assert (np.diff(integers.astype(np.int64)) >= 0).all()
    assert integers.min() >= grid.low
    assert integers.max() <= grid.high


@given(arrays, grids)
def test_integers_survive_a_round_trip(values: np.ndarray, grid: IntegerGrid) -> None:
    params = choose_qparams(values.min(), values.max(), grid)
    integers = quantize(values, params)
    assert np.array_equal(quantize(dequantize(integers, params), params), integers)


@given(hnp.arrays(np.float32, (3, 4, 2), elements=reals), st.integers(0, 2))
def test_per_channel_equals_each_channel_alone(weight: np.ndarray, axis: int) -> None:
    grid = integer_grid("int8", symmetric=True)
    params = weight_qparams(weight, grid, PerChannel(axis))
    integers = quantize(weight, params)
    restored = dequantize(integers, params)
    assert params.scale.shape == (weight.shape[axis],)
    for channel in range(weight.shape[axis]):
        slice_ = weight.take(channel, axis)
        alone = weight_qparams(slice_, grid, PerTensor())
        assert np.array_equal(integers.take(channel, axis), quantize(slice_, alone))
        assert np.array_equal(restored.take(channel, axis), dequantize(quantize(slice_, alone), alone))


@given(arrays)
def test_symmetric_weights_never_use_the_lowest_integer(weight: np.ndarray) -> None:
    params = weight_qparams(weight, integer_grid("int8", symmetric=True), PerTensor())
    assert not params.zero_point.any()
    assert quantize(weight, params).min(initial=0) >= -127


def test_rounds_to_even_as_onnx_does() -> None:
    params = with_scale(choose_qparams(-1, 1, integer_grid("int8", symmetric=True)), np.array(1.0))
    assert quantize(np.array([0.5, 1.5, 2.5, -0.5], np.float32), params).tolist() == [0, 2, 2, 0]


def test_agrees_with_onnx_reference_on_asymmetric_values() -> None:
    params = choose_qparams(-1.0, 3.0, integer_grid("uint8", symmetric=False))
    assert float(params.scale) == pytest.approx(4 / 255)
    assert int(params.zero_point) == 64
    assert quantize(np.array([-1.0, 0.0, 3.0, 9.0], np.float32), params).tolist() == [0, 64, 255, 255]


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_range_stays_zero(symmetric: bool) -> None:
    params = choose_qparams(0.0, 0.0, integer_grid("int8", symmetric=symmetric))
    assert params.scale == 1.0
    assert dequantize(quantize(np.zeros(3, np.float32), params), params).tolist() == [0, 0, 0]


def test_tiny_range_keeps_a_scale_whose_products_are_normal() -> None:
    params = choose_qparams(-1e-40, 1e-38, integer_grid("int8", symmetric=True))
    assert params.scale == np.float32(SMALLEST_SCALE)
    assert np.float32(params.scale) * np.float32(params.scale) >= np.finfo(np.float32).tiny


def test_positive_range_is_widened_to_zero() -> None:
    params = choose_qparams(4.0, 5.1, integer_grid("uint8", symmetric=False))
    assert int(params.zero_point) == 0
    assert float(params.scale) == pytest.approx(0.02)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    grid = integer_grid("int8", symmetric=True)
    sentence = "tensor 'conv.w': it holds values that are not finite and cannot be quantized"
    weight = np.array([[1.0, bad]], np.float32)
    with pytest.raises(InputError) as error:
        weight_qparams(weight, grid, PerChannel(0), name="conv.w")
    assert str(error.value) == sentence
    with pytest.raises(InputError) as error:
        quantize(weight, choose_qparams(-1, 1, grid), name="conv.w")
    assert str(error.value) == sentence


@settings(max_examples=200)
@given(
    st.floats(-1e30, 1e30).filter(lambda b: b == 0 or abs(b) > 1e-30),
    st.floats(1e-12, 1e3),
)
def test_bias_fits_at_the_floor_of_its_scale(bias: float, input_scale: float) -> None:
    values, scale = np.array([bias], np.float32), np.float32(input_scale)
    floor = bias_scale_floor(values, np.asarray(scale))
    product = np.asarray(scale * np.maximum(floor, SMALLEST_SCALE), np.float32)
    integers = quantize_bias(values, product)
    assert abs(int(integers[0])) <= 2**30 * 1.0001
    assert abs(float(integers[0]) * float(product[0]) - float(values[0])) <= float(product[0]) * 0.51


def test_bias_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError) as error:
        quantize_bias(np.array([1.0], np.float32), np.array([1e-12], np.float32), name="conv.b")
    assert str(error.value) == "tensor 'conv.b': it does not fit in 32 bits at its scale"


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=reals))
def test_products_of_neighbours_never_overflow_int16_at_the_pair_floor(rows: np.ndarray) -> None:
    params = weight_qparams(rows, integer_grid("int8", symmetric=True), PerChannel(0))
    params = with_scale(params, np.maximum(params.scale, pair_scale_floor(rows)))
    integers = np.abs(quantize(rows, params).astype(int))
    integers = np.pad(integers, ((0, 0), (0, integers.shape[1] % 2)))
    assert (255 * (integers[:, 0::2] + integers[:, 1::2]) <= 2**15 - 1).all()


def test_pair_floor_costs_nothing_beside_small_neighbours_and_one_bit_at_most() -> None:
    assert pair_scale_floor(np.array([[1.0, 0.0, 0.25, 0.5]], np.float32)) == pytest.approx(1 / 127)
    assert pair_scale_floor(np.array([[1.0, -1.0]], np.float32)) == pytest.approx(2 / 127)
    assert pair_scale_floor(np.array([[0.5, 0.5, 1.0]], np.float32)) == pytest.approx(1 / 127)
