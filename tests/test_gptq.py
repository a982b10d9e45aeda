from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.errors import InputError
from optkit.quant.clipping import search_qparams
from optkit.quant.gptq import fit_scales, gptq, refit
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
    spread,
    weight_qparams,
)

FOUR, TWO = integer_grid("int4", symmetric=True, full_range=True), integer_grid("uint2", symmetric=False)


def gptq_reference(
    weight: np.ndarray, hessian: np.ndarray, params: QuantParams, order: np.ndarray, damping: float
) -> np.ndarray:
    """Optimal brain quantization (Frantar & Alistarh 2022, section 4) in the given order, inverting at every column."""
    left = weight.astype(np.float64)
    diagonal = np.diag(hessian)
    damped = hessian + np.diag(np.where(diagonal > 0, damping * diagonal.mean(), 1.0))
    scale, zero = (
        np.broadcast_to(spread(v, weight.shape, params.granularity), weight.shape).astype(np.float64)
        for v in (params.scale, params.zero_point)
    )
    integers = np.empty(weight.shape, params.grid.dtype)
    remaining = list(order)
    while remaining:
        k = remaining[0]
        inverse = np.linalg.inv(damped[np.ix_(remaining, remaining)])
        steps = np.rint(left[:, k] / scale[:, k] + zero[:, k]).clip(params.grid.low, params.grid.high)
        integers[:, k] = steps
        error = (left[:, k] - (steps - zero[:, k]) * scale[:, k]) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0][None]
        remaining.pop(0)
    return integers


def correlated(rng: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    """Inputs that vary along few directions, as a layer's do."""
    rank = max(columns // 4, 1)
    return rng.normal(size=(tokens, rank)) @ rng.normal(size=(rank, columns)) + 0.3 * rng.normal(size=(tokens, columns))


def output_error(inputs: np.ndarray, weight: np.ndarray, integers: np.ndarray, params: QuantParams) -> float:
    return float(np.linalg.norm(inputs @ (weight - dequantize(integers, params)).T) / np.linalg.norm(inputs @ weight.T))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.integers(1, 24),
    st.sampled_from(["int2", "uint2", "uint3", "int4", "uint4", "int8"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([PerTensor(), PerChannel(0), PerChannel(1), PerBlock(1, 8), PerBlock(1, 7), PerBlock(1, 64)]),
    st.booleans(),
    st.sampled_from([0.01, 0.1]),
)
def test_equals_optimal_brain_quantization_in_a_fixed_order(
    seed: int,
    rows: int,
    columns: int,
    dtype: str,
    symmetric: bool,
    act_order: bool,
    granularity: Granularity,
    dead: bool,
    damping: float,
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    inputs = correlated(rng, 3 * columns, columns)
    if dead:
        inputs[:, rng.integers(columns)] = 0
    hessian = inputs.T @ inputs
    params = weight_qparams(weight, integer_grid(dtype, symmetric=symmetric, full_range=True), granularity)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(columns)
    found = gptq(weight, hessian, params, act_order=act_order, damping=damping)
    assert found.dtype == params.grid.dtype
    assert np.array_equal(found, gptq_reference(weight, hessian, params, order, damping))


@pytest.mark.parametrize("act_order", [True, False])
def test_equals_the_reference_beyond_one_lazy_batch(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optkit.quant.gptq.LAZY", 16)
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(5, 52)).astype(np.float32)
    inputs = correlated(rng, 150, 52)
    hessian = inputs.T @ inputs
    params = search_qparams(weight, FOUR, PerBlock(1, 20))
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(52)
    found = gptq(weight, hessian, params, act_order=act_order)
    assert np.array_equal(found, gptq_reference(weight, hessian, params, order, 0.01))


@pytest.mark.parametrize("grid", [FOUR, TWO], ids=["int4", "uint2"])
@pytest.mark.parametrize("granularity", [PerChannel(0), PerBlock(1, 32)], ids=["channel", "block"])
@pytest.mark.parametrize("act_order", [True, False])
def test_cuts_the_error_of_outputs_on_correlated_inputs(
    grid: IntegerGrid, granularity: Granularity, act_order: bool
) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(64, 192)).astype(np.float32)
    inputs, unseen = np.split(correlated(rng, 2000, 192), 2)
    params = search_qparams(weight, grid, granularity)
    nearest, found = quantize(weight, params), gptq(weight, inputs.T @ inputs, params, act_order=act_order)
    for sample in (inputs, unseen):
        assert output_error(sample, weight, found, params) < 0.6 * output_error(sample, weight, nearest, params)


def test_independent_inputs_round_to_nearest() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    params = weight_qparams(weight, TWO, PerChannel(0))
    assert np.array_equal(gptq(weight, np.diag(np.arange(1.0, 10.0)), params), quantize(weight, params))
    assert np.array_equal(gptq(weight, np.zeros((9, 9)), params), quantize(weight, params))


def test_a_dead_column_is_rounded_to_nearest_and_changes_no_other() -> None:
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(4, 12)).astype(np.float32)
    inputs = correlated(rng, 60, 12)
    inputs[:, 5] = 0
    params = weight_qparams(weight, FOUR, PerChannel(0))
    found = gptq(weight, inputs.T @ inputs, params)
    assert np.array_equal(found[:, 5], quantize(weight, params)[:, 5])
    other = weight.copy()
    other[:, 5] *= 0.5
    assert np.array_equal(np.delete(gptq(other, inputs.T @ inputs, params), 5, 1), np.delete(found, 5, 1))


def test_one_sample_and_no_damping_still_factor() -> None:
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(3, 16)).astype(np.float32)
    inputs = rng.normal(size=(1, 16))
    params = weight_qparams(weight, FOUR, PerChannel(0))
    found = gptq(weight, inputs.T @ inputs, params, damping=0.0)
    assert output_error(inputs, weight, found, params) < output_error(inputs, weight, quantize(weight, params), params)


def test_float_zero_points_are_added_before_rounding() -> None:
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(3, 20)).astype(np.float32)
    params = weight_qparams(weight, TWO, PerBlock(1, 10))
    params = replace(params, zero_point=params.zero_point.astype(np.float32) + np.float32(0.3))
    inputs = correlated(rng, 60, 20)
    hessian = inputs.T @ inputs
    found = gptq(weight, hessian, params, act_order=False)
    assert np.array_equal(found, gptq_reference(weight, hessian, params, np.arange(20), 0.01))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    weight = np.zeros(shape, np.float32)
    params = weight_qparams(weight, FOUR, PerBlock(1, 2))
    assert gptq(weight, np.eye(shape[1]), params).shape == shape
    assert refit(weight, np.eye(shape[1]), np.eye(shape[1])).shape == shape


@pytest.mark.parametrize(
    ("weight", "hessian", "sentence"),
    [
        (np.ones((2, 3, 1)), np.eye(3), "tensor 'fc.w': it has 3 axes where GPTQ takes a matrix"),
        (np.ones((2, 3)), np.eye(2), "tensor 'fc.w': the Hessian of its inputs is [2, 2] and not [3, 3]"),
        (
            np.array([[1, np.nan]]),
            np.eye(2),
            "tensor 'fc.w': it holds values that are not finite and cannot be quantized",
        ),
        (
            np.ones((2, 2)),
            np.full((2, 2), np.inf),
            "tensor 'fc.w': the Hessian of its inputs holds values that are not finite",
        ),
        (np.ones((2, 2)), -np.eye(2), "tensor 'fc.w': the Hessian of its inputs is not positive semidefinite"),
        (
            np.ones((2, 2)),
            np.array([[1.0, 9.0], [9.0, 1.0]]),
            "tensor 'fc.w': the Hessian of its inputs is not positive semidefinite",
        ),
    ],
)
def test_refusals(weight: np.ndarray, hessian: np.ndarray, sentence: str) -> None:
    params = weight_qparams(np.ones((2, 3), np.float32), FOUR, PerTensor())
    with pytest.raises(InputError) as error:
        gptq(weight.astype(np.float32), hessian, params, name="fc.w")
    assert str(error.value) == sentence


def test_refit_is_the_minimum() -> None:
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(4, 10)).astype(np.float32)
    floats = correlated(rng, 50, 10)
    quantized = floats + 0.2 * rng.normal(size=floats.shape)
    hessian = quantized.T @ quantized
    found = refit(weight, floats.T @ quantized, hessian, damping=0.05)
    ridge = 0.05 * np.diag(hessian).mean()

    def loss(other: np.ndarray) -> float:
        fit = np.square(floats @ weight.T - quantized @ other.T).sum()
        return float(fit + ridge * np.square(other.astype(np.float64) - weight).sum())

    for _ in range(20):
        assert loss(found) <= loss(found + 0.01 * rng.normal(size=found.shape))
    assert loss(found) < loss(weight)


def test_refit_keeps_the_weight_where_inputs_agree_or_say_nothing() -> None:
    rng = np.random.default_rng(7)
    weight = rng.normal(size=(4, 6)).astype(np.float32)
    inputs = correlated(rng, 50, 6)
    inputs[:, 2] = 0
    hessian = inputs.T @ inputs
    assert np.allclose(refit(weight, hessian, hessian), weight, atol=1e-5)
    assert np.array_equal(refit(weight, np.zeros((6, 6)), np.zeros((6, 6))), weight)


def test_refit_before_gptq_makes_up_for_quantized_inputs() -> None:
    rng = np.random.default_rng(8)
    weight = rng.normal(size=(32, 96)).astype(np.float32)
    floats = correlated(rng, 800, 96)
    quantized = np.rint(floats * 0.3) / 0.3
    hessian = quantized.T @ quantized
    target = refit(weight, floats.T @ quantized, hessian)
    errors = []
    for start in (weight, target):
        params = search_qparams(start, FOUR, PerBlock(1, 32))
        restored = dequantize(gptq(start, hessian, params), params)
        errors.append(float(np.linalg.norm(floats @ weight.T - quantized @ restored.T)))
    assert errors[1] < 0.9 * errors[0]


def test_refit_without_damping_is_refused() -> None:
    with pytest.raises(InputError, match=r"damping of 0\.0 holds the weight to nothing"):
        refit(np.ones((1, 2), np.float32), np.eye(2), np.eye(2), damping=0.0)


@pytest.mark.parametrize("grid", [FOUR, TWO], ids=["int4", "uint2"])
@pytest.mark.parametrize("granularity", [PerChannel(0), PerBlock(1, 32), PerBlock(1, 40)])
def test_fitted_scales_lower_the_error_of_the_same_integers(grid: IntegerGrid, granularity: Granularity) -> None:
    rng = np.random.default_rng(9)
    weight = rng.normal(size=(16, 96)).astype(np.float32)
    inputs, unseen = np.split(correlated(rng, 2000, 96), 2)
    hessian = inputs.T @ inputs
    params = search_qparams(weight, grid, granularity)
    integers = gptq(weight, hessian, params)
    found = fit_scales(weight, hessian, integers, params)
    assert (found.scale.dtype, found.scale.shape) == (np.float32, params.scale.shape)
    assert np.array_equal(np.sign(found.scale), np.sign(params.scale))
    for sample in (inputs, unseen):
        assert output_error(sample, weight, integers, found) < 0.99 * output_error(sample, weight, integers, params)


def test_enough_sweeps_reach_the_least_squares_scales() -> None:
    rng = np.random.default_rng(10)
    weight = rng.normal(size=(3, 24)).astype(np.float32)
    inputs = correlated(rng, 200, 24)
    hessian = inputs.T @ inputs
    params = weight_qparams(weight, FOUR, PerBlock(1, 8))
    integers = gptq(weight, hessian, params)
    found = fit_scales(weight, hessian, integers, params, damping=0.0, sweeps=300)
    for row in range(3):
        outputs = (inputs * integers[row]).reshape(200, 3, 8).sum(axis=2)  # of every block at scale 1
        best = np.linalg.lstsq(outputs, inputs @ weight[row], rcond=None)[0]
        assert np.allclose(found.scale[row], best, rtol=1e-3)


def test_scales_of_empty_and_zero_weights_stay() -> None:
    for weight in (np.zeros((0, 4), np.float32), np.zeros((2, 4), np.float32)):
        params = weight_qparams(weight, FOUR, PerBlock(1, 2))
        found = fit_scales(weight, np.eye(4), quantize(weight, params), params)
        assert np.array_equal(found.scale, params.scale)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerBlock(0, 2)])
def test_scales_shared_by_rows_are_not_fitted(granularity: Granularity) -> None:
    weight = np.ones((2, 4), np.float32)
    params = weight_qparams(weight, FOUR, granularity)
    with pytest.raises(InputError) as error:
        fit_scales(weight, np.eye(4), quantize(weight, params), params, name="fc.w")
    assert str(error.value) == "tensor 'fc.w': its scales are shared by rows and are not fitted row by row"
