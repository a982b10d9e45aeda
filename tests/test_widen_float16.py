"""float16 models for targets without float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.dataset.samples import random_samples
from optkit.model.loading import load, load_text
from optkit.pass_check import fingerprint
from optkit.pipeline import Context, Pipeline
from optkit.session import Session
from optkit.target import Target, load_target
from pass_runs import create, messages, op_types, run

NARROW = "main (float16[2] x) => (float16[2] y) {{ {} }}"


@pytest.fixture(scope="module")
def a53() -> Target:
    return load_target("cortex-a53")


def dtypes(model: ir.Model) -> set[ir.DataType | None]:
    return {value.dtype for n in model.graph.all_nodes() if n.op_type != "Cast" for value in n.outputs}


def test_squeezenet_is_widened_and_keeps_its_interface(shared: Path, a53: Target) -> None:
    model = load(shared / "data" / "squeezenet1_1" / "squeezenet1_1_fp16_original.onnx")
    result = Pipeline([create("widen-float16")], strict=True).run(
        model, Context(target=a53), list(random_samples(model, 2))
    )
    assert ir.DataType.FLOAT16 not in dtypes(model)
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == ["data_0", "softmaxout_1"]
    assert result.steps[0].change is not None
    assert 0 < result.steps[0].change < 1e-2
    assert op_types(model)["Cast"] == 2
    assert not messages(model, create("widen-float16"), kind="applied", target=a53)[1:]


def test_bodies_casts_and_constants_are_widened(a53: Target) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    main (float[2] x, bool c, int64[1] n) => (float[2] y)
    {
      h = Cast <to: int = 10> (x)
      k = ConstantOfShape <value: tensor = float16[1] {16384}> (n)
      z = If (c) <then_branch: graph = then () => (float16[2] a) { a = Add (h, k) },
                  else_branch: graph = else () => (float16[2] b) { b = Neg (h) }>
      y = Cast <to: int = 1> (z)
    }"""
    model = load_text(text)
    sample = {"x": np.array([1.0, -2.0], np.float32), "c": np.array(True), "n": np.array([2])}
    expected = Session(model).run(sample)["y"]
    assert messages(model, create("widen-float16"), kind="applied", target=a53)
    assert ir.DataType.FLOAT16 not in {v.dtype for g in model.graphs() for n in g for v in n.outputs}
    assert "Cast" not in op_types(model) or op_types(model)["Cast"] == 1  # the one that is a graph output may stay
    np.testing.assert_allclose(Session(model).run(sample)["y"], expected, rtol=1e-3)


def test_attributes_that_name_a_type_are_widened(a53: Target) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> main () => (bool y)'
    body = "r = RandomUniform <dtype: int = 10, shape: ints = [2]> () n = Neg (r)"
    body += " o = Optional () y = OptionalHasElement (o)"
    model = ir.from_onnx_text(f"{text} <float16[2] r> {{ {body} }}")
    optional = ir.TypeAndShape(ir.SequenceType(ir.TensorType(ir.DataType.FLOAT16)), None)
    model.graph[2].attributes.add(ir.AttrTypeProto("type", optional))
    assert messages(model, create("widen-float16"), kind="applied", target=a53)
    assert model.graph[0].attributes["dtype"].as_int() == ir.DataType.FLOAT
    assert model.graph[2].attributes["type"].value.type == ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))


def test_tied_float16_weights_stay_tied(a53: Target) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    main (float16[2] x, float16[2] w, float16[2] u) => (float16[2] y, float16[2] w) { a = Add (x, w) y = Mul (a, u) }"""
    model = ir.from_onnx_text(text.replace(", float16[2] w)", ")"))
    tied = ir.tensor(np.array([1.0, 2.0], np.float16))
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = tied
        model.graph.register_initializer(value)
    run(model, create("widen-float16"), target=a53)
    first, second = (model.graph.initializers[name].const_value for name in ("w", "u"))
    assert first is second
    assert first is not None
    assert first.dtype == ir.DataType.FLOAT


def test_a_constant_output_keeps_its_type(a53: Target) -> None:
    signature = "main (float16[2] x, float16[2] w) => (float16[2] y, float16[2] w)"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {signature} {{ y = Add (x, w) }}')
    weight = model.graph.inputs[1]
    model.graph.inputs.remove(weight)
    weight.const_value = ir.tensor(np.array([1.0, 2.0], np.float16), name="w")
    model.graph.register_initializer(weight)
    run(model, create("widen-float16"), target=a53)
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT16] * 2
    assert ir.DataType.FLOAT16 not in dtypes(model)


def test_operators_of_other_domains_keep_float16_between_casts(a53: Target) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> main (float16[2] x) => (float16[2] y)'
    model = ir.from_onnx_text(f"{text} <float16[2] a, float16[2] b> {{ a = Neg (x) b = mine.Twist (a) y = Neg (b) }}")
    assert messages(model, create("widen-float16"), kind="applied", target=a53)
    twist = next(n for n in model.graph if n.domain == "mine")
    assert twist.inputs[0] is not None
    assert twist.inputs[0].dtype == twist.outputs[0].dtype == ir.DataType.FLOAT16
    assert [n.op_type for n in model.graph] == ["Cast", "Neg", "Cast", "Twist", "Cast", "Neg", "Cast"]
    assert {n.outputs[0].dtype for n in model.graph if n.op_type == "Neg"} == {ir.DataType.FLOAT}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            'opset_import: ["" : 17, "mine" : 1]> main (float16[2] x) => (float16[2] y) '
            "{ b = mine.Twist (x) y = Neg (b) }",
            "the type of 'b' at mine::Twist is not known",
        ),
        (
            'opset_import: ["" : 17]> main (seq(float16[2]) x, int64 i) => (float16[2] y) { y = SequenceAt (x, i) }',
            "'x' is not a plain tensor of float16, so no Cast can stand for it",
        ),
    ],
)
def test_what_cannot_be_widened_stays(text: str, reason: str, a53: Target) -> None:
    model = ir.from_onnx_text(f"<ir_version: 8, {text}")
    before = fingerprint(model)
    assert messages(model, create("widen-float16"), target=a53) == [reason]
    assert fingerprint(model) == before


def test_a_target_with_float16_takes_the_model_as_it_is(a53: Target) -> None:
    able = a53.model_copy(update={"name": "able", "dtypes": ("float32", "float16")})
    model = load_text('<ir_version: 8, opset_import: ["" : 17]> main (float16[2] x) => (float16[2] y) { y = Neg (x) }')
    assert messages(model, create("widen-float16"), target=able) == ["target 'able' computes float16"]
