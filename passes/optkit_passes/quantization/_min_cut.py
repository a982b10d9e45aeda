"""The labelling of a graph with two labels that cuts the fewest links, some labels being given."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import pairwise

SOURCE, SINK = 0, 1
ENDLESS = 1 << 30


class _Flow:
    """A flow network: capacities between numbered vertices, as residual graph."""

    def __init__(self) -> None:
        self.edges: list[dict[int, int]] = [{}, {}]

    def vertex(self) -> int:
        self.edges.append({})
        return len(self.edges) - 1

    def connect(self, a: int, b: int, capacity: int) -> None:
        if a != b:
            self.edges[a][b] = self.edges[a].get(b, 0) + capacity
            self.edges[b].setdefault(a, 0)

    def saturate(self) -> None:
        """Push flow along shortest paths until none is left (Edmonds & Karp 1972): one path for each link cut."""
        while (before := self._search()) is not None:
            path = [SINK]
            while path[-1] != SOURCE:
                path.append(before[path[-1]])
            path.reverse()
            steps = list(pairwise(path))
            amount = min(self.edges[a][b] for a, b in steps)
            for a, b in steps:
                self.edges[a][b] -= amount
                self.edges[b][a] += amount

    def _search(self) -> dict[int, int] | None:
        before, queue = {SOURCE: SOURCE}, deque([SOURCE])
        while queue:
            a = queue.popleft()
            for b, capacity in self.edges[a].items():
                if capacity and b not in before:
                    before[b] = a
                    if b == SINK:
                        return before
                    queue.append(b)
        return None

    def reaching_sink(self) -> set[int]:
        """Return the vertices from which more flow could reach the sink."""
        found, queue = {SINK}, deque([SINK])
        while queue:
            b = queue.popleft()
            for a in self.edges[b]:
                if a not in found and self.edges[a].get(b, 0):
                    found.add(a)
                    queue.append(a)
        return found


def fewest_cuts(
    labels: Mapping[Hashable, bool | None], links: Iterable[tuple[Hashable, Sequence[Hashable]]]
) -> set[Hashable]:
    """Return the vertices labelled True where as few links as possible join different labels.

    A link joins one vertex with several and counts once however many of these differ from it, as a Cast serves every
    reader that wants its type. Of all best labellings it is the one with the most True.

    Args:
        labels: Every vertex, with its label where it is given and None where it is free.
        links: One vertex and those it is joined with.
    """
    flow = _Flow()
    number = {vertex: flow.vertex() if label is None else SOURCE if label else SINK for vertex, label in labels.items()}
    for vertex, others in links:
        a, ends = number[vertex], {number[other] for other in others} - {number[vertex]}
        if len(ends) == 1:
            (b,) = ends
            flow.connect(a, b, 1)
            flow.connect(b, a, 1)
        elif ends:  # Ihler, Wagner & Wagner 1993: a hyperedge as two auxiliary vertices, one for each direction
            out, back = flow.vertex(), flow.vertex()
            flow.connect(a, out, 1)
            flow.connect(back, a, 1)
            for b in ends:
                flow.connect(out, b, ENDLESS)
                flow.connect(b, back, ENDLESS)
    flow.saturate()
    low = flow.reaching_sink()
    return {vertex for vertex, label in labels.items() if label or (label is None and number[vertex] not in low)}
