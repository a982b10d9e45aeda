"""Activations."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optkit_targets.coreml.lowering.scope import Scope
from optkit_targets.coreml.lowering.table import lowers

PLAIN = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh"}


@lowers(*PLAIN)
def plain(scope: Scope, node: ir.Node) -> Any:
    """Write an activation without parameters."""
    return getattr(scope.mb, PLAIN[node.op_type])(x=scope.input(node, 0), name=scope.name(node.name or ""))
