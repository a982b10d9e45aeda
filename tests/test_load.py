"""Loading: what every ONNX model from opset 7 on may contain, tried on models made here."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from optkit.errors import InputError
from optkit.model.loading import bind_dims, dynamic_dims, graph_inputs, load, load_text, save
from round_trips import HEADER, NEWEST, X, assert_same, run, write


@pytest.mark.parametrize("opset", range(7, NEWEST + 1))
def test_every_opset(opset: int) -> None:
    text = "main (float[N, 4] x) => (float[N, 2] y) <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = MatMul (x, w) }"
    ir_version = 3 if opset < 9 else 14 if opset > 25 else 8
    model = load_text(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> {text}')
    assert model.opset_imports == {"": opset}
    assert model.ir_version == ir_version


def test_opset_of_another_domain_alone(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["ai.onnx.ml" : 3]>
      main (float[1, 2] x) => (float[1, 2] y) { y = ai.onnx.ml.Scaler <offset = [1.0, 2.0], scale = [2.0, 2.0]> (x) }"""
    model = assert_same(write(tmp_path, text), x=np.ones((1, 2), np.float32))
    assert model.opset_imports == {"ai.onnx.ml": 3}


def test_the_default_domain_under_its_long_name(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["ai.onnx" : 17]>
      main (float[4] x) => (float[4] y) { a = ai.onnx.Relu (x) y = ai.onnx.Neg (a) }"""
    model = load(write(tmp_path, text))
    assert model.opset_imports == {"": 17}
    assert [node.domain for node in model.graph] == ["", ""]
    np.testing.assert_array_equal(run(model, x=X)[0], -np.maximum(X, 0))


def test_ir_version_3_keeps_initializers_as_inputs_in_the_file(tmp_path: Path) -> None:
    text = """<ir_version: 3, opset_import: ["" : 8]>
      main (float[4] x, float[4] w, bool c) => (float[4] y) <float[4] w = {1, 2, 3, 4}, bool c = {1}> {
        a = Add (x, w)
        b = If (c) <then_branch = t () => (float[4] p) { k = Constant <value = float[1] {2}> () p = Mul (a, k) },
                    else_branch = e () => (float[4] q) { q = Identity (a) }>
        k = Constant <value = float[1] {5}> ()
        y = Add (b, k)
      }"""
    model = assert_same(write(tmp_path, text.replace("k =", "k2 =", 1).replace("(a, k)", "(a, k2)")), x=X)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert set(model.graph.initializers) == {"w", "c", "k"}
    saved = onnx.load(tmp_path / "saved.onnx").graph
    assert {value.name for value in saved.input} == {"x", "w", "c", "k"}
    branch = saved.node[1].attribute[0].g
    assert [node.op_type for node in branch.node] == ["Constant", "Mul"]
    assert not branch.initializer


def test_ir_version_4_with_every_initializer_an_input(tmp_path: Path) -> None:
    text = """<ir_version: 4, opset_import: ["" : 9]>
      main (float[4] x, float[4] w) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { y = Add (x, w) }"""
    assert [value.name for value in assert_same(write(tmp_path, text), x=X).graph.inputs] == ["x"]


def test_an_initializer_that_a_caller_may_override_stays_an_input(tmp_path: Path) -> None:
    path = write(tmp_path, "main (float[4] x, float[1] w) => (float[4] y) <float[1] w = {2}> { y = Mul (x, w) }")
    model = assert_same(path, x=X)
    assert [value.name for value in model.graph.inputs] == ["x", "w"]
    assert [value.name for value in graph_inputs(model)] == ["x"]
    (overridden,) = run(tmp_path / "saved.onnx", x=X, w=np.array([3], np.float32))
    np.testing.assert_array_equal(overridden, 3 * X)


def test_an_initializer_that_is_an_output(tmp_path: Path) -> None:
    text = "main (float[4] x) => (float[4] y, float[1] w) <float[1] w = {2}> { y = Mul (x, w) }"
    model = assert_same(write(tmp_path, text), x=X)
    assert [value.name for value in model.graph.outputs] == ["y", "w"]


def test_an_input_that_is_an_output(tmp_path: Path) -> None:
    assert_same(write(tmp_path, "main (float[4] x) => (float[4] x, float[4] y) { y = Relu (x) }"), x=X)


# Structure


def test_unsorted_nodes_are_put_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "main (float[4] x) => (float[4] y) { b = Relu (x) a = Neg (b) y = Abs (a) }")
    proto = onnx.load(path)
    proto.graph.node.reverse()
    path.write_bytes(proto.SerializeToString())
    assert [node.op_type for node in load(path).graph] == ["Relu", "Neg", "Abs"]
    np.testing.assert_array_equal(run(load(path), x=X)[0], np.maximum(X, 0))


def test_the_order_of_sorted_nodes_is_kept(tmp_path: Path) -> None:
    nodes = "a = Relu (x) b = Neg (x) c = Abs (a) d = Abs (b) e = Add (d, c) y = Mul (e, a)"
    path = write(tmp_path, f"main (float[4] x) => (float[4] y) {{ {nodes} }}")
    assert [n.output[0] for n in onnx.load(path).graph.node] == [n.outputs[0].name for n in load(path).graph]


LOOP = """main (float[4] x, int64 n) => (float[4] y, float[N, 4] trace) <bool go = {1}, float[4] start = {0, 0, 0, 0}> {
    y, trace = Loop (n, go, start) <body = b (int64 i, bool c, float[4] s) => (bool d, float[4] t, float[4] u) {
        two = Constant <value = float[1] {2}> ()
        doubled = Mul (x, two)
        t = Add (s, doubled)
        d = Identity (c)
        u = Identity (t)
    }>
}"""


def test_loop_bodies(tmp_path: Path) -> None:
    model = assert_same(write(tmp_path, LOOP), x=X, n=np.array(3))
    assert {node.op_type for node in model.graph.all_nodes()} == {"Loop", "Mul", "Add", "Identity"}


def test_scan_bodies(tmp_path: Path) -> None:
    text = """main (float[3, 4] x) => (float[4] last, float[3, 4] all) <float[4] zero = {0, 0, 0, 0}> {
      last, all = Scan (zero, x) <num_scan_inputs = 1, body = b (float[4] s, float[4] v) => (float[4] t, float[4] u) {
        t = Add (s, v) u = Identity (t) }>
    }"""
    assert_same(write(tmp_path, text), x=np.arange(12, dtype=np.float32).reshape(3, 4))


def nested(depth: int) -> str:
    body = "p0 = Relu (x)"
    for n in range(1, depth + 1):
        then = f"t{n} () => (float[4] p{n - 1}) {{ {body} }}"
        otherwise = f"e{n} () => (float[4] q{n}) {{ q{n} = Identity (x) }}"
        body = f"p{n} = If (c) <then_branch = {then}, else_branch = {otherwise}>"
    return f"main (float[4] x, bool c) => (float[4] p{depth}) {{ {body} }}"


def test_deeply_nested_bodies(tmp_path: Path) -> None:
    depth = 20
    model = assert_same(write(tmp_path, nested(depth)), x=X, c=np.array(True))
    assert sum(node.op_type == "If" for node in model.graph.all_nodes()) == depth


def test_functions_are_inlined(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "pkg" : 1]>
      main (float[4] x) => (float[4] y) {
        t = Relu (x)
        [one] a = pkg.twice <by = 3.0> (t)
        [two] y = pkg.twice (a)
      }
      <domain: "pkg", opset_import: ["" : 17, "pkg" : 1]> scale <by> (t) => (r) {
        k = Constant <value_float: float = @by> () r = Mul (t, k) }
      <domain: "pkg", opset_import: ["" : 17, "pkg" : 1]> twice <by: float = 2.0> (t) => (r) {
        s = pkg.scale <by: float = @by> (t)
        zero = Constant <value = float {0}> ()
        total = ReduceSum <keepdims = 0> (s)
        positive = Greater (total, zero)
        r = If (positive) <then_branch = a () => (z) { z = Neg (s) }, else_branch = b () => (z2) { z2 = Abs (s) }>
      }"""
    model = assert_same(write(tmp_path, text), x=X)
    assert not model.functions
    assert not any(node.domain for node in model.graph.all_nodes())
    names = [node.name for node in model.graph.all_nodes()]
    assert len(names) == len(set(names))


def test_a_function_of_another_opset_with_operators_of_one_meaning(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "pkg" : 1]>
      main (float[4] x) => (float[4] y) { y = pkg.f (x) }
      <domain: "pkg", opset_import: ["" : 18]> f (a) => (b) { b = Relu (a) }"""
    model = load(write(tmp_path, text))
    assert model.opset_imports[""] == 17
    np.testing.assert_array_equal(run(model, x=X)[0], np.maximum(X, 0))


def test_custom_operators_are_untouched(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.acme" : 3]> main (float[4] x) => (float[4] y) {
        a = Relu (x)
        [mine] b, c = com.acme.Spline <order = 3, knots = [0.5, 1.5], mode = "natural"> (a, x)
        y = Add (b, c)
      }"""
    path = write(tmp_path, text)
    saved = tmp_path / "saved.onnx"
    save(load(path), saved)
    before, after = onnx.load(path), onnx.load(saved)
    assert before.graph.node[1] == after.graph.node[1]
    assert before.opset_import == after.opset_import


@pytest.mark.parametrize(
    "text", ["main (float[4] x) => (float[4] y) { y = Relu (x) }", "main (float[4] x) => (float[4] x) { }"]
)
def test_one_node_and_none(text: str, tmp_path: Path) -> None:
    assert_same(write(tmp_path, text), x=X)


def test_no_inputs(tmp_path: Path) -> None:
    text = "main () => (float[2] y) { a = Constant <value = float[2] {1, 2}> () y = Neg (a) }"
    assert graph_inputs(assert_same(write(tmp_path, text))) == []


def test_a_constant_that_is_an_output(tmp_path: Path) -> None:
    text = "main (float[4] x) => (float[2] a, float[4] y) { a = Constant <value = float[2] {1, 2}> () y = Neg (x) }"
    assert_same(write(tmp_path, text), x=X)


def test_node_names_are_made_unique_and_own_names_are_kept(tmp_path: Path) -> None:
    nodes = "[same] a = Relu (x) [same] b = Relu (a) c = Relu (b) [Relu_0] y = Abs (c)"
    text = f"main (float[4] x) => (float[4] y) {{ {nodes} }}"
    assert [node.name for node in load(write(tmp_path, text)).graph] == ["same", "Relu_1", "Relu_2", "Relu_0"]


def test_unicode_names(tmp_path: Path) -> None:
    path = write(tmp_path, "main (float[4] x) => (float[4] y) { [n] y = Relu (x) }", "модель 模型.onnx")
    proto = onnx.load(path)
    proto.graph.node[0].name = "сеть/слой:0 🧠"
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "вход"
    path.write_bytes(proto.SerializeToString())
    model = assert_same(path, вход=X)
    assert model.graph[0].name == "сеть/слой:0 🧠"


def test_absent_optional_inputs_and_outputs(tmp_path: Path) -> None:
    text = """main (float[4] x) => (float[4] y) <float top = {2}> { a = Clip (x, , top) y, = Dropout (a) }"""
    assert_same(write(tmp_path, text), x=X)


# Shapes and types

DYNAMIC = """main (float[batch, 3, height] a, float[batch, ?] b) => (float[batch, 3, height] y, float[batch, M] z) {
    y = Relu (a) z = Neg (b)
}"""


def test_dynamic_dimensions_are_listed_and_bound() -> None:
    model = load_text(HEADER + DYNAMIC)
    assert sorted(dynamic_dims(model)) == ["b.1", "batch", "height"]
    bound = load_text(HEADER + DYNAMIC, {"batch": 2, "a.2": 5, "b.1": 7})
    assert dynamic_dims(bound) == {}
    assert [list(value.shape) for value in bound.graph.outputs] == [[2, 3, 5], [2, 7]]
    by_position = load_text(HEADER + DYNAMIC, {"a.0": 2})
    assert [value.shape[0] for value in [*by_position.graph.inputs, *by_position.graph.outputs]] == [2] * 4


@pytest.mark.parametrize(
    ("dims", "sentence"),
    [
        ({"bath": 1}, "the model has no dynamic dimension 'bath'; did you mean 'batch'?"),
        ({"a.1": 1}, "the model has no dynamic dimension 'a.1'; did you mean 'b.1' or 'a.2' or 'a.0'?"),
        ({"batch": 0}, "dimension 'batch' cannot be 0; give a positive size"),
        ({"batch": 2, "a.0": 3}, "dimension 'batch' cannot be both 2 and 3"),
    ],
)
def test_dimensions_that_cannot_be_bound(dims: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        load_text(HEADER + DYNAMIC, dims)
    assert str(caught.value) == sentence


def test_binding_where_nothing_is_dynamic() -> None:
    model = load_text(HEADER + "main (float[4] x) => (float[4] y) { y = Relu (x) }")
    with pytest.raises(InputError) as caught:
        bind_dims(model, {"batch": 1})
    assert str(caught.value) == "the model has no dynamic dimension 'batch'; all its dimensions are fixed"


def test_binding_reaches_intermediate_shapes() -> None:
    text = """main (float[batch, 4] x) => (float[batch, 2] y) <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
        a = MatMul (x, w) y = Relu (a) }"""
    model = load_text(HEADER + text, {"batch": 3})
    assert list(model.graph[0].outputs[0].shape) == [3, 2]


def test_negative_sizes_mean_dynamic(tmp_path: Path) -> None:
    path = write(tmp_path, "main (float[4, 4] x) => (float[4, 4] y) { y = Relu (x) }")
    proto = onnx.load(path)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = -1
    path.write_bytes(proto.SerializeToString())
    model = load(path)
    assert list(dynamic_dims(model)) == ["x.0"]
    np.testing.assert_array_equal(run(model, x=np.tile(X, (2, 1)))[0], np.maximum(np.tile(X, (2, 1)), 0))


def test_unknown_rank(tmp_path: Path) -> None:
    path = write(tmp_path, "main (float[] x) => (float[] y) { y = Relu (x) }")
    proto = onnx.load(path)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.ClearField("shape")
    path.write_bytes(proto.SerializeToString())
    model = load(path)
    assert model.graph.inputs[0].shape is None
    np.testing.assert_array_equal(run(model, x=X)[0], np.maximum(X, 0))


@pytest.mark.parametrize("name", ["float16", "double", "int8", "uint8", "int32", "int64"])
def test_input_types(name: str, tmp_path: Path) -> None:
    dtype = {"double": "float64"}.get(name, name)
    text = f"main ({name}[4] x) => ({name}[4] y) {{ y = Identity (x) }}"
    assert_same(write(tmp_path, text), x=np.arange(4).astype(dtype))


def test_bool_inputs(tmp_path: Path) -> None:
    assert_same(write(tmp_path, "main (bool[4] x) => (bool[4] y) { y = Not (x) }"), x=X > 0)


def test_string_inputs_and_tensors(tmp_path: Path) -> None:
    text = """main (string[2] x) => (bool[2] y) <string[2] w = {"a", "b"}> { y = Equal (x, w) }"""
    assert_same(
        write(tmp_path, text.join(['<ir_version: 9, opset_import: ["" : 19]>', ""])), x=np.array(["a", "c"], object)
    )


def test_empty_tensors(tmp_path: Path) -> None:
    path = write(
        tmp_path, "main (float[1, 4] x) => (float[1, 4] y) { y = Concat <axis = 0> (x, none) }".replace("none", "x")
    )
    proto = onnx.load(path)
    proto.graph.node[0].input[1] = "none"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((0, 4), np.float32), "none"))
    path.write_bytes(proto.SerializeToString())
    assert_same(path, x=X[None])


def test_bfloat16_weights_run(tmp_path: Path) -> None:
    text = "main (float[4] x) => (float[4] y) { c = Cast <to = 1> (w) y = Mul (x, c) }"
    path = tmp_path / "model.onnx"
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.append(ir.to_proto(ir.Tensor(np.full(4, 0.5, ml_dtypes.bfloat16), name="w")))
    path.write_bytes(proto.SerializeToString())
    assert_same(path, x=X)


def test_libraries_stay_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, LOOP)
    load(path)
    assert logging.getLogger("onnx_ir").getEffectiveLevel() >= logging.ERROR
    assert capfd.readouterr() == ("", "")
