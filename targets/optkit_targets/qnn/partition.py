"""Which units run together on the NPU: the fewest convex partitions, and the islands that are not worth a crossing.

A partition becomes one graph of the context binary. It must be convex: no path may leave it and come back, or it
would wait for itself. With ``segment(v)`` the largest number of NPU stretches that a path to ``v`` has behind it,
the units of one segment form a partition. No partitioning has fewer: a path through k stretches needs k of them,
and there is one with as many stretches as there are segments. The provider reaches the same sets in waves
(``CreateSupportedPartitionNodeGroups`` of onnxruntime-qnn 2.7).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeVar

import networkx as nx

Key = TypeVar("Key", bound=Hashable)


def partitions(graph: nx.DiGraph[Key], taken: AbstractSet[Key]) -> list[set[Key]]:
    """Return the fewest convex sets that hold all of ``taken`` and nothing else, in an order in which they can run.

    Args:
        graph: What depends on what, without cycles.
        taken: The members that run on the NPU.
    """
    segment: dict[Key, int] = {}
    found: dict[int, set[Key]] = {}
    for member in nx.topological_sort(graph):
        before = graph.predecessors(member)
        # What the CPU computes after segment k is the first that segment k + 1 can read.
        ends = (segment[other] + (other in taken and member not in taken) for other in before)
        segment[member] = max(ends, default=0)
        if member in taken:
            found.setdefault(segment[member], set()).add(member)
    return [found[index] for index in sorted(found)]


def is_convex(graph: nx.DiGraph[Key], members: AbstractSet[Key]) -> bool:
    """Return whether no path leaves ``members`` and comes back."""
    outside: set[Key] = set()
    for member in members:
        outside.update(nx.descendants(graph, member) - members)
    return not any(set(graph.successors(member)) & members for member in outside)


@dataclass(frozen=True)
class Worth:
    """What running an island on the NPU costs and saves, in seconds.

    Attributes:
        npu_seconds: Its work on the NPU.
        cpu_seconds: Its work on the CPU beside it.
        crossing_seconds: Moving what crosses its border through main memory, and starting it.
        crossing_bytes: What crosses.
    """

    npu_seconds: float
    cpu_seconds: float
    crossing_seconds: float
    crossing_bytes: int

    @property
    def pays(self) -> bool:
        """Whether the NPU is worth the crossing."""
        return self.npu_seconds + self.crossing_seconds <= self.cpu_seconds

    @property
    def reason(self) -> str:
        """Why an island would be done sooner on the CPU, with the numbers."""
        return (
            f"an island: {self.crossing_bytes:,} bytes cross for {_micro(self.crossing_seconds)}, and its work takes "
            f"{_micro(self.npu_seconds)} on the NPU, {_micro(self.cpu_seconds)} on the CPU"
        )


def without_islands(
    graph: nx.DiGraph[Key], taken: AbstractSet[Key], worth: Callable[[AbstractSet[Key]], Worth]
) -> tuple[list[set[Key]], Mapping[Key, Worth]]:
    """Return the partitions that pay, and what each member that was given back was worth.

    The partition that loses most is given back first, and the rest partitioned anew, since its neighbours may now
    join the CPU's work around it; so on until every partition pays. The largest is never an island: a graph whose
    every part loses belongs on a target without an NPU, which is not for the partitioner to decide.
    """
    kept = set(taken)
    returned: dict[Key, Worth] = {}
    while True:
        found = partitions(graph, kept)
        largest = max(found, key=len, default=set())
        losses = [(worth(members), members) for members in found if members is not largest]
        losing = [(value, members) for value, members in losses if not value.pays]
        if not losing:
            return found, returned
        value, members = max(losing, key=lambda entry: _loss(entry[0]))
        kept -= members
        returned.update(dict.fromkeys(members, value))


def _loss(value: Worth) -> float:
    return value.npu_seconds + value.crossing_seconds - value.cpu_seconds


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"


def quotient(graph: nx.DiGraph[Key], groups: Sequence[AbstractSet[Key]]) -> nx.DiGraph[int]:
    """Return the graph of ``groups`` by index, and of the members outside them; acyclic where all groups can run."""
    home: dict[Key, int] = {member: index for index, group in enumerate(groups) for member in group}
    for member in graph:
        home.setdefault(member, len(home) + len(groups))
    edges = ((home[a], home[b]) for a, b in graph.edges if home[a] != home[b])
    result: nx.DiGraph[int] = nx.DiGraph()
    result.add_nodes_from(home.values())
    result.add_edges_from(edges)
    return result
