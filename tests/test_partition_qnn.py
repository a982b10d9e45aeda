"""Partitions: the fewest convex ones, and which of them are worth a crossing."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from itertools import product

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.model.loading import load_text
from optkit.target import load_target
from optkit_targets.qnn.partition import Worth, is_convex, partitions, quotient, without_islands
from optkit_targets.qnn.placement import place

SMALL = 6


@st.composite
def graphs(draw: st.DrawFn, most: int = 14) -> tuple[nx.DiGraph, set[int]]:
    """Draw a graph whose edges go up, and which of its nodes run on the NPU."""
    size = draw(st.integers(1, most))
    edges = [(a, b) for b in range(size) for a in range(b) if draw(st.booleans())]
    graph = nx.DiGraph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from(edges)
    return graph, draw(st.sets(st.integers(0, size - 1)))


@given(graphs())
def test_partitions_hold_all_and_are_convex(drawn: tuple[nx.DiGraph, set[int]]) -> None:
    graph, taken = drawn
    found = partitions(graph, taken)
    assert sorted(member for group in found for member in group) == sorted(taken)
    assert all(is_convex(graph, group) for group in found)
    assert nx.is_directed_acyclic_graph(quotient(graph, found))


@given(graphs())
def test_partitions_come_in_an_order_in_which_they_can_run(drawn: tuple[nx.DiGraph, set[int]]) -> None:
    graph, taken = drawn
    found = partitions(graph, taken)
    for later, group in enumerate(found):
        behind = {member for start in group for member in nx.descendants(graph, start)}
        assert not any(behind & earlier for earlier in found[:later])


@settings(max_examples=40, deadline=None)
@given(graphs(SMALL))
def test_no_partitioning_has_fewer(drawn: tuple[nx.DiGraph, set[int]]) -> None:
    graph, taken = drawn
    assert len(partitions(graph, taken)) == fewest(graph, taken)


def fewest(graph: nx.DiGraph, taken: AbstractSet[int]) -> int:
    """Try every way to put the members into groups; a way counts where the groups can run one after another."""
    members = sorted(taken)
    best = len(members)
    for labels in product(range(len(members)), repeat=len(members)):
        groups = [{m for m, label in zip(members, labels, strict=True) if label == each} for each in set(labels)]
        if len(groups) < best and nx.is_directed_acyclic_graph(quotient(graph, groups)):
            best = len(groups)
    return best


@given(graphs())
def test_convex_means_that_no_path_comes_back(drawn: tuple[nx.DiGraph, set[int]]) -> None:
    graph, members = drawn
    outside = set(graph) - members
    returns = any(
        nx.has_path(graph, a, out) and nx.has_path(graph, out, b) for a in members for b in members for out in outside
    )
    assert is_convex(graph, members) is not returns


def by_size(loss: float) -> Worth:
    return Worth(npu_seconds=0.0, cpu_seconds=0.0, crossing_seconds=loss, crossing_bytes=0)


def test_a_chain_is_cut_where_the_cpu_must_work() -> None:
    graph = nx.path_graph(5, create_using=nx.DiGraph)
    assert partitions(graph, {0, 1, 3, 4}) == [{0, 1}, {3, 4}]


def test_branches_beside_the_cpus_work_stay_together() -> None:
    """0 feeds 1 (CPU) and 2; both feed 3: 2 need not wait."""
    graph = nx.DiGraph([(0, 1), (0, 2), (1, 3), (2, 3)])
    assert partitions(graph, {0, 2, 3}) == [{0, 2}, {3}]


def test_an_island_that_does_not_pay_is_given_back() -> None:
    graph = nx.path_graph(6, create_using=nx.DiGraph)
    found, islands = without_islands(graph, {0, 1, 2, 4}, lambda members: by_size(1e-4 if members == {4} else 0.0))
    assert found == [{0, 1, 2}]
    assert set(islands) == {4}


def test_giving_back_joins_the_work_around_it() -> None:
    """Without 2 the CPU's stretch is one, and what was behind it is still one partition."""
    graph = nx.path_graph(7, create_using=nx.DiGraph)
    found, islands = without_islands(graph, {0, 1, 3, 5, 6}, lambda members: by_size(1e-4 if members == {3} else 0.0))
    assert found == [{0, 1}, {5, 6}]
    assert set(islands) == {3}


def test_the_largest_partition_is_no_island() -> None:
    graph = nx.path_graph(3, create_using=nx.DiGraph)
    found, islands = without_islands(graph, {0, 1, 2}, lambda _: by_size(1.0))
    assert (found, islands) == ([{0, 1, 2}], {})


def test_the_reason_names_the_numbers() -> None:
    value = Worth(npu_seconds=2e-6, cpu_seconds=5e-6, crossing_seconds=1e-4, crossing_bytes=2048)
    assert not value.pays
    assert value.reason == (
        "an island: 2,048 bytes cross for 100 µs, and its work takes 2 µs on the NPU, 5 µs on the CPU"
    )


@pytest.mark.parametrize(("option", "island"), [("", True), (":options.crossing_seconds=0", False)])
def test_a_small_operator_behind_the_cpus_is_an_island(option: str, island: bool) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[64,512] x) => (float[64,512] y) {
      [a] a = Relu(x) [b] b = Sigmoid(a) [c] c = Tanh(b)
      [cpu] d = Hardmax(c)
      [n] y = Relu(d)
    }"""
    found = {each.node: each for each in place(load_text(text), load_target("snapdragon-8gen3-npu" + option))}
    assert [found[name].device for name in ("a", "cpu", "n")] == ["npu", "cpu", "npu"]
    assert ("an island: " in found["n"].reason) is island
    assert "an island: " not in found["a"].reason
