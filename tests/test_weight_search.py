from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optkit.errors import InputError
from optkit.quant.awq import awq_scales
from optkit.quant.clipping import search_qparams
from optkit.quant.hqq import NORM, hqq_qparams
from optkit.quant.integers import (
    Granularity,
    IntegerGrid,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantParams,
    dequantize,
    integer_grid,
    quantize,
    reduce_per_scale,
    scale_shape,
    weight_qparams,
)
from optkit.quant.rows import from_rows, row_values, to_rows

TYPES = ["int2", "uint2", "uint3", "int4", "uint4", "int8", "uint16"]
grids = st.builds(integer_grid, st.sampled_from(TYPES), symmetric=st.booleans(), full_range=st.booleans())
reals = st.floats(-1e6, 1e6, width=32) | st.floats(-1.0, 1.0, width=32)
weights = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=reals)


@st.composite
def granularities(draw: st.DrawFn, weight: np.ndarray) -> Granularity:
    axis = draw(st.integers(-weight.ndim, weight.ndim - 1))
    return draw(st.sampled_from([PerTensor(), PerChannel(axis), PerBlock(axis, draw(st.integers(1, 12)))]))


def errors(weight: np.ndarray, params: QuantParams, importance: np.ndarray | float = 1.0, p: float = 2) -> np.ndarray:
    """The sum of each scale's errors to the power p."""
    error = np.abs(dequantize(quantize(weight, params), params).astype(np.float64) - weight) ** p
    return reduce_per_scale(np.add, error * importance, params.granularity)


@given(st.data(), weights)
def test_rows_hold_the_values_of_one_scale(data: st.DataObject, weight: np.ndarray) -> None:
    granularity = data.draw(granularities(weight))
    rows = to_rows(weight, granularity)
    largest = reduce_per_scale(np.maximum, weight, granularity)
    assert np.array_equal(row_values(largest, granularity), rows.max(axis=1, initial=0))
    assert np.array_equal(from_rows(rows.max(axis=1, initial=0), weight.shape, granularity), largest)


@given(st.data(), weights, grids)
def test_the_search_is_never_worse_than_the_exact_range(
    data: st.DataObject, weight: np.ndarray, grid: IntegerGrid
) -> None:
    granularity = data.draw(granularities(weight))
    costs = hnp.arrays(np.float64, weight.shape, elements=st.floats(0, 1e6))
    importance = data.draw(st.none() | costs)
    params = search_qparams(weight, grid, granularity, importance=importance)
    assert params.scale.shape == params.zero_point.shape == scale_shape(weight.shape, granularity)
    assert (params.scale.dtype, params.zero_point.dtype) == (np.float32, grid.dtype)
    assert (params.scale != 0).all()
    if grid.symmetric:
        assert (params.zero_point == grid.middle).all()
    if not grid.full_range:
        assert (params.scale > 0).all()
    exact = weight_qparams(weight, grid, granularity)
    cost = 1.0 if importance is None else importance
    assert (errors(weight, params, cost) <= errors(weight, exact, cost) * (1 + 1e-9)).all()


@pytest.mark.parametrize("dtype", ["uint2", "uint4"])
@pytest.mark.parametrize("kind", ["symmetric", "full", "asymmetric"])
def test_the_search_is_close_to_the_best_of_a_fine_one(dtype: str, kind: str) -> None:
    grid = integer_grid(dtype, symmetric=kind != "asymmetric", full_range=kind == "full")
    weight = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    params = search_qparams(weight, grid, PerBlock(1, 32))
    best = np.full((8, 1), np.inf)
    zeros = [grid.middle] if grid.symmetric else range(grid.low, grid.high + 1)
    signs = (1, -1) if kind == "full" else (1,)
    for size in np.linspace(0.02, 2.0, 400, dtype=np.float32):
        for zero in zeros:
            for sign in signs:
                tried = QuantParams(
                    np.full((8, 1), sign * size), np.full((8, 1), zero, grid.dtype), grid, params.granularity
                )
                best = np.minimum(best, errors(weight, tried))
    assert errors(weight, params).sum() < 1.01 * best.sum()


def test_an_outlier_is_clipped_and_the_rest_gains() -> None:
    weight = np.append(np.linspace(-1, 1, 31), 2.2).astype(np.float32)[None]
    grid = integer_grid("int2", symmetric=True)
    exact, found = weight_qparams(weight, grid, PerChannel(0)), search_qparams(weight, grid, PerChannel(0))
    assert found.limits()[1] < 2.2
    assert errors(weight, found) < 0.5 * errors(weight, exact)


def test_importance_moves_the_error_to_where_it_costs_little() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    importance = np.where(np.arange(32) < 4, 100.0, 1.0)[None]
    grid = integer_grid("int4", symmetric=True, full_range=True)
    plain = search_qparams(weight, grid, PerBlock(1, 32))
    weighted = search_qparams(weight, grid, PerBlock(1, 32), importance=importance)
    assert errors(weight, weighted, importance).sum() < 0.8 * errors(weight, plain, importance).sum()


@pytest.mark.parametrize("importance", [-1.0, np.nan, np.inf])
def test_an_importance_that_is_none_is_refused(importance: float) -> None:
    weight, grid = np.ones((2, 4), np.float32), integer_grid("int4", symmetric=True)
    with pytest.raises(InputError) as error:
        search_qparams(weight, grid, PerTensor(), importance=np.array([1, 1, 1, importance]), name="fc.w")
    assert str(error.value) == "tensor 'fc.w': the importance of its values is negative or not finite"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weight, grid = np.array([[1.0, bad]], np.float32), integer_grid("uint4", symmetric=False)
    sentence = "tensor 'fc.w': it holds values that are not finite and cannot be quantized"
    for find in (search_qparams, hqq_qparams):
        with pytest.raises(InputError) as error:
            find(weight, grid, PerBlock(1, 2), name="fc.w")
        assert str(error.value) == sentence


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(0, 4), PerBlock(-1, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_empty_tensors(shape: tuple[int, ...], granularity: Granularity, symmetric: bool) -> None:
    weight, grid = np.zeros(shape, np.float32), integer_grid("uint4", symmetric=symmetric)
    assert search_qparams(weight, grid, granularity).scale.shape == scale_shape(shape, granularity)
    for float_zero in (True, False):
        integers, params = hqq_qparams(weight, grid, granularity, float_zero=float_zero)
        assert (integers.shape, params.scale.shape) == (shape, scale_shape(shape, granularity))


@settings(deadline=None)
@given(st.data(), weights, grids, st.booleans())
def test_hqq_is_never_worse_than_rounding_to_nearest_in_its_own_norm(
    data: st.DataObject, weight: np.ndarray, grid: IntegerGrid, float_zero: bool
) -> None:
    granularity = data.draw(granularities(weight))
    integers, params = hqq_qparams(weight, grid, granularity, float_zero=float_zero)
    assert np.array_equal(integers, quantize(weight, params))
    assert params.zero_point.dtype == (np.float32 if float_zero and not grid.symmetric else grid.dtype)
    exact = weight_qparams(weight, grid, granularity)
    # what lies in the middle of two steps, and differences of large float32, are judged with an error of their own
    slack = reduce_per_scale(np.add, (1e-5 * np.abs(weight.astype(np.float64))) ** NORM, granularity)
    slack = slack + reduce_per_scale(np.add, np.ones(weight.shape), granularity) * (1e-5 * np.abs(exact.scale)) ** NORM
    assert (errors(weight, params, p=NORM) <= errors(weight, exact, p=NORM) * (1 + 1e-4) + slack).all()


@pytest.mark.parametrize(("dtype", "gain"), [("uint2", 0.9), ("uint4", 0.97)])
def test_hqq_has_smaller_norm_than_least_squares_on_heavy_tails(dtype: str, gain: float) -> None:
    weight = np.random.default_rng(0).laplace(size=(64, 100)).astype(np.float32)
    grid = integer_grid(dtype, symmetric=False)
    squares = errors(weight, search_qparams(weight, grid, PerBlock(1, 32)), p=NORM).sum()
    rounded = errors(weight, hqq_qparams(weight, grid, PerBlock(1, 32))[1], p=NORM).sum()
    floats = errors(weight, hqq_qparams(weight, grid, PerBlock(1, 32), float_zero=True)[1], p=NORM).sum()
    assert rounded < gain**0.3 * squares
    assert floats < gain * squares
    assert floats < rounded


def test_float_zero_points_serve_ranges_far_from_zero() -> None:
    weight = (5 + np.random.default_rng(0).normal(size=(4, 32))).astype(np.float32)
    grid = integer_grid("uint4", symmetric=False)
    rounded, floats = (hqq_qparams(weight, grid, PerBlock(1, 32), float_zero=kind)[1] for kind in (False, True))
    assert errors(weight, floats).sum() < 0.5 * errors(weight, rounded).sum()


def nearest(bits: int) -> object:
    def quantizer(weight: np.ndarray) -> np.ndarray:
        params = weight_qparams(weight, integer_grid(f"int{bits}", symmetric=True), PerBlock(1, 32))
        return dequantize(quantize(weight, params), params)

    return quantizer


def layer_error(inputs: np.ndarray, weight: np.ndarray, scales: np.ndarray) -> float:
    restored = nearest(4)(weight * scales) / scales  # type: ignore[operator]
    return float(np.linalg.norm(inputs @ (weight - restored).T))


@pytest.mark.parametrize("tokens", [20, 400])
def test_awq_protects_the_channels_of_large_inputs(tokens: int) -> None:
    rng = np.random.default_rng(0)
    loud = np.where(np.arange(64) % 16 == 3, 30.0, 1.0)
    inputs = rng.normal(size=(tokens, 64)) * loud
    layers = [rng.normal(size=(rows, 64)).astype(np.float32) for rows in (24, 8)]
    scales = awq_scales(layers, np.abs(inputs).mean(axis=0), inputs, nearest(4))  # type: ignore[arg-type]
    assert scales.dtype == np.float32
    assert scales[loud > 1].min() > scales[loud == 1].max()
    assert scales.max() * scales.min() == pytest.approx(1, rel=1e-5)
    for weight in layers:
        assert layer_error(inputs, weight, scales) < 0.7 * layer_error(inputs, weight, np.ones(64, np.float32))


def test_awq_leaves_alone_what_it_cannot_better() -> None:
    rng = np.random.default_rng(0)
    inputs, weight = rng.normal(size=(50, 8)), rng.normal(size=(4, 8)).astype(np.float32)
    exact = awq_scales([weight], np.abs(inputs).mean(axis=0), inputs, lambda values: values)
    assert exact.max() / exact.min() < 100  # whatever it is, nothing is lost
    for magnitude, sample in ((np.zeros(8), inputs), (np.ones(8), inputs[:0]), (np.ones(8), inputs)):
        scales = awq_scales([weight], magnitude, sample, nearest(4))  # type: ignore[arg-type]
        assert np.array_equal(scales, np.ones(8))
    assert awq_scales([np.zeros((3, 0))], np.zeros(0), np.zeros((5, 0)), nearest(4)).shape == (0,)  # type: ignore[arg-type]


def test_awq_survives_channels_that_are_always_zero() -> None:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(50, 32)) * np.where(np.arange(32) < 2, 20.0, 1.0)
    inputs[:, 7] = 0
    weight = rng.normal(size=(4, 32)).astype(np.float32)
    scales = awq_scales([weight], np.abs(inputs).mean(axis=0), inputs, nearest(4))  # type: ignore[arg-type]
    assert (scales > 0).all()
    assert np.isfinite(scales).all()


@pytest.mark.parametrize(
    ("weight", "magnitude", "sample", "sentence"),
    [
        ((2, 3), [1, 1, 1], np.ones((4, 2)), "inputs [4, 2] and magnitudes [3] are not of the same channels"),
        ((2, 4), [1, 1, 1], np.ones((4, 3)), "a weight [2, 4] does not read its 3 channels"),
        ((2, 3), [1, -1, 1], np.ones((4, 3)), "a magnitude is negative"),
        ((2, 3), [1, np.nan, 1], np.ones((4, 3)), "it holds values that are not finite"),
        ((2, 3), [1, 1, 1], np.full((4, 3), np.inf), "it holds values that are not finite"),
    ],
)
def test_awq_refusals(weight: tuple[int, ...], magnitude: list[float], sample: np.ndarray, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        awq_scales([np.ones(weight)], np.array(magnitude, float), sample, nearest(4), name="x")  # type: ignore[arg-type]
    assert str(error.value) == f"tensor 'x': {sentence}"
