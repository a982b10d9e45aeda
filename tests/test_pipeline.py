"""The pipeline's promises: a pass that lies, fails, hides a change or breaks the model is caught by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import InputError, VerificationError
from optkit.model.loading import load_text
from optkit.pipeline import LOSSY, Context, Effect, Pipeline
from scripted_passes import CHAIN, HEADER, X, add, add_to_k, failure, node, nothing, rename_a_tensor, run, scripted

DEFECT = "this is a defect of the pass: leave it out of the recipe and report it"


def add_to_k_in_silence(model: ir.Model, context: Context) -> None:
    add(model, "k", 1)


# Passes that move the outputs


def test_an_exact_pass_that_changes_values_is_named_with_the_first_tensor_that_differs() -> None:
    assert failure(scripted("FoldWrongly", add_to_k)) == (
        "first differing tensor 'shifted' (relative error 0.056): pass 'fold-wrongly' moved an output by 0.075 "
        f"relative, more than its declared 0 (exact); {DEFECT}"
    )


def test_the_first_tensor_is_one_that_both_models_compute() -> None:
    def shift_everything(model: ir.Model, context: Context) -> None:
        add(model, "w", 1)
        node(model, "scale").outputs[0].name = "other"
        context.applied("w", "added one")

    assert failure(scripted("Shift", shift_everything)).startswith("first differing tensor 'positive' ")


def test_the_sample_that_differs_most_is_the_one_that_is_explained() -> None:
    def subtract(model: ir.Model, context: Context) -> None:
        node(model, "scale").op_type = "Sub"
        context.applied(node(model, "scale"), "subtracts")

    same = np.full(4, -5, np.float32)  # Relu turns it into zeros in both models
    assert failure(scripted("Subtract", subtract), x=[same, X]).startswith("first differing tensor 'scaled' ")


def test_a_change_within_the_declared_tolerance_passes_and_is_recorded() -> None:
    def nudge(model: ir.Model, context: Context) -> None:
        add(model, "k", 1e-6)
        context.applied("k", "rounded differently")

    result = run(scripted("Nudge", nudge, Effect.reassociate(1e-5)))
    assert result.steps[0].change is not None
    assert 0 < result.steps[0].change < 1e-5
    assert "more than its declared 0 (exact)" in failure(scripted("Nudge", nudge))
    assert "more than its declared 1e-09 (reassociate)" in failure(scripted("Nudge", nudge, Effect.reassociate(1e-9)))


def test_rounding_of_float16_is_allowed_for_what_it_is() -> None:
    text = """main (float[4] x) => (float[4] y) <float[1] k = {2}> {
        half = Cast <to = 10> (x) single = Cast <to = 1> (half) y = Add (single, k) }"""

    def nudge(model: ir.Model, context: Context) -> None:
        add(model, "k", 0.01)
        context.applied("k", "rounded differently")

    result = run(scripted("Nudge", nudge, Effect.reassociate(1e-5)), text=text)
    assert result.steps[0].change is not None
    assert 1e-5 < result.steps[0].change < 0.03


def test_a_lossy_pass_is_recorded_and_becomes_the_reference_of_the_next() -> None:
    result = run(scripted("Quantize", add_to_k, LOSSY), scripted("Rename", rename_a_tensor))
    assert [step.change for step in result.steps] == [pytest.approx(0.075, rel=0.02), 0.0]
    for step in result.steps:
        assert step.fidelity is not None
        assert 20 < step.fidelity.sqnr_db < 40  # against the original, so the second step shows the first one's loss


def test_nan_and_infinite_outputs_are_equal_to_themselves() -> None:
    outputs = run(scripted("Rename", rename_a_tensor), text=CHAIN.replace("k = {2}", "k = {-5}"), x=[X * np.inf, X])
    assert outputs.steps[0].change == 0.0


def test_a_new_nan_is_a_difference() -> None:
    def poison(model: ir.Model, context: Context) -> None:
        add(model, "k", -100)
        context.applied("k", "below zero")

    assert "moved an output by inf relative" in failure(scripted("Poison", poison, Effect.reassociate(0.1)))


def test_sequence_outputs_are_compared() -> None:
    text = """main (float[4] x) => (seq(float[4]) y) <float[1] k = {2}> {
        [shift] a = Add (x, k) y = SequenceConstruct (a, x) }"""
    assert "moved an output" in failure(scripted("FoldWrongly", add_to_k), text=text)


# Passes that change something in silence


def test_strict_mode_catches_a_silent_change() -> None:
    sentence = failure(scripted("Sneak", add_to_k_in_silence), strict=True)
    assert sentence == f"pass 'sneak' changed the model without an 'applied' remark; {DEFECT}"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: node(model, "relu").metadata_props.update({"optkit.kernel": "gemm"}),
        lambda model: model.metadata_props.update({"key": "value"}),
        lambda model: node(model, "relu").attributes.add(ir.AttrInt64("extra", 1)),
        lambda model: setattr(node(model, "relu").outputs[0], "name", "renamed"),
        lambda model: setattr(node(model, "relu"), "name", "renamed"),
        lambda model: model.opset_imports.update({"": 18}),
        lambda model: add(model, "w", 1),
    ],
    ids=["node metadata", "model metadata", "attribute", "tensor name", "node name", "opset", "weights"],
)
def test_strict_mode_sees_every_kind_of_change(change: Callable[[ir.Model], object]) -> None:
    sneak = scripted("Sneak", lambda model, context: change(model) and None)
    assert "changed the model without an 'applied' remark" in failure(sneak, strict=True)


def test_strict_mode_lets_inferred_shapes_pass() -> None:
    def infer(model: ir.Model, context: Context) -> None:
        node(model, "relu").outputs[0].shape = ir.Shape([4])

    run(scripted("Infer", infer), text=CHAIN.replace("float[4] x", "float[N] x"), strict=True)


def test_strict_mode_leaves_an_honest_pass_alone() -> None:
    run(scripted("Rename", rename_a_tensor), scripted("Nothing", nothing), strict=True)


def test_a_silent_change_is_not_blamed_on_the_next_pass() -> None:
    sentence = failure(
        scripted("Nothing", nothing), scripted("Sneak", add_to_k_in_silence), scripted("Rename", rename_a_tensor)
    )
    assert sentence == (
        "an output moved by 0.075 relative, but none of the passes that ran since the last comparison remarked on a "
        "change: 'nothing', 'sneak'; this is a defect of one of them: a strict run names it"
    )


def test_a_silent_change_of_the_last_pass_is_found() -> None:
    sentence = failure(scripted("Rename", rename_a_tensor), scripted("Sneak", add_to_k_in_silence))
    assert sentence.startswith("an output moved by 0.075 relative, but none of the passes")


# Passes that fail or break the model


def test_a_pass_that_raises_is_named_with_what_ran_before() -> None:
    def stumble(model: ir.Model, context: Context) -> None:
        raise KeyError("scale")

    with pytest.raises(VerificationError) as caught:
        run(scripted("Nothing", nothing), scripted("Rename", rename_a_tensor), scripted("Stumble", stumble))
    assert str(caught.value) == (
        "pass 'stumble' failed with KeyError: 'scale' (ran before it: nothing, rename); "
        "leave it out of the recipe, or run with --debug for the traceback"
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_sentence_for_the_user_goes_through_as_it_is() -> None:
    def refuse(model: ir.Model, context: Context) -> None:
        raise InputError("no calibration data", hint="pass --calibration")

    with pytest.raises(InputError, match=r"^no calibration data; pass --calibration$"):
        run(scripted("Refuse", refuse))


def test_a_pass_that_renames_an_output() -> None:
    def rename(model: ir.Model, context: Context) -> None:
        model.graph.outputs[0].name = "z"
        context.applied(node(model, "root"), "renamed")

    assert failure(scripted("RenameOutput", rename)) == (
        "pass 'rename-output' changed the model's inputs or outputs: output 'y' (FLOAT) is gone, "
        f"output 'z' (FLOAT) is new; {DEFECT}"
    )


def test_a_pass_that_removes_an_input_or_reorders_them() -> None:
    text = "main (float[4] x, float[4] u, float[4] v) => (float[4] y) { [relu] y = Relu (x) }"
    inputs = dict.fromkeys("xuv", X)

    def change(edit: Callable[[Any], object]) -> str:
        def work(model: ir.Model, context: Context) -> None:
            edit(model.graph.inputs)
            context.applied(node(model, "relu"), "edited the inputs")

        with pytest.raises(VerificationError) as caught:
            Pipeline([scripted("Edit", work)]).run(load_text(HEADER + text), Context(), [inputs])
        return caught.value.what

    assert change(lambda values: values.pop()).endswith("inputs or outputs: input 'v' (FLOAT) is gone")
    assert change(lambda values: values.append(values.pop(1))).endswith("inputs or outputs: their order is another")


def test_a_pass_that_removes_the_default_of_an_input() -> None:
    text = "main (float[4] x, float[1] k) => (float[4] y) <float[1] k = {2}> { [shift] y = Add (x, k) }"

    def work(model: ir.Model, context: Context) -> None:
        del model.graph.initializers["k"]
        context.applied(node(model, "shift"), "removed k")

    assert "input 'k' (FLOAT, with a default) is gone, input 'k' (FLOAT) is new" in failure(
        scripted("Remove", work), text=text
    )


def test_a_model_that_no_longer_runs() -> None:
    def break_it(model: ir.Model, context: Context) -> None:
        node(model, "relu").op_type = "Rellu"
        context.applied(node(model, "relu"), "misspelt")

    sentence = failure(scripted("Misspell", break_it))
    assert sentence.startswith("the model no longer runs after pass 'misspell': onnxruntime ")
    assert "Rellu" in sentence
    assert "/onnxruntime" not in sentence


def test_a_model_that_fails_at_run_time() -> None:
    text = "main (float[N] x) => (float[M, K] y) <int64[2] s = {2, -1}> { [r] y = Reshape (x, s) }"

    def break_it(model: ir.Model, context: Context) -> None:
        model.graph.initializers["s"].const_value = ir.Tensor(np.array([3, -1]), name="s")
        context.applied("s", "three rows")

    sentence = failure(scripted("Reshape", break_it), text=text)
    assert sentence.startswith(
        "the model no longer runs after pass 'reshape': the model does not run on the given inputs: "
        "Non-zero status code returned while running Reshape node. Name:'r'"
    )
    assert ".h:" not in sentence
    assert ".cc:" not in sentence


def test_a_graph_that_cannot_even_be_written() -> None:
    def cut(model: ir.Model, context: Context) -> None:
        model.graph.remove(node(model, "relu"))
        context.applied("relu", "removed, its user not")

    assert failure(scripted("Cut", cut)).startswith("the model no longer runs after pass 'cut': ")
    assert failure(scripted("Cut", cut), strict=True).startswith("the model no longer runs after pass 'cut': ")
