"""Move transposes through the operators between them, where that leaves fewer bytes to transpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import onnx_ir as ir

from optkit import Context, Effect, Pass
from optkit.graph import cannot_forward, constant, forward, names, opset, prune, remove, unique
from optkit_targets.qnn.legalize.layouts import bytes_of, can_change, change, data_inputs, inverse
from optkit_targets.rewriting import Writer


class SinkTransposes(Pass):
    """Let the operators between transposes work in the layout on the other side, so that the transposes cancel.

    Behind ``y = Transpose(x)`` lies a region of operators that could as well work on x: element by element, along an
    axis, reductions, Concat, Split, Pad and Slice. Each transpose into it vanishes, as does each one out of it that
    undoes the first; every other value that enters or leaves needs a transpose. The region changes its layout where
    fewer bytes are transposed afterwards, else it is tried with less: what lies downwards, then single nodes. Constants
    are transposed here. HTP moves every byte of a Transpose through its memory, and merges only adjacent ones.
    """

    # It moves no arithmetic, but kernels of onnxruntime round the last elements of a row differently from the others.
    effect: ClassVar[Effect] = Effect.reassociate(1e-5)

    def run(self, model: ir.Model, context: Context) -> None:
        """Change regions until none is worth it; each leaves fewer bytes, so there is an end."""
        taken, version = names(model), opset(model)
        for graph in model.graphs():
            reasons: dict[ir.Node, str] = {}
            while _improve(graph, version, taken, context, reasons):
                pass
            for node, reason in reasons.items():
                if node.graph is graph:
                    context.missed(node, reason)


def _improve(graph: ir.Graph, version: int, taken: set[str], context: Context, reasons: dict[ir.Node, str]) -> bool:
    """Change one region; return whether there was one."""
    reasons.clear()
    for node in graph:
        perm = _perm(node)
        if perm is None:
            if (node.domain, node.op_type) == ("", "Transpose"):
                reasons[node] = "its shape is not fixed, so that its bytes cannot be weighed"
            continue
        if perm == sorted(perm):
            reasons[node] = "it moves no axis: eliminate-no-ops removes it"
            continue
        cheapest: tuple[int, int] | None = None
        for region in _regions(node, perm, version):
            before, after = _bytes_moved(region, perm)
            if after < before:
                _apply(region, perm, taken)
                nodes = (
                    f"{region[0].op_type} behind it works"
                    if len(region) == 1
                    else f"{len(region)} nodes behind it work"
                )
                what = f"{nodes} in its input's layout"
                context.applied(node, f"{what}: {after} bytes to transpose in place of {before}")
                return True
            if cheapest is None or after - before < cheapest[1] - cheapest[0]:
                cheapest = before, after
        if cheapest is not None:
            reasons[node] = f"moving it on would transpose {cheapest[1]} bytes in place of {cheapest[0]}"
    return False


def _perm(node: ir.Node | None) -> list[int] | None:
    if node is None or (node.domain, node.op_type) != ("", "Transpose"):
        return None
    x = node.inputs[0]
    if x is None or x.shape is None or bytes_of(node.outputs[0]) is None:
        return None
    return list(node.attributes.get_ints("perm") or range(len(x.shape))[::-1])


def _regions(node: ir.Node, perm: list[int], version: int) -> Iterator[list[ir.Node]]:
    """Yield regions behind a transpose, the largest first."""

    def fits(other: ir.Node | None) -> bool:
        return other is not None and other.graph is node.graph and can_change(other, len(perm), version)

    readers = [user for user in dict.fromkeys(use.node for use in node.outputs[0].uses()) if fits(user)]
    if not readers:
        return
    yield _grow(readers, fits, upwards=True)
    yield _grow(readers, fits, upwards=False)
    for reader in readers:
        yield [reader]


def _grow(seeds: list[ir.Node], fits: Callable[[ir.Node | None], bool], *, upwards: bool) -> list[ir.Node]:
    """Return the nodes that are reached from the seeds through operators that fit."""
    found = dict.fromkeys(seeds)
    pending = list(seeds)
    while pending:
        node = pending.pop()
        near = [use.node for value in node.outputs for use in value.uses()]
        if upwards:
            inputs = [node.inputs[index] for index in data_inputs(node)]
            near += [producer for value in inputs if value is not None and (producer := value.producer()) is not None]
        for other in near:
            if other not in found and fits(other):
                found[other] = None
                pending.append(other)
    return list(found)


def _entering(region: list[ir.Node]) -> list[ir.Value]:
    """Return the values that come into a region in its layout, constants and scalars left out."""
    inside = set(region)
    values = [node.inputs[index] for node in region for index in data_inputs(node)]
    return [
        value
        for value in dict.fromkeys(values)
        if value is not None and value.producer() not in inside and constant(value) is None and len(value.shape or ())
    ]


def _leaving(region: list[ir.Node]) -> list[ir.Value]:
    """Return the values of a region that something outside reads."""
    inside = set(region)
    values = [value for node in region for value in node.outputs]
    return [v for v in values if v.is_graph_output() or any(use.node not in inside for use in v.uses())]


def _bytes_moved(region: list[ir.Node], perm: list[int]) -> tuple[int, int]:
    """Return the bytes transposed into and out of a region, before and after its layout changes."""
    inside, back = set(region), inverse(perm)
    before = after = 0
    for value in _entering(region):
        producer, count = value.producer(), bytes_of(value) or 0
        first = _perm(producer)
        gone = all(use.node in inside for use in value.uses()) and not value.is_graph_output()
        before += count if first is not None and gone else 0
        after += 0 if first == perm else count
    for value in _leaving(region):
        count, left = bytes_of(value) or 0, value.is_graph_output()
        taken = left  # one value has one name: it stands for one output of the graph at most
        for user in dict.fromkeys(use.node for use in value.uses() if use.node not in inside):
            second = _perm(user)
            left |= second is None
            before += count if second is not None else 0
            kept = second is not None and (second != back or (taken and user.outputs[0].is_graph_output()))
            after += count if kept else 0
            taken |= second == back and user.outputs[0].is_graph_output()
        after += count if left else 0
    return before, after


def _apply(region: list[ir.Node], perm: list[int], taken: set[str]) -> None:
    """Change the layout of a region, with transposes where it needs them."""
    inside, back = set(region), inverse(perm)
    leaving = [
        (value, value.is_graph_output(), [(node, index) for node, index in value.uses() if node not in inside])
        for value in _leaving(region)
    ]
    for value in _entering(region):
        producer, first = value.producer(), _perm(value.producer())
        source, steps = value, back
        if producer is not None and first is not None and producer.inputs[0] is not None:
            source, steps = producer.inputs[0], [first[axis] for axis in back]
        if steps != sorted(steps):
            source = _transpose(region[0].graph, source, steps, taken)
        for node, index in [use for use in value.uses() if use.node in inside]:
            node.replace_input_with(index, source)
        prune([value])
    for node in region:
        old = list(node.inputs)
        change(node, perm, Writer(node, taken, 0))
        prune(old)
    for value, is_output, uses in leaving:
        _restore(value, uses, perm, taken, is_output=is_output)


def _restore(
    value: ir.Value, uses: list[tuple[ir.Node, int]], perm: list[int], taken: set[str], *, is_output: bool
) -> None:
    """Give what lies outside a region the old layout of a value of it; transposes are merged, or cancel."""
    graph = value.graph
    rest = [(node, index) for node, index in uses if _perm(node) is None]
    if rest or is_output:
        transposed = _transpose(graph, value, perm, taken)
        for node, index in rest:
            node.replace_input_with(index, transposed)
        if is_output and graph is not None:
            graph.outputs[list(graph.outputs).index(value)] = transposed
            transposed.name, value.name = value.name, transposed.name
    for node in dict.fromkeys(node for node, index in uses if (node, index) not in rest):
        steps = [perm[axis] for axis in _perm(node) or ()]
        if steps == sorted(steps) and not cannot_forward(node.outputs[0], value):
            forward(node.outputs[0], value)
            remove(node)
        else:
            node.attributes.add(ir.AttrInt64s("perm", steps))


def _transpose(graph: ir.Graph | ir.Function | None, source: ir.Value, perm: list[int], taken: set[str]) -> ir.Value:
    """Add a transpose right behind a value and return its result."""
    assert graph is not None
    name, producer = f"{source.name}/Transpose", source.producer()
    node = ir.node("Transpose", [source], {"perm": perm}, name=unique(name, taken))
    result = node.outputs[0]
    result.name, result.type = unique(name, taken), source.type
    result.shape = None if source.shape is None else ir.Shape([source.shape[axis] for axis in perm])
    if producer is not None and producer.graph is graph:
        node.metadata_props.update(producer.metadata_props)
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph[0], node)
    return result
