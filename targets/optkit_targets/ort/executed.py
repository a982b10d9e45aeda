"""Which kernel stands for which node, from a model and the graph that a runtime made of it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import onnx_ir as ir

CONVERSIONS = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear"})
INTEGER_OPS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
        "QEmbedLayerNormalization",
    }
)
NAMES = {"FLOAT": "float32", "FLOAT16": "float16", "DOUBLE": "float64", "UINT8": "int8", "UINT16": "int16"}


@dataclass
class Executed:
    """What a runtime executes in place of a model's nodes.

    A node belongs to the kernel that lies behind it: going back from a kernel's outputs to its inputs through tensors
    that the executed graph no longer has passes exactly the nodes that the kernel replaces. Names of tensors that both
    graphs have are what ties them together.
    """

    _kernels: dict[ir.Node, ir.Node] = field(default_factory=dict)
    _constants: set[str] = field(default_factory=set)
    _types: dict[str, ir.DataType] = field(default_factory=dict)

    @staticmethod
    def of(model: ir.Model, executed: ir.Model) -> Executed:
        """Tie the nodes of ``model``, bodies included, to those of ``executed``."""
        found = Executed()
        found._match(model.graph, executed.graph)
        return found

    def kernel(self, node: ir.Node) -> ir.Node | None:
        """Return the executed node that does the work of ``node``, or None where none does."""
        return self._kernels.get(node)

    def is_constant(self, node: ir.Node) -> bool:
        """Whether the executed graph holds an output of ``node`` as a constant."""
        return any(value.name in self._constants for value in node.outputs)

    def precision(self, kernel: ir.Node) -> str:
        """Return the arithmetic of a kernel: ``int8`` for integer kernels, else the type of what it reads."""
        if kernel.op_type.startswith("QLinear") or kernel.op_type in INTEGER_OPS:
            return "int8"
        values = [value for value in (*kernel.inputs, *kernel.outputs) if value is not None]
        types = [self._types.get(value.name or "", value.dtype) for value in values]
        known = next((dtype for dtype in types if dtype is not None), None)
        return "-" if known is None else NAMES.get(known.name, known.name.lower())

    def _match(self, graph: ir.Graph, executed: ir.Graph) -> None:
        producers = {value.name: node for node in graph for value in node.outputs}
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        self._types |= {value.name or "": value.dtype for value in values if value.dtype is not None}
        self._constants |= set(executed.initializers)
        alive = {value.name for node in executed for value in node.outputs} | set(executed.initializers)
        alive |= {value.name for value in executed.inputs}
        twins = {node.name: node for node in executed if node.op_type not in CONVERSIONS}
        for last in executed:
            kernel = _before_conversions(last, producers)
            behind = [producers.get(value.name) for value in last.outputs if value.name]
            while behind:
                node = behind.pop()
                if node is not None and node not in self._kernels:
                    self._kernels[node] = twins.get(node.name, kernel)  # onnxruntime keeps names where it can
                    behind += [producers.get(v.name) for v in node.inputs if v is not None and v.name not in alive]
        for node in graph:
            for name, attribute in node.attributes.items():
                twin = twins.get(node.name)
                if attribute.type == ir.AttributeType.GRAPH and twin is not None and name in twin.attributes:
                    self._match(attribute.as_graph(), twin.attributes[name].as_graph())


def _before_conversions(kernel: ir.Node, known: Container[str | None]) -> ir.Node:
    """Return the kernel whose result, under a name that the model does not have, ``kernel`` only converts."""
    while kernel.op_type in CONVERSIONS and kernel.inputs and kernel.inputs[0] is not None:
        producer = kernel.inputs[0].producer()
        if producer is None or kernel.inputs[0].name in known:
            break
        kernel = producer
    return kernel
