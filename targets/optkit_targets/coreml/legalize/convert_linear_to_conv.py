"""Write linear layers as 1x1 convolutions, and carry their layout through what lies between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import onnx_ir as ir

from optkit import Context, Effect, Pass
from optkit.graph import cannot_forward, forward, names, opset, remove
from optkit.model.loading import infer_shapes
from optkit_targets.coreml.legalize.carrying import (
    Constants,
    carry,
    enter,
    leave,
    perm_of,
    transpose_of,
    transposes_to_enter,
    transposes_to_leave,
)
from optkit_targets.coreml.legalize.channels_first import can_carry, carried_shape, data_inputs
from optkit_targets.coreml.legalize.linear_layers import RANKS, Linear, conv_weight, linear_layer
from optkit_targets.coreml.legalize.writing import Writer
from optkit_targets.rewriting import RefusedError

Layers = Mapping[ir.Node, Linear]


class ConvertLinearToConv(Pass):
    """Linear layers on tokens, ``[B, S, C]``, become 1x1 ``Conv`` on ``[B, C, 1, S]``, as do all operators between.

    ::

        MatMul [B, S, C] x [C, N] ─▶ Add ─▶ Relu ─▶ MatMul          Conv 1x1 ─▶ Relu ─▶ Conv 1x1   [B, C, 1, S]

    The engine keeps channels apart and the last axis contiguous in memory: "Deploying Transformers on the Apple Neural
    Engine" (machinelearning.apple.com, 2022; apple/ml-ane-transformers), principles 1 and 3. From the linear layers on,
    every operator that can work in that layout does: element by element, along an axis, normalizations over channels,
    written out, and the views that part channels into heads, ``[B, S, H, D]`` as ``[B, H, D, S]``. Transposes on the
    rim are merged with those that already stand there, so that a key needs none. A region stays as it is where it would
    take more transposes than it has layers, those that it saves deducted.

    Weights that are stored as integers or palettes stay so.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-4)  # products and normalizations are summed in another order

    def run(self, model: ir.Model, context: Context) -> None:
        """Convert region by region, bodies included."""
        taken, version, changed = names(model), opset(model), False
        for graph in list(model.graphs()):
            layers = _layers(graph, context)
            apart, constants = dict(layers), Constants()
            for region in _regions(graph, layers, version):
                inside = [apart.pop(node) for node in region if node in layers]
                extra = _transposes(region)
                if extra > len(inside):
                    for layer in inside:
                        context.missed(layer.node, f"{extra} transposes more for {len(inside)} layers to convert")
                    continue
                _convert(region, layers, constants, taken, version)
                changed = True
                for layer in inside:
                    size = "x".join(map(str, carried_shape(layer_shape(layer))))
                    context.applied(layer.node, f"is a 1x1 convolution on {size}, {len(region)} nodes in its layout")
            for node in apart:
                context.missed(node, "it reads rows, and no layer on batch, tokens and channels is beside it")
        if changed:
            infer_shapes(model)


def layer_shape(layer: Linear) -> list[int]:
    """Return the shape of a layer's result."""
    return [dim for dim in layer.last.outputs[0].shape or () if isinstance(dim, int)]


def _layers(graph: ir.Graph, context: Context) -> dict[ir.Node, Linear]:
    """Return the linear layers of a graph that can be convolutions."""
    found = {}
    for node in graph:
        try:
            layer = linear_layer(node)
        except RefusedError as reason:
            context.missed(node, str(reason))
            continue
        if layer is not None:
            found[node] = layer
    return found


def _regions(graph: ir.Graph, layers: Layers, version: int) -> Iterator[list[ir.Node]]:
    """Yield what can be carried around the layers on tokens, each region in the graph's order."""
    order = {node: place for place, node in enumerate(graph)}
    fits = {node: node in layers or can_carry(node, version) for node in graph}
    seen: set[ir.Node] = set()
    for seed in layers:
        if seed in seen or len(seed.inputs[0].shape or ()) != RANKS[-1]:  # type: ignore[union-attr]
            continue
        found, pending = {seed}, [seed]
        while pending:
            node = pending.pop()
            near = [use.node for value in node.outputs for use in value.uses() if _reads(use.node, value)]
            for value in (value for index in _data(node) if (value := node.inputs[index]) is not None):
                near += [use.node for use in value.uses() if _reads(use.node, value)]  # one transpose serves them all
                near += [producer for producer in [value.producer()] if producer is not None]
            for other in near:
                if other not in found and fits.get(other):
                    found.add(other)
                    pending.append(other)
        seen |= found
        yield sorted(found, key=order.__getitem__)


def _data(node: ir.Node) -> list[int]:
    return [0] if node.op_type in ("Gemm", "MatMul") else data_inputs(node)


def _reads(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node reads a value as data, not as its bias or shape."""
    return any(node.inputs[index] is value for index in _data(node))


def _entering(region: list[ir.Node]) -> list[ir.Value]:
    inside = set(region)
    values = dict.fromkeys(node.inputs[index] for node in region for index in _data(node))
    return [value for value in values if value is not None and value.producer() not in inside]


def _leaving(region: list[ir.Node]) -> dict[ir.Value, list[tuple[ir.Node, int]]]:
    """Return the values of a region that something outside reads, and what reads them there."""
    inside, found = set(region), {}
    for value in (value for node in region for value in node.outputs):
        uses = [(node, index) for node, index in value.uses() if node not in inside]
        if uses or value.is_graph_output():
            found[value] = uses
    return found


def _follows(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node is a transpose of the same graph, into which one before it can be merged."""
    return transpose_of(node.outputs[0]) is node and node.graph is value.graph


def _transposes(region: list[ir.Node]) -> int:
    """Return how many transposes more there would be."""
    inside, extra = set(region), 0
    for value in _entering(region):
        before = transpose_of(value)
        gone = not value.is_graph_output() and all(node in inside for node, _ in value.uses())
        extra += transposes_to_enter(value) - (before is not None and gone)
    for value, uses in _leaving(region).items():
        shape, rest = _ints(value), value.is_graph_output()
        for node in dict.fromkeys(node for node, _ in uses):
            follows = _follows(node, value)
            extra += (transposes_to_leave(shape, perm_of(node)) - 1) if follows else 0
            rest |= not follows
        extra += rest and transposes_to_leave(shape)
    return extra


def _convert(region: list[ir.Node], layers: Layers, constants: Constants, taken: set[str], version: int) -> None:
    """Write a region in the layout, and take the old nodes away."""
    leaving, carried = _leaving(region), dict[ir.Value, ir.Value]()
    named: dict[ir.Node, str | None] = {}
    weights: dict[tuple[ir.Value, bool], ir.Value] = {}
    entering = set(_entering(region))
    for node in region:
        writer = Writer(node, taken, version)
        for index in _data(node):
            value = node.inputs[index]
            if value in entering and value not in carried:
                carried[value] = enter(value, writer)
        if node.outputs[0] in carried:  # the Add of a bias
            continue
        layer = layers.get(node)
        last = node if layer is None else layer.last
        results = (
            carry(node, carried, constants, writer)
            if layer is None
            else [_convolution(layer, carried, weights, writer)]
        )
        carried.update(zip(last.outputs, results, strict=True))
        producer = results[0].producer()
        if producer is not None:
            named.setdefault(producer, node.name)
    for value, uses in leaving.items():
        _restore(value, carried[value], uses, taken, version)
    remove(reversed(region))
    for producer, name in named.items():
        producer.name = name


def _convolution(
    layer: Linear,
    carried: Mapping[ir.Value, ir.Value],
    weights: dict[tuple[ir.Value, bool], ir.Value],
    writer: Writer,
) -> ir.Value:
    """Write a layer as a convolution; layers that share a weight go on doing so."""
    x = layer.node.inputs[0]
    assert x is not None
    key = layer.stored, layer.rows
    if key not in weights:
        weights[key] = conv_weight(layer, writer)
    bias = [] if layer.bias is None else [writer.constant("bias", layer.bias)]
    shape = carried_shape(layer_shape(layer))
    return writer.add("Conv", carried[x], weights[key], *bias, shape=shape, kernel_shape=[1, 1])


def _restore(value: ir.Value, new: ir.Value, uses: list[tuple[ir.Node, int]], taken: set[str], version: int) -> None:
    """Give what lies outside a region a value as it was; transposes that follow take what is left of them."""
    rest = [use for use in uses if not _follows(use[0], value)]
    shape, producer = _ints(value), value.producer()
    assert producer is not None
    for node in dict.fromkeys(node for node, _ in uses if _follows(node, value)):
        writer = Writer(node, taken, version)
        _forward(node.outputs[0], leave(new, shape, writer, perm_of(node)), writer)
        remove(node)
    if not rest and not value.is_graph_output():
        return
    writer = Writer(producer, taken, version)  # the new nodes stand in front of the old ones
    back = leave(new, shape, writer)
    for node, index in rest:
        node.replace_input_with(index, back)
    if value.is_graph_output():
        _forward(value, back, writer)


def _forward(old: ir.Value, new: ir.Value, writer: Writer) -> None:
    """Let a new value stand in for an old one, through an Identity where it cannot take its name as an output."""
    forward(old, writer.add("Identity", new, shape=_ints(old)) if cannot_forward(old, new) else new)


def _ints(value: ir.Value) -> list[int]:
    return [dim for dim in value.shape or () if isinstance(dim, int)]
