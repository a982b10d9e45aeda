"""Constants that stand for minus infinity: what they hide gets no share of a Softmax, however large they are."""

from __future__ import annotations

import onnx_ir as ir

from optkit.graph import constant

_SOFTMAX = ("LogSoftmax", "Softmax")
# Operators that pass a hidden value on as it is, beside others, or with a finite score added.
_PASSING = frozenset({
    "Add", "Concat", "Expand", "Gather", "Identity", "Max", "Min", "Mul", "Reshape", "Slice", "Squeeze", "Tile",
    "Transpose", "Trilu", "Unsqueeze", "Where",
})  # fmt: skip
_MOVING = frozenset({"Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"})
_WHOLE = frozenset({
    ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8,
})  # fmt: skip


def hidden_values(mask: ir.Value) -> set[ir.Value] | None:
    """Return the values that a large negative constant makes on its way to a Softmax, itself included.

    None where it gets anywhere else: there, its exact size may matter. A product counts only with a factor that is 0 or
    1, as in ``Mul(Sub(1, Cast(mask)), -1e9)``.
    """
    found, pending = {mask}, [mask]
    ended = False
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return None
        for node, index in value.uses():
            if node.op_type in _SOFTMAX and node.domain in ("", "ai.onnx"):
                ended = True
                continue
            if node.op_type not in _PASSING or node.domain not in ("", "ai.onnx") or node.graph is not value.graph:
                return None
            if node.op_type == "Mul" and not _is_indicator(node.inputs[1 - index]):
                return None
            for output in node.outputs:
                if output not in found:
                    found.add(output)
                    pending.append(output)
    return found if ended else None


def _is_indicator(value: ir.Value | None) -> bool:
    """Whether a value is 0 or 1 by construction: integers or booleans made float, perhaps taken from 1."""
    while value is not None:
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "Cast":
            source = node.inputs[0]
            return source is not None and source.dtype in _WHOLE
        if node.op_type == "Sub":
            one = constant(node.inputs[0])
            if one is None or not (one == 1).all():
                return False
            value = node.inputs[1]
        elif node.op_type in _MOVING:
            value = node.inputs[0]
        else:
            return False
    return False
