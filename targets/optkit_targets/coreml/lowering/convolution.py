"""Convolutions."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optkit_targets.coreml.lowering.scope import Scope
from optkit_targets.coreml.lowering.table import lowers


@lowers("Conv")
def conv(scope: Scope, node: ir.Node) -> Any:
    """Write a convolution of one to three axes: ONNX pads [begins, ends], MIL [begin, end] by axis."""
    axes = len(scope.shape(node, 1)) - 2
    pads = scope.ints(node, "pads", [0] * 2 * axes) or []
    bias = scope.optional(node, 2)
    return scope.mb.conv(
        x=scope.input(node, 0),
        weight=scope.input(node, 1),
        **({} if bias is None else {"bias": bias}),
        strides=scope.ints(node, "strides", [1] * axes),
        dilations=scope.ints(node, "dilations", [1] * axes),
        groups=node.attributes.get_int("group", 1),
        pad_type="custom",
        pad=[pads[half * axes + axis] for axis in range(axes) for half in (0, 1)],
        name=scope.name(node.name or ""),
    )
