"""What static quantization leaves in float says why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.evaluate.fidelity import compare
from optkit.pipeline import Context
from optkit.session import run_samples
from optkit_passes.quantization.quantize_static import QuantizeStatic
from quantizing import (
    CONSTANTS,
    build,
    deployed,
    find,
    inputs_of,
    missed,
    ops,
    quantized,
    random,
    residual,
    sqnr,
)

REFUSALS: dict[str, tuple[str, dict[str, np.ndarray], str, str]] = {
    "weights computed": (
        "(float[1,3,6,6] x, float[4,3,1,1] w) => (float[1,4,6,6] y) { y = Conv (x, w) }",
        {},
        "Conv",
        "its weights are not constant",
    ),
    "bias computed": (
        "(float[1,3,6,6] x, float[4] b) => (float[1,4,6,6] y) { y = Conv (x, w, b) }",
        {"w": random(4, 3, 1, 1)},
        "Conv",
        "its bias is not constant",
    ),
    "gemm bias matrix": (
        "(float[4,16] x) => (float[4,5] y) { y = Gemm (x, w, b) }",
        {"w": random(16, 5), "b": random(4, 5)},
        "Gemm",
        "its bias has shape [4, 5], not one value per output column",
    ),
    "gemm of activations with bias": (
        "(float[4,16] x, float[16,5] w) => (float[4,5] y) { y = Gemm (x, w, b) }",
        {"b": random(5)},
        "Gemm",
        "its weights are not constant and it has a bias",
    ),
    "vector": (
        "(float[4,16] x) => (float[4] y) { y = MatMul (x, w) }",
        {"w": random(16)},
        "MatMul",
        "its constant input is a vector",
    ),
    "masked columns": (
        "(float[4,16] x) => (float[4,5] y) { y = Gemm (x, w, b) }",
        {"w": random(16, 5), "b": np.array([0, -np.inf, 0, 0, -np.inf], np.float32)},
        "Gemm",
        "its bias holds infinite values",
    ),
    "tiny weights": (
        "(float[4,16] x) => (float[4,5] y) { y = MatMul (x, w) }",
        {"w": random(16, 5) * np.float32(1e-25)},
        "MatMul",
        "its weights are below 3e-17, too small for a scale",
    ),
    "double": (
        "(double[4,16] x) => (double[4,5] y) { y = MatMul (x, w) }",
        {"w": random(16, 5).astype(np.float64)},
        "MatMul",
        "input 'x' is double, not float32",
    ),
    "pad value": (
        "(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  p = Pad (a, pads, one)  y = Conv (p, v) }",
        {"v": random(3, 3, 1, 1), "pads": CONSTANTS["pads"], "one": np.array(1, np.float32)},
        "Pad",
        "it pads with a value other than 0",
    ),
    "cubic": (
        '(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  p = Resize <mode="cubic"> (a, , scales) '
        "y = Conv (p, v) }",
        {"v": random(3, 3, 1, 1), "scales": CONSTANTS["scales"]},
        "Resize",
        "its result may leave the range of its input",
    ),
    "read in float": (
        "(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  p = GlobalAveragePool (a)  y = Softmax (p) }",
        {"v": random(3, 3, 1, 1)},
        "GlobalAveragePool",
        "its output is only read in float",
    ),
    "float neighbour": (
        "(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  e = Exp (x)  p = Add (a, e)  y = Conv (p, v) }",
        {"v": random(3, 3, 1, 1)},
        "Add",
        "input 'e' is computed in float",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    text, constants, op_type, reason = REFUSALS[name]
    model = build(text, **constants)
    samples = [{k: v.astype(np.float64) for k, v in s.items()} for s in inputs_of(model)] if name == "double" else None
    result, remarks = quantized(model, samples)
    assert missed(remarks)[op_type] == reason
    if op_type != "GlobalAveragePool" and name != "double":
        assert sqnr(model, result) > 25


def test_weight_that_is_an_output_is_kept_beside_its_integers() -> None:
    model = build("(float[4,16] x) => (float[4,5] y, float[16,5] w) { y = MatMul (x, w) }", w=random(16, 5))
    result, remarks = quantized(model)
    assert [r.message for r in remarks if r.kind == "missed"] == [
        "reads 'w' in float, so that it is stored in both forms"
    ]
    assert sqnr(model, result) > 25


def test_masked_columns_after_a_product_stay_apart() -> None:
    model = build(
        "(float[4,16] x) => (float[4,5] y) { a = MatMul (x, w)  b = Add (a, mask)  y = Softmax (b) }",
        w=random(16, 5),
        mask=np.array([0, -np.inf, 0, 0, -np.inf], np.float32),
    )
    result, _ = quantized(model)
    assert [ops(result).count(op) for op in ("MatMul", "Add", "Gemm")] == [1, 1, 0]
    assert result.graph.initializers["mask"].dtype == ir.DataType.FLOAT
    assert sqnr(model, result) > 25


def test_rule_keeps_a_node_in_float() -> None:
    model = residual()
    kept = [node for node in model.graph if node.op_type == "Conv"][1]
    kept.metadata_props["optkit.precision"] = "fp32"
    result, remarks = quantized(model)
    assert missed(remarks)["Conv"] == "kept in float by a rule (fp32)"
    assert deployed(result)["QLinearConv"] == 2
    assert "u" in result.graph.initializers
    allowed = residual()
    find(allowed, "Conv").metadata_props["optkit.precision"] = "w8a8"
    assert not missed(quantized(allowed)[1])


def test_every_node_ruled_float_leaves_the_model_as_it_was() -> None:
    model = residual()
    for node in model.graph:
        node.metadata_props["optkit.precision"] = "fp32"
    result = model.clone()
    context = Context(pass_name="quantize-static")  # no calibration data needed either
    QuantizeStatic().run(result, context)
    assert ir.to_onnx_text(result) == ir.to_onnx_text(model)
    assert {remark.kind for remark in context.remarks} == {"missed"}


def test_node_in_a_body_says_why_it_stays_float() -> None:
    model = build(
        "(float[1,3,6,6] x, bool c) => (float[1,4,6,6] y) { a = Conv (x, v)  y = If (c) <"
        "then_branch = t () => (float[1,4,6,6] p) { p = Conv (a, w) },"
        "else_branch = e () => (float[1,4,6,6] q) { q = Exp (a) }> }",
        v=random(4, 3, 1, 1),
        w=random(4, 4, 1, 1),
    )
    samples = [{**s, "c": np.array(i % 2 == 0)} for i, s in enumerate(inputs_of_float(model))]
    result, remarks = quantized(model, samples)
    assert missed(remarks) == {"Conv": "inside the body of a control-flow node, where activations cannot be observed"}
    assert "w" in result.graph.initializers
    assert "v_quantized" in result.graph.initializers
    assert compare(run_samples(model, samples), run_samples(result, samples)).sqnr_db > 25


def inputs_of_float(model: ir.Model) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    return [{"x": generator.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(8)]


@pytest.mark.parametrize("opset", [10, 12])
def test_old_opset_is_refused_with_a_remark(opset: int) -> None:
    model = build(
        "(float[1,3,6,6] x) => (float[1,4,6,6] y) { y = Conv (x, w) }",
        header=f'<ir_version: 6, opset_import: ["" : {opset}]>',
        w=random(4, 3, 1, 1),
    )
    result, remarks = quantized(model)
    assert ops(result) == ["Conv"]
    assert missed(remarks) == {"Conv": f"opset {opset}: one scale per channel needs opset 13"}


def test_quantized_model_is_left_alone() -> None:
    once, _ = quantized(residual())
    twice, remarks = quantized(once)
    assert ops(twice) == ops(once)
    assert {r.kind for r in remarks} == {"missed"}
    assert any(r.op_type == "Conv" and r.message.endswith("is already quantized") for r in remarks)
