"""Pattern rewriting keeps names, metadata, other users and overridable defaults, and says what it did."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as ir_passes

from optkit.graph import constant
from optkit.ir_passes import run_ir_pass
from optkit.model.loading import load_text
from optkit.pipeline import EXACT, Context, Effect, Pass, Pipeline
from optkit.rewrite import USED_ELSEWHERE, Rule, accept, refuse, rewrite
from optkit.session import Session


class NegSub(Rule):
    """Replace ``Neg(Sub(x, y))`` with ``Sub(y, x)``."""

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.Neg(op.Sub(x, y))

    def check(self, context: Any, x: ir.Value, y: ir.Value) -> Any:
        return refuse("the subtrahend is a constant") if y.const_value is not None else accept()

    def rewrite(self, op: Any, x: ir.Value, y: ir.Value) -> Any:
        return op.Sub(y, x)


class NegNeg(Rule):
    """Replace ``Neg(Neg(x))`` with ``x``."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(op.Neg(x))

    def rewrite(self, op: Any, x: ir.Value) -> Any:
        return x


class SubToAdd(Rule):
    """Replace ``Sub(x, y)`` with ``Add(Mul(y, -1), x)``."""

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.Sub(x, y)

    def rewrite(self, op: Any, x: ir.Value, y: ir.Value) -> Any:
        return op.Add(op.Mul(y, op.Constant(value=ir.tensor(np.float32(-1)))), x)


class Rewrite(Pass):
    """Runs every rule above but the last."""

    effect = EXACT

    def run(self, model: ir.Model, context: Context) -> None:
        rewrite(model, [NegSub, NegNeg], context)


def text(body: str, outputs: str = "float[2] out", initializers: str = "") -> str:
    head = '<ir_version: 8, opset_import: ["" : 17]>\nmain (float[2] x, float[2] y, bool cond)'
    return f"{head} => ({outputs}) {initializers} {{ {body} }}"


def run(source: str) -> tuple[ir.Model, list[tuple[str, str, str]]]:
    model, context = load_text(source), Context()
    samples = [
        {"x": np.array([1.5, -2], np.float32), "y": np.array([0.25, 3], np.float32), "cond": np.array(flag)}
        for flag in (True, False)
    ]
    Pipeline([Rewrite()], strict=True).run(model, context, samples)
    return model, [(remark.kind, remark.node, remark.message) for remark in context.remarks]


def ops(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


def test_a_match_is_replaced_and_keeps_name_and_metadata() -> None:
    model = load_text(text("d = Sub(x, y) n = Neg(d) out = Relu(n)"))
    inner, root = model.graph[0], model.graph[1]
    inner.metadata_props["optkit.precision"] = "float"
    root.name = "negate"
    context = Context()
    rewrite(model, [NegSub], context)
    assert ops(model.graph) == ["Sub", "Relu"]
    assert (model.graph[0].name, model.graph[0].outputs[0].name) == ("negate", "n")
    assert model.graph[0].metadata_props["optkit.precision"] == "float"
    assert [(r.kind, r.node, r.op_type) for r in context.remarks] == [("applied", "negate", "Neg")]
    assert context.remarks[0].message == "Replace ``Neg(Sub(x, y))`` with ``Sub(y, x)``"


def test_an_intermediate_with_another_user_is_left_and_said() -> None:
    model, remarks = run(text("d = Sub(x, y) out = Neg(d) two = Abs(d)", "float[2] out, float[2] two"))
    assert ops(model.graph) == ["Sub", "Neg", "Abs"]
    assert remarks == [("missed", "Neg_0", USED_ELSEWHERE)]


def test_an_intermediate_that_is_a_graph_output_is_left() -> None:
    model, remarks = run(text("d = Sub(x, y) out = Neg(d)", "float[2] out, float[2] d"))
    assert ops(model.graph) == ["Sub", "Neg"]
    assert remarks == [("missed", "Neg_0", USED_ELSEWHERE)]


def test_an_intermediate_captured_by_a_body_is_left() -> None:
    branches = "then_branch = t () => (float[2] a) { a = Relu(d) }, else_branch = e () => (float[2] b) { b = Abs(x) }"
    model, remarks = run(text(f"d = Sub(x, y) n = Neg(d) f = If(cond) <{branches}> out = Add(n, f)"))
    assert ops(model.graph) == ["Sub", "Neg", "If", "Add"]
    assert remarks == [("missed", "Neg_0", USED_ELSEWHERE)]


def test_bodies_are_rewritten_too() -> None:
    branches = (
        "then_branch = t () => (float[2] a) { d = Sub(x, y) a = Neg(d) }, "
        "else_branch = e () => (float[2] b) { n = Neg(x) b = Neg(n) }"
    )
    model, remarks = run(text(f"out = If(cond) <{branches}>"))
    then_branch, else_branch = list(model.graph.subgraphs())
    assert ops(then_branch) == ["Sub"]
    assert ops(else_branch) == ["Identity"]  # a body may not return a value from outside as it is
    assert not then_branch.opset_imports
    assert [kind for kind, _, _ in remarks] == ["applied", "applied"]


@pytest.mark.parametrize(
    ("initializers", "expected"),
    [("<float[2] c = {1.0, 2.0}>", "the subtrahend is a constant"), ("", "")],
)
def test_a_default_that_a_caller_may_override_is_no_constant(initializers: str, expected: str) -> None:
    source = text("d = Sub(x, c) out = Neg(d)", initializers=initializers or "<float[2] c = {1.0, 2.0}>")
    if not expected:
        source = source.replace("bool cond)", "bool cond, float[2] c)").replace("<float[2] c = {1.0, 2.0}>", "")
    model = load_text(source)
    if not expected:
        value = model.graph.inputs[-1]
        value.const_value = ir.tensor(np.array([1, 2], np.float32), name="c")
        model.graph.register_initializer(value)
    context = Context()
    rewrite(model, [NegSub], context)
    assert [remark.message for remark in context.remarks if remark.kind == "missed"] == [expected] * bool(expected)
    assert bool([node for node in model.graph if node.op_type == "Neg"]) == bool(expected)
    assert model.graph.initializers["c"].const_value is not None


def test_a_graph_input_that_becomes_the_output_keeps_both_names() -> None:
    model, _ = run(text("n = Neg(x) out = Neg(n)"))
    assert ops(model.graph) == ["Identity"]
    assert [value.name for value in model.graph.outputs] == ["out"]


def test_constants_of_a_replacement_become_initializers_with_names_of_their_own() -> None:
    model = load_text(text("d = Sub(x, y) out = Sub(d, y)"))
    sample = {"x": np.ones(2, np.float32), "y": np.full(2, 3, np.float32), "cond": np.array(True)}
    before = Session(model).run(sample)
    rewrite(model, [SubToAdd], Context())
    assert ops(model.graph) == ["Mul", "Add", "Mul", "Add"]
    assert len(model.graph.initializers) == 2
    assert all(constant(value) == -1 for value in model.graph.initializers.values())
    node_names = [node.name for node in model.graph]
    assert len(set(node_names)) == 4
    assert {"Sub_0", "Sub_1"} <= set(node_names)
    after = Session(model).run(sample)
    np.testing.assert_array_equal(before["out"], after["out"])


def test_a_pass_of_onnx_ir_reports_what_it_removed() -> None:
    model = load_text(text("unused = Abs(x) out = Neg(y)", initializers="<float[2] spare = {1.0, 2.0}>"))
    context = Context()
    run_ir_pass(model, ir_passes.RemoveUnusedNodesPass(), context, "unused")
    assert [(r.kind, r.node, r.message) for r in context.remarks] == [
        ("applied", "Abs_0", "unused"),
        ("applied", "spare", "unused"),
    ]


def test_the_effect_of_a_pass_of_rules_is_checked() -> None:
    class Wrong(Rule):
        """Replace ``Neg(x)`` with ``Abs(x)``."""

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Neg(x)

        def rewrite(self, op: Any, x: ir.Value) -> Any:
            return op.Abs(x)

    class WrongPass(Pass):
        """Runs a wrong rule."""

        effect = Effect("exact")

        def run(self, model: ir.Model, context: Context) -> None:
            rewrite(model, [Wrong], context)

    model = load_text(text("out = Neg(x)"))
    sample = {"x": np.ones(2, np.float32), "y": np.ones(2, np.float32), "cond": np.array(True)}
    with pytest.raises(Exception, match="moved an output by 2 relative"):
        Pipeline([WrongPass()]).run(model, Context(), [sample])
