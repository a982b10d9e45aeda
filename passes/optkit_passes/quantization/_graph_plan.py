"""Decides how a whole graph becomes complete quantized units: analysis only, nothing is changed.

Unlike `plan_regions`, which leaves float what gains nothing from integers on a CPU, every operator that has a quantized
form becomes a unit: a runtime for which float is the exception gets no float in between. What stays float are operators
without such a form, those whose results span too many orders of magnitude, and those between them or behind the last
layer, whose results nobody reads as integers: to round these would cost accuracy and save nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir

from optkit.graph import is_constant, is_unused

from ._graph_operators import FIXED_RANGES, is_moving, unit_inputs
from ._layers import CLAMP_OPS, LAYER_OPS, Layer, describe
from ._regions import Plan, may_be_float, share_scales

STANDARD = ("", "ai.onnx")


def plan_graph(
    graph: ir.Graph,
    excluded: Mapping[ir.Node, str],
    *,
    floats: bool,
    separate: Collection[ir.Node] = (),
    forced: Collection[ir.Node] = (),
) -> Plan:
    """Return the plan for a main graph; its ``glue`` are all the units that are no layers.

    Args:
        graph: The graph, in topological order.
        excluded: Nodes that must stay float, and why.
        floats: Whether the target computes in float where that is better.
        separate: Relu and Clip nodes whose input is to be rounded too, since no quantizer does their work.
        forced: Nodes that must not be computed in float.
    """
    plan = Plan()
    for node in graph:
        if node in excluded:
            plan.reasons[node] = excluded[node]
        elif node.domain in STANDARD and any(may_be_float(value) for value in node.outputs):
            _classify(node, plan, floats=floats and node not in forced)
    if floats:
        _settle(graph, plan, separate, forced)
    _collect(graph, plan, separate)
    _share(graph, plan)
    return plan


def fused_clamps(plan: Plan, separate: Collection[ir.Node] = ()) -> Iterator[ir.Node]:
    """Yield the Relu and Clip nodes that the quantizer behind them does the work of: a unit's only readers."""
    for node in plan.glue:
        value = node.inputs[0]
        if node.op_type not in CLAMP_OPS or node in separate or value is None:
            continue
        producer = value.producer()
        if producer is None or len(value.uses()) != 1 or value.is_graph_output():
            continue
        if producer in plan.layers or (producer in plan.glue and not is_moving(producer)):
            yield node


def _classify(node: ir.Node, plan: Plan, *, floats: bool) -> None:
    found = describe(node) if node.op_type in LAYER_OPS else unit_inputs(node, floats=floats)
    if isinstance(found, Layer):
        plan.layers[node] = found
    elif isinstance(found, str):
        plan.reasons[node] = found
    else:
        plan.glue[node] = found


def _settle(graph: ir.Graph, plan: Plan, separate: Collection[ir.Node], forced: Collection[ir.Node]) -> None:
    """Drop units that only read what is computed in float, or that only float operators and the caller read."""
    changed = True
    while changed:
        changed = False
        fused = set(fused_clamps(plan, separate))
        for node in [node for node in graph if node in plan.glue and node not in forced]:
            reason = _objection(node, plan, fused)
            if reason:
                del plan.glue[node]
                plan.reasons[node] = reason
                changed = True


def _objection(node: ir.Node, plan: Plan, fused: Collection[ir.Node]) -> str:
    """Return why a unit is better computed in float, given what is around it; empty if it is not."""
    values = [value for index in plan.glue[node] if (value := node.inputs[index]) is not None]
    computed = [value for value in values if not is_constant(value)]
    producers = [value.producer() for value in computed]
    if computed and all(each is not None and not is_unit(each, plan) for each in producers):
        return "all that it reads is computed in float"
    if node in fused or not computed:
        return ""
    if is_moving(node) and any(each is None or is_unit(each, plan) for each in producers):
        return ""
    if not any(is_unit(use.node, plan) for output in node.outputs for use in output.uses()):
        return "its result is read in float only"
    return ""


def is_unit(node: ir.Node, plan: Plan) -> bool:
    """Whether a node reads and returns integers."""
    return node in plan.layers or node in plan.glue


def _collect(graph: ir.Graph, plan: Plan, separate: Collection[ir.Node]) -> None:
    """List the values to quantize: all that units read or return, but what only a fused clamp reads."""
    within = {node.inputs[0] for node in fused_clamps(plan, separate)}
    for node in graph:
        if not is_unit(node, plan):
            continue
        indices = plan.layers[node].activations if node in plan.layers else plan.glue[node]
        for value in (node.inputs[index] for index in indices):
            if value is not None and value not in within:
                plan.quantized[value] = None
        for output in node.outputs:
            if not is_unused(output) and output not in within and output.dtype in (None, ir.DataType.FLOAT):
                plan.quantized[output] = None
                plan.integer.add(output)


def _share(graph: ir.Graph, plan: Plan) -> None:
    """Join what movement operators tie together, and what is only computed to be concatenated.

    An input of Concat with other readers keeps a scale of its own, which is finer.
    """
    ties: dict[ir.Node, list[ir.Value]] = {}
    moved: set[ir.Value] = set()
    for node in plan.glue:
        read = [value for index in plan.glue[node] if (value := node.inputs[index]) is not None]
        if is_moving(node):
            ties[node] = [read[0], *node.outputs]
            moved.update(node.outputs)
        elif node.op_type == "Concat":
            alone = [value for value in read if _only_feeds(value, node)]
            ties[node] = [*alone, *node.outputs]
            if len(alone) == len(read):
                moved.update(node.outputs)
    share_scales(plan, ties, moved)


def _only_feeds(value: ir.Value, node: ir.Node) -> bool:
    producer = value.producer()
    fixed = producer is not None and producer.op_type in FIXED_RANGES
    return not fixed and not value.is_graph_output() and {use.node for use in value.uses()} == {node}
