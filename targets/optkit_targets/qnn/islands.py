"""Parts of a model that the NPU takes and that would be done sooner on the CPU beside it, because crossing costs more.

The provider cannot be told to leave a node alone: it has no such option, and onnxruntime's own,
``session.layer_assignment_settings``, fails with providers that are plugins (1.31.1: its partitioner then counts
nodes that it has hidden from them). So an island is planned and named, with its numbers, and where it runs stays true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cache

import networkx as nx
import onnx_ir as ir

from optkit.cost.roofline import NodeCost, Work, price
from optkit.cost.shapes import value_bytes
from optkit.cost.work import describe_static
from optkit.target import Target, load_target
from optkit_targets.qnn.partition import Worth, without_islands
from optkit_targets.qnn.units import Unit

# What starting a graph on the NPU and waiting for it costs beside the bytes. Hexagon SDK, "System optimizations":
# cache maintenance alone takes "a minimum of a few hundred microseconds" where DSP and CPU are not I/O-coherent, as
# they are on newer chips; a third of that is assumed. The option ``crossing_seconds`` of a target replaces it.
CROSSING_SECONDS = 1e-4
HOST = "cortex-a76"  # the cores beside the NPU, unless the target's option ``host`` names another target


@dataclass(frozen=True)
class Plan:
    """How a model would be split between the NPU and the CPU if only time counted.

    Attributes:
        partitions: The units on the NPU by index, one set for each graph.
        islands: What each unit was worth that would be given back to the CPU.
    """

    partitions: tuple[frozenset[int], ...]
    islands: Mapping[int, Worth]


def plan(
    model: ir.Model, found: Sequence[Unit], graph: nx.DiGraph[int], taken: AbstractSet[int], target: Target
) -> Plan:
    """Split a model by time.

    Args:
        model: The model, its shapes known.
        found: Its units.
        graph: Which unit depends on which, by index.
        taken: The units that the NPU takes.
        target: The target; its option ``host`` names the CPU's own target, ``crossing_seconds`` the cost of a crossing.
    """
    host = _host(str(target.options.get("host", HOST)))
    works = describe_static(model)
    npu, cpu = _seconds(works, found, target, floats="float16"), _seconds(works, found, host, floats="float32")
    start = float(target.options.get("crossing_seconds", CROSSING_SECONDS))
    bandwidth = target.main_memory.bytes_per_second

    def worth(members: AbstractSet[int]) -> Worth:
        moved = _crossing_bytes(found, members)
        seconds = start + (moved / bandwidth.value if bandwidth is not None else 0.0)
        return Worth(sum(npu[index] for index in members), sum(cpu[index] for index in members), seconds, moved)

    kept, islands = without_islands(graph, taken, worth)
    return Plan(tuple(frozenset(members) for members in kept), islands)


@cache
def _host(name: str) -> Target:
    return load_target(name)


def _seconds(works: Sequence[Work], found: Sequence[Unit], target: Target, floats: str) -> list[float]:
    """Return the seconds of each unit; what has no price counts nothing on either side."""
    home = {node.name: index for index, unit in enumerate(found) for node in unit.nodes}
    seconds = [0.0] * len(found)
    for work in works:
        kind = floats if work.dtype in ("float32", "float16") else work.dtype
        cost = price(replace(work, dtype=kind), target)
        if isinstance(cost, NodeCost) and work.name in home:
            seconds[home[work.name]] += cost.cost.seconds
    return seconds


def _crossing_bytes(found: Sequence[Unit], members: AbstractSet[int]) -> int:
    inside = {node for index in members for node in found[index].nodes}
    border: dict[str | None, ir.Value] = {}
    for node in inside:
        for value in node.inputs:
            if value is not None and not value.is_initializer() and value.producer() not in inside:
                border[value.name] = value
        for value in node.outputs:
            if value.is_graph_output() or any(user not in inside for user, _ in value.uses()):
                border[value.name] = value
    return sum(value_bytes(value) or 0 for value in border.values())
