"""Decides which tensors of a graph become integers: analysis only, nothing is changed.

Layers (convolutions, matrix products) are quantized wherever they can be. Between them, glue operators (residual Add,
Concat, pooling, Reshape, ...) join only where that adds no rounding that is not there anyway: all they read is integer
already and somebody reads their result as integers. So a residual CNN is integer throughout, while the residual stream
of a transformer, its normalizations and softmax stay float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from optkit.graph import is_constant, is_unused

from ._layers import (
    ARITHMETIC_OPS,
    CLAMP_OPS,
    GLUE_OPS,
    LAYER_OPS,
    MOVEMENT_OPS,
    Layer,
    describe,
    glue_inputs,
    why_float,
)

# Where a value comes from. INTEGER: only an integer kernel computes it, so every reader gets the rounded value. EITHER:
# the kernel can return float at no loss (MatMul, Gemm), or the caller feeds float.
INTEGER, EITHER, FLOAT, CONSTANT = "integer", "either", "float", "constant"


@dataclass
class Plan:
    """What becomes integer.

    Attributes:
        layers: The layers, by node.
        glue: Glue nodes that run on integers, with the indices of the inputs that carry values.
        reasons: Why each other node that could have been integer stays float.
        quantized: Values that get a quantize / dequantize pair, in graph order; constants among them.
        integer: Those of them whose readers all get the rounded value.
        groups: For every quantized value the values it shares its scale with, itself included.
        sources: For every quantized value those of its group whose range decides.
    """

    layers: dict[ir.Node, Layer] = field(default_factory=dict)
    glue: dict[ir.Node, tuple[int, ...]] = field(default_factory=dict)
    reasons: dict[ir.Node, str] = field(default_factory=dict)
    quantized: dict[ir.Value, None] = field(default_factory=dict)
    integer: set[ir.Value] = field(default_factory=set)
    groups: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)
    sources: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)

    def transposes(self) -> list[ir.Node]:
        """Return the nodes that swap the axes of a constant weight; what stands for them is written anew."""
        return list(dict.fromkeys(layer.transpose for layer in self.layers.values() if layer.transpose is not None))

    def constants(self) -> dict[ir.Value, None]:
        """Return the constants that become integers: weights, biases, and what glue reads."""
        biases = (layer.node.inputs[layer.bias] for layer in self.layers.values() if layer.bias is not None)
        found = [*(layer.stored for layer in self.layers.values()), *biases, *self.quantized]
        return dict.fromkeys(value for value in found if value is not None and is_constant(value))

    def read_as_integer(self, node: ir.Node, index: int) -> bool:
        """Whether the node takes its input at ``index`` as integers."""
        if node in self.layers:
            return index in self.layers[node].activations
        return index in self.glue.get(node, ())


def plan_regions(graph: ir.Graph, excluded: Mapping[ir.Node, str]) -> Plan:
    """Return the plan for a main graph.

    Args:
        graph: The graph, in topological order.
        excluded: Nodes that must stay float, and why.
    """
    plan = Plan()
    for node in graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in LAYER_OPS | GLUE_OPS:
            continue
        if node.op_type in GLUE_OPS and not may_be_float(node.outputs[0]):
            continue
        found: Layer | tuple[int, ...] | str
        if node in excluded:
            found = excluded[node]
        elif node.op_type in LAYER_OPS:
            found = describe(node)
        else:
            found = why_float(node, (0,)) or glue_inputs(node)
        if isinstance(found, Layer):
            plan.layers[node] = found
        elif isinstance(found, str):
            plan.reasons[node] = found
        else:
            plan.glue[node] = found
    _settle(graph, plan)
    for node in plan.transposes():
        plan.reasons.pop(node, None)
    _collect(graph, plan)
    _share_scales(plan)
    return plan


def may_be_float(value: ir.Value) -> bool:
    """Whether a value holds floats, or is of a type that nobody knows."""
    return value.dtype is None or value.dtype.is_floating_point()


def _settle(graph: ir.Graph, plan: Plan) -> None:
    """Drop glue until every remaining one reads integers and is read as integers: the greatest such set."""
    order = list(graph)
    changed = True
    while changed:
        changed = False
        origin = _origins(graph, plan)
        for node in [*order, *reversed(order)]:
            if node in plan.glue:
                reason = _objection(node, plan, origin)
                if reason:
                    del plan.glue[node]
                    plan.reasons[node] = reason
                    origin.update(dict.fromkeys(node.outputs, FLOAT))
                    changed = True


def _origins(graph: ir.Graph, plan: Plan) -> dict[ir.Value, str]:
    origin = dict.fromkeys((v for v in graph.inputs if v.dtype == ir.DataType.FLOAT), EITHER)
    for node in graph:
        kind = FLOAT
        if node in plan.layers:
            kind = INTEGER if node.op_type in ("Conv", "ConvTranspose") else EITHER
        elif node in plan.glue:
            read = {origin_of(node.inputs[index], origin) for index in plan.glue[node]} - {CONSTANT}
            kind = FLOAT if FLOAT in read or not read else EITHER if EITHER in read else INTEGER
        origin.update(dict.fromkeys(node.outputs, kind))
    return origin


def origin_of(value: ir.Value | None, origin: Mapping[ir.Value, str]) -> str:
    """Return where a value comes from; what is not known comes from float."""
    if is_constant(value):
        return CONSTANT
    return FLOAT if value is None else origin.get(value, FLOAT)


def _objection(node: ir.Node, plan: Plan, origin: Mapping[ir.Value, str]) -> str:
    """Return why a glue node has to stay float, given what is around it; empty if it need not."""
    read = {index: origin_of(node.inputs[index], origin) for index in plan.glue[node]}
    for index, kind in read.items():
        value = node.inputs[index]
        if kind == CONSTANT and value is not None and value.dtype != ir.DataType.FLOAT:
            return f"input '{value.name}' is not float32"
        if kind == FLOAT:
            return f"input '{'' if value is None else value.name}' is computed in float"
        if kind == EITHER and (node.op_type in ARITHMETIC_OPS or (node.op_type in CLAMP_OPS and not fuses(node, plan))):
            return f"input '{'' if value is None else value.name}' is available in float at no cost"
    if set(read.values()) == {CONSTANT}:
        return "all its inputs are constant"
    if node.op_type in CLAMP_OPS and INTEGER in read.values() and fuses(node, plan):
        return ""
    users = [plan.read_as_integer(user, index) for output in node.outputs for user, index in output.uses()]
    if not any(users):
        return "its output is only read in float"
    if EITHER in read.values() and not (all(users) and not any(output.is_graph_output() for output in node.outputs)):
        return "its output is also read in float"
    return ""


def fuses(node: ir.Node, plan: Plan) -> bool:
    """Whether a Relu or Clip is the only reader of an integer kernel, which then returns the bounded range at once."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if value is None or producer is None or len(value.uses()) != 1 or value.is_graph_output():
        return False
    return producer in plan.layers or (producer in plan.glue and producer.op_type in ARITHMETIC_OPS)


def _collect(graph: ir.Graph, plan: Plan) -> None:
    """List the values to quantize: what layers and glue read, and what integer kernels return."""
    origin = _origins(graph, plan)
    fused = {node.inputs[0] for node in plan.glue if node.op_type in CLAMP_OPS and fuses(node, plan)}
    for node in graph:
        indices = plan.layers[node].activations if node in plan.layers else plan.glue.get(node, ())
        for value in (node.inputs[index] for index in indices):
            if value is not None and value not in fused:
                plan.quantized[value] = None
        for output in (output for output in node.outputs if not is_unused(output)):
            is_integer = origin.get(output) == INTEGER and output not in fused
            if is_integer or (node in plan.glue and output not in fused):
                plan.quantized[output] = None
                plan.integer.add(output)


def _share_scales(plan: Plan) -> None:
    """Join what movement operators tie together."""
    ties: dict[ir.Node, list[ir.Value]] = {}
    for node, indices in plan.glue.items():
        if node.op_type in MOVEMENT_OPS:
            values = [*(node.inputs[index] for index in indices), *node.outputs]
            ties[node] = [value for value in values if value is not None]
    share_scales(plan, ties, moved={value for node in ties for value in node.outputs})


def share_scales(plan: Plan, ties: Mapping[ir.Node, Sequence[ir.Value]], moved: Collection[ir.Value]) -> None:
    """Join the quantized values that share a scale into groups.

    Args:
        plan: Its ``groups`` and ``sources`` are filled in.
        ties: Values that share a scale because of a node.
        moved: Values that only hold what others of their group hold; a group's range is that of the rest.
    """
    parent = {value: value for value in plan.quantized}

    def root(value: ir.Value) -> ir.Value:
        while parent[value] is not value:
            parent[value] = parent[parent[value]]
            value = parent[value]
        return value

    for values in ties.values():
        tied = [value for value in values if value in parent]
        for value in tied[1:]:
            parent[root(value)] = root(tied[0])
    groups: dict[ir.Value, list[ir.Value]] = {}
    for value in plan.quantized:
        groups.setdefault(root(value), []).append(value)
    for group in groups.values():
        sources = [value for value in group if value not in moved]
        for value in group:
            plan.groups[value] = group
            plan.sources[value] = sources
