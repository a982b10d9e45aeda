"""What the fusions of whole formulas share: reading single operators, and replacing a match by one operator."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from optkit.graph import constant, prune
from optkit_passes.fusion.linear import RefusedError


def number(value: ir.Value | None, rank: int) -> float | None:
    """Return a constant of one element and at most ``rank`` axes, so that it gives no result more axes than that."""
    array = constant(value)
    if array is None or array.size != 1 or array.ndim > rank:
        return None
    item = array.item()
    return float(item) if isinstance(item, int | float) else None


def produced_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the standard operator that computes the value, if it is one of these."""
    node = value.producer() if value is not None else None
    return node if node is not None and is_operator(node, *op_types) else None


def is_operator(node: ir.Node, *op_types: str) -> bool:
    """Return whether the node is one of these standard operators."""
    return node.domain == "" and node.op_type in op_types


def other_input(node: ir.Node, index: int) -> ir.Value | None:
    """Return the other operand of an operator that takes two."""
    return node.inputs[1 - index] if len(node.inputs) == 2 else None


def sole_reader(value: ir.Value, *op_types: str) -> tuple[ir.Node, ir.Value] | None:
    """Return the one node that takes a value, and its other operand, if it is one of these operators on two values."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.graph is not value.graph:
        return None
    other = other_input(uses[0].node, uses[0].idx) if is_operator(uses[0].node, *op_types) else None
    return None if other is None else (uses[0].node, other)


def collect(root: ir.Node, operands: Collection[ir.Value | None]) -> list[ir.Node]:
    """Return the nodes that compute ``root`` from its operands, itself first.

    Raises:
        RefusedError: A result in between is used elsewhere too.
    """
    nodes = [root]
    for node in nodes:  # grows while it is read
        for value in node.inputs:
            producer = value.producer() if value is not None and value not in operands else None
            if producer is not None and producer not in nodes:
                nodes.append(producer)
    for node in nodes[1:]:
        for value in node.outputs:
            if value.is_graph_output() or any(use.node not in nodes for use in value.uses()):
                raise RefusedError(f"the result of {node.op_type} is used elsewhere too")
    return nodes


def replace(
    root: ir.Node, op_type: str, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr] = (), domain: str = ""
) -> None:
    """Make the node another operator: its name, metadata and result stay, what it alone needed goes."""
    old = root.inputs
    root.op_type, root.domain = op_type, domain
    root.attributes.clear()
    for attribute in attributes:
        root.attributes.add(attribute)
    root.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        root.replace_input_with(index, value)
    prune(old)
