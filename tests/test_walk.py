"""A walk computes what the whole model computes, node by node, and sees changes ahead of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import InputError
from optkit.quant.walk import Walk, reads
from optkit.session import run_samples

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x, bool flag) => (float[N,4] y, float[N,4] early)
<float[4,4] w = {1,0,0,0, 0,2,0,0, 0,0,3,0, 0,0,0,4}, float[4,4] v = {1,1,0,0, 0,1,1,0, 0,0,1,1, 0,0,0,1}>
{
    a = MatMul(x, w)
    early = Relu(a)
    b = MatMul(early, v)
    c = If (flag) <
        then_branch = t () => (float[N,4] p) { p = Add(a, b) },
        else_branch = e () => (float[N,4] q) { q = Sub(a, b) }
    >
    y = MatMul(c, w)
}
"""


def _model() -> ir.Model:
    return ir.from_onnx_text(MODEL)


def _samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(n + 1, 4)).astype(np.float32), "flag": np.array(n % 2 == 0)} for n in range(count)]


def _node(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in model.graph if node.outputs[0].name == output)


@pytest.mark.parametrize("optimize", [False, True])
def test_outputs_of_a_walk_are_those_of_the_model(optimize: bool) -> None:
    model, samples = _model(), _samples()
    walk = Walk(model, samples, optimize=optimize)
    for name in ("b", "c", "y"):
        walk.inputs(_node(model, name))
    walk.advance(None)
    for value in model.graph.outputs:
        for found, expected in zip(walk.values(value), run_samples(model, samples), strict=True):
            np.testing.assert_allclose(found, expected[value.name], rtol=1e-6)


def test_inputs_come_for_every_sample_with_constants_in_place() -> None:
    model, samples = _model(), _samples()
    rows = Walk(model, samples).inputs(_node(model, "b"))
    assert [len(row) for row in rows] == [2, 2, 2]
    weight = rows[0][1]
    for row, sample in zip(rows, samples, strict=True):
        np.testing.assert_allclose(row[0], np.maximum(sample["x"] * [1, 2, 3, 4], 0), rtol=1e-6)
        assert row[1] is weight


def test_a_change_ahead_is_seen_by_later_layers() -> None:
    model, samples = _model(), _samples()
    walk = Walk(model, samples)
    walk.inputs(_node(model, "a"))
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros((4, 4), np.float32))
    assert all(not row[0].any() for row in walk.inputs(_node(model, "b")))


QDQ = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2] x) => (float[N,2] y)
<int8[2,2] q = {1,0,0,1}, float scale = {0.5}>
{
    w = DequantizeLinear(q, scale)
    a = MatMul(x, w)
    y = MatMul(a, w)
}
"""


def test_what_depends_on_constants_only_is_computed_anew() -> None:
    model = ir.from_onnx_text(QDQ)
    samples = [{"x": np.array([[4.0, 8.0]], np.float32)}]
    walk = Walk(model, samples)
    np.testing.assert_array_equal(walk.inputs(_node(model, "a"))[0][1], [[0.5, 0], [0, 0.5]])
    model.graph.initializers["scale"].const_value = ir.tensor(np.array(1.0, np.float32))
    np.testing.assert_array_equal(walk.inputs(_node(model, "y"))[0][0], [[4, 8]])


def test_only_what_later_nodes_read_is_held() -> None:
    model = _model()
    walk = Walk(model, _samples())
    walk.advance(_node(model, "y"))
    assert set(walk._values[0]) == {"c", "early"}  # the memory bound is the point


def test_what_a_body_reads_is_held_until_it_was_run() -> None:
    model = _model()
    walk = Walk(model, _samples())
    walk.advance(_node(model, "c"))
    assert set(walk._values[0]) == {"flag", "a", "b", "early"}


def test_what_is_changed_of_a_constant_value_is_computed_anew() -> None:
    model = ir.from_onnx_text(QDQ)
    walk = Walk(model, [{"x": np.ones((1, 2), np.float32)}])
    weight = _node(model, "w").outputs[0]
    assert walk.outputs(_node(model, "w"))[0].shape == (2, 2)
    walk.add(weight, np.ones((2, 2), np.float32))  # the initializers behind it are what counts
    np.testing.assert_array_equal(walk.values(weight)[0], [[0.5, 0], [0, 0.5]])


DEFAULT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2] x, float[2] k) => (float[N,2] y) <float[2] k = {1,2}> { a = Mul(x, k)  y = Mul(a, k) }
"""


def test_a_default_holds_where_a_sample_does_not_override_it() -> None:
    ones, tens = np.ones((1, 2), np.float32), np.full(2, 10, np.float32)
    for samples, expected in (([{"x": ones}], [[1, 4]]), ([{"x": ones}, {"x": ones, "k": tens}], [[1, 4], [100, 100]])):
        model = ir.from_onnx_text(DEFAULT)
        walk = Walk(model, samples)
        walk.inputs(_node(model, "y"))
        found = walk.outputs(_node(model, "y"))
        np.testing.assert_array_equal(np.concatenate(found), expected)


def test_nodes_put_in_while_it_walks_are_run() -> None:
    model = _model()
    walk, samples = Walk(model, _samples()), _samples()
    walk.inputs(_node(model, "b"))
    added = ir.Node("", "Neg", [_node(model, "early").outputs[0]], num_outputs=1, name="neg")
    added.outputs[0].name = "negative"
    model.graph.insert_before(_node(model, "b"), added)
    _node(model, "b").replace_input_with(0, added.outputs[0])
    for row, sample in zip(walk.inputs(_node(model, "b")), samples, strict=True):
        np.testing.assert_allclose(row[0], -np.maximum(sample["x"] * [1, 2, 3, 4], 0), rtol=1e-6)


def test_a_kept_value_stays() -> None:
    model = _model()
    walk = Walk(model, _samples())
    bias = _node(model, "b").outputs[0]
    walk.advance(None, keep=[bias])
    assert walk.values(bias)[0].shape == (1, 4)


def test_reads_looks_into_bodies() -> None:
    assert [value.name for value in reads(_node(_model(), "c"))] == ["flag", "a", "b", "p", "q"]


def test_refusals() -> None:
    model = _model()
    with pytest.raises(InputError, match="rounding needs calibration data and none was given"):
        Walk(model, None, name="rounding")
    with pytest.raises(InputError, match="the data given holds no samples"):
        Walk(model, [])
    with pytest.raises(InputError, match="calibration sample 0: it has no array for input 'flag'"):
        Walk(model, [{"x": np.zeros((1, 4), np.float32)}])
    broken = _samples(2)
    broken[1]["x"][0, 0] = np.nan
    with pytest.raises(InputError, match="calibration sample 1: tensor 'x' has NaN values"):
        Walk(model, broken).inputs(_node(model, "a"))
    wrong = [{"x": np.zeros((1, 5), np.float32), "flag": np.array(True)}]
    with pytest.raises(InputError, match="calibration sample 0: the model does not run on the given inputs"):
        Walk(model, wrong).advance(None)
