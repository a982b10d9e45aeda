from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optkit.errors import InputError
from optkit.quant.integers import (
    SMALLEST_SCALE,
    Granularity,
    IntegerGrid,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantParams,
    choose_qparams,
    dequantize,
    integer_grid,
    quantize,
    reduce_per_scale,
    scale_shape,
    spread,
    weight_qparams,
)

TYPES = [f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 3, 4, 8, 16)]
grids = st.builds(integer_grid, st.sampled_from(TYPES), symmetric=st.booleans(), full_range=st.booleans())
reals = st.floats(-1e6, 1e6, width=32)
weights = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=reals)


@pytest.mark.parametrize(
    ("dtype", "symmetric", "full", "low", "high", "middle", "storage"),
    [
        ("int2", True, False, -1, 1, 0, "int8"),
        ("int2", True, True, -2, 1, 0, "int8"),
        ("int2", False, False, -2, 1, 0, "int8"),
        ("uint2", False, False, 0, 3, 2, "uint8"),
        ("int3", True, False, -3, 3, 0, "int8"),
        ("uint3", True, True, 0, 7, 4, "uint8"),
        ("int4", True, False, -7, 7, 0, "int8"),
        ("int4", True, True, -8, 7, 0, "int8"),
        ("uint4", True, False, 1, 15, 8, "uint8"),
        ("uint4", True, True, 0, 15, 8, "uint8"),
        ("uint4", False, False, 0, 15, 8, "uint8"),
        ("int8", True, True, -128, 127, 0, "int8"),
        ("uint16", True, False, 1, 65535, 32768, "uint16"),
    ],
)
def test_grid(dtype: str, symmetric: bool, full: bool, low: int, high: int, middle: int, storage: str) -> None:
    grid = integer_grid(dtype, symmetric=symmetric, full_range=full)
    assert (grid.low, grid.high, grid.middle, str(grid.dtype)) == (low, high, middle, storage)
    assert (grid.type, grid.bits) == (dtype, int(dtype.partition("int")[2]))


@pytest.mark.parametrize("dtype", ["int1", "int5", "int32", "float16", "", "Int4", "int4 "])
def test_a_type_that_is_no_grid_is_refused(dtype: str) -> None:
    with pytest.raises(InputError) as error:
        integer_grid(dtype, symmetric=True)
    assert (
        str(error.value)
        == f"'{dtype}' is no integer type to quantize to; choose 2, 3, 4, 8 or 16 bits, such as int4 or uint8"
    )


def test_two_bits_are_not_reduced() -> None:
    with pytest.raises(InputError, match="the range of 'uint2' cannot be reduced"):
        integer_grid("uint2", symmetric=False, reduced_range=True)


def test_an_empty_block_is_refused() -> None:
    with pytest.raises(InputError, match="a block has at least one element, not 0"):
        PerBlock(1, 0)


@st.composite
def blocked(draw: st.DrawFn) -> tuple[np.ndarray, PerBlock]:
    weight = draw(weights)
    return weight, PerBlock(draw(st.integers(-weight.ndim, weight.ndim - 1)), draw(st.integers(1, 12)))


@given(blocked(), grids)
def test_per_block_equals_each_block_alone(case: tuple[np.ndarray, PerBlock], grid: IntegerGrid) -> None:
    weight, blocks = case
    axis = blocks.axis % weight.ndim
    params = weight_qparams(weight, grid, blocks)
    integers = quantize(weight, params)
    restored = dequantize(integers, params)
    assert params.scale.shape == params.zero_point.shape == scale_shape(weight.shape, blocks)
    for index in np.ndindex(params.scale.shape):
        first = index[axis] * blocks.size
        at = (*index[:axis], slice(first, first + blocks.size), *index[axis + 1 :])
        alone = weight_qparams(weight[at], grid, PerTensor())
        assert (params.scale[index], params.zero_point[index]) == (alone.scale, alone.zero_point)
        assert np.array_equal(integers[at], quantize(weight[at], alone))
        assert np.array_equal(restored[at], dequantize(quantize(weight[at], alone), alone))


@given(blocked(), grids)
def test_no_value_of_a_block_moves_more_than_half_a_step(case: tuple[np.ndarray, PerBlock], grid: IntegerGrid) -> None:
    weight, blocks = case
    params = weight_qparams(weight, grid, blocks)
    error = np.abs(dequantize(quantize(weight, params), params).astype(np.float64) - weight)
    half = np.abs(spread(params.scale, weight.shape, blocks)) * 0.5
    if not grid.symmetric:
        half *= 2  # the rounded zero point shifts the range by up to half a step
    assert (error <= half * (1 + 1e-5) + np.abs(weight) * 1e-6).all()


@given(weights, grids)
def test_limits_are_in_order_and_zero_is_exact(weight: np.ndarray, grid: IntegerGrid) -> None:
    params = weight_qparams(weight, grid, PerBlock(0, 2))
    low, high = params.limits()
    assert (low <= 0).all()
    assert (high >= 0).all()
    zeros = np.zeros_like(weight)
    assert not dequantize(quantize(zeros, params), params).any()


@given(weights, st.sampled_from(["int2", "int4", "uint4"]))
def test_the_spare_step_is_on_the_side_of_the_largest_magnitude(weight: np.ndarray, dtype: str) -> None:
    assume(np.abs(weight).max() > 1e-3)
    grid = integer_grid(dtype, symmetric=True, full_range=True)
    params = weight_qparams(weight, grid, PerTensor())
    assert params.zero_point == grid.middle
    assert (params.scale < 0) == (weight.max() > -weight.min())
    plain = weight_qparams(weight, integer_grid(dtype, symmetric=True), PerTensor())
    assert abs(params.scale) < plain.scale


def test_a_one_sided_block_loses_no_level() -> None:
    grid = integer_grid("int4", symmetric=True, full_range=True)
    params = choose_qparams(0.0, 4.0, grid)
    assert params.scale == -0.5
    assert quantize(np.array([4.0, 3.5, 0.0, -9.0], np.float32), params).tolist() == [-8, -7, 0, 7]


def test_a_block_longer_than_the_axis_is_one_channel() -> None:
    weight = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    grid = integer_grid("int4", symmetric=False)
    blocks, channels = (weight_qparams(weight, grid, granularity) for granularity in (PerBlock(1, 99), PerChannel(0)))
    assert np.array_equal(blocks.scale[:, 0], channels.scale)
    assert np.array_equal(quantize(weight, blocks), quantize(weight, channels))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(0, 4), PerBlock(-1, 4)])
def test_empty_tensors(shape: tuple[int, ...], granularity: Granularity) -> None:
    weight = np.zeros(shape, np.float32)
    params = weight_qparams(weight, integer_grid("int4", symmetric=True, full_range=True), granularity)
    assert params.scale.shape == scale_shape(shape, granularity)
    assert quantize(weight, params).shape == dequantize(quantize(weight, params), params).shape == shape


@given(blocked())
def test_sums_per_scale(case: tuple[np.ndarray, PerBlock]) -> None:
    weight, blocks = case
    ones = reduce_per_scale(np.add, np.ones(weight.shape), blocks)
    assert ones.sum() == weight.size
    assert np.array_equal(spread(ones, weight.shape, blocks).shape, weight.shape)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerBlock(0, 2), PerBlock(1, 2)])
def test_values_that_are_not_finite_are_refused_by_name(bad: float, granularity: Granularity) -> None:
    weight = np.array([[1.0, 2.0, bad], [0.0, 1.0, 1.0]], np.float32)
    with pytest.raises(InputError) as error:
        weight_qparams(weight, integer_grid("int4", symmetric=True), granularity, name="fc.w")
    assert str(error.value) == "tensor 'fc.w': it holds values that are not finite and cannot be quantized"


def test_scales_of_another_tensor_are_refused() -> None:
    params = weight_qparams(np.ones((2, 8), np.float32), integer_grid("int4", symmetric=True), PerBlock(1, 4))
    with pytest.raises(InputError, match=r"scales of shape \[2, 2\] where a tensor \[2, 12\] needs \[2, 3\]"):
        quantize(np.ones((2, 12), np.float32), params)


def test_a_float_zero_point_is_added_before_rounding() -> None:
    grid = integer_grid("uint4", symmetric=False)
    params = QuantParams(np.array(0.5, np.float32), np.array(3.3, np.float32), grid)
    integers = quantize(np.array([0.0, 0.5, -9.0, 99.0], np.float32), params)
    assert integers.tolist() == [3, 4, 0, 15]
    assert dequantize(integers, params) == pytest.approx([-0.15, 0.35, -1.65, 5.85])


def test_vanishing_blocks_keep_a_scale_whose_products_are_normal() -> None:
    weight = np.array([[1e-40, 0.0, 1.0, 0.5]], np.float32)
    params = weight_qparams(weight, integer_grid("int4", symmetric=True, full_range=True), PerBlock(1, 2))
    assert np.abs(params.scale).min() == np.float32(SMALLEST_SCALE)
