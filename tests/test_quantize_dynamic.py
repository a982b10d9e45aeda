"""Dynamic quantization: its form, its weights by target, what onnxruntime makes of it, and tied tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.graph import constant
from optkit.model.loading import load, load_text
from optkit.pipeline import Context, Pipeline, Remark
from optkit.session import run_samples
from optkit.target import IntegerFormat, Target, load_target
from optkit_passes.quantization.quantize_dynamic import QuantizeDynamic
from pass_runs import messages, op_types
from quantizing import LAYERS, TOKENS, build, deployed, find, inputs_of, missed, random, sqnr, transformer_block

DYNAMIC = IntegerFormat(dtype="uint8", symmetric=False)
PRODUCTS = [name for name in LAYERS if "gemm" in name or "matmul" in name]
CONSTANT = [name for name in PRODUCTS if "of activations" not in name and "left" not in name]


def able(name: str, *isa: str) -> Target:
    """Return a target whose runtime quantizes activations as they come."""
    target = load_target(name)
    return target.model_copy(update={"isa": isa, "activations": {**target.activations, "dynamic": DYNAMIC}})


def dynamic(model: ir.Model, target: Target | None = None, **options: object) -> tuple[ir.Model, list[Remark]]:
    result = model.clone()
    context = Context(target=target)
    fresh = inputs_of(model, 2) if all(v.dtype == ir.DataType.FLOAT for v in model.graph.inputs) else []
    Pipeline([QuantizeDynamic.model_validate(options)], strict=True).run(result, context, fresh)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    return result, context.remarks


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize("name", CONSTANT)
def test_every_product_with_constant_weights(name: str, weights: str, optimize: bool) -> None:
    model = LAYERS[name]()
    result, remarks = dynamic(model, weights=weights)
    counts = op_types(result)
    assert counts["MatMulInteger"] == counts["DynamicQuantizeLinear"] == 1
    assert not counts["MatMul"] + counts["Gemm"]
    assert [v.name for v in result.graph.outputs] == ["y"]
    assert remarks[0].message.endswith("activations as they come")
    assert sqnr(model, result, optimize=optimize) > 36


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name not in CONSTANT])
def test_products_without_constant_weights_stay(name: str) -> None:
    result, remarks = dynamic(LAYERS[name]())
    assert not op_types(result)["MatMulInteger"]
    assert set(missed(remarks).values()) == {"its weights are not constant"}


def test_what_reads_one_value_shares_its_integers_and_onnxruntime_fuses_all() -> None:
    model = transformer_block()
    result, _ = dynamic(model)
    assert op_types(result)["DynamicQuantizeLinear"] == 3  # q and k share one
    ran = deployed(result)
    assert ran["MatMulIntegerToFloat"] + ran["DynamicQuantizeMatMul"] == 4
    assert not ran["MatMulInteger"]
    assert sqnr(model, result) > 35


def test_names_of_results_and_outputs_stay() -> None:
    model = build("(float[4,16] x) => (float[4,4] y, float[4,8] h) { h = MatMul (x, w)  y = MatMul (h, v) }",
                  w=random(16, 8), v=random(8, 4))  # fmt: skip
    result, _ = dynamic(model)
    assert [v.name for v in result.graph.outputs] == ["y", "h"]
    inner = build("(float[4,16] x) => (float[4,8] y) { h = MatMul (x, w)  y = Relu (h) }", w=random(16, 8))
    assert find(dynamic(inner)[0], "Relu").inputs[0].name == "h"


@pytest.mark.parametrize(
    ("isa", "dtype"),
    [((), ir.DataType.UINT8), (("avx512_vnni",), ir.DataType.INT8), (("avx_vnni",), ir.DataType.INT8)],
)
def test_weights_are_unsigned_where_signed_ones_would_saturate(isa: tuple[str, ...], dtype: ir.DataType) -> None:
    result, _ = dynamic(LAYERS["matmul"](), able("host", "x86_64", "avx2", *isa))
    assert find(result, "MatMulInteger").inputs[1].dtype == dtype


def test_signed_weights_keep_pairs_within_int16_where_they_are_asked_for() -> None:
    model = build("(float[4,16] x) => (float[4,5] y) { y = MatMul (x, w) }", w=np.ones((16, 5), np.float32))
    result, _ = dynamic(model, able("host", "x86_64", "avx2"), weights="int8")
    stored = constant(find(result, "MatMulInteger").inputs[1])
    assert stored is not None
    pairs = np.abs(stored.astype(int)).reshape(8, 2, 5).sum(axis=1)
    assert 126 <= pairs.max() <= 128
    assert dynamic(model, able("cortex-a53", "neon"))[0].graph.initializers["w_quantized"].dtype == ir.DataType.INT8


def test_a_target_without_dynamic_activations_or_8_bit_weights_is_an_error() -> None:
    plain = load_target("cortex-a53")
    plain = plain.model_copy(update={"activations": {"int8": plain.activations["int8"]}})
    with pytest.raises(InputError, match="does not quantize activations at run time"):
        dynamic(LAYERS["matmul"](), plain)
    with pytest.raises(InputError, match="takes no 8-bit weights"):
        dynamic(LAYERS["matmul"](), able("cortex-a53").model_copy(update={"weights": {}}))


@pytest.mark.parametrize(
    "form", ["t = Transpose <perm=[1,0]> (table)  y = MatMul (h, t)", "y = Gemm <transB=1> (h, table)"]
)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("weights", ["int8", "uint8"])
def test_a_table_that_is_a_weight_too_is_stored_once_with_a_scale_per_row(
    form: str, per_channel: bool, weights: str
) -> None:
    table = random(50, 16) * np.logspace(-1, 1, 50, dtype=np.float32)[:, None]
    model = build(
        f"(int64[1,9] ids) => (float[9,50] y) {{ e = Gather (table, ids)  h = Reshape (e, flat)  {form} }}",
        table=table,
        flat=np.array([9, 16]),
    )
    result, remarks = dynamic(model, per_channel=per_channel, weights=weights)
    stored = [v for v in result.graph.initializers.values() if v.const_value is not None and v.const_value.size == 800]
    assert [v.name for v in stored] == ["table_quantized"]
    assert any("once for its rows and for the products with it" in r.message for r in remarks)
    for optimize in (False, True):
        assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS, optimize=optimize)).sqnr_db > 33


def test_tables_alone_are_stored_as_quantize_static_does_and_may_be_kept() -> None:
    model = build(
        "(int64[N,T] ids) => (float[N,T,4] y) { e = Gather (table, ids)  y = MatMul (e, w) }",
        table=random(50, 16),
        w=random(16, 4),
    )
    result, _ = dynamic(model)
    assert [use.node.op_type for use in find(result, "Gather").outputs[0].uses()] == ["DequantizeLinear"]
    assert "table" not in result.graph.initializers
    kept, _ = dynamic(model, embeddings=False)
    assert "table" in kept.graph.initializers
    old = build("(int64[N] ids) => (float[N,16] y) { y = Gather (table, ids) }",
                '<ir_version: 7, opset_import: ["" : 12]>', table=random(50, 16))  # fmt: skip
    assert "needs opset 13" in missed(dynamic(old)[1])["Gather"]


def test_weights_read_in_float_as_well_are_said_to_be_stored_twice() -> None:
    model = build("(float[16,16] x) => (float[16,16] y) { a = MatMul (x, w)  y = Add (a, w) }", w=random(16, 16))
    result, remarks = dynamic(model)
    assert "stored in both forms" in missed(remarks)["Add"]
    assert {"w", "w_quantized"} <= set(result.graph.initializers)


def test_bodies_are_quantized_where_they_compute() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    main (float[2,16] x, bool c) => (float[2,8] y)
    {
      y = If (c) <then_branch: graph = then () => (float[2,8] a) { a = MatMul (x, w) },
                  else_branch: graph = else () => (float[2,8] b) { m = MatMul (x, w) b = Neg (m) }>
    }"""
    model = load_text(text.replace("main (float[2,16] x, bool c)", "main (float[2,16] x, bool c, float[16,8] w)"))
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(random(16, 8), name="w")
    model.graph.register_initializer(weight)
    result, remarks = dynamic(model)
    assert [node.op_type for node in result.graph] == ["If"]  # neither branch pays for the other
    assert sum(r.kind == "applied" for r in remarks) == 2
    assert next(v.name for v in result.graph.initializers.values()) == "w_quantized"
    samples = [{"x": random(2, 16, seed=i), "c": np.array(i == 0)} for i in range(2)]
    assert compare(run_samples(model, samples), run_samples(result, samples)).sqnr_db > 36


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[16,4] x) => (float[4,5] y) { y = Gemm <transA=1> (x, w) }", "it transposes its input"),
        ("(float[16] x) => (float[5] y) { y = MatMul (x, w) }", "its input is not known to be a matrix"),
        ("(float16[4,16] x) => (float[4,5] y) { c = Cast <to=1> (x)  y = MatMul (c, w) }", ""),
    ],
)
def test_refusals(text: str, reason: str) -> None:
    model = build(text, w=random(16, 5))
    context = Context()
    QuantizeDynamic().run(model, context)
    assert "".join(missed(context.remarks).values()) == reason


def test_old_opsets_rules_and_bad_weights() -> None:
    model = build("(float[4,16] x) => (float[4,5] y) { y = MatMul (x, w) }",
                  '<ir_version: 5, opset_import: ["" : 10]>', w=random(16, 5))  # fmt: skip
    context = Context()
    QuantizeDynamic().run(model, context)
    assert missed(context.remarks)["MatMul"] == "opset 10: DynamicQuantizeLinear needs opset 11"
    ruled = LAYERS["matmul"]()
    find(ruled, "MatMul").metadata_props["optkit.precision"] = "fp32"
    assert missed(dynamic(ruled)[1])["MatMul"] == "kept in float by a rule (fp32)"
    bad = build("(float[4,16] x) => (float[4,5] y) { y = MatMul (x, w) }", w=np.full((16, 5), np.nan, np.float32))
    with pytest.raises(InputError, match="not finite"):
        QuantizeDynamic().run(bad, Context())


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    summed=st.integers(1, 33),
    columns=st.integers(1, 9),
    weights=st.sampled_from(["int8", "uint8"]),
    clip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_error_of_a_product_is_that_of_its_rounding(
    rows: int, summed: int, columns: int, weights: str, clip: bool, seed: int
) -> None:
    weight = random(summed, columns, seed=seed)
    model = build(f"(float[{rows},{summed}] x) => (float[{rows},{columns}] y) {{ y = MatMul (x, w) }}", w=weight)
    result, _ = dynamic(model, weights=weights, clip=clip)
    (sample,) = inputs_of(model, 1, seed=seed)
    x = sample["x"].astype(np.float64)
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    shrink = 2.5 if clip else 1.0  # clipping gives up accuracy at the ends
    weight_step = (np.abs(weight).max(axis=0) / 127) * (127.0 if clip else 1.0)
    bound = np.abs(weight).sum(axis=0) * step * shrink + (np.abs(x).sum(axis=1, keepdims=True) + step) * weight_step
    error = np.abs(run_samples(result, [sample])[0]["y"] - x @ weight.astype(np.float64))
    assert (error <= bound + 1e-5).all()


@pytest.mark.slow
def test_language_models_beat_static_quantization(shared: Path) -> None:
    from real_models import REAL_MODELS

    for name, least in (("relu_lm", 40.0), ("stories260k", 29.0), ("sst2_relu_encoder", 40.0)):
        real = REAL_MODELS[name]
        model = load(real.path)
        original, samples = model.clone(), list(real.samples(4))
        Pipeline([QuantizeDynamic()]).run(model, Context())
        assert compare(run_samples(original, samples), run_samples(model, samples)).sqnr_db > least


@pytest.mark.parametrize(("last", "width", "kept"), [(2, 256, False), (2, 64, True), (16, 64, False), (2, 4, False)])
def test_a_small_last_layer_stays_in_float(last: int, width: int, kept: bool) -> None:
    """A share of 2, 0.5 or 4 per cent of the weights; below 1 per cent and 1024 weights it is left."""
    rows = {256: 100, 64: 396, 4: 100}[width]
    model = build(
        f"(float[4,{rows}] x) => (float[4,{last}] y) {{ h = MatMul (x, w)  r = Relu (h)  y = Gemm (r, v, b) }}",
        w=random(rows, width),
        v=random(width, last),
        b=random(last),
    )
    reasons = messages(model.clone(), QuantizeDynamic(), "missed")
    told = f"its {width * last} weights are less than a hundredth of all: not worth rounding"
    assert reasons == ([told] if kept else [])
    assert messages(model.clone(), QuantizeDynamic(min_elements=0), "missed") == []
