"""The choice between static and dynamic quantization, by measurement on held-out samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import quantizing
from optkit.dataset.samples import Samples
from optkit.errors import InputError
from optkit.model.loading import load_text
from optkit.pipeline import Context, Pipeline, Remark
from optkit.quant.calibrate import observe
from optkit.quant.histogram import Histogram
from optkit.target import IntegerFormat, Target, load_target
from optkit_passes.quantization import quantize_int8, quantize_static
from optkit_passes.quantization.quantize_int8 import QuantizeInt8
from pass_runs import op_types
from quantizing import HEADER, LAYERS, build, inputs_of, params, random, residual, sqnr, transformer_block


def able(name: str = "cortex-a53") -> Target:
    target = load_target(name)
    dynamic = IntegerFormat(dtype="uint8", symmetric=False)
    return target.model_copy(update={"activations": {**target.activations, "dynamic": dynamic}})


def quantized(
    model: ir.Model,
    samples: list[dict[str, np.ndarray]] | None,
    target: Target | None = None,
    **options: object,
) -> tuple[ir.Model, list[Remark]]:
    result = model.clone()
    context = Context(target=target, calibration=None if samples is None else Samples(samples))
    fresh = inputs_of(model, 2, seed=3)
    Pipeline([QuantizeInt8.model_validate(options)], strict=True).run(result, context, fresh)
    return result, context.remarks


def spoken(remarks: list[Remark]) -> str:
    """Return what was said about the model as a whole."""
    return next(r.message for r in remarks if r.message.startswith(("chose", "quantized")))


def measured(remarks: list[Remark]) -> str:
    """Return what was measured."""
    return next(r.message for r in remarks if r.kind == "applied" and r.message.startswith("chose"))


def figures_of(told: str) -> dict[str, float]:
    """Return the SQNR of each form."""
    return {part.rsplit(" ", 2)[0]: float(part.split()[-2]) for part in told.split(", ")}


def inputs_scale(model: ir.Model) -> float:
    """Return the scale that input 'x' is quantized with."""
    return float(params(model.graph.inputs[0])[0])


def exact_scale(samples: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Return the scale over the exact range of 'x'."""
    arrays = [sample["x"] for sample in samples]
    return float(max(array.max() for array in arrays) - min(array.min() for array in arrays)) / 255


def with_outliers(model: ir.Model, count: int = 16) -> list[dict[str, np.ndarray]]:
    samples = inputs_of(model, count)
    samples[0]["x"] = samples[0]["x"] * 50  # a range that no other sample needs
    return samples


def test_dynamic_wins_where_one_sample_widens_the_ranges() -> None:
    model = LAYERS["matmul"]()
    result, remarks = quantized(model, with_outliers(model), able())
    assert op_types(result)["DynamicQuantizeLinear"] == 1
    assert spoken(remarks).startswith("chose dynamic")
    assert "SQNR on 4 held-out samples: static " in spoken(remarks)
    assert sqnr(model, result) > 36
    passes = {r.message for r in remarks if r.op_type == "MatMul"}
    assert len(passes) == 1  # nothing about the forms that lost


def test_the_form_of_highest_sqnr_is_the_one_kept() -> None:
    model = build("(float[1,4,16] x) => (float[1,4,5] y) { s = Tanh (x)  y = MatMul (s, w) }", w=random(16, 5))
    samples = [{"x": s["x"] * 100} for s in inputs_of(model, 16)]
    result, remarks = quantized(model, samples, able())
    chosen, told = spoken(remarks).removeprefix("chose ").split(": SQNR on 4 held-out samples: ")
    figures = figures_of(told)
    assert set(figures) == {"static", "dynamic", "dynamic with clipped weights"}
    assert figures[chosen] + 1 >= max(figures.values())
    assert bool(op_types(result)["DynamicQuantizeLinear"]) == (chosen != "static")


def test_of_forms_whose_biases_are_corrected_the_best_is_kept() -> None:
    model = residual()
    result, remarks = quantized(model, inputs_of(model, 32), able("host"))
    chosen, told = measured(remarks).removeprefix("chose ").split(": SQNR on 8 held-out samples: ")
    plain, corrected = (figures_of(part) for part in told.split("; with biases corrected: "))
    best = max(plain.values())
    assert set(plain) == {"static", "static with float sums"}
    assert set(corrected) == {name for name, found in plain.items() if found >= best - 1}
    assert chosen in corrected
    assert any(r.message.startswith("bias corrected") for r in remarks)
    assert sqnr(model, result) > 30


def test_where_there_is_no_choice_every_sample_is_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LAYERS["conv"]()
    monkeypatch.setattr(quantize_int8, "run_samples", lambda *_, **__: pytest.fail("measured"))
    samples = inputs_of(model, 16)
    samples[3]["x"] = samples[3]["x"] * 3  # would be held out
    result, remarks = quantized(model, samples, able("host"))
    assert spoken(remarks) == "quantized statically: no matrix product has constant weights"
    assert inputs_scale(result) == pytest.approx(exact_scale(samples), rel=0.01)


def test_static_forms_share_one_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[tuple[str, int]] = []

    def counting(model: ir.Model, names: Iterable[str], samples: Samples, **rest: Any) -> dict[str, Histogram]:
        names = list(names)
        observed.extend((name, len(samples)) for name in names)
        return observe(model, names, samples, **rest)

    monkeypatch.setattr(quantize_static, "observe", counting)
    model = residual()
    quantized(model, inputs_of(model, 16), able("host"))
    assert {count for _, count in observed} == {12}
    assert len({name for name, _ in observed}) == len(observed) > 5


@pytest.mark.parametrize("count", [15, 16])
def test_few_samples_are_all_fitted_to_and_of_many_the_measured_model_is_kept(count: int) -> None:
    model = residual()
    samples = inputs_of(model, count)
    samples[3]["x"] = samples[3]["x"] * 3  # held out
    fitted = [sample for index, sample in enumerate(samples) if index % 4 != 3]
    result, remarks = quantized(model, samples, able("host"), form="static")
    few = measured(remarks).endswith("; then fitted to all 15 samples, and not measured again")
    assert few == (count == 15)
    assert f"SQNR on {count - len(fitted)} held-out samples" in measured(remarks)
    ratio = inputs_scale(result) / exact_scale(fitted)
    assert ratio > 1.5 if few else ratio < 1.01


def test_convolutions_stay_static_beside_dynamic_products() -> None:
    model = build(
        "(float[1,3,16] x) => (float[1,8,6] y) { c = Conv <pads=[1,1]> (x, k, b)  r = Relu (c)  "
        "n = Abs (r)  m = MatMul (n, w)  d = MatMul (r, v)  y = Add (m, d) }",
        k=random(8, 3, 3),
        b=random(8),
        w=random(16, 6),
        v=random(16, 6, seed=2),
    )
    result, remarks = quantized(model, inputs_of(model, 8), able(), form="dynamic")
    assert spoken(remarks) == "quantized dynamically: as asked for"
    counts = op_types(result)
    assert counts["DynamicQuantizeLinear"] == 1  # what reads the convolution stays with it
    assert counts["QuantizeLinear"]
    assert counts["MatMul"] == 1
    assert not {"w", "v", "k"} & set(result.graph.initializers)
    assert not any("by a rule" in r.message for r in remarks)
    assert not any("optkit.precision" in node.metadata_props for node in result.graph)


@pytest.mark.parametrize(
    ("model", "target", "reason"),
    [
        (residual(), able(), "matrix products hold 5 % of the weights and none reads a sequence"),
        (LAYERS["conv"](), able(), "no matrix product has constant weights"),
    ],
)
def test_static_alone_where_dynamic_is_no_question(model: ir.Model, target: Target, reason: str) -> None:
    result, remarks = quantized(model, inputs_of(model, 8), target)
    assert spoken(remarks) == f"quantized statically: {reason}"
    assert op_types(result)["QuantizeLinear"]


def test_a_form_may_be_asked_for() -> None:
    model = transformer_block()
    result, remarks = quantized(model, inputs_of(model, 8), able(), form="static")
    assert spoken(remarks) == "quantized statically: as asked for"
    assert not op_types(result)["DynamicQuantizeLinear"]


def test_a_target_that_lacks_dynamic_ranges_is_quantized_statically() -> None:
    target = able()
    target = target.model_copy(update={"activations": {"int8": target.activations["int8"]}})
    model = transformer_block()
    result, remarks = quantized(model, inputs_of(model, 8), target)
    assert spoken(remarks) == "quantized statically: target 'cortex-a53' does not quantize activations at run time"
    assert not op_types(result)["DynamicQuantizeLinear"]


def test_without_calibration_only_dynamic_is_possible() -> None:
    model = transformer_block()
    result, remarks = quantized(model, None, able())
    assert spoken(remarks).startswith("quantized dynamically without calibration data")
    assert op_types(result)["MatMulInteger"] == 4
    with pytest.raises(InputError, match="needs calibration data"):
        quantized(residual(), None, able())
    with pytest.raises(InputError, match="holds no samples"):
        quantized(model, [], able())


def test_one_sample_serves_both_purposes() -> None:
    model = transformer_block()
    _, remarks = quantized(model, inputs_of(model, 1), able("host"))
    assert "SQNR on 1 calibration sample: static " in spoken(remarks)


def test_a_model_without_weights_is_left_alone() -> None:
    model = load_text('<ir_version: 8, opset_import: ["" : 17]> main (float[2] x) => (float[2] y) { y = Neg (x) }')
    context = Context(calibration=Samples(inputs_of(model, 2)))
    QuantizeInt8().run(model, context)
    said = [(remark.kind, remark.message) for remark in context.remarks]
    assert said == [("missed", "it has no convolution, matrix product or table to quantize")]
    assert op_types(model) == {"Neg": 1}
    assert not model.metadata_props


def test_what_cannot_be_quantized_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("(float[2,4] x, float[4,3] z) => (float[2,3] y) { y = MatMul (x, z) }")
    samples = [{name: np.zeros_like(array) for name, array in sample.items()} for sample in inputs_of(model, 8)]
    monkeypatch.setattr(quantize_int8, "run_samples", lambda *_: pytest.fail("measured"))
    result, remarks = quantized(model, samples, able())
    assert [(r.kind, r.message) for r in remarks] == [("missed", "tensor 'z' is 0 in every calibration sample")]
    assert op_types(result) == {"MatMul": 1}
    assert "onnx.infer" not in result.metadata_props


def test_equalized_channels_take_part_where_products_read_uneven_ones() -> None:
    spread = np.logspace(-2, 2, 8, base=4, dtype=np.float32)
    model = build(
        "(float[1,3,4,4] x) => (float[1,5] y) { h = Conv <pads=[1,1,1,1]> (x, w)  r = Relu (h)  f = Flatten (r) "
        "y = Gemm <transB=1> (f, v, c) }",
        w=random(8, 3, 3, 3) * spread.reshape(8, 1, 1, 1),
        v=random(5, 128) / np.repeat(spread, 16),
        c=random(5),
    )
    for count in (8, 64):  # fitted again to all, or kept as measured
        result, remarks = quantized(model, inputs_of(model, count))
        assert measured(remarks).startswith("chose static with equalized channels: ")
        assert any("channels scaled by" in remark.message for remark in remarks)
        assert sqnr(model, result) > sqnr(model, quantizing.quantized(model, inputs_of(model, count))[0]) + 3


def test_a_dynamic_form_is_kept_where_it_comes_close() -> None:
    model = transformer_block()
    _, remarks = quantized(model, inputs_of(model))
    figures = figures_of(measured(remarks).split(": ", 2)[2])
    chosen = measured(remarks).removeprefix("chose ").split(":")[0]
    close = {name for name, value in figures.items() if "dynamic" in name and value > max(figures.values()) - 0.9}
    assert not close or "dynamic" in chosen


def test_sums_stay_in_float_where_that_is_half_a_decibel_better_and_the_target_computes_in_float() -> None:
    blocks = "".join(
        f"c{i} = Conv <pads=[1,1,1,1]> (x{i}, u{i}, d)  s{i} = Add (c{i}, x{i})  x{i + 1} = Relu (s{i})  "
        for i in range(8)
    )
    model = build(
        f"(float[1,3,8,8] x) => (float[1,5] y) {{ a = Conv <pads=[1,1,1,1]> (x, v, d)  x0 = Relu (a)  {blocks} "
        "p = GlobalAveragePool (x8)  f = Flatten (p)  y = Gemm <transB=1> (f, w, b) }",
        v=random(8, 3, 3, 3),
        d=random(8),
        w=random(5, 8),
        b=random(5),
        header=HEADER,
        **{f"u{i}": random(8, 8, 3, 3, seed=i) for i in range(8)},
    )
    _, remarks = quantized(model, inputs_of(model))
    figures = figures_of(measured(remarks).split(": ", 2)[2].split("; ")[0])
    assert set(figures) == {"static", "static with float sums"}
    kept = [remark for remark in remarks if remark.op_type == "Add" and remark.message.startswith("kept in float")]
    assert len(kept) == (8 if "float sums" in measured(remarks).split(":")[0] else 0)
    target = load_target("cortex-a53")
    integers = {name: taken for name, taken in target.activations.items() if name != "dynamic"}
    _, remarks = quantized(model, inputs_of(model), target.model_copy(update={"activations": integers}))
    assert spoken(remarks).startswith("quantized statically: ")


def test_convolutions_beside_products_may_stay_in_float_on_weights_of_8_bits() -> None:
    model = build(
        "(float[1,16,32] x) => (float[1,16,6] y) { e = MatMul (x, w)  c = Conv <pads=[2,2]> (e, k) y = MatMul (c, v) }",
        w=random(32, 16),
        k=random(16, 16, 5),
        v=random(16, 6),
    )
    samples = inputs_of(model, 24)
    for index in (3, 11, 19):  # held out: ranges fitted to the others miss them
        samples[index]["x"] = samples[index]["x"] * 30
    result, remarks = quantized(model, samples, able("host"))
    assert measured(remarks).startswith("chose dynamic with convolutions in float: ")
    assert op_types(result)["Conv"] == 1
    assert result.graph.initializers.keys().isdisjoint({"w", "k", "v"})
    assert sqnr(model, result) > 35
