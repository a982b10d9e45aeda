"""Peak activation memory: how long each tensor lives, and where an arena of one block would hold it.

Counted are the tensors that exist at run time (see `optkit.cost.fused`): the model's inputs and outputs and everything
in between, not the weights and not the scratch space of kernels. What is expanded from constants when the model is
loaded (half-precision or palettized weights, to floats) is there as long as the model is. A reshape takes no memory of
its own. The body of an If, Loop or Scan counts as one block as large as its own plan (the larger branch), alive while
that node runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.cost.fused import INTEGER_BITS, fused
from optkit.cost.shapes import value_bytes, with_shapes

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Lifetime:
    """A tensor and the steps over which it must stay: from the one that writes it to the last that reads it.

    Attributes:
        name: The tensor.
        size_bytes: Its bytes, a multiple of the alignment.
        first: Index of the first step at which it exists; -1 for inputs.
        last: Index of the last one, inclusive.
    """

    name: str
    size_bytes: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether both must exist at the same step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Where every tensor lies.

    Attributes:
        tensors: The tensors, in order of their first step.
        offsets: The offset of each, bytes.
        peak_bytes: The end of the highest one: the memory that the plan needs.
        bound_bytes: The largest sum of tensors alive at one step: no plan for this order of nodes needs less.
        unknown: Tensors left out because their size is not known; the figures are then too low.
    """

    tensors: tuple[Lifetime, ...]
    offsets: tuple[int, ...]
    peak_bytes: int
    bound_bytes: int
    unknown: tuple[str, ...] = ()


def plan_memory(
    model: ir.Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    sample: Mapping[str, np.ndarray] | None = None,
) -> Arena:
    """Return the arena of one run of the model, its nodes in the order in which they stand.

    Args:
        model: The model; not changed.
        shapes: Shapes of the inputs by name, where the model leaves them open.
        sample: Input values; see `optkit.cost.shapes.with_shapes`.

    Raises:
        InputError: A shape contradicts the model's.
    """
    return plan_static(with_shapes(model, shapes, sample))


def plan_static(model: ir.Model, bits: Collection[int] = INTEGER_BITS) -> Arena:
    """Return the arena of a model whose values already carry every shape that is known."""
    return _plan_graph(model.graph, bits)


def plan(tensors: Sequence[Lifetime]) -> tuple[int, ...]:
    """Return an offset for every tensor so that no two that live at the same step overlap.

    Largest first, each into the smallest gap that holds it ("greedy by size", Pisarchyk and Lee, arXiv:2001.03288,
    section 5.2, with best fit).
    """
    offsets = [0] * len(tensors)
    placed: list[int] = []
    for index in sorted(range(len(tensors)), key=lambda i: (-tensors[i].size_bytes, tensors[i].first, i)):
        tensor = tensors[index]
        end, best, gap = 0, None, 0
        for other in sorted((i for i in placed if tensors[i].overlaps(tensor)), key=offsets.__getitem__):
            free = offsets[other] - end
            if free >= tensor.size_bytes and (best is None or free < gap):
                best, gap = end, free
            end = max(end, offsets[other] + tensors[other].size_bytes)
        offsets[index] = end if best is None else best
        placed.append(index)
    return tuple(offsets)


def _plan_graph(graph: ir.Graph, bits: Collection[int]) -> Arena:
    tensors, unknown = _lifetimes(graph, bits)
    offsets = plan(tensors)
    peak = max((offset + tensor.size_bytes for offset, tensor in zip(offsets, tensors, strict=True)), default=0)
    return Arena(tuple(tensors), offsets, peak, _bound(tensors), tuple(unknown))


def _bound(tensors: Sequence[Lifetime]) -> int:
    """Sweep over the steps: what begins is added before what ended one step earlier is seen again."""
    changes = sorted(
        [(tensor.first, 1, tensor.size_bytes) for tensor in tensors]
        + [(tensor.last + 1, 0, -tensor.size_bytes) for tensor in tensors]
    )
    live = most = 0
    for _, _, change in changes:
        live += change
        most = max(most, live)
    return most


def _lifetimes(graph: ir.Graph, bits: Collection[int]) -> tuple[list[Lifetime], list[str]]:
    groups = fused(graph, bits)
    spans: dict[ir.Value, list[int]] = {value: [-1, -1] for value in graph.inputs if value.const_value is None}
    alias: dict[ir.Value, ir.Value] = {}  # a view's memory is its input's
    bodies: list[Lifetime] = []
    unknown: list[str] = []

    def read(value: ir.Value, step: int) -> ir.Value | None:
        """Extend the life of the memory behind ``value``; None where it is a constant or lies outside this graph."""
        memory = alias.get(value, value)
        if memory not in spans:
            return None
        spans[memory][1] = max(spans[memory][1], step)
        return memory

    for step, node in enumerate(graph):
        if node in groups.loaded:
            read_later = [value for value in node.outputs if any(n not in groups.loaded for n in value.consumers())]
            spans.update({value: [-1, len(graph)] for value in read_later})
            continue
        if node in groups.lead:
            continue  # runs inside another node, which reads and writes in its place
        source = None
        for index, value in enumerate(node.inputs):
            memory = read(groups.read(node, value), step) if value is not None else None
            source = memory if index == 0 else source
        for value in filter(None, _captured(node)):
            read(groups.stored(value), step)
        arenas = [_plan_graph(body, bits) for body in _bodies(node)]
        if arenas:
            bodies.append(Lifetime(f"{node.name} (body)", max(arena.peak_bytes for arena in arenas), step, step))
            unknown += [name for arena in arenas for name in arena.unknown]
        for value in map(groups.stored, node.outputs):
            if source is not None and node.op_type in VIEWS and value is groups.stored(node.outputs[0]):
                alias[value] = source
            elif value.name:
                spans[value] = [step, step]
    for value in graph.outputs:
        read(groups.stored(value), len(graph))
    tensors = [body for body in bodies if body.size_bytes]
    for value, (first, last) in spans.items():
        size = value_bytes(value)
        if size is None:
            unknown.append(value.name or "")
        elif size:
            tensors.append(Lifetime(value.name or "", -(-size // ALIGNMENT) * ALIGNMENT, first, last))
    return sorted(tensors, key=lambda tensor: (tensor.first, tensor.last, tensor.name)), unknown


def _bodies(node: ir.Node) -> list[ir.Graph]:
    return [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]


def _captured(node: ir.Node) -> Iterator[ir.Value | None]:
    """Yield every value that the node's bodies use; those from outside are among them."""
    for body in _bodies(node):
        yield from body.outputs
        for inner in body.all_nodes():
            yield from inner.inputs
