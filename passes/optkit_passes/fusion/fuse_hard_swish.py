"""Fuse HardSwish from the operators that exporters write it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, opset, prune
from optkit.pipeline import Context, Effect, Pass

SINCE = 14  # the opset that introduced HardSwish


class FuseHardSwish(Pass):
    """Turn ``x * clip(x + 3, 0, 6) / 6`` and ``x * HardSigmoid(x, 1/6, 1/2)`` into ``HardSwish(x)`` (since opset 14).

    The division may stand anywhere, and may be a multiplication by 1/6.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-5)

    def run(self, model: ir.Model, context: Context) -> None:
        """Fuse from the last operator of each match backwards."""
        for graph in list(model.graphs()):
            for node in list(graph):
                match = _product(node) if node.graph is not None else None
                if match is None or not np.isclose(match.factor, 1 / 6, rtol=1e-6):
                    continue
                if opset(model) < SINCE:
                    context.missed(node, f"HardSwish exists since opset {SINCE}, and the model has {opset(model)}")
                elif any(len(value.uses()) > 1 or value.is_graph_output() for value in match.inner):
                    context.missed(node, "an intermediate result is used elsewhere too")
                else:
                    old = node.inputs
                    node.op_type = "HardSwish"
                    node.attributes.clear()
                    node.resize_inputs(1)
                    node.replace_input_with(0, match.x)
                    prune(value for value in old if value is not match.x)
                    context.applied(node, "fused x * clip(x + 3, 0, 6) / 6")


@dataclass(frozen=True)
class _Match:
    """``factor * clip(x + 3, 0, 6)``, or that times x; ``inner`` are the values that only this computes."""

    x: ir.Value
    factor: float
    inner: tuple[ir.Value, ...]


def _number(value: ir.Value | None) -> float | None:
    array = constant(value)
    return float(array.ravel()[0]) if array is not None and array.size == 1 and array.dtype.kind == "f" else None


def _split(node: ir.Node, op_type: str) -> tuple[ir.Value, float] | None:
    """Return the operands of ``op_type(value, number)``, in either order where it commutes."""
    if node.domain or node.op_type != op_type:
        return None
    for value, other in (node.inputs, node.inputs[::-1]) if op_type != "Div" else (node.inputs,):
        number = _number(other)
        if number is not None and value is not None:
            return value, number
    return None


def _product(node: ir.Node) -> _Match | None:
    """Match ``x * gate(x)``, times or divided by a number."""
    for value, factor in _scaled(node):
        inner = value.producer()
        match = _product(inner) if inner is not None else None
        if match is not None:
            return _Match(match.x, match.factor * factor, (value, *match.inner))
    if node.domain or node.op_type != "Mul":
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        match = _gate(gate) if gate is not None else None
        if match is not None and match.x is x:
            return match
    return None


def _gate(value: ir.Value) -> _Match | None:
    """Match ``clip(x + 3, 0, 6)``, times or divided by a number, or HardSigmoid."""
    node = value.producer()
    if node is None or node.domain:
        return None
    for scaled, factor in _scaled(node):
        match = _gate(scaled)
        if match is not None:
            return _Match(match.x, match.factor * factor, (value, *match.inner))
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return None
    if node.op_type == "HardSigmoid":
        alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
        return _Match(source, 1 / 6, (value,)) if np.isclose(alpha, 1 / 6, rtol=1e-6) and beta == 0.5 else None
    low, high = (
        node.attributes.get_float(name, None) if name in node.attributes else _number(argument(node, index))
        for index, name in enumerate(("min", "max"), start=1)
    )
    producer = source.producer()
    shifted = _split(producer, "Add") if producer is not None and node.op_type == "Clip" else None
    if shifted is None or (low, high) != (0, 6) or shifted[1] != 3:
        return None
    return _Match(shifted[0], 1.0, (value, source))


def _scaled(node: ir.Node) -> list[tuple[ir.Value, float]]:
    """Return the value and the factor of a multiplication or division by a number, if the node is one."""
    multiplied, divided = _split(node, "Mul"), _split(node, "Div")
    if divided is not None and divided[1]:
        return [(divided[0], 1 / divided[1])]
    return [multiplied] if multiplied is not None else []
