"""Where each node would run, predicted from the constraints alone; and what the provider itself decides."""

from __future__ import annotations

import re
from collections.abc import Mapping

import networkx as nx
import onnx_ir as ir

from optkit.graph import bodies
from optkit.package.contract import Placement
from optkit.target import Target
from optkit_targets.qnn import runtime
from optkit_targets.qnn.constraints import GENERAL, violation
from optkit_targets.qnn.islands import plan
from optkit_targets.qnn.operator_constraints import specific
from optkit_targets.qnn.partition import Worth, is_convex, partitions
from optkit_targets.qnn.shapes import with_shapes
from optkit_targets.qnn.units import DEQUANTIZE, INTEGERS_16, QUANTIZE, Unit, dtype, homes, incomplete, producer, units

NPU, CPU = "npu", "cpu"
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
LONE = "a lone Q or DQ node makes no partition: the provider leaves it to the CPU"
CONSTANT = "a partition must read what is fed or computed: the compiler fails on one of constants alone"
CAPTURED = (
    "The provider's partitions must not be left and entered again through the body of an If or Loop: "
    "onnxruntime then gives it nothing"
)
# The layout transformer renames what it moves to channels-last; functions are expanded into nodes without a name.
RENAMED = re.compile(r"_token_\d+$")


def place(model: ir.Model, target: Target) -> list[Placement]:
    """Return one placement for each node, bodies included, in the model's order.

    Nothing of Qualcomm's is needed: the constraints decide, node by node, then by unit and by partition.
    """
    shaped = with_shapes(model)
    found = units(shaped)
    reasons = {index: _refusal(unit, shaped, target) for index, unit in enumerate(found)}
    _by_partition(found, reasons)
    home = homes(found)
    taken = {index for index, reason in reasons.items() if not reason}
    islands = plan(shaped, found, dependencies(found), taken, target).islands
    return [
        _placement(node, found[home[node]], reasons[home[node]], islands.get(home[node]))
        if node in home
        else _on_cpu(node, violation(node, shaped, target, GENERAL))
        for node in shaped.graph.all_nodes()
    ]


def dependencies(found: list[Unit], *, captures: bool = True) -> nx.DiGraph[int]:
    """Return which unit reads what which other computes, by index.

    A DQ node that several units share is as good as one of each: who reads it depends on what feeds it.

    Args:
        found: The units.
        captures: Whether what the body of an If or Loop reads from around it counts as read by the node.
    """
    home = homes(found)
    shared = {node for unit in found for node in unit.dequantize}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(found)))
    for index, unit in enumerate(found):
        for node in unit.nodes:
            inner = [value for body in bodies(node) for child in body.all_nodes() for value in child.inputs]
            for value in (*node.inputs, *(inner if captures else ())):
                source = producer(value)
                while source in shared and source not in unit.nodes:
                    source = producer(source.inputs[0])
                if source in home and source not in unit.nodes:
                    graph.add_edge(home[source], index)
    return graph


def _by_partition(found: list[Unit], reasons: dict[int, str]) -> None:
    """Refuse what stands against whole partitions.

    The provider follows no captured values when it partitions, so that a path through a body may leave a partition and
    come back; onnxruntime then takes back everything.
    """
    taken = {index for index, reason in reasons.items() if not reason}
    whole = dependencies(found)
    for partition in partitions(dependencies(found, captures=False), taken):
        if not is_convex(whole, partition):
            reasons.update(dict.fromkeys(taken, CAPTURED))
            return
        if len(partition) == 1 and all(found[index].node.op_type in (QUANTIZE, DEQUANTIZE) for index in partition):
            reasons.update(dict.fromkeys(partition, LONE))
        elif not _is_fed({node for index in partition for node in found[index].nodes}):
            reasons.update(dict.fromkeys(partition, CONSTANT))


def _is_fed(members: set[ir.Node]) -> bool:
    """Return whether any of the nodes reads a graph input, or what a node outside computes."""
    values = [value for node in members for value in node.inputs if value is not None]
    return any(
        value.is_graph_input() or ((source := value.producer()) is not None and source not in members)
        for value in values
    )


def devices(assigned: Mapping[str, str]) -> dict[str, str]:
    """Return the device of each node by its own name, from the provider of each as onnxruntime names it."""
    return {RENAMED.sub("", name): NPU if provider == runtime.NPU else CPU for name, provider in assigned.items()}


def _refusal(unit: Unit, model: ir.Model, target: Target) -> str:
    if reason := violation(unit.node, model, target, GENERAL):
        return reason + (f": {why}" if (why := incomplete(unit.node, model)) else "")
    return violation(unit.node, model, target, specific(unit.node))


def _placement(node: ir.Node, unit: Unit, refused: str, island: Worth | None) -> Placement:
    if refused:
        return _on_cpu(
            node, refused if node is unit.node else f"part of {unit.node.op_type} '{unit.node.name}': {refused}"
        )
    precision, reason = _precision(unit)
    if node is not unit.node:
        precision, reason = "-", f"part of {unit.node.op_type} '{unit.node.name}'"
    if island is not None:
        reason = f"{reason}; {island.reason}"
    return Placement(node.name or "", node.op_type, NPU, precision, True, reason)


def _precision(unit: Unit) -> tuple[str, str]:
    if unit.node.op_type in (QUANTIZE, DEQUANTIZE):
        return "-", "converts between floats and integers"
    types = [dtype(node.inputs[0]) for node in unit.dequantize[:1]] + [dtype(node.outputs[0]) for node in unit.quantize]
    if unit.quantized and (unit.quantize or not any(dtype(value) in FLOATS for value in unit.node.outputs)):
        bits = 16 if any(kind in INTEGERS_16 for kind in types) else 8
        return f"int{bits}", f"one operator in integers of {bits} bits with the Q and DQ nodes around it"
    values = [dtype(value) for value in (*unit.node.inputs, *unit.node.outputs)]
    if any(kind in FLOATS for kind in values):
        return "float16", "floats are computed in fp16"
    return "-", "moves or computes integers and flags"


def _on_cpu(node: ir.Node, reason: str) -> Placement:
    return Placement(node.name or "", node.op_type, CPU, "-", False, reason)
