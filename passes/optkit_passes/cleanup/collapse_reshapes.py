"""Merge chains of Reshape, Flatten, Squeeze and Unsqueeze into one Reshape."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import (
    add_constant,
    argument,
    cannot_forward,
    constant,
    forward,
    ints,
    names,
    prune,
    remove,
    static_shape,
)

VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class Dim:
    """A size: ``factor`` times the free dimensions of the source tensor on ``axes`` (a multiset)."""

    factor: int = 1
    axes: Counter[int] = field(default_factory=Counter)

    def __mul__(self, other: Dim) -> Dim:
        return Dim(self.factor * other.factor, self.axes + other.axes)

    def divided_by(self, other: Dim) -> Dim | None:
        """Return the quotient where it is exact for any size of the free dimensions."""
        if other.factor == 0 or self.factor % other.factor or other.axes - self.axes:
            return None
        return Dim(self.factor // other.factor, self.axes - other.axes)


class CollapseReshapes(Pass):
    """``Reshape(Unsqueeze(Flatten(x)))`` becomes ``Reshape(x)``, or ``x`` where the shape is its own.

    Free dimensions are followed through the chain: the result copies those that stay in their place (0) and leaves at
    most one to be inferred (-1).
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Try the longest chain that ends at each node, last node first."""
        taken = names(model)
        for graph in list(model.graphs()):
            for node in reversed(list(graph)):
                if node.graph is graph and _is_view(node):
                    _collapse(node, taken, context)


def _is_view(node: ir.Node | None) -> bool:
    return node is not None and node.domain == "" and node.op_type in VIEWS and node.graph is not None


def _collapse(node: ir.Node, taken: set[str], context: Context) -> None:
    chain = [node]  # from the last node back to the first
    while (source := chain[-1].inputs[0]) is not None and (before := source.producer()) is not None:
        if not _is_view(before) or before.graph is not node.graph:
            break
        chain.append(before)
    refusal = ""
    for length in range(len(chain), 1, -1):
        refusal = _merge(chain[:length], taken, context)
        if not refusal:
            return
    if refusal:
        context.missed(node, refusal)


def _merge(chain: list[ir.Node], taken: set[str], context: Context) -> str:
    """Merge a chain, last node first, into its last node; return why that cannot be done."""
    node, source = chain[0], chain[-1].inputs[0]
    if source is None or node.graph is None:
        return "its first input is missing"
    dims = _source_dims(source)
    own = dims
    for link in reversed(chain):
        static = static_shape(link.outputs[0])
        dims = _apply(link, dims) if static is None else [Dim(dim) for dim in static]
    if dims is not None and dims == own and not cannot_forward(node.outputs[0], source):
        context.applied(node, f"the views from '{source.name}' to it restore its shape")
        forward(node.outputs[0], source)
        remove(node)
        return ""
    shared = [link for link in chain[1:] if len(link.outputs[0].uses()) > 1 or link.outputs[0].is_graph_output()]
    if shared:
        return f"the result of '{shared[0].name}' is used elsewhere too"
    copies_nothing = node.op_type == "Reshape" and _shape(node) is not None and not _copied(node)
    if not copies_nothing:
        if dims is None:
            return "the shape of the chain is only known at run time"
        target = _target(dims)
        if target is None:
            return "its free dimensions cannot be written as one shape"
        shape = add_constant(node.graph, f"{node.name}/shape", np.array(target, np.int64), taken)
        setting = argument(node, 1)
        node.op_type = "Reshape"
        node.attributes.clear()
        node.resize_inputs(2)
        node.replace_input_with(1, shape)
        prune([setting])
    context.applied(node, f"one view of '{source.name}' in place of {len(chain)}")
    node.replace_input_with(0, source)
    remove(chain[1])
    return ""


def _source_dims(source: ir.Value) -> list[Dim] | None:
    if source.shape is None:
        return None
    return [Dim(dim) if isinstance(dim, int) else Dim(1, Counter([i])) for i, dim in enumerate(source.shape)]


def _shape(node: ir.Node) -> list[int] | None:
    shape = constant(argument(node, 1))
    return None if shape is None else [int(dim) for dim in shape.ravel()]


def _copied(node: ir.Node) -> list[int]:
    """Return the places where a Reshape copies a dimension of its input."""
    if node.attributes.get_int("allowzero", 0):
        return []
    return [place for place, dim in enumerate(_shape(node) or []) if dim == 0]


def _apply(node: ir.Node, dims: list[Dim] | None) -> list[Dim] | None:
    """Return the dimensions of a view's result from those of its input; None where they depend on data."""
    if dims is None:
        return None
    rank = len(dims)
    if node.op_type == "Reshape":
        return _apply_reshape(node, dims)
    if node.op_type == "Flatten":
        axis = node.attributes.get_int("axis", 1) or 0
        axis += rank if axis < 0 else 0
        return [math.prod(dims[:axis], start=Dim()), math.prod(dims[axis:], start=Dim())]
    axes = ints(node, "axes", 1)
    given = "axes" in node.attributes or argument(node, 1) is not None
    if axes is None and (given or node.op_type == "Unsqueeze" or any(dim.axes for dim in dims)):
        return None  # a free dimension may be 1 and squeezed
    if node.op_type == "Squeeze":
        gone = {axis % rank for axis in axes} if axes is not None else {i for i in range(rank) if dims[i] == Dim()}
        return [dim for place, dim in enumerate(dims) if place not in gone]
    total = rank + len(axes or ())
    new, left = {axis % total for axis in axes or ()}, iter(dims)
    return [Dim() if place in new else next(left) for place in range(total)]


def _apply_reshape(node: ir.Node, dims: list[Dim]) -> list[Dim] | None:
    shape = _shape(node)
    if shape is None:
        return None
    copied = set(_copied(node))
    result = [dims[place] if place in copied else Dim(max(dim, 0)) for place, dim in enumerate(shape)]
    if -1 in shape:
        place = shape.index(-1)
        rest = math.prod((dim for i, dim in enumerate(result) if i != place), start=Dim())
        inferred = math.prod(dims, start=Dim()).divided_by(rest)
        if inferred is None:
            return None
        result[place] = inferred
    return result


def _target(dims: list[Dim]) -> list[int] | None:
    """Return the shape input that makes ``dims`` of the source: 0 copies, -1 infers; None where they do not suffice."""
    target = []
    for place, dim in enumerate(dims):
        if dim.axes:
            target.append(0 if dim == Dim(1, Counter([place])) else -1)
        elif dim.factor == 0:
            return None
        else:
            target.append(dim.factor)
    return None if target.count(-1) > 1 or (-1 in target and 0 in target) else target
