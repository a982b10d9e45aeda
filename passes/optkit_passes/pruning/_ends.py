"""Which layers stand first and last in a model."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from optkit.quant.walk import reads


def first_layers(graph: ir.Graph, layers: Iterable[ir.Node]) -> set[ir.Node]:
    """Return those of the layers, lookups among them, that read nothing another one computed."""
    wanted, behind, found = set(layers), set[ir.Value](), set[ir.Node]()
    for node in graph:
        depends = any(value in behind for value in reads(node))
        if node in wanted and not depends:
            found.add(node)
        if node in wanted or depends:
            behind.update(node.outputs)
    return found


def last_layers(graph: ir.Graph, layers: Iterable[ir.Node]) -> set[ir.Node]:
    """Return those of the layers whose results no other one reads, however indirectly."""
    wanted, before, found = set(layers), set[ir.Value](), set[ir.Node]()
    for node in reversed(graph):
        read_later = any(value in before for value in node.outputs)
        if node in wanted and not read_later:
            found.add(node)
        if node in wanted or read_later:
            before.update(reads(node))
    return found
