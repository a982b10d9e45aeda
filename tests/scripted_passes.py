"""Passes that do what a test says, and a model for them to do it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import VerificationError
from optkit.model.loading import load_text
from optkit.pipeline import EXACT, Context, Effect, Pass, Pipeline, PipelineResult

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
CHAIN = """main (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}, float[1] k = {2}> {
    [scale] scaled = Mul (x, w)
    [relu] positive = Relu (scaled)
    [shift] shifted = Add (positive, k)
    [root] y = Sqrt (shifted)
}"""


X = np.array([1, -2, 3, 4], np.float32)
Work = Callable[[ir.Model, Context], None]


class Scripted(Pass):
    """Do what a test says."""

    work: ClassVar[Work]

    def run(self, model: ir.Model, context: Context) -> None:
        type(self).work(model, context)


def scripted(name: str, work: Work, effect: Effect = EXACT) -> Pass:
    """Make a pass with a class of its own, so that it has its own name and effect."""
    namespace: dict[str, Any] = {"work": staticmethod(work), "effect": effect, "__doc__": name}
    return type(name, (Scripted,), {"__module__": __name__, "__annotations__": {}, **namespace})()


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph.all_nodes() if node.name == name)


def add(model: ir.Model, name: str, amount: float) -> None:
    """Add to an initializer, by a new tensor, as passes do."""
    value = model.graph.initializers[name]
    value.const_value = ir.Tensor((value.const_value.numpy() + amount).astype(np.float32), name=name)


def add_to_k(model: ir.Model, context: Context) -> None:
    add(model, "k", 1)
    context.applied(node(model, "shift"), "made it larger")


def nothing(model: ir.Model, context: Context) -> None:
    context.missed(node(model, "relu"), "not today")


def rename_a_tensor(model: ir.Model, context: Context) -> None:
    node(model, "relu").outputs[0].name = "renamed"
    context.applied(node(model, "relu"), "renamed its output")


def run(*passes: Pass, text: str = CHAIN, x: list[np.ndarray] | None = None, strict: bool = False) -> PipelineResult:
    samples = [{"x": array} for array in ([X] if x is None else x)]
    return Pipeline(passes, strict=strict).run(load_text(HEADER + text), Context(), samples)


def failure(*passes: Pass, **options: Any) -> str:
    with pytest.raises(VerificationError) as caught:
        run(*passes, **options)
    assert caught.value.exit_code == 4
    return str(caught.value)
