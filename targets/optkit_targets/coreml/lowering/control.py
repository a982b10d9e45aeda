"""Control flow, and other operators whose work or results' shapes depend on values that only a run knows."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optkit_targets.coreml.lowering.scope import NoLowering, Scope
from optkit_targets.coreml.lowering.table import lowers

REASONS = {
    "If": "its condition is computed at run time: constant conditions are folded before",
    "Loop": "loops keep the whole model off the Neural Engine, and their shapes are not static: unroll it on export",
    "NonMaxSuppression": "how many boxes are left is known at run time only: end the model before it",
    "Scan": "scans keep the whole model off the Neural Engine: unroll it on export",
    "Unique": "how many elements differ is known at run time only, and shapes must be static",
}


@lowers(*REASONS)
def refuse(scope: Scope, node: ir.Node) -> Any:
    """Refuse what values decide at run time."""
    raise NoLowering(REASONS[node.op_type])
