"""Whole graphs become complete quantized units: their widths, what stays float, masks, and what HTP makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quantizing
from optkit.dataset.samples import Samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.model.loading import save
from optkit.pipeline import Context
from optkit.quant.integers import choose_qparams, integer_grid
from optkit.session import run_samples
from optkit.target import load_target
from optkit_passes.quantization._graph_writer import FACTOR, regrid
from optkit_passes.quantization.quantize_graph import QuantizeGraph
from optkit_targets.qnn.runtime import NPU, Emulator, assignment
from quantizing import LAYERS, build, find, inputs_of, missed, ops, params, random, residual, transformer_block

NEW = '<ir_version: 10, opset_import: ["" : 21]>'
QDQ = ("DequantizeLinear", "QuantizeLinear")


quantized = partial(quantizing.quantized, pass_class=QuantizeGraph)


def sqnr(model: ir.Model, other: ir.Model, samples: Sequence[dict[str, np.ndarray]] | None = None) -> float:
    fresh = samples if samples is not None else inputs_of(model, 4)  # some of those that the ranges come from
    return compare(run_samples(model, fresh), run_samples(other, fresh)).sqnr_db


def incomplete(model: ir.Model) -> list[str]:
    """Return the operators that read or return float values which are not rounded right there."""
    found = []
    for node in model.graph:
        if node.op_type in QDQ:
            continue
        floats = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        read = all((p := v.producer()) is not None and p.op_type == QDQ[0] for v in floats)
        returned = all(u.node.op_type == QDQ[1] for output in node.outputs for u in output.uses())
        if not read or not returned or any(output.is_graph_output() for output in node.outputs):
            found.append(node.op_type)
    return found


def widths(model: ir.Model, op_type: str) -> set[int]:
    """Return the bits of what the operators of a type read and return."""
    nodes = [node for node in model.graph if node.op_type == op_type]
    values = [*(v for node in nodes for v in node.outputs), *(node.inputs[0] for node in nodes)]
    return {8 * params(value)[2].itemsize for value in values}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_a_complete_unit(layer: str, bits: int) -> None:
    model = LAYERS[layer]()
    result, _ = quantized(model, activation_bits=bits)
    assert not incomplete(result)
    assert sqnr(model, result) > {8: 30, 16: 40}[bits]


@pytest.mark.parametrize(("model", "floats"), [(residual, []), (transformer_block, ["Add"])])
def test_networks_are_complete_but_for_what_only_the_caller_reads(model: Any, floats: list[str]) -> None:
    original = model()
    result, remarks = quantized(original)
    assert incomplete(result) == floats
    assert "Relu" not in ops(result)
    assert sqnr(original, result) > 30
    assert [r.message for r in remarks if r.kind == "missed"] == ["its result is read in float only"] * len(floats)


def test_second_run_changes_nothing() -> None:
    result, _ = quantized(residual())
    _, remarks = quantized(result)
    assert not [remark for remark in remarks if remark.kind == "applied"]
    assert "is already quantized" in missed(remarks)["Conv"]


def test_four_bits_have_zero_points_and_convolutions_scales_per_channel() -> None:
    model = build(
        "(float[1,4,8,8] x) => (float[1,6,8,8] y) { a = Conv <pads=[1,1,1,1]> (x, w) b = Relu (a) "
        "y = ConvTranspose <group=2, pads=[1,1,1,1]> (b, v) }",
        NEW,
        w=random(8, 4, 3, 3),
        v=random(8, 3, 3, 3),
    )
    result, _ = quantized(model, weight_bits=4)
    first, second = (find(result, op).inputs[1].producer() for op in ("Conv", "ConvTranspose"))
    assert first.inputs[0].dtype == first.inputs[2].dtype == ir.DataType.INT4
    assert first.inputs[1].shape == (8,)
    assert second.inputs[0].dtype == ir.DataType.INT8
    assert second.inputs[1].shape == ()


def test_right_factor_of_two_wide_activations_is_symmetric() -> None:
    model = build("(float[2,7,16] x, float[2,16,5] z) => (float[2,7,5] y) { y = MatMul (x, z) }", NEW)
    result, _ = quantized(model, activation_bits=16)
    left, right = (params(value) for value in find(result, "MatMul").inputs)
    assert left[2] == np.uint16
    assert right[1:] == (0, np.int16)
    assert sqnr(model, result) > 70


def test_right_factor_has_8_bits_where_the_target_has_no_int16() -> None:
    target = load_target("snapdragon-8gen3-npu")
    target = target.model_copy(update={"dtypes": tuple(dtype for dtype in target.dtypes if dtype != "int16")})
    model = build("(float[2,7,16] x, float[2,16,5] z) => (float[2,7,5] y) { y = MatMul (x, z) }", NEW)
    result, _ = quantized(model, target=target, activation_bits=16)
    assert [params(value)[2] for value in find(result, "MatMul").inputs] == [np.uint16, np.uint8]


@pytest.mark.parametrize(("bits", "kinds"), [(8, ["UINT8", "INT32"]), (16, ["UINT16", "UINT16"])])
def test_normalizations_are_written_as_they_are_computed(bits: int, kinds: list[str]) -> None:
    model = build(
        "(float[4,16] x) => (float[4,5] y) { n = LayerNormalization (x, g, b) y = MatMul (n, w) }",
        NEW,
        g=random(16) + 1,
        b=random(16, seed=1),
        w=random(16, 5),
    )
    result, _ = quantized(model, activation_bits=bits)
    sources = [value.producer().inputs[0] for value in find(result, "LayerNormalization").inputs[1:]]
    assert [source.dtype.name for source in sources] == kinds
    assert not incomplete(result)
    assert sqnr(model, result) > 30


def test_sixteen_bits_below_opset_21_are_onnxruntimes_operators() -> None:
    model = LAYERS["matmul"]()
    result, _ = quantized(model, activation_bits=16)
    assert {node.domain for node in result.graph if node.op_type == "QuantizeLinear"} == {"com.microsoft"}
    assert sqnr(model, result) > 40


def test_tied_table_is_stored_in_both_forms() -> None:
    model = build(
        "(int64[2,9] ids) => (float[2,9,50] y) { e = Gather (table, ids) h = MatMul (e, w) "
        "t = Transpose <perm=[1,0]> (table) y = MatMul (h, t) }",
        table=random(50, 16),
        w=random(16, 16),
    )
    tokens = [{"ids": np.random.default_rng(i).integers(0, 50, (2, 9))} for i in range(8)]
    result, remarks = quantized(model, tokens)
    assert not incomplete(result)
    assert "Transpose" not in ops(result)
    assert "reads a constant that was transposed beforehand" in [remark.message for remark in remarks]
    assert sqnr(model, result, tokens) > 30


def test_softmax_keeps_its_whole_range_and_concat_shares_what_only_it_reads() -> None:
    model = build(
        "(float[4,8] x) => (float[4,5] y) { a = MatMul (x, w) s = Softmax (a) b = MatMul (x, v) "
        "c = Concat <axis=1> (s, b) y = MatMul (c, u) }",
        w=random(8, 8) * 100,
        v=random(8, 8),
        u=random(16, 5),
    )
    result, _ = quantized(model)
    softmax, concat = find(result, "Softmax"), find(result, "Concat")
    assert params(softmax.outputs[0])[:2] == (pytest.approx(1 / 255), 0)
    assert params(concat.inputs[1])[:2] == params(concat.outputs[0])[:2]
    assert params(concat.inputs[0])[:2] != params(concat.outputs[0])[:2]


def test_clamp_that_the_shared_scale_does_not_replace_stays() -> None:
    model = build(
        "(float[4,8] x) => (float[4,5] y) { a = MatMul (x, w) r = Relu (a) b = MatMul (x, v) "
        "c = Concat <axis=1> (r, b) y = MatMul (c, u) }",
        w=random(8, 8),
        v=random(8, 8),
        u=random(16, 5),
    )
    result, _ = quantized(model)
    assert "Relu" in ops(result)
    assert not incomplete(result)
    assert sqnr(model, result) > 30


@pytest.mark.parametrize("hidden", [-np.inf, -1e9])
@pytest.mark.parametrize("bits", [8, 16])
def test_hidden_scores_are_lifted(hidden: float, bits: int) -> None:
    model = build(
        "(float[1,6,8] x) => (float[1,6,8] y) { t = Transpose <perm=[0,2,1]> (x) s = MatMul (x, t) "
        "m = Add (s, mask) p = Softmax (m) y = MatMul (p, x) }",
        NEW,
        mask=np.triu(np.full((6, 6), hidden, np.float32), 1),
    )
    result, remarks = quantized(model, activation_bits=bits)
    assert not incomplete(result)
    assert sqnr(model, result) > {8: 20, 16: 60}[bits]
    assert f"instead of {hidden:.4g}" in next(r.message for r in remarks if r.op_type == "Add")


def test_mask_that_reaches_more_than_a_softmax_stays_float() -> None:
    model = build(
        "(float[4,6] x) => (float[4,6] y, float[4,6] m) { a = MatMul (x, w) m = Add (a, mask) p = Softmax (m) "
        "y = MatMul (p, w) }",
        w=random(6, 6),
        mask=np.triu(np.full((4, 6), -1e9, np.float32), 1),
    )
    result, remarks = quantized(model)
    assert "reaches -1e+09: beside that no other value has a step" in missed(remarks)["Add"]
    assert sqnr(model, result) > 30


def variance(scale: float = 1.0) -> ir.Model:
    """A mean of squares less the square of a mean, between two layers: 8 bits leave nothing of their difference."""
    return build(
        "(float[8,16] x) => (float[8,5] y) { a = MatMul (x, w) c = Add (a, offset) m = ReduceMean <axes=[1]> (c) "
        "q = Mul (m, m) s = Mul (c, c) n = ReduceMean <axes=[1]> (s) d = Sub (n, q) k = Mul (x, d) y = MatMul (k, v) }",
        w=random(16, 32),
        v=random(16, 5),
        offset=np.array(30 * scale, np.float32),
    )


def test_what_8_bits_spoil_is_measured_and_widened() -> None:
    model = variance()
    narrow, _ = quantized(model, wide="never")
    result, remarks = quantized(model)
    assert sqnr(model, narrow) < 10
    assert sqnr(model, result) > 20
    assert widths(result, "Sub") == {16}
    assert widths(narrow, "Sub") == {8}
    said = {remark.op_type: remark.message for remark in remarks}
    assert said["Sub"].startswith("activations in 16 bits: '")
    assert "all in 8 bits give" in said[""]
    again, _ = quantized(model)
    assert ir.to_onnx_text(again) == ir.to_onnx_text(result)


def test_layers_stay_narrow_beyond_their_budget() -> None:
    result, _ = quantized(variance(), wide_macs=0)
    assert widths(result, "MatMul") == {8}


def test_what_float16_does_not_hold_is_no_float() -> None:
    model = build(
        "(float[8,16] x) => (float[8,5] y) { a = MatMul (x, w) s = Mul (a, a) n = ReduceSum <keepdims=1> (s, axes) "
        "r = Sqrt (n) d = Div (a, r) y = MatMul (d, v) }",
        w=random(16, 32) * 1000,
        v=random(32, 5),
        axes=np.array([1]),
    )
    result, remarks = quantized(model)
    roots = [r.message for r in remarks if r.op_type == "Sqrt"]
    assert "which float16 may not hold" in roots[0]
    assert widths(result, "Sqrt") == {16}
    assert missed(remarks)["Div"] == "its results span too many orders of magnitude for integers"
    assert sqnr(model, result) > 20


def test_fed_and_computed_floats_are_rounded_for_units_only() -> None:
    model = build(
        "(float[4,8] x) => (float[4,5] y, float[4,8] e) { e = Exp (x) y = MatMul (e, w) }",
        w=random(8, 5),
    )
    result, remarks = quantized(model)
    assert next(value for value in result.graph.outputs if value.name == "e").producer().op_type == "Exp"
    assert find(result, "MatMul").inputs[0].producer().op_type == "DequantizeLinear"
    assert missed(remarks)["Exp"] == "its results span too many orders of magnitude for integers"


def test_target_without_floats_gets_integers_wherever_there_is_a_form() -> None:
    target = load_target("snapdragon-8gen3-npu")
    target = target.model_copy(update={"dtypes": tuple(d for d in target.dtypes if not d.startswith("float"))})
    model = build("(float[4,8] x) => (float[4,5] y) { e = Exp (x) m = MatMul (e, w) y = Softmax (m) }", w=random(8, 5))
    result, _ = quantized(model, target=target)
    assert not incomplete(result)


REFUSALS = {
    "none": (None, "none was given"),
    "empty": ([], "holds no samples"),
    "nan": ([{"x": np.full((2, 7, 16), np.nan, np.float32)}], "has NaN values"),
    "infinite": ([{"x": np.full((2, 7, 16), np.inf, np.float32)}], "has infinite values"),
    "shape": ([{"x": np.zeros((2, 7, 15), np.float32)}], "does not run"),
    "name": ([{"z": np.zeros((2, 7, 16), np.float32)}], "Required inputs"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_calibration_that_says_nothing_is_refused(case: str) -> None:
    samples, sentence = REFUSALS[case]
    context = Context(calibration=None if samples is None else Samples(samples))
    with pytest.raises(InputError, match=sentence):
        QuantizeGraph().run(LAYERS["matmul"](), context)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = build("(float[4,8] x) => (float[4,5] y) { y = MatMul (x, w) }", w=np.full((8, 5), np.nan, np.float32))
    with pytest.raises(InputError, match="NaN"):
        quantized(model)


def test_one_sample_is_remarked() -> None:
    model = LAYERS["matmul"]()
    _, remarks = quantized(model, inputs_of(model, 1))
    assert "one sample only" in missed(remarks)[""]


def test_empty_and_constant_and_half_tensors_stay_as_they_are() -> None:
    model = build(
        "(float[0,8] x, float16[4,8] h) => (float[0,5] y, float16[4,5] z, float[3] c) "
        "{ y = MatMul (x, w) z = MatMul (h, v) c = Identity (k) }",
        w=random(8, 5),
        v=random(8, 5).astype(np.float16),
        k=random(3),
    )
    samples = [{"x": np.zeros((0, 8), np.float32), "h": np.ones((4, 8), np.float16)}] * 3
    result, remarks = quantized(model, samples)
    assert ops(result) == ops(model)
    reasons = {remark.message for remark in remarks}
    assert "input 'h' is float16, not float32" in reasons
    assert any("has no elements in every calibration sample" in reason for reason in reasons)


@pytest.mark.parametrize("opset", [13, 17, 18, 21, 23])
def test_opsets(opset: int) -> None:
    model = build(
        "(float[1,3,8,8] x) => (float[1,5] y) { a = Conv <pads=[1,1,1,1]> (x, v) r = Clip (a, low, high) "
        "p = GlobalAveragePool (r) f = Flatten (p) y = Gemm <transB=1> (f, w, b) }",
        f'<ir_version: 8, opset_import: ["" : {opset}]>',
        v=random(6, 3, 3, 3),
        low=np.array(0, np.float32),
        high=np.array(6, np.float32),
        w=random(5, 6),
        b=random(5),
    )
    result, _ = quantized(model)
    assert not incomplete(result)
    assert "Clip" not in ops(result)
    assert sqnr(model, result) > 25


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_wider_integers_cover_the_same_range(a: float, b: float) -> None:
    narrow = choose_qparams(min(a, b), max(a, b), integer_grid("uint8", symmetric=False))
    low, high = narrow.limits()
    for grid in (integer_grid("uint16", symmetric=False), FACTOR):
        wide = regrid(narrow, grid)
        bottom, top = wide.limits()
        step = float(wide.scale)
        assert bottom <= low + step
        assert top >= high - step
        assert float(wide.scale) <= float(narrow.scale)
        assert grid.low <= int(wide.zero_point) <= grid.high
    assert regrid(narrow, narrow.grid) is narrow


@pytest.mark.emulator
@pytest.mark.parametrize("options", [{"activation_bits": 16}, {"weight_bits": 4}])
def test_htp_takes_every_node_and_agrees(options: dict[str, int], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    target = load_target("snapdragon-8gen3-npu")
    for number, model in enumerate((residual(), transformer_block())):
        model.opset_imports[""] = 21
        result, _ = quantized(model, target=target, **options)
        assert set(assignment(result, target).values()) == {NPU}
        samples = inputs_of(model, 2, seed=2)
        path = tmp_path / f"{number}.onnx"
        save(result, path)
        emulator = Emulator(path, target)
        outputs = emulator.run(samples)
        emulator.close()
        assert compare(run_samples(result, samples), outputs).sqnr_db > 20
