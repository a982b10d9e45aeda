"""Ranges chosen by the error at the outputs: outliers that matter are kept, those that do not are clipped."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.session import run_samples
from optkit_passes.quantization import _comparison
from quantizing import build, find, inputs_of, params, quantized, random, residual, sqnr, transformer_block


def with_outliers(count: int = 32, *, matter: bool) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    """Return a model whose first input column has one large value in one sample, read by large weights or by none."""
    weight = random(16, 5)
    weight[0] = 3 if matter else 0
    model = build("(float[64,16] x) => (float[64,5] y) { y = MatMul (x, w) }", w=weight)
    samples = inputs_of(model, count)
    samples[0]["x"][5, 0] = 400
    return model, samples


def high(model: ir.Model) -> float:
    scale, zero, _ = params(find(model, "MatMul").inputs[0])
    return (255 - zero) * scale


def test_outliers_without_effect_are_clipped_and_others_kept() -> None:
    for matter in (False, True):
        model, samples = with_outliers(matter=matter)
        result, _ = quantized(model, samples, range_method="auto")
        assert (high(result) > 300) == matter


def test_auto_beats_the_exact_range_where_outliers_do_not_matter() -> None:
    model, samples = with_outliers(matter=False)
    exact, auto = (quantized(model, samples, range_method=method)[0] for method in ("minmax", "auto"))
    assert sqnr(model, auto) > sqnr(model, exact) + 10


@pytest.mark.parametrize("model", [residual, transformer_block])
def test_auto_is_not_worse_on_the_samples_it_compares(model: object) -> None:
    assert callable(model)
    reference = model()
    samples = inputs_of(reference, 16)
    exact, auto = (quantized(reference, samples, range_method=method)[0] for method in ("minmax", "auto"))
    goals = run_samples(reference, samples)
    errors = [
        sum(float(np.square(a["y"] - b["y"]).sum()) for a, b in zip(goals, run_samples(each, samples), strict=True))
        for each in (exact, auto)
    ]
    assert errors[1] <= 1.02 * errors[0]


def test_same_inputs_give_the_same_choice() -> None:
    model = residual()
    first, second = (quantized(model, range_method="auto")[0] for _ in range(2))
    assert ir.to_proto(first).SerializeToString(deterministic=True) == ir.to_proto(second).SerializeToString(
        deterministic=True
    )


def test_the_number_of_runs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0
    error = _comparison._Trial.error

    def counted(self: _comparison._Trial, chosen: list[object]) -> float:
        nonlocal runs
        runs += len(self.samples)
        return error(self, chosen)

    monkeypatch.setattr(_comparison._Trial, "error", counted)
    monkeypatch.setattr(_comparison, "RUNS", 40)
    quantized(residual(), range_method="auto")
    assert runs <= 40 + 5 * _comparison.SAMPLES


@pytest.mark.parametrize("count", [1, 2])
def test_few_samples_suffice(count: int) -> None:
    model = residual()
    result, _ = quantized(model, inputs_of(model, count), range_method="auto")
    assert sqnr(model, result) > 12


def test_16_bits_and_integer_outputs_are_compared_too() -> None:
    model = build(
        "(float[8,16] x) => (int64[8] y) { m = MatMul (x, w)  y = ArgMax <axis=1, keepdims=0> (m) }",
        '<ir_version: 10, opset_import: ["" : 21]>',
        w=random(16, 5),
    )
    result, _ = quantized(model, range_method="auto", activation_bits=16)
    assert find(result, "QuantizeLinear").outputs[0].dtype == ir.DataType.UINT16
