"""Passes of onnx_ir behind our own: run one, and derive the remarks from what is gone after it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optkit.pipeline import Context


def run_ir_pass(model: ir.Model, ir_pass: Any, context: Context, message: str) -> None:
    """Run a pass of onnx_ir and derive the remarks from what is gone after it.

    Args:
        model: The model.
        ir_pass: An ``onnx_ir.passes.InPlacePass`` that only removes nodes, initializers, functions or opset imports.
        context: Receives an ``applied`` remark with ``message`` for each.
        message: The message.
    """
    before = _contents(model)
    ir_pass(model)
    after = _contents(model)
    for key, where in before.items():
        if key not in after:
            context.applied(where, message)


def _contents(model: ir.Model) -> dict[object, ir.Node | ir.Value | str]:
    found: dict[object, ir.Node | ir.Value | str] = {}
    for graph in model.graphs():
        found.update({node: node for node in graph})
        found.update({value: value for value in graph.initializers.values()})
    found.update({identifier: "::".join(filter(None, identifier)) for identifier in model.functions})
    found.update({("opset", domain): domain or "ai.onnx" for domain in model.opset_imports})
    return found
