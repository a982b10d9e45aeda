"""What the pipeline records: steps, remarks, options, and why a model could not be verified."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optkit.model.loading import load_text
from optkit.pipeline import EXACT, Context, Pass, Pipeline, Remark
from scripted_passes import CHAIN, HEADER, X, add_to_k, failure, node, nothing, rename_a_tensor, run, scripted

# Models that cannot be verified


def test_a_model_with_a_custom_operator_runs_the_passes_and_says_why_nothing_was_verified() -> None:
    text = "main (float[4] x) => (float[4] y) <float[1] k = {2}> { [shift] a = Add (x, k) y = com.acme.Op (a) }"
    model = load_text(HEADER.replace("17]", '17, "com.acme" : 1]') + text)
    context = Context()
    result = Pipeline([scripted("Wrong", add_to_k)]).run(model, context, [{"x": X}])
    assert "com.acme" in result.unverified
    assert result.unverified.startswith("onnxruntime ")
    assert (result.steps[0].change, result.steps[0].fidelity, result.steps[0].applied) == (None, None, 1)


def test_no_samples() -> None:
    result = run(scripted("Wrong", add_to_k), x=[])
    assert result.unverified == "no sample inputs"
    assert result.steps[0].change is None


def test_inputs_that_the_model_rejects() -> None:
    result = run(scripted("Wrong", add_to_k), x=[np.zeros((2, 2), np.float32)])
    assert result.unverified.startswith("the model does not run on the given inputs: ")


def test_a_random_model_is_not_blamed_on_a_pass() -> None:
    text = """main (float[4] x) => (float[4] y) <float[1] k = {2}> {
        noise = RandomNormalLike (x) [shift] a = Add (x, k) y = Add (a, noise) }"""

    def touch(model: ir.Model, context: Context) -> None:
        context.applied(node(model, "shift"), "looked at it")

    result = run(scripted("Touch", touch), text=text)
    assert result.unverified == "two runs of the original differ at output 'y' (it has RandomNormalLike)"
    assert result.steps[0].change is None


def test_a_random_operator_that_reaches_no_output_hinders_nothing() -> None:
    text = """main (float[4] x) => (float[4] y) <float[1] k = {2}> {
        noise = RandomNormalLike (x) [shift] y = Add (x, k) }"""
    assert run(text=text).unverified == ""
    assert "moved an output" in failure(scripted("FoldWrongly", add_to_k), text=text)


# Records


def test_steps_count_what_happened() -> None:
    def prune(model: ir.Model, context: Context) -> None:
        relu = node(model, "relu")
        relu.outputs[0].replace_all_uses_with(relu.inputs[0])
        model.graph.remove(relu, safe=True)
        context.applied(relu, "removed")
        context.missed(node(model, "root"), "kept")
        context.missed(node(model, "scale"), "kept")

    first, second = run(scripted("Prune", prune), scripted("Nothing", nothing_at_all), x=[np.abs(X)]).steps
    assert (first.pass_name, first.applied, first.missed) == ("prune", 1, 2)
    assert (first.nodes_before, first.nodes_after, second.nodes_before, second.nodes_after) == (4, 3, 3, 3)
    assert (second.applied, second.missed, second.change) == (0, 0, 0.0)
    assert first.options == {}
    assert first.effect == EXACT
    assert first.seconds >= 0
    assert first.fidelity is not None
    assert (first.fidelity.max_error, first.fidelity.samples) == (0.0, 1)


def nothing_at_all(model: ir.Model, context: Context) -> None:
    pass


class WithOptions(Pass):
    """A pass with options."""

    limit: int = 3
    names: tuple[str, ...] = ("a",)

    def run(self, model: ir.Model, context: Context) -> None:
        context.missed("graph", f"limit {self.limit}")


def test_options_are_validated_and_recorded() -> None:
    assert run(WithOptions(limit=5)).steps[0].options == {"limit": 5, "names": ["a"]}
    with pytest.raises(ValueError, match="unknown"):
        WithOptions(unknown=1)
    with pytest.raises(ValueError, match="limit"):
        WithOptions(limit="many")


def test_names_of_passes() -> None:
    names = ["FuseGelu", "FoldBatchNorm", "PackInt4Blocks", "CSE"]
    passes = [scripted(name, nothing).name() for name in names]
    assert passes == ["fuse-gelu", "fold-batch-norm", "pack-int4-blocks", "cse"]


def test_remarks_stand_in_the_order_in_which_they_were_made() -> None:
    context = Context()
    passes = [scripted("Rename", rename_a_tensor), scripted("Nothing", nothing)]
    model = load_text(HEADER + CHAIN)
    Pipeline(passes).run(model, context, [{"x": X}])
    assert context.remarks == [
        Remark("applied", "rename", "relu", "Relu", "renamed its output"),
        Remark("missed", "nothing", "relu", "Relu", "not today"),
    ]


def test_remarks_may_stand_at_a_value_or_a_name() -> None:
    context = Context()

    def remark(model: ir.Model, context: Context) -> None:
        context.missed(model.graph.initializers["w"], "a value")
        context.missed("anything", "a name")

    Pipeline([scripted("Remark", remark)]).run(load_text(HEADER + CHAIN), context)
    assert [(r.node, r.op_type) for r in context.remarks] == [("w", ""), ("anything", "")]


def test_track_wraps_what_a_pass_iterates_over() -> None:
    seen: list[tuple[str, int | None]] = []

    def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        seen.append((description, total))
        return items

    def slow(model: ir.Model, context: Context) -> None:
        assert list(context.track([1, 2], "Observing", 2)) == [1, 2]

    Pipeline([scripted("Slow", slow)]).run(load_text(HEADER + CHAIN), Context(track=track))
    assert seen == [("Observing", 2)]
    assert list(Context().track([3], "unseen")) == [3]


def test_the_original_is_not_touched_by_verification() -> None:
    model = load_text(HEADER + CHAIN)
    before = ir.to_onnx_text(model)
    Pipeline([scripted("Nothing", nothing)], strict=True).run(model, Context(), [{"x": X}])
    assert ir.to_onnx_text(model) == before
