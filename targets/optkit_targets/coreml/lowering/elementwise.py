"""Arithmetic, comparisons and logic on every element, with ONNX's broadcasting, which is MIL's."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optkit_targets.coreml.lowering.scope import Scope
from optkit_targets.coreml.lowering.table import lowers

BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul"}


@lowers(*BINARY)
def binary(scope: Scope, node: ir.Node) -> Any:
    """Write ``x op y``."""
    operation = getattr(scope.mb, BINARY[node.op_type])
    return operation(x=scope.input(node, 0), y=scope.input(node, 1), name=scope.name(node.name or ""))
