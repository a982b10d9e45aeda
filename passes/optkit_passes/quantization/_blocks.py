"""Writes quantized constants into a graph: onnxruntime's block operators, or DequantizeLinear before the readers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, argument, constant, forward, names, remove, unique
from optkit.quant.integers import QuantParams
from optkit.quant.packing import pack

from ._constants import Use, Weights

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Integers:
    """A quantized constant, as rows.

    Attributes:
        values: [N, K], the grid's dtype.
        params: Scales [N] or [N, blocks], and zero points.
    """

    values: np.ndarray
    params: QuantParams

    @property
    def scale(self) -> np.ndarray:
        """Scales, [N, blocks]."""
        return self.params.scale.reshape(len(self.values), -1)

    @property
    def zero_point(self) -> np.ndarray | None:
        """Zero points, [N, blocks]; None where all are what an omitted one means."""
        zeros = self.params.zero_point.reshape(len(self.values), -1)
        return None if self.params.grid.symmetric else zeros


@dataclass
class BlockWriter:
    """Replaces the readers of quantized constants.

    Attributes:
        model: The model, changed in place.
        accuracy_level: How MatMulNBits may round activations: 0 and 1 not at all, 4 to int8.
    """

    model: ir.Model
    accuracy_level: int = 0
    taken: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.taken = names(self.model)

    def packed(self, weights: Weights, integers: Integers, block_size: int) -> list[ir.Node]:
        """Let MatMulNBits and GatherBlockQuantized read the constant, packed once whoever shares it; return them.

        Shapes: with b bits and ceil(K / block_size) blocks a row, B is uint8 [N, blocks, block_size b / 8], scales are
        [N, blocks], zero points uint8 [N, ceil(blocks b / 8)]. A table that nothing multiplies with is uint8
        [V, D b / 8], without a block filled up.
        """
        self.model.opset_imports.setdefault(CONTRIB, 1)
        graph, bits, name = weights.value.graph, integers.params.grid.bits, weights.name
        assert graph is not None
        values, alone = integers.values, all(use.is_table for use in weights.uses)
        if not alone:
            values = np.pad(values, ((0, 0), (0, -values.shape[1] % block_size)))
        data = pack(values, bits)
        if not alone:
            data = data.reshape(len(data), -1, block_size * bits // 8)
        dtype = np.float16 if weights.value.dtype == ir.DataType.FLOAT16 else np.float32
        inputs = [
            add_constant(graph, f"{name}_{bits}bit", data, self.taken),
            add_constant(graph, f"{name}_scales", integers.scale.astype(dtype), self.taken),
        ]
        if integers.zero_point is not None:
            inputs.append(add_constant(graph, f"{name}_zero_points", pack(integers.zero_point, bits), self.taken))
        written = []
        for use in weights.uses:
            if use.is_table:
                written.append(self._gather(use, inputs, weights, bits, block_size))
            else:
                written.append(self._product(use, inputs, weights, bits, block_size))
        return written

    def dequantized(self, weights: Weights, integers: Integers, block_size: int) -> ir.Node:
        """Put a DequantizeLinear between the constant and all that reads it; return it.

        It has one scale per channel (``block_size`` 0) or one per block along the axis that its readers sum over.
        """
        value, grid, name = weights.value, integers.params.grid, weights.name
        graph = value.graph
        assert graph is not None
        dtype = np.float16 if value.dtype == ir.DataType.FLOAT16 else np.float32
        kind = ir.DataType[grid.type.upper()].numpy()
        axis = weights.axis
        if block_size:
            stored, scale = weights.stored(integers.values), weights.stored(integers.scale)
        else:
            axis = 0 if weights.is_convolution else 1 - axis
            whole = integers.values.reshape(weights.array.shape) if axis == 0 else integers.values.T
            stored, scale = np.ascontiguousarray(whole), integers.scale.ravel()
        inputs = [
            add_constant(graph, f"{name}_quantized", stored.astype(kind), self.taken),
            add_constant(graph, f"{name}_scale", scale.astype(dtype), self.taken),
        ]
        if integers.zero_point is not None:
            zero = weights.stored(integers.zero_point) if block_size else integers.zero_point.ravel()
            inputs.append(add_constant(graph, f"{name}_zero_point", zero.astype(kind), self.taken))
        attributes = [ir.AttrInt64("axis", axis)]
        if block_size:
            attributes.append(ir.AttrInt64("block_size", block_size))
        output = self._value(f"{name}_dequantized", value.type, value.shape)
        node = self._node("", "DequantizeLinear", inputs, attributes, output)
        readers = {use.node for use in value.uses()}
        first = next((each for each in graph if each in readers), graph[0])
        graph.insert_before(first, node)
        value.replace_all_uses_with(output)
        graph.initializers.pop(name)
        return node

    def _product(self, use: Use, inputs: list[ir.Value], weights: Weights, bits: int, block_size: int) -> ir.Node:
        node = use.node
        columns, length = weights.array.size // weights.length, weights.length
        attributes = [
            ir.AttrInt64("K", length),
            ir.AttrInt64("N", columns),
            ir.AttrInt64("bits", bits),
            ir.AttrInt64("block_size", block_size),
            ir.AttrInt64("accuracy_level", self.accuracy_level),
        ]
        last, bias, rest = self._bias(node, columns)
        given: list[ir.Value | None] = [node.inputs[0], *inputs]
        if bias is not None:
            given += [None] * (5 - len(given)) + [bias]
        old = last.outputs[0]
        output = self._value(f"{old.name}_product", old.type, old.shape)
        new = self._node(CONTRIB, "MatMulNBits", given, attributes, output, node)
        nodes = [new]
        if rest is not None:
            output = self._value(f"{old.name}_sum", old.type, old.shape)
            nodes.append(self._node("", "Add", [new.outputs[0], rest], [], output))
        self._replace(last, nodes)
        remove(node)
        return new

    def _bias(self, node: ir.Node, columns: int) -> tuple[ir.Node, ir.Value | None, ir.Value | None]:
        """Return the node whose result the new one computes, the bias it can take, and what is added after it."""
        if node.op_type == "Gemm":
            added = argument(node, 2)
            beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
            array = constant(added)
            if added is None or beta == 0:
                return node, None, None
            if array is not None and array.size in (1, columns) and (array.ndim == 0 or array.shape[-1] == array.size):
                return node, self._flat_bias(added, array * array.dtype.type(beta), columns), None
            return node, None, added
        product = node.outputs[0]
        users = list(product.uses())
        if len(users) != 1 or product.is_graph_output() or users[0].node.op_type != "Add":
            return node, None, None
        add = users[0].node
        added = add.inputs[1 - users[0].idx]
        array = constant(added)
        if add.graph is not node.graph or array is None or added is None or array.shape != (columns,):
            return node, None, None
        return add, added, None

    def _flat_bias(self, value: ir.Value, array: np.ndarray, columns: int) -> ir.Value:
        flat = np.broadcast_to(array.ravel(), (columns,))
        held = constant(value)
        if held is not None and held.shape == (columns,) and np.array_equal(held, flat):
            return value
        assert value.graph is not None
        return add_constant(value.graph, f"{value.name}_row", np.ascontiguousarray(flat), self.taken)

    def _gather(self, use: Use, inputs: list[ir.Value], weights: Weights, bits: int, block_size: int) -> ir.Node:
        node, (data, *scales) = use.node, inputs
        old, graph, width = node.outputs[0], node.graph, weights.length
        assert graph is not None
        assert data.shape is not None
        nodes: list[ir.Node] = []
        if len(data.shape) == 3:  # packed for MatMulNBits: the same bytes, a row on one axis
            width = -(-width // block_size) * block_size
            shape = [len(weights.array), width * bits // 8]
            flat = self._value(f"{data.name}_rows", data.type, ir.Shape(shape))
            length = add_constant(graph, f"{data.name}_rows_shape", np.array(shape), self.taken)
            nodes.append(self._node("", "Reshape", [data, length], [], flat))
            data = flat
        attributes = [
            ir.AttrInt64("bits", bits),
            ir.AttrInt64("block_size", block_size),
            ir.AttrInt64("gather_axis", 0),
            ir.AttrInt64("quantize_axis", 1),
        ]
        shape_of = old.shape if width == weights.length else None
        output = self._value(f"{old.name}_rows", old.type, shape_of)
        gather = self._node(CONTRIB, "GatherBlockQuantized", [data, node.inputs[1], *scales], attributes, output, node)
        nodes.append(gather)
        if width != weights.length:
            bounds = [("starts", 0), ("ends", weights.length), ("axes", -1)]
            values = [add_constant(graph, f"{old.name}_{n}", np.array([v]), self.taken) for n, v in bounds]
            sliced = self._value(f"{old.name}_cut", old.type, old.shape)
            nodes.append(self._node("", "Slice", [output, *values], [], sliced))
        self._replace(node, nodes)
        return gather

    def _value(self, name: str, kind: ir.TypeProtocol | None, shape: ir.Shape | None) -> ir.Value:
        return ir.Value(name=unique(name, self.taken), type=kind, shape=None if shape is None else shape.copy())

    def _node(
        self,
        domain: str,
        op_type: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        attributes: list[ir.Attr],
        output: ir.Value,
        origin: ir.Node | None = None,
    ) -> ir.Node:
        """Return a new node; it takes the name and the metadata of the one that it stands for."""
        name = unique(f"{output.name}_{op_type}", self.taken) if origin is None else origin.name
        node = ir.Node(domain, op_type, inputs, attributes, outputs=[output], name=name)
        if origin is not None:
            node.metadata_props.update(origin.metadata_props)
        return node

    def _replace(self, node: ir.Node, nodes: list[ir.Node]) -> None:
        """Put ``nodes`` in the place of ``node``: the last one's result takes the name of its result."""
        assert node.graph is not None
        node.graph.insert_before(node, nodes)
        old, new = node.outputs[0], nodes[-1].outputs[0]
        name = old.name
        forward(old, new)
        old.name, new.name = None, name
        remove(node)
