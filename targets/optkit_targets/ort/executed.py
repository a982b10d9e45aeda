"""Which kernel stands for which node, from a model and the graph that a runtime made of it."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

CONVERSIONS = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear"})
SHAPES = frozenset({"Shape", "Size"})
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
INT8_LEVEL = 4  # of MatMulNBits
NAMES = {"FLOAT": "float32", "FLOAT16": "float16", "DOUBLE": "float64", "UINT8": "int8", "UINT16": "int16"}


@dataclass
class Executed:
    """What a runtime executes in place of a model's nodes.

    A node belongs to the kernel that lies behind it: going back from a kernel's outputs to its inputs through tensors
    that the executed graph no longer has passes exactly the nodes that the kernel replaces. Names of tensors that both
    graphs have are what ties them together.

    Attributes:
        int8_blocks: Whether MatMulNBits rounds activations to int8 where its accuracy level allows it; kernels for ISAs
            without dot products of bytes never do.
    """

    int8_blocks: bool = False
    _kernels: dict[ir.Node, ir.Node] = field(default_factory=dict)
    _constants: set[str | None] = field(default_factory=set)
    _types: dict[str | None, ir.DataType | None] = field(default_factory=dict)

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
        """Whether the node's results follow from constants and shapes alone."""
        return node.op_type in SHAPES or all(value is None or value.name in self._constants for value in node.inputs)

    def precision(self, kernel: ir.Node) -> str:
        """Return the arithmetic of a kernel: ``int8`` for integer kernels, else the type of what it reads."""
        if kernel.op_type.startswith("QLinear") or kernel.op_type in INTEGER_OPS:
            return "int8"
        if kernel.op_type == "MatMulNBits" and kernel.attributes.get_int("accuracy_level", 0) == INT8_LEVEL:
            return "int8" if self.int8_blocks else "float32"
        known = _first(self._types.get(value.name) for value in (*kernel.inputs, *kernel.outputs) if value is not None)
        return "-" if known is None else NAMES.get(known.name, known.name.lower())

    def _match(self, graph: ir.Graph, executed: ir.Graph) -> None:
        producers: dict[str | None, ir.Node] = {
            value.name: node for node in graph for value in node.outputs if value.name
        }
        self._constants |= {name for name, value in graph.initializers.items() if not value.is_graph_input()}
        for node in graph:
            if self.is_constant(node):
                self._constants |= {value.name for value in node.outputs}
        for scope in (graph, executed):
            self._learn_types(scope)
        alive = {value.name for node in executed for value in node.outputs} | set(executed.initializers)
        alive |= {value.name for value in executed.inputs}
        twins = {node.name: node for node in executed if node.op_type not in CONVERSIONS}
        for last in executed:
            kernel = _before_conversions(last, producers)
            names = [value.name for value in last.outputs]
            while names:
                replaced = producers.get(names.pop())
                if replaced is not None and replaced not in self._kernels:
                    self._kernels[replaced] = twins.get(replaced.name, kernel)  # onnxruntime keeps names where it can
                    names += [value.name for value in replaced.inputs if value is not None and value.name not in alive]
        for node in graph:
            for name, attribute in node.attributes.items():
                twin = twins.get(node.name)
                if attribute.type == ir.AttributeType.GRAPH and twin is not None and name in twin.attributes:
                    self._match(attribute.as_graph(), twin.attributes[name].as_graph())

    def _learn_types(self, graph: ir.Graph) -> None:
        """Add the element types of a graph's tensors; those that it does not say follow from the operators."""
        for value in (*graph.inputs, *graph.initializers.values()):
            self._types.setdefault(value.name, value.dtype)
        for node in graph:
            given = [None if value is None else self._types.get(value.name) for value in node.inputs]
            result = {"DequantizeLinear": given[1:2], "QuantizeLinear": given[2:3]}.get(node.op_type, given)
            if node.op_type == "Cast":
                result = [ir.DataType(node.attributes["to"].as_int())]
            for value in node.outputs:
                self._types.setdefault(value.name, value.dtype or _first(result))


def _first(types: Iterable[ir.DataType | None]) -> ir.DataType | None:
    return next((dtype for dtype in types if dtype is not None), None)


def _before_conversions(kernel: ir.Node, known: Container[str | None]) -> ir.Node:
    """Return the kernel whose result, under a name that the model does not have, ``kernel`` only converts."""
    while kernel.op_type in CONVERSIONS and kernel.inputs and kernel.inputs[0] is not None:
        producer = kernel.inputs[0].producer()
        if producer is None or kernel.inputs[0].name in known:
            break
        kernel = producer
    return kernel
