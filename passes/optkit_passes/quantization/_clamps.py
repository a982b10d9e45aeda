"""A Relu or Clip in front of a quantizer that clamps at the same bounds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import remove
from optkit.quant.integers import QuantParams

from ._layers import clamp_bounds, why_float


def clamps_alike(node: ir.Node, params: QuantParams) -> bool:
    """Whether a quantizer of the node's output clamps at its bounds, or within them, to the nearest step."""
    bounds = clamp_bounds(node)
    if bounds is None or why_float(node, (0,)):
        return False
    limits = ir.DataType.from_numpy(params.grid.dtype)
    with np.errstate(over="ignore"):
        low, high = (np.rint(np.float32(bound) / params.scale) + params.zero_point for bound in bounds)
    return bool(low <= limits.min and high >= limits.max)


def remove_clamp(node: ir.Node) -> bool:
    """Remove a Relu or Clip whose only reader is a quantizer; return whether it went."""
    value, source = node.outputs[0], node.inputs[0]
    uses = list(value.uses())
    if source is None or value.is_graph_output() or len(uses) != 1 or uses[0].node.op_type != "QuantizeLinear":
        return False
    uses[0].node.replace_input_with(0, source)
    remove(node)
    return True
