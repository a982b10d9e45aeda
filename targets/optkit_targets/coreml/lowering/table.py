"""The table of lowerings: which function writes which ONNX operator in MIL.

A plugin adds to it through the entry point group ``optkit.lowerings``: the entry's name is the operator
(``Gelu``, or ``my.domain::Op``), its value the function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import onnx_ir as ir

from optkit.quant.palette import LUT_BITS_KEY
from optkit_targets.coreml.lowering.scope import Scope

Lowering = Callable[[Scope, ir.Node], Any]
"""Writes a node with ``scope.mb`` and returns its MIL result, or one for each output; raises CannotLower."""

GROUP = "optkit.lowerings"
FAMILIES = (
    "activation",
    "attention",
    "comparison",
    "contraction",
    "control",
    "convolution",
    "elementwise",
    "indexing",
    "normalization",
    "palettes",
    "pooling",
    "product",
    "quantization",
    "recurrent",
    "reduction",
    "resizing",
    "shaping",
    "slicing",
)
# Keys of the nodes that expand a palettized weight: they carry LUT_BITS_KEY, and stand for one constant.
PALETTE, PALETTE_INDEX = "optkit::Palette", "optkit::PaletteIndex"
_TABLE: dict[str, Lowering] = {}


def lowers(*operators: str) -> Callable[[Lowering], Lowering]:
    """Enter a function into the table for operators of ai.onnx, or ``domain::Op``."""

    def enter(function: Lowering) -> Lowering:
        for operator in operators:
            if operator in _TABLE:
                raise ValueError(f"{operator} has two lowerings")
            _TABLE[operator] = function
        return function

    return enter


@cache
def table() -> dict[str, Lowering]:
    """Return every lowering by operator; a plugin's comes before ours."""
    for family in FAMILIES:
        import_module(f"optkit_targets.coreml.lowering.{family}")
    found = dict(sorted(_TABLE.items()))
    for entry in entry_points(group=GROUP):
        found[entry.name] = entry.load()
    return found


def operator(node: ir.Node) -> str:
    """Return the key of a node's operator in the table."""
    if LUT_BITS_KEY in node.metadata_props:
        return PALETTE if node.op_type == "Gather" else PALETTE_INDEX
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def lacking(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes whose operator has no lowering."""
    known = table()
    return [node for node in nodes if operator(node) not in known]
