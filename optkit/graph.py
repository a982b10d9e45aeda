"""Reading and editing a graph: what is constant, what an operator's setting is, and replacing one value by another.

ONNX moved settings (axes, pads, ratio, ...) from attributes to inputs over the years, bodies of If, Loop and Scan see
the values around them, and an initializer that is also a graph input is only a default. These functions know that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

# An end, a size or a clip bound at least this large means "no limit" in every exporter (INT32_MAX).
NO_LIMIT = 2**31 - 1


def is_constant(value: ir.Value | None) -> bool:
    """Return whether the value is an initializer that no caller can override."""
    return value is not None and value.is_initializer() and not value.is_graph_input() and value.const_value is not None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant value, or None where it is computed, fed or absent."""
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    return value.const_value.numpy()


def static_shape(value: ir.Value | None) -> list[int] | None:
    """Return the value's shape where every dimension is known, else None."""
    if value is None or value.shape is None:
        return None
    dims = [dim for dim in value.shape if isinstance(dim, int)]
    return dims if len(dims) == len(value.shape) else None


def opset(model: ir.Model) -> int:
    """Return the version of the default operator set."""
    return model.opset_imports.get("", 1)


def argument(node: ir.Node, index: int) -> ir.Value | None:
    """Return the input at ``index``, or None where it is omitted."""
    return node.inputs[index] if index < len(node.inputs) else None


def ints(node: ir.Node, name: str, index: int, default: Sequence[int] | None = None) -> list[int] | None:
    """Return a setting that old opsets give as attribute ``name`` and new ones as input ``index``.

    Args:
        node: The node.
        name: The attribute.
        index: The input.
        default: What an absent setting means.

    Returns:
        The integers; None where they are computed at run time, or absent without a default.
    """
    if name in node.attributes:
        attribute = node.attributes[name]
        if attribute.is_ref():
            return None
        return [attribute.as_int()] if attribute.type == ir.AttributeType.INT else list(attribute.as_ints())
    value = argument(node, index)
    if value is None:
        return list(default) if default is not None else None
    array = constant(value)
    return None if array is None else [int(item) for item in array.ravel()]


def names(model: ir.Model) -> set[str]:
    """Return the names of all nodes and values, bodies included."""
    taken: set[str] = set()
    for graph in model.graphs():
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        taken.update(value.name for value in values if value.name)
        taken.update(node.name for node in graph if node.name)
    return taken


def unique(name: str, taken: set[str]) -> str:
    """Return ``name``, or ``name_1``, ``name_2``, ... where it is taken, and mark it as taken."""
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def add_constant(graph: ir.Graph, name: str, array: np.ndarray, taken: set[str]) -> ir.Value:
    """Add an initializer to the graph under ``name`` or, where that is taken, one derived from it."""
    tensor = ir.tensor(array, name=unique(name, taken))
    value = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def cannot_forward(old: ir.Value, new: ir.Value) -> str:
    """Return why ``new`` cannot stand in for ``old``: a graph output must keep its name; empty when it can."""
    if not old.is_graph_output() or new is old:
        return ""
    if new.is_graph_input():
        return f"graph output '{old.name}' would be graph input '{new.name}' itself"
    if new.is_initializer():
        return f"graph output '{old.name}' would be initializer '{new.name}' itself"
    if new.is_graph_output():
        return f"graph outputs '{old.name}' and '{new.name}' would be one value"
    if new.graph is not old.graph:
        return f"body output '{old.name}' would be a value of the graph around it"
    return ""


def forward(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` stand in for ``old`` everywhere; as a graph output it takes the old name.

    Raises:
        ValueError: ``cannot_forward`` has an objection.
    """
    objection = cannot_forward(old, new)
    if objection:
        raise ValueError(objection)
    if not new.is_graph_input():
        new.type = new.type or old.type
        new.shape = _merged(new.shape, old.shape)
    if old.is_graph_output():
        name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
    else:
        old.replace_all_uses_with(new)


def _merged(shape: ir.Shape | None, other: ir.Shape | None) -> ir.Shape | None:
    """Return the shape with dimensions that only the other one knows; where ranks differ it is returned as it is."""
    if shape is None or other is None:
        return shape or other
    if len(shape) != len(other):
        return shape
    return ir.Shape(
        [b if isinstance(b, int) and not isinstance(a, int) else a for a, b in zip(shape, other, strict=True)]
    )


def is_unused(value: ir.Value) -> bool:
    """Return whether no node, no body and no graph output uses the value."""
    return not value.uses() and not value.is_graph_output()


def remove(nodes: ir.Node | Iterable[ir.Node]) -> None:
    """Remove nodes whose results are not used, and every node and initializer before them that this leaves unused."""
    for node in [nodes] if isinstance(nodes, ir.Node) else list(nodes):
        if node.graph is None or not all(is_unused(output) for output in node.outputs):
            continue
        inner = [each for body in bodies(node) for each in body.all_nodes()]
        inputs = dict.fromkeys(value for each in [node, *inner] for value in each.inputs)
        for each in inner:
            for index in range(len(each.inputs)):
                each.replace_input_with(index, None)
        node.graph.remove(node, safe=True)
        prune(inputs)


def prune(values: Iterable[ir.Value | None]) -> None:
    """Remove the values that nothing uses: their initializers, or the nodes that compute them."""
    for value in values:
        if value is None or not is_unused(value):
            continue
        producer = value.producer()
        if producer is not None:
            remove(producer)
        elif is_constant(value) and value.graph is not None and value.name is not None:
            value.graph.initializers.pop(value.name)


def bodies(node: ir.Node) -> list[ir.Graph]:
    """Return the bodies of a control-flow node, in the order of its attributes."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            found.extend(attribute.as_graphs())
    return found
