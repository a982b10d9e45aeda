"""Weight-only quantization: every form runs, shared constants stay one, refusals have reasons."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.dataset.samples import Samples, random_samples
from optkit.evaluate.fidelity import compare
from optkit.model.loading import storable, weight_bytes
from optkit.pipeline import Context
from optkit.quant.packing import unpack
from optkit.recipe import PRECISION_KEY
from optkit.session import Session, run_samples
from optkit_passes.quantization.quantize_weights import QuantizeWeights
from pass_runs import node, op_types
from quantizing import build, random
from weight_runs import OPSET21, OPSET25, missed, product, quantize

ENOUGH_DB = {8: 38.0, 4: 15.0, 2: 2.0}


def sqnr(before: ir.Model, after: ir.Model, *, optimize: bool = False) -> float:
    samples = list(random_samples(before, 4))
    return compare(run_samples(before, samples), run_samples(after, samples, optimize=optimize)).sqnr_db


def tied(dim: int) -> ir.Model:
    return build(
        "(int64[2,5] t) => (float[2,5,40] y) { z = Sub (t, t)  e = Gather (w, z)  s = Sin (e)  "
        "v = Transpose <perm=[1,0]> (w)  y = MatMul (s, v) }",
        w=random(40, dim),
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["MatMulNBits", "DequantizeLinear"])
@pytest.mark.parametrize("block_size", [0, 16, 32])
def test_every_form_of_a_matrix_product_runs(bits: int, symmetric: bool, form: str, block_size: int) -> None:
    model = product(header=OPSET25 if bits == 2 else OPSET21)
    before = model.clone()
    quantize(model, bits=bits, symmetric=symmetric, form=form, block_size=block_size, method="rtn")
    assert op_types(model)[form if block_size else "DequantizeLinear"] == 1
    assert "w" not in model.graph.initializers
    assert sqnr(before, model) > ENOUGH_DB[bits]
    assert sqnr(before, model, optimize=True) > min(ENOUGH_DB[bits], 30)


def test_an_old_opset_stores_a_row_as_one_block() -> None:
    model = product(k=80, header='<ir_version: 8, opset_import: ["" : 17]>')
    quantize(model, block_size=0, method="rtn")
    assert next(iter(model.graph)).attributes["block_size"].as_int() == 128


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_is_gathered_from_packed_rows(bits: int, symmetric: bool) -> None:
    model = build("(int64[2,5] t) => (float[2,5,48] y) { z = Sub (t, t)  y = Gather (w, z) }", w=random(50, 48))
    before = model.clone()
    quantize(model, bits=bits, embeddings=bits, symmetric=symmetric, method="rtn")
    assert op_types(model)["GatherBlockQuantized"] == 1
    assert sqnr(before, model) > ENOUGH_DB[bits]


def test_rows_that_fill_no_bytes_take_a_form_that_needs_none() -> None:
    model = build("(int64[5] t) => (float[5,33] y) { z = Sub (t, t)  y = Gather (w, z) }", OPSET21, w=random(50, 33))
    quantize(model, embeddings=4, method="rtn")
    assert op_types(model)["DequantizeLinear"] == 1


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_tied_table_is_stored_once(dim: int, symmetric: bool, bits: int) -> None:
    model = tied(dim)
    before = model.clone()
    quantize(model, embeddings=bits, symmetric=symmetric, method="rtn")
    counts = op_types(model)
    assert counts["MatMulNBits"] == counts["GatherBlockQuantized"] == 1
    assert counts["Transpose"] == 0
    packed = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT8 and v.name.endswith("bit")]
    assert len(packed) == 1
    assert weight_bytes(model) < weight_bytes(before) * (bits + 2.6) / 32 * 96 / dim + 64
    assert sqnr(before, model) > ENOUGH_DB[bits] - 3
    assert sqnr(before, model, optimize=True) > ENOUGH_DB[bits] - 8


def test_a_tied_table_is_dequantized_once_where_blocks_have_no_operator() -> None:
    model = tied(64)
    model.graph.opset_imports[""] = 21
    quantize(model, form="DequantizeLinear", method="rtn")
    assert op_types(model)["DequantizeLinear"] == 1


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ("Gemm (x, w, b)", {"w": (48, 8), "b": (8,)}),
        ("Gemm <alpha=0.5, beta=2.0, transB=1> (x, w, b)", {"w": (8, 48), "b": (8,)}),
        ("Gemm (x, w, b)", {"w": (48, 8), "b": (1, 1)}),
        ("Gemm (x, w, b)", {"w": (48, 8), "b": (6, 1)}),
        ("Gemm (x, w)", {"w": (48, 8)}),
    ],
)
@pytest.mark.parametrize("form", ["MatMulNBits", "DequantizeLinear"])
def test_gemm_keeps_its_scaling_and_bias(text: str, constants: dict[str, tuple[int, ...]], form: str) -> None:
    model = build(
        f"(float[6,48] x) => (float[6,8] y) {{ y = {text} }}", **{k: random(*s) for k, s in constants.items()}
    )
    before = model.clone()
    quantize(model, bits=8, method="rtn", form=form)
    assert op_types(model)[form] == 1
    assert sqnr(before, model) > 38


def test_a_bias_added_to_a_product_is_its_input() -> None:
    model = build(
        "(float[6,48] x) => (float[6,8] y) { p = MatMul (x, w)  y = Add (b, p) }", w=random(48, 8), b=random(8)
    )
    quantize(model, bits=8, method="rtn")
    assert op_types(model) == {"MatMulNBits": 1}
    assert [output.name for output in model.graph.outputs] == ["y"]


def test_gemm_that_transposes_its_input_has_no_block_operator() -> None:
    text = "(float[48,6] x) => (float[6,8] y) { y = Gemm <transA=1> (x, w) }"
    assert op_types_after(build(text, OPSET21, w=random(48, 8))) == {"DequantizeLinear": 1, "Gemm": 1}


def op_types_after(model: ir.Model, **options: Any) -> dict[str, int]:
    quantize(model, **{"method": "rtn", **options})
    return dict(op_types(model))


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_are_dequantized(kernel: int) -> None:
    text = f"(float[1,32,6,6] x) => (float[1,8,{7 - kernel},{7 - kernel}] y) {{ y = Conv (x, w) }}"
    model = build(text, OPSET21, w=random(8, 32, kernel, kernel))
    before = model.clone()
    quantize(model, method="rtn", block_size=16)
    assert node(model, "w_dequantized_DequantizeLinear").attributes["block_size"].as_int() == 16
    assert sqnr(before, model) > 15


def test_an_old_opset_stores_convolutions_in_8_bits() -> None:
    model = build("(float[1,32,6,6] x) => (float[1,8,6,6] y) { y = Conv (x, w) }", w=random(8, 32, 1, 1))
    before = model.clone()
    context = quantize(model, method="rtn")
    wanted = "opset 17: 4-bit weights need opset 21; stored in 8 bits, one scale per channel"
    assert missed(context) == [wanted]
    assert sqnr(before, model) > 38


def test_float16_weights_have_float16_scales() -> None:
    text = "(float16[3,48] x) => (float16[3,8] y) { y = MatMul (x, w) }"
    model = build(text, w=random(48, 8).astype(np.float16))
    before = model.clone()
    quantize(model, bits=8, method="rtn")
    assert model.graph.initializers["w_scales"].dtype == ir.DataType.FLOAT16
    assert sqnr(before, model) > 35


BODY = """(bool c, float[3,48] x) => (float[3,8] y) {
  y = If (c) <
    then_branch = a () => (float[3,8] p) { p = MatMul (x, w) },
    else_branch = b () => (float[3,8] q) { r = MatMul (x, w)  q = Neg (r) }
  > }"""


def test_bodies_are_rounded_to_nearest() -> None:
    model = ir.from_proto(ir.to_proto(build(BODY, w=random(48, 8))))  # parsed text does not link bodies to constants
    before = model.clone()
    context = quantize(model, Samples(list(random_samples(model, 4))), bits=8)
    assert missed(context) == [
        "rounded to nearest: inside the body of a control-flow node, where inputs cannot be observed"
    ]
    assert op_types(model)["MatMulNBits"] == 2
    assert sqnr(before, model) > 38


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[4,4,8] x, float[8,4] v) => (float[4,4,4] y) { y = MatMul (x, v) }", "its weights are not constant"),
        ("(float[4,2,48] x) => (float[4,2,8] y) { y = MatMul (x, batch) }", "its weights are 2 axes of matrices"),
        ("(float[48,2] x) => (float[8,2] y) { y = MatMul (left, x) }",
         "its constant is on the left, where no runtime takes weights"),
        ("(float[2,48] x) => (float[2] y) { y = MatMul (x, vector) }", "its constant is a vector"),
        ("(float[2,48] x) => (float[2,8] y) { y = MatMul (x, holes) }", "'holes' holds values that are not finite"),
        ("(float[2,48] x) => (float[2,8] y) { y = MatMul (x, tiny) }", "'tiny' is below 3e-17, too small for a scale"),
        ("(int64[2] t) => (float[48,2] y) { z = Sub (t, t)  y = Gather <axis=1> (w, z) }", "it picks columns"),
        ("(float[2,48] x) => (float[2,8] y) { m = MatMul (x, w)  s = ReduceSum (w)  y = Add (m, s) }",
         "'w' is also read by 'ReduceSum_0' in float: it would be stored twice"),
        ("(float[2,8] x) => (float[2,8] y) { a = MatMul (x, square)  y = Gemm <transB=1> (a, square) }",
         "'square' is read along both axes, and blocks run along one"),
    ],
)  # fmt: skip
def test_refusals_have_reasons(text: str, reason: str) -> None:
    constants = {
        "batch": random(4, 48, 8), "left": random(8, 48), "vector": random(48), "w": random(48, 8),
        "tiny": random(48, 8) * np.float32(1e-20), "square": random(8, 8),
        "holes": np.where(random(48, 8) > 0.2, np.float32(np.nan), random(48, 8)),
    }  # fmt: skip
    used = {name: array for name, array in constants.items() if f"({name}" in text or f", {name}" in text}
    model = build(text, '<ir_version: 8, opset_import: ["" : 12]>' if "ReduceSum" in text else OPSET21, **used)
    context = Context()
    QuantizeWeights(method="rtn", min_elements=0).run(model, context)
    assert reason in missed(context)
    assert "MatMulNBits" not in op_types(model)


def test_a_rule_an_output_and_a_default_keep_weights_in_float() -> None:
    model = product()
    node(model, model.graph[0].name or "").metadata_props[PRECISION_KEY] = "fp32"
    assert missed(quantize(model, method="rtn")) == ["kept in float by a rule (fp32)"]
    model = product()
    model.graph.outputs.append(model.graph.initializers["w"])
    context = Context()
    QuantizeWeights(method="rtn").run(model, context)
    assert missed(context) == ["'w' is an output of the model, so that it is stored in float anyway"]
    model = product()
    model.graph.inputs.append(model.graph.initializers["w"])
    context = Context()
    QuantizeWeights(method="rtn").run(model, context)
    assert missed(context) == ["input 'w' is a default that a caller may override"]


def test_small_constants_and_unwanted_tables_stay_in_float() -> None:
    assert missed(quantize(product(), method="rtn", min_elements=2000)) == ["1920 weights are fewer than 2000"]
    model = build("(int64[5] t) => (float[5,32] y) { z = Sub (t, t)  y = Gather (w, z) }", w=random(50, 32))
    assert missed(quantize(model, embeddings=0, method="rtn")) == ["tables stay in float (embeddings = 0)"]


@pytest.mark.parametrize(("version", "kinds"), [(7, {}), (13, {"DequantizeLinear": 1}), (21, {"DequantizeLinear": 1})])
def test_the_standard_form_needs_an_opset(version: int, kinds: dict[str, int]) -> None:
    model = product(header=f'<ir_version: 8, opset_import: ["" : {version}]>')
    quantize(model, form="DequantizeLinear", method="rtn")
    assert {k: v for k, v in op_types(model).items() if k != "MatMul"} == kinds


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 90), st.integers(1, 20), st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 64]), st.booleans())
def test_packed_bytes_hold_the_integers_of_any_shape(k: int, n: int, bits: int, block: int, symmetric: bool) -> None:
    model = product(k, n)
    before = model.clone()
    quantize(model, bits=bits, block_size=block, symmetric=symmetric, method="minmax")
    held = model.graph.initializers
    blocks = -(-k // block)
    packed, scales = (held[name].const_value.numpy() for name in (f"w_{bits}bit", "w_scales"))  # type: ignore[union-attr]
    assert packed.shape == (n, blocks, block * bits // 8)
    integers = unpack(packed, bits, block).reshape(n, -1)[:, :k].astype(np.float64)
    zeros = np.full((n, blocks), 1 << (bits - 1))
    if not symmetric:
        zeros = unpack(held["w_zero_points"].const_value.numpy(), bits, blocks)  # type: ignore[union-attr]
    spread = [np.repeat(array, block, axis=1)[:, :k] for array in (scales, zeros)]
    sample = next(iter(random_samples(model, 1)))
    weights = ((integers - spread[1]) * spread[0]).T
    assert np.allclose(Session(model).run(sample)["y"], sample["x"] @ weights, atol=1e-4)
    assert np.abs(weights - before.graph.initializers["w"].const_value.numpy()).max() <= np.abs(scales).max() * 0.51  # type: ignore[union-attr]


def test_a_saved_model_holds_what_it_ran_with() -> None:
    model = tied(64)
    quantize(model, method="rtn")
    again = ir.from_proto(ir.to_proto(storable(model)))
    samples = list(random_samples(model, 2))
    for one, other in zip(run_samples(model, samples), run_samples(again, samples), strict=True):
        np.testing.assert_array_equal(one["y"], other["y"])
