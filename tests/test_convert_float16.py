"""Half precision: what is converted, what stays float32 and why, and how it is stored."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from optkit.dataset.samples import Samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.model.loading import load, load_text
from optkit.pipeline import Context, Pipeline, Remark
from optkit.session import run_samples
from optkit.target import Target, load_target
from optkit_passes.quantization._min_cut import fewest_cuts
from optkit_passes.quantization.convert_float16 import ConvertFloat16
from pass_runs import op_types
from quantizing import build, find, inputs_of, ops, random, residual, transformer_block

HALF = ir.DataType.FLOAT16


def converted(
    model: ir.Model,
    samples: list[dict[str, np.ndarray]] | None = None,
    target: Target | None = None,
    *,
    check: bool = True,
    **options: object,
) -> tuple[ir.Model, list[Remark]]:
    result = model.clone()
    context = Context(target=target, calibration=Samples(inputs_of(model, 4) if samples is None else samples))
    fresh = inputs_of(model, 2, seed=2) if check else []
    Pipeline([ConvertFloat16.model_validate(options)], strict=True).run(result, context, fresh)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    return result, context.remarks


def sqnr(model: ir.Model, other: ir.Model) -> float:
    fresh = inputs_of(model, 4, seed=2)
    return compare(run_samples(model, fresh), run_samples(other, fresh)).sqnr_db


def reasons(remarks: list[Remark]) -> dict[str, str]:
    return {remark.op_type: remark.message for remark in reversed(remarks) if remark.kind == "missed"}


def halves(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph if node.op_type != "Cast" and node.outputs[0].dtype == HALF}


def test_a_network_is_one_region_between_two_casts() -> None:
    model = residual()
    result, remarks = converted(model)
    assert op_types(result)["Cast"] == 2
    assert [ops(result)[0], ops(result)[-1]] == ["Cast", "Cast"]
    assert [v.name for v in result.graph.outputs] == ["y"]
    assert {v.dtype for v in result.graph.initializers.values()} == {HALF}
    assert sum(r.message == "computed in float16" for r in remarks) == len(model.graph)
    assert 55 < sqnr(model, result) < 90


def test_transformer_block_keeps_its_interface_and_agrees() -> None:
    model = transformer_block()
    result, _ = converted(model)
    assert halves(result) >= {"MatMul", "Softmax", "Relu", "LayerNormalization"}
    assert 55 < sqnr(model, result) < 90


def test_attributes_that_only_say_how_to_compute_stay() -> None:
    model = build(
        "(float[2,16] x) => (float[2,4] y) { n = LayerNormalization <stash_type=1> (x, one)  y = MatMul (n, w) }",
        one=np.ones(16, np.float32),
        w=random(16, 4),
    )
    result, _ = converted(model)
    assert find(result, "LayerNormalization").attributes["stash_type"].as_int() == ir.DataType.FLOAT


def test_values_beyond_the_margin_stay_float32_and_the_maximum_is_said() -> None:
    model = build(
        "(float[4,16] x) => (float[4,8] y) { a = MatMul (x, w)  b = Mul (a, k)  c = Div (b, k)  y = MatMul (c, v) }",
        w=random(16, 16),
        v=random(16, 8),
        k=np.array(3e4, np.float32),
    )
    result, remarks = converted(model)
    assert halves(result) == {"MatMul"}
    assert reasons(remarks)["Mul"].startswith("'b' reaches ")
    assert reasons(remarks)["Mul"].endswith(" in calibration, beyond 3.275e+04")
    assert sqnr(model, result) > 50
    blind = model.clone()
    context = Context(pass_name="convert-float16")
    ConvertFloat16().run(blind, context)
    assert "no value was compared with the largest float16" in reasons(context.remarks)[""]
    assert "Mul" in halves(blind)
    # onnxruntime computes half nodes in float32 on a CPU; arithmetic that rounds every result shows the overflow
    sample = {"x": np.full((4, 16), 10, np.float32)}
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = [ReferenceEvaluator(ir.to_proto(m)).run(None, sample)[0] for m in (result, blind)]
    finite = [bool(np.isfinite(output).all()) for output in outputs]
    assert finite == [True, False]
    wide, _ = converted(model, dtype="bfloat16", check=False)
    assert op_types(wide)["Cast"] == 2


def test_constants_beyond_float16_and_below_it_stay() -> None:
    model = build(
        "(float[4,16] x) => (float[4,16] y) { a = MatMul (x, w)  b = Add (a, e)  c = Sub (b, k)  y = MatMul (c, w) }",
        w=random(16, 16),
        e=np.array(1e-12, np.float32),
        k=np.array(1e6, np.float32),
    )
    _, remarks = converted(model)
    found = reasons(remarks)
    assert found["Add"] == "constant 'e' loses too much: 1 of 1 values are below 6.1e-05"
    assert found["Sub"].startswith("constant 'k' holds 1e+06, beyond 65504")


@pytest.mark.parametrize("mask", [-65504.0, -1e9, -3.4e38, -np.inf])
@pytest.mark.parametrize(
    "body",
    [
        "h = Cast <to=1> (m)  o = Sub (one, h)  k = Mul (o, big)  s = Add (q, k)",
        "s = Where (c, q, big)",
    ],
)
def test_masks_become_small_enough_to_be_added(mask: float, body: str) -> None:
    if mask == -np.inf and "Mul" in body:
        pytest.skip("0 times infinity is not a number in any precision")
    constants = {"w": random(16, 8), "v": random(8, 4), "big": np.array(mask, np.float32)}
    if "Sub" in body:
        constants["one"] = np.array(1, np.float32)
    model = build(
        f"(float[2,16] x, int64[2,8] m) => (float[2,4] y) {{ c = Cast <to=9> (m)  q = MatMul (x, w)  {body} "
        "p = Softmax (s)  y = MatMul (p, v) }",
        **constants,
    )
    samples = [{**s, "m": np.array([[1, 1, 0, 1, 0, 1, 1, 1]] * 2)} for s in inputs_of(model, 2)]
    result, remarks = converted(model, samples, check=False)
    assert "Softmax" in halves(result)
    assert compare(run_samples(model, samples), run_samples(result, samples)).sqnr_db > 55
    clamped = [r.message for r in remarks if r.message.startswith("clamped")]
    assert bool(clamped) == bool(np.isfinite(mask))
    assert all(message == "clamped to -16376: it only hides scores from a Softmax" for message in clamped)


def test_a_row_that_is_masked_altogether_is_a_number_in_half_arithmetic() -> None:
    model = build(
        "(float[2,16] x) => (float[2,4] y) { q = MatMul (x, w)  s = Add (q, a)  t = Add (s, a)  p = Softmax (t) "
        "y = MatMul (p, v) }",
        w=random(16, 8) - 20,
        v=random(8, 4),
        a=np.full((1, 8), -1e9, np.float32),
    )
    result, _ = converted(model, check=False)
    assert "Add" in halves(result)
    sample = {"x": np.ones((2, 16), np.float32)}  # scores of -320: with -65504 twice, all would be -infinity
    assert np.isfinite(ReferenceEvaluator(ir.to_proto(result)).run(None, sample)[0]).all()


def test_a_large_constant_that_goes_elsewhere_is_not_clamped() -> None:
    model = build(
        "(float[2,8] x) => (float[2,8] y, float[2,8] s) { q = MatMul (x, w)  s = Add (q, big)  y = Softmax (s) }",
        w=random(8, 8),
        big=np.array([-1e9] + [0] * 7, np.float32),
    )
    result, remarks = converted(model, check=False)
    assert not [r for r in remarks if r.message.startswith("clamped")]
    np.testing.assert_array_equal(run_samples(result, inputs_of(model, 1))[0]["s"][:, 0], np.float32(-1e9))


@pytest.mark.parametrize(
    ("body", "op", "reason"),
    [
        ("y = ReduceMean <axes=[1]> (a)", "ReduceMean", "it adds up many values"),
        ("b = Exp (a)  y = MatMul (b, w)", "Exp", "it makes large differences of small ones"),
        ("b = Floor (a)  y = MatMul (b, w)", "Floor", "it computes whole numbers, exact up to 2048 only"),
        ("b = ArgMax (a)  y = Cast <to=1> (b)", "ArgMax", "it chooses among values that half precision may round"),
        ("b = Less (a, x)  y = Cast <to=1> (b)", "Less", "it chooses among values that half precision may round"),
        ("b = com.microsoft.Gelu (a)  y = MatMul (b, w)", "Gelu", "an operator of the domain 'com.microsoft', whose"),
    ],
)  # fmt: skip
def test_sensitive_operators_stay_float32(body: str, op: str, reason: str) -> None:
    header = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
    model = build(f"(float[4,16] x) => (y) {{ a = MatMul (x, w)  {body} }}", header, w=random(16, 16))
    model.graph.outputs[0].type = model.graph.outputs[0].type or ir.TensorType(ir.DataType.FLOAT)
    for value in (value for node in model.graph for value in node.outputs):
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    context = Context(calibration=Samples(inputs_of(model, 2)))
    ConvertFloat16().run(model, context)
    assert reasons(context.remarks)[op].startswith(reason)
    assert find(model, op).inputs[0].dtype == ir.DataType.FLOAT
    assert run_samples(model, inputs_of(model, 1))


def test_what_a_schema_does_not_take_is_read_from_the_schema() -> None:
    text = "(float[1,3,4,4] x) => (float[1,3,8,8] y) { a = Conv (x, w)  y = Resize (a, , scales) }"
    constants = {"w": random(3, 3, 1, 1), "scales": np.array([1, 1, 2, 2], np.float32)}
    result, _ = converted(build(text, **constants))
    resize = find(result, "Resize")
    assert resize.outputs[0].dtype == HALF
    assert resize.inputs[2].dtype == ir.DataType.FLOAT
    text = "(float[1,3,4,4] x) => (float[1,3,4,4] y) { a = Conv (x, w)  b = Softplus (a)  y = Conv (b, w) }"
    _, remarks = converted(build(text, w=random(3, 3, 1, 1)), dtype="bfloat16", check=False)
    assert reasons(remarks)["Softplus"] == "Softplus of opset 17 takes no bfloat16"
    _, remarks = converted(
        build(text, '<ir_version: 8, opset_import: ["" : 12]>', w=random(3, 3, 1, 1)), dtype="bfloat16"
    )
    assert reasons(remarks)[""] == "opset 12 has no Cast to bfloat16"


def test_a_root_mean_square_norm_changes_with_its_input() -> None:
    text = """<ir_version: 11, opset_import: ["" : 23]>
    main (float[2, 4] x) => (float[2, 4] y) <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1},
        float[4] scale = {1, 2, 3, 4}> { a = MatMul (x, w)  b = RMSNormalization (a, scale)  y = MatMul (b, w) }"""
    result, _ = converted(load_text(text))
    norm = next(node for node in result.graph if node.op_type == "RMSNormalization")
    types = {value.dtype for value in (*norm.inputs, *norm.outputs) if value is not None}
    assert len(types) == 1  # onnxruntime takes no others


def test_long_softmax_stays_float32() -> None:
    for length, half in ((2048, True), (2049, False)):
        model = build(
            "(float[2,4] x) => (float[2,4] y) { a = MatMul (x, w)  p = Softmax (a)  y = MatMul (p, v) }",
            w=random(4, length),
            v=random(length, 4),
        )
        result, _ = converted(model)
        assert ("Softmax" in halves(result)) == half


def test_bodies_compute_in_float32_and_their_weights_are_stored_in_half() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    main (float[2,16] x, bool c) => (float[2,16] y) <float[16,16] w>
    {
      h = MatMul (x, w)
      y = If (c) <then_branch: graph = then () => (float[2,16] a) { a = MatMul (h, w) },
                  else_branch: graph = else () => (float[2,16] b) { b = Neg (h) }>
    }"""
    model = ir.from_onnx_text(text, initializers=[ir.tensor(random(16, 16), name="w")])
    model.graph.initializers["w"].type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    samples = [{**s, "c": np.array(i % 2 == 0)} for i, s in enumerate(inputs_of(model, 4))]
    result, remarks = converted(model, samples, check=False)
    assert reasons(remarks)["If"] == "its bodies compute in float32, where values cannot be observed"
    assert result.graph.initializers["w"].dtype == HALF
    assert compare(run_samples(model, samples), run_samples(result, samples)).sqnr_db > 55


def test_storage_only_is_what_a_target_without_half_arithmetic_gets() -> None:
    model = residual()
    target = load_target("cortex-a53")
    result, remarks = converted(model, target=target)
    assert not halves(result)
    assert {n.op_type for n in result.graph if n.outputs[0].dtype == HALF} == set()
    large = [v for v in result.graph.initializers.values() if v.const_value is not None and v.const_value.size >= 128]
    assert large
    assert {v.dtype for v in large} == {HALF}
    assert all(r.message.endswith("values stored in float16") for r in remarks if r.kind == "applied")
    assert sqnr(model, result) > 55
    able = target.model_copy(update={"dtypes": ("float32", "float16")})
    assert "Conv" in halves(converted(model, target=able)[0])


def test_weights_that_do_not_fit_are_left_with_a_reason() -> None:
    model = build(
        "(float[4,16] x) => (float[4,16] y) { a = MatMul (x, w)  b = MatMul (a, u)  y = MatMul (b, v) }",
        w=random(16, 16) * np.float32(1e6),
        u=random(16, 16) * np.float32(1e-9),
        v=random(16, 16),
    )
    _, remarks = converted(model, storage_only=True)
    found = {r.node: r.message for r in remarks if r.kind == "missed"}
    assert found["w"].startswith("constant 'w' holds ")
    assert found["u"] == "constant 'u' loses too much: 256 of 256 values are below 6.1e-05"
    assert "v" not in found


def test_a_weight_of_half_and_float_readers_is_stored_once() -> None:
    model = build(
        "(float[16,16] x) => (float[16,16] y) { a = MatMul (x, w)  e = Exp (w)  y = MatMul (a, e) }", w=random(16, 16)
    )
    result, _ = converted(model)
    assert [v.dtype for v in result.graph.initializers.values()] == [HALF]
    assert sqnr(model, result) > 55


def test_tied_weights_constant_outputs_and_defaults() -> None:
    model = build(
        "(float[16,16] x, float[16,16] d) => (float[16,16] y, float[16,16] k) "
        "{ a = MatMul (x, w)  b = MatMul (a, u)  c = MatMul (b, d)  y = MatMul (c, k) }",
        w=random(16, 16),
        u=random(16, 16, seed=3),
        k=random(16, 16, seed=4),
    )
    tied = model.graph.initializers["w"].const_value
    model.graph.initializers["u"].const_value = tied
    default = next(v for v in model.graph.inputs if v.name == "d")
    default.const_value = ir.tensor(random(16, 16, seed=5), name="d")
    model.graph.register_initializer(default)
    result, _ = converted(model, inputs_of(model, 2), check=False)
    first, second = (result.graph.initializers[name].const_value for name in ("w", "u"))
    assert first is second
    assert default.dtype == ir.DataType.FLOAT
    assert [v.dtype for v in result.graph.outputs] == [ir.DataType.FLOAT] * 2
    samples = [{"x": random(16, 16)}]
    assert compare(run_samples(model, samples), run_samples(result, samples)).sqnr_db > 50


def test_a_rule_keeps_a_node_in_float32_and_a_second_run_changes_nothing() -> None:
    model = residual()
    gemm = find(model, "Gemm")
    gemm.metadata_props["optkit.precision"] = "fp32"
    result, remarks = converted(model)
    assert reasons(remarks)["Gemm"] == "kept in float by a rule (fp32)"
    assert "Gemm" not in halves(result)
    context = Context(calibration=Samples(inputs_of(model, 2)))
    before = op_types(result)
    ConvertFloat16().run(result, context)
    assert op_types(result) == before


def test_calibration_without_samples_or_with_nan_is_an_error() -> None:
    with pytest.raises(InputError, match="holds no samples"):
        converted(residual(), [])
    bad = inputs_of(residual(), 1)
    bad[0]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="input 'x' has NaN values"):
        converted(residual(), bad)
    with pytest.raises(InputError, match="calibration sample 0"):
        converted(residual(), [{"x": np.zeros((1, 2), np.float32)}])


def test_empty_tensors_and_models_without_floats() -> None:
    model = load_text('<ir_version: 8, opset_import: ["" : 17]> main (int64[2] x) => (int64[2] y) { y = Add (x, x) }')
    context = Context()
    ConvertFloat16().run(model, context)
    assert not [r for r in context.remarks if r.kind == "applied"]
    empty = build("(float[0,4] x) => (float[0,4] y) { y = MatMul (x, w) }", w=random(4, 4))
    result, _ = converted(empty)
    assert run_samples(result, inputs_of(empty, 1))[0]["y"].shape == (0, 4)


@given(
    labels=st.lists(st.sampled_from([True, False, None]), min_size=2, max_size=7),
    data=st.data(),
)
def test_fewest_cuts_is_the_best_of_all_labellings(labels: list[bool | None], data: st.DataObject) -> None:
    vertex = st.integers(0, len(labels) - 1)
    links = data.draw(st.lists(st.tuples(vertex, st.lists(vertex, max_size=4)), max_size=8))

    def cuts(chosen: tuple[bool, ...]) -> int:
        return sum(any(chosen[other] != chosen[one] for other in others) for one, others in links)

    choices = itertools.product(*([label] if label is not None else [False, True] for label in labels))
    best = min((cuts(choice), -sum(choice)) for choice in choices)
    found = fewest_cuts(dict(enumerate(labels)), links)
    chosen = tuple(index in found for index in range(len(labels)))
    assert (cuts(chosen), -sum(chosen)) == best


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "least"), [("relu_lm", 70.0), ("resnet20_cifar10", 60.0)])
def test_real_models(shared: Path, folder: str, least: float) -> None:
    from optkit.dataset.samples import read_samples
    from real_models import REAL_MODELS

    real = REAL_MODELS[folder]
    model = load(real.path)
    original = model.clone()
    samples = read_samples(real.calibration_data, model, preprocess=real.spec, inputs_only=True)[:4]
    ConvertFloat16().run(model, Context(calibration=samples))
    assert compare(run_samples(original, samples), run_samples(model, samples)).sqnr_db > least
