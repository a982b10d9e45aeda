"""Control flow: what is left of it when a model is lowered depends on values that only a run knows."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import lowers

REASONS = {
    "If": "its condition is computed at run time: constant conditions are folded before",
    "Loop": "loops keep the whole model off the Neural Engine, and their shapes are not static: unroll it on export",
    "Scan": "scans keep the whole model off the Neural Engine: unroll it on export",
}


@lowers(*REASONS)
def refuse(scope: Scope, node: ir.Node) -> Any:
    """Refuse a body that runs as values say."""
    raise CannotLower(REASONS[node.op_type])
