"""Palettized weights, as Core ML's own LUTs."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optkit.quant.palette import palette_of
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import PALETTE, PALETTE_INDEX, lowers
from optkit_targets.coreml.lowering.weights import Palettized


@lowers(PALETTE)
def palette(scope: Scope, node: ir.Node) -> Any:
    """Write the Gather that expands a palettized weight as LUTs and indices."""
    found = palette_of(node)
    if found is None:
        raise CannotLower("its indices and LUTs are not as a palette has them")
    return Palettized(found).write(scope, node.name or "")


@lowers(PALETTE_INDEX)
def palette_index(scope: Scope, node: ir.Node) -> Any:
    """Write nothing: the Gather behind it reads the stored indices."""
    return ()
