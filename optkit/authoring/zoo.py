"""Small models that break passes (``zoo.txt``), and a pass tried on one of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import onnx_ir as ir

from optkit.dataset.samples import random_samples
from optkit.errors import InputError, OptkitError
from optkit.model.loading import load_text
from optkit.pipeline import Context, Inputs, Pass, Remark
from optkit.target import Target, load_target, target_names
from optkit.testing import read_golden

MARK = "zoo"  # metadata that the model and every node carry before the pass runs
LARGE = 100.0  # one sample is scaled by this, to reach the flat ends of Clip, Tanh and their like
CALIBRATION_SAMPLES = 8


@cache
def zoo() -> dict[str, str]:
    """Return the models of the zoo as ONNX text, by name."""
    with resources.as_file(resources.files("optkit.authoring") / "zoo.txt") as path:
        return {case.title: case.before for case in read_golden(path)}


@dataclass(frozen=True)
class Outcome:
    """How a run of a pass ended.

    Attributes:
        remarks: What it said.
        declined: The sentence with which it refused the model (an `OptkitError`), or empty.
        failure: The exception that it raised, or empty.
    """

    remarks: tuple[Remark, ...]
    declined: str = ""
    failure: str = ""

    @property
    def ended_well(self) -> bool:
        """Whether there is a result to look at."""
        return not self.declined and not self.failure

    @property
    def applied(self) -> int:
        """Number of ``applied`` remarks."""
        return sum(remark.kind == "applied" for remark in self.remarks)


@dataclass(frozen=True)
class Trial:
    """A pass run once on one model of the zoo.

    Attributes:
        title: The model's name.
        text: The model as ONNX text.
        before: The model before the pass, with marks in its metadata; not touched since.
        after: The same model after the pass.
        nodes: The nodes it had, bodies included.
        arrays: Its weights as the pass could reach them, and a copy from before.
        outcome: How the run ended.
    """

    title: str
    text: str
    before: ir.Model
    after: ir.Model
    nodes: tuple[ir.Node, ...]
    arrays: tuple[tuple[str, np.ndarray, np.ndarray], ...]
    outcome: Outcome


def attempt(pass_: Pass, title: str, text: str) -> Trial:
    """Load a model of the zoo and run the pass on it."""
    before, after = marked(text), marked(text)
    nodes = tuple(after.graph.all_nodes())
    arrays = []
    for model in (before, after):
        for graph in model.graphs():
            for name, value in graph.initializers.items():
                if value.const_value is not None:
                    array = np.array(value.const_value.numpy())
                    value.const_value = ir.tensor(array, name=name)
                    if model is after:
                        arrays.append((name, array, array.copy()))
    return Trial(title, text, before, after, nodes, tuple(arrays), run(pass_, after))


def marked(text: str) -> ir.Model:
    """Return a model of the zoo with metadata on itself, its graphs and its nodes."""
    model = load_text(text)
    model.producer_name, model.doc_string = MARK, "a model of the zoo"
    model.metadata_props[MARK] = "model"
    for node in model.graph.all_nodes():
        node.metadata_props[MARK] = node.name or ""
    return model


def run(pass_: Pass, model: ir.Model) -> Outcome:
    """Run the pass on the model in place."""
    context = context_for(pass_, model)
    try:
        pass_.run(model, context)
    except OptkitError as error:
        return Outcome(tuple(context.remarks), declined=str(error))
    except Exception as error:
        return Outcome(tuple(context.remarks), failure=f"{type(error).__name__}: {error}")
    return Outcome(tuple(context.remarks))


def context_for(pass_: Pass, model: ir.Model) -> Context:
    """Return a context with a target and calibration samples, for passes that read them."""
    samples = random_samples(model, CALIBRATION_SAMPLES, seed=1)
    return Context(any_target(), samples, pass_name=pass_.name())


@cache
def any_target() -> Target | None:
    """Return the installed target that takes integers in the most ways, so that passes find theirs, or None."""
    found = []
    for name in target_names():
        try:
            found.append(load_target(name))
        except InputError:
            continue
    return max(found, key=lambda target: len(target.weights) + len(target.activations), default=None)


def inputs_for(model: ir.Model) -> list[Inputs]:
    """Return three samples to compare outputs on, the last one large."""
    samples = list(random_samples(model, 3))
    return [*samples[:2], {k: v * LARGE if v.dtype.kind == "f" else v for k, v in samples[2].items()}]
