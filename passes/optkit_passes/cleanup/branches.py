"""Taking the branch of an If whose condition is constant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir

from optkit import Context
from optkit.graph import cannot_forward, constant, forward, names, remove, unique


def take_branches(model: ir.Model, context: Context) -> bool:
    """Replace every If with a constant condition by the nodes of the branch that it takes."""
    changed = False
    for graph in list(model.graphs()):
        for node in list(graph):
            condition = constant(node.inputs[0]) if (node.domain, node.op_type) == ("", "If") else None
            if condition is None or node.graph is not graph:
                continue
            name = "then_branch" if condition.ravel()[0] else "else_branch"
            context.applied(node, f"its condition is constant: the nodes of its {name} take its place")
            _inline(model, node, node.attributes[name].as_graph())
            changed = True
    return changed


def _inline(model: ir.Model, node: ir.Node, branch: ir.Graph) -> None:
    graph, taken = node.graph, names(model)
    if graph is None:
        return
    count = Counter(value.name for each in model.graphs() for value in _values(each))
    for value in _values(branch):
        if value.name and count[value.name] > 1:  # another body has a value of this name: here it would hide it
            value.name = unique(f"{node.name}/{value.name}", taken)
    outputs, nodes = list(branch.outputs), list(branch)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        branch.initializers.pop(value.name or "")
        graph.register_initializer(value)
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, outputs, strict=True):
        kept = new
        if cannot_forward(old, new):
            identity = ir.node("Identity", [new], name=unique(f"{node.name}/Identity", taken))
            identity.outputs[0].name = unique(f"{node.name}/{old.name}", taken)
            graph.insert_before(node, identity)
            kept = identity.outputs[0]
        forward(old, kept)
    remove(node)


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
