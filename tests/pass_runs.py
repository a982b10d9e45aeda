"""Passes run strictly on random samples, and their remarks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from optkit.dataset.samples import random_samples
from optkit.pipeline import Context, Pass, Pipeline
from optkit.plugins import pass_class
from optkit.target import Target


def create(name: str, **options: object) -> Pass:
    return pass_class(name).model_validate(options)


def run(model: ir.Model, *passes: Pass, samples: int = 2, target: Target | None = None) -> Context:
    """Run passes strictly, each verified within its effect on random samples."""
    context = Context(target=target)
    result = Pipeline(passes, strict=True).run(model, context, list(random_samples(model, samples)))
    assert not result.unverified
    return context


def messages(model: ir.Model, pass_: Pass, kind: str = "missed", target: Target | None = None) -> list[str]:
    """Run one pass without executing the model, and return its remarks."""
    context = Context(target=target)
    pass_.run(model, context)
    return [remark.message for remark in context.remarks if remark.kind == kind]


def op_types(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph.all_nodes() if node.name == name)


def silero_sample() -> dict[str, np.ndarray]:
    audio = np.random.default_rng(0).standard_normal((1, 576)) * 0.1
    return {"input": audio.astype(np.float32), "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}
