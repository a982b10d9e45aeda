"""What a runtime runs as one: integer operators between Dequantize and Quantize, activations after a product.

The rules are those that CPU runtimes share (onnxruntime's QDQ selectors, XNNPACK and TFLite likewise):

* A node whose floating inputs are all dequantized from 8 bits, and whose outputs are each quantized and used nowhere
  else, runs in integers; the quantize and dequantize nodes around it cost nothing and their float tensors never exist.
  MatMul and Gemm also run in integers when their output stays float. CPUs have no integer kernels of other widths:
  4-bit weights and 16-bit activations are computed in float. Where there are such kernels, ``bits`` says so.
* An activation that is the only use of a convolution's or matrix product's output runs inside it.
* A dequantize node on a constant costs nothing: the weights stay as they are stored.
* Anything else that only constants go into (a Cast, a lookup in a palette) is computed once, when the model is loaded:
  it costs no time in a run, and its result is what lies in memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_ir as ir

from optkit.cost.arithmetic import COMPUTE, is_known

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "PRelu", "Elu"})
INTEGER_BITS = frozenset({8, 32})  # of operands on CPUs; biases have 32
FLOAT_OUTPUT = frozenset({"MatMul", "Gemm"})
# Operators whose inputs after the first are limits, sizes or fill values: never quantized.
PARAMETERS = frozenset({"Clip", "Pad", "Resize", "Upsample"})
NEVER = frozenset({QUANTIZE, DEQUANTIZE, "DynamicQuantizeLinear", "Cast", "Loop", "Scan", "If", "Constant"})
# Never computed when the model is loaded: integers stay integers, and what is random is so in every run.
KEPT = NEVER - {"Cast"} | {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"}


@dataclass
class Fused:
    """How one graph's nodes group together.

    Attributes:
        lead: For each node that costs nothing, the node it runs inside.
        source: For each value that never exists as such, the value that is read or written in its place.
        integer: Nodes that run in integers.
        expanded: For each value that is computed when the model is loaded, the constants that it is made of.
        loaded: The nodes that compute these.
    """

    lead: dict[ir.Node, ir.Node] = field(default_factory=dict)
    source: dict[ir.Value, ir.Value] = field(default_factory=dict)
    integer: set[ir.Node] = field(default_factory=set)
    expanded: dict[ir.Value, tuple[ir.Value, ...]] = field(default_factory=dict)
    loaded: set[ir.Node] = field(default_factory=set)

    def stored(self, value: ir.Value) -> ir.Value:
        """Return the value that lies in memory where the graph has ``value``."""
        while value in self.source:
            value = self.source[value]
        return value

    def read(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return the value that ``node`` reads where the graph feeds it ``value``."""
        producer = value.producer()
        if node in self.integer and producer is not None and producer.op_type == DEQUANTIZE and producer.inputs[0]:
            return self.stored(producer.inputs[0])
        return self.stored(value)


def fused(graph: ir.Graph, bits: Collection[int] = INTEGER_BITS) -> Fused:
    """Group the nodes of one graph, bodies not included.

    Args:
        graph: The graph.
        bits: Widths of the operands, biases included, that integer operators take.
    """
    result = Fused()
    for node in graph:
        sources = _constant_sources(node, result)
        if sources and all(_users(value, graph) for value in node.outputs):
            result.loaded.add(node)
            result.expanded.update(dict.fromkeys(node.outputs, sources))
    for node in graph:
        if node.op_type in NEVER or node in result.loaded:
            continue
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type in ACTIVATIONS and producer is not None and _runs_inside(node, producer, graph):
            result.lead[node] = producer
            result.source[producer.outputs[0]] = node.outputs[0]
    for node in graph:
        if node.op_type not in NEVER and node not in result.lead and _is_integer(node, result, graph, bits):
            result.integer.add(node)
            for value in node.outputs:
                last = result.stored(value)
                if _only_quantized(last, graph):
                    (quantize,) = last.consumers()
                    result.lead[quantize] = node
                    result.source[last] = quantize.outputs[0]
    for node in graph:
        if node.op_type != DEQUANTIZE or node.inputs[0] is None:
            continue
        users = _users(node.outputs[0], graph)
        constant = node.inputs[0].const_value is not None
        if users and (constant or all(user in result.integer for user in users)):
            result.lead[node] = users[0]
            result.source[node.outputs[0]] = node.inputs[0]
    return result


def _constant_sources(node: ir.Node, result: Fused) -> tuple[ir.Value, ...]:
    """Return the constants that a node's result is made of; none where it reads anything else, or stays as it is."""
    if node.op_type in KEPT or not is_known(node):
        return ()
    sources: dict[ir.Value, None] = {}
    for value in (value for value in node.inputs if value is not None):
        if value.const_value is not None and not value.is_graph_input():
            sources[value] = None
        elif value in result.expanded:
            sources.update(dict.fromkeys(result.expanded[value]))
        else:
            return ()
    return tuple(sources)


def _users(value: ir.Value, graph: ir.Graph) -> list[ir.Node] | None:
    """Return the nodes that use the value; None where something else does: an output of the graph, or a body."""
    users = [node for node, _ in value.uses()]
    if value.is_graph_output() or any(node.graph is not graph for node in users):
        return None
    return users


def _runs_inside(activation: ir.Node, producer: ir.Node, graph: ir.Graph) -> bool:
    return (
        producer.graph is graph
        and producer.op_type in COMPUTE
        and len(producer.outputs) == 1
        and _users(producer.outputs[0], graph) == [activation]
    )


def _only_quantized(value: ir.Value, graph: ir.Graph) -> bool:
    users = _users(value, graph)
    return users is not None and len(users) == 1 and users[0].op_type == QUANTIZE


def _is_integer(node: ir.Node, result: Fused, graph: ir.Graph, bits: Collection[int]) -> bool:
    dequantized = 0
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype is None or not value.dtype.is_floating_point():
            continue
        producer = value.producer()
        if producer is not None and producer.op_type == DEQUANTIZE and producer.graph is graph:
            stored = producer.inputs[0].dtype if producer.inputs[0] is not None else None
            if stored is not None and stored.bitwidth not in bits:
                return False
            dequantized += index == 0 or (producer.inputs[0] is not None and producer.inputs[0].const_value is None)
        elif not (index and node.op_type in PARAMETERS and value.const_value is not None):
            return False
    if not dequantized:
        return False
    used = [result.stored(value) for value in node.outputs if value.uses() or value.is_graph_output()]
    return node.op_type in FLOAT_OUTPUT or (bool(used) and all(_only_quantized(value, graph) for value in used))
