from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ConfigDict

from optkit.authoring import conformance, zoo
from optkit.authoring.conformance import CHECKS, Result, check_class, check_pass
from optkit.errors import InputError
from optkit.model.loading import load_text
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.plugins import PASSES, _entries, pass_names
from optkit.session import CannotRunError, run_samples

COUNTER = itertools.count()
NEEDS = {"quantize-inc": "neural_compressor"}  # what a pass of an extra imports


def replaced(model: ir.Model, old: str, new: str, context: Context) -> None:
    for node in model.graph.all_nodes():
        if node.op_type == old and node.domain == "":
            node.op_type = new
            context.applied(node, f"is {new} now")


class Idle(Pass):
    """Do nothing."""

    def run(self, model: ir.Model, context: Context) -> None:
        for node in model.graph.all_nodes():
            context.missed(node, "nothing is wrong with it")


class Undocumented(Pass):
    def run(self, model: ir.Model, context: Context) -> None: ...


class Boundless(Idle):
    """Declare no bound."""

    effect: ClassVar[Effect] = Effect.reassociate(0)


class Vague(Idle):
    """Declare an effect in words."""

    effect: ClassVar[Any] = "small"


class Demanding(Idle):
    """Ask for an option."""

    bits: int


class Untyped(Idle):
    """Take anything."""

    bits: Any = 8


class Open(Idle):
    """Take any option."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Crash(Idle):
    """Expect two inputs."""

    def run(self, model: ir.Model, context: Context) -> None:
        for node in model.graph.all_nodes():
            assert node.inputs[1] is not None


class Silent(Idle):
    """Change an operator and say nothing."""

    def run(self, model: ir.Model, context: Context) -> None:
        for node in model.graph.all_nodes():
            if node.op_type == "Relu":
                node.op_type = "Identity"


class Boast(Idle):
    """Change nothing and say otherwise."""

    def run(self, model: ir.Model, context: Context) -> None:
        context.applied(model.graph[0], "is faster now")


class Mute(Idle):
    """Give a remark without words."""

    def run(self, model: ir.Model, context: Context) -> None:
        context.missed(model.graph[0], " ")


class Rename(Idle):
    """Give an output another name."""

    def run(self, model: ir.Model, context: Context) -> None:
        model.graph.outputs[0].name = "renamed"
        context.applied("renamed", "is the output's name")


class Abs(Idle):
    """Take the absolute value for a rectifier."""

    def run(self, model: ir.Model, context: Context) -> None:
        replaced(model, "Relu", "Abs", context)


class Explode(Idle):
    """Lose the outputs' values: log of what may be negative."""

    effect: ClassVar[Effect] = LOSSY

    def run(self, model: ir.Model, context: Context) -> None:
        replaced(model, "Relu", "Log", context)


class Capture(Idle):
    """Let bodies see the input in place of the value that is computed from it."""

    def run(self, model: ir.Model, context: Context) -> None:
        outside = {output: node for node in model.graph for output in node.outputs}
        for graph in list(model.graphs())[1:]:
            for node in graph:
                for index, value in enumerate(node.inputs):
                    if value in outside and outside[value].op_type == "Neg":
                        node.replace_input_with(index, outside[value].inputs[0])
                        context.applied(node, "reads the input")


class FoldDefault(Idle):
    """Take a default for a constant and drop the multiplication by one."""

    def run(self, model: ir.Model, context: Context) -> None:
        for node in model.graph:
            factor = node.inputs[1] if len(node.inputs) > 1 else None
            ones = factor is not None and factor.const_value is not None and (factor.const_value.numpy() == 1).all()
            if node.op_type == "Mul" and ones and node.inputs[0] is not None:
                node.outputs[0].replace_all_uses_with(node.inputs[0])
                context.applied(node, "multiplied by one")


class Restless(Idle):
    """Change something every time."""

    def run(self, model: ir.Model, context: Context) -> None:
        node = model.graph[0]
        node.metadata_props["times"] = node.metadata_props.get("times", "") + "I"
        context.applied(node, "counted once more")


class Random(Idle):
    """Write a number that is another one each time."""

    def run(self, model: ir.Model, context: Context) -> None:
        if "number" not in model.graph[0].metadata_props:
            model.graph[0].metadata_props["number"] = str(next(COUNTER))
            context.applied(model.graph[0], "numbered")


class Talkative(Idle):
    """Give remarks that are others each time."""

    def run(self, model: ir.Model, context: Context) -> None:
        context.missed(model.graph[0], f"attempt {next(COUNTER)}")


class Meddle(Idle):
    """Change an attribute of an operator that nobody knows."""

    def run(self, model: ir.Model, context: Context) -> None:
        for node in model.graph:
            if node.domain and node.attributes["turns"].as_int() == 3:
                node.attributes["turns"] = ir.AttrInt64("turns", 4)
                context.applied(node, "turns once more")


class Forget(Idle):
    """Drop the model's metadata."""

    def run(self, model: ir.Model, context: Context) -> None:
        if model.metadata_props:
            model.metadata_props.clear()
            context.applied("model", "metadata dropped")


class ForgetNode(Idle):
    """Drop a node's metadata."""

    def run(self, model: ir.Model, context: Context) -> None:
        if model.graph[0].metadata_props:
            model.graph[0].metadata_props.clear()
            context.applied(model.graph[0], "metadata dropped")


class Sign(Idle):
    """Claim to be the producer."""

    def run(self, model: ir.Model, context: Context) -> None:
        if model.producer_name != "me":
            model.producer_name = "me"
            context.applied("model", "signed")


class Overwrite(Idle):
    """Write into an array that other models share."""

    effect: ClassVar[Effect] = LOSSY

    def run(self, model: ir.Model, context: Context) -> None:
        for name, value in model.graph.initializers.items():
            if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                value.const_value.numpy()[...] += np.float32(1)
                context.applied(name, "raised by one")


class Nameless(Idle):
    """Leave the graph without a name, which ONNX forbids."""

    def run(self, model: ir.Model, context: Context) -> None:
        if model.graph.name:
            model.graph.name = ""
            context.applied("graph", "lost its name")


class Picky(Idle):
    """Take no model."""

    def run(self, model: ir.Model, context: Context) -> None:
        raise InputError("models are not taken")


BROKEN = [
    (Undocumented, "documented", "integers", "it has no docstring, which is its help"),
    (Boundless, "documented", "integers", "it reassociates within 0; declare a bound between 0 and 1"),
    (Vague, "documented", "integers", "its effect is 'small'; declare EXACT, Effect.reassociate(rtol) or LOSSY"),
    (Demanding, "options", "integers", "option 'bits' has no default"),
    (Untyped, "options", "integers", "option 'bits' takes anything; give it a type"),
    (Open, "options", "integers", "it takes any option"),
    (Crash, "runs", "integers", "integers: IndexError: tuple index out of range"),
    (Silent, "remarks-changes", "half-precision", "half-precision: it changed the model without an 'applied' remark"),
    (Boast, "remarks-changes", "integers", "integers: it gave 1 'applied' remarks and changed nothing"),
    (Mute, "remarks-changes", "integers", "integers: a remark lacks its message or the name of its node"),
    (Rename, "keeps-interface", "integers", "integers: it changed the model's inputs or outputs"),
    (Abs, "preserves-semantics", "half-precision", "half-precision: pass 'abs' moved an output by "),
    (Explode, "preserves-semantics", "half-precision", "half-precision: outputs change their shape or are no longer"),
    (Capture, "preserves-bodies", "loop-body", "loop-body: pass 'capture' moved an output by "),
    (
        FoldDefault,
        "respects-defaults",
        "initializers-as-inputs-and-outputs",
        "initializers-as-inputs-and-outputs: with",
    ),
    (Restless, "idempotent", "integers", "integers: a second run applied 'counted once more' at 'Gather_0'"),
    (Random, "deterministic", "integers", "integers: two runs give different models"),
    (Talkative, "deterministic", "integers", "integers: two runs give different remarks"),
    (Meddle, "keeps-custom-operators", "custom-operators", "custom-operators: it changed, merged or removed a custom"),
    (Forget, "keeps-metadata", "integers", "integers: it dropped the model's metadata_props"),
    (ForgetNode, "keeps-metadata", "integers", "integers: it dropped the metadata_props of node 'Gather_0'"),
    (Sign, "keeps-metadata", "integers", "integers: it changed the model's producer, documentation or graph name"),
    (Overwrite, "leaves-tensors", "tied-weights", "tied-weights: it wrote into the array of 'w'"),
    (Nameless, "survives-saving", "integers", "integers: the ONNX checker refuses the graph"),
    (Picky, "coverage", "integers", "it takes none of the models: models are not taken"),
]


@pytest.mark.parametrize(("cls", "check", "title", "problem"), BROKEN, ids=[row[0].__name__ for row in BROKEN])
def test_a_broken_pass_is_caught(
    cls: type[Pass], check: str, title: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = zoo.zoo()
    monkeypatch.setattr(conformance, "zoo", lambda: {title: models[title]})
    found = {result.check: result.problem for result in check_class(cls)}
    assert found[check].startswith(problem)


def test_every_check_has_a_pass_that_breaks_it() -> None:
    names = {check.__name__.replace("_", "-") for check in CHECKS} | {"documented", "options", "coverage"}
    assert names == {check for _, check, _, _ in BROKEN}


def test_a_pass_that_does_nothing_conforms() -> None:
    results = check_class(Idle)
    assert {result.check: result.problem for result in results if result.problem} == {}
    assert all(result.detail for result in results)
    assert results[-1] == Result("coverage", "Took 17 of 17 models, applied on none, so that its golden file decides")


def test_a_problem_names_three_models_and_counts_the_others() -> None:
    problems = {result.check: result.problem for result in check_class(Boast)}
    assert problems["remarks-changes"].count("changed nothing") == 3
    assert problems["remarks-changes"].endswith("; and 14 more models")


def test_a_pass_is_registered_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "pass_class", lambda name: Untyped)
    first = check_pass("typed")[0]
    assert first.problem == "it is registered as 'typed', and its class is named for 'untyped'"


def test_an_unknown_pass_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^no pass 'fold-batchnorm'; did you mean 'fold-batch-norm'"):
        check_pass("fold-batchnorm")


PLUGIN = '''
from optkit import Context, Pass

class TagSet(Pass):
    """Write down the node names, in the order of a set."""

    def run(self, model, context):
        names = {node.name for node in model.graph}
        model.graph.metadata_props["names"] = " ".join(names if SETS else sorted(names))
        context.applied("graph", "names written down")
'''


@pytest.mark.slow
@pytest.mark.parametrize("sets", [True, False])
def test_another_hash_seed_must_change_nothing(sets: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tag_set.py").write_text(f"SETS = {sets}\n{PLUGIN}")
    info = tmp_path / "tag_set-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tag-set\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[optkit.passes]\ntag-set = tag_set:TagSet\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problem = conformance._reproducible("tag-set")
    assert problem == ("the result of tag-set depends on the order of a set or of hashes" if sets else "")


@pytest.mark.slow
def test_a_second_process_that_fails_is_a_problem() -> None:
    assert conformance._reproducible("no-such-pass").startswith("a second process fails: optkit.errors.InputError: ")


@pytest.mark.parametrize("title", zoo.zoo())
def test_the_zoo_is_valid_and_runs(title: str) -> None:
    model = load_text(zoo.zoo()[title])
    try:
        outputs = run_samples(model, zoo.inputs_for(model))
    except CannotRunError:
        assert title == "custom-operators"
    else:
        assert all(np.isfinite(value).all() for sample in outputs for value in sample.values())


BUILT_IN = [name for name in pass_names() if _entries(PASSES)[name].value.startswith("optkit_")]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_passes_conform(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert {result.check: result.problem for result in check_pass(name, processes=False) if result.problem} == {}


@pytest.mark.slow
def test_the_built_in_passes_write_the_same_in_every_process() -> None:
    assert conformance._reproducible(*(name for name in BUILT_IN if name not in NEEDS)) == ""
