"""Writes quantize and dequantize nodes into a graph, with onnxruntime's names; equal constants are written once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, constant, names, opset, unique
from optkit.quant.clipping import search_qparams
from optkit.quant.integers import (
    Granularity,
    IntegerGrid,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantParams,
    bias_scale_floor,
    pair_scale_floor,
    quantize,
    quantize_bias,
    weight_qparams,
    with_scale,
)

from ._formats import Formats
from ._layers import Layer, summed_rows
from ._regions import Plan

INT4_IR_VERSION = 10  # the first with 4-bit tensors
# What QuantizeLinear and DequantizeLinear of ai.onnx take since opset 21 only.
NEWER = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT16, ir.DataType.UINT16)


@dataclass(frozen=True)
class WrittenLayer:
    """How a layer's weight and bias were written.

    Attributes:
        weight: The float weight, a Gemm's alpha multiplied in.
        params: Its scale and zero point.
        integers: The initializer that holds its integers.
        bias: The bias that the layer reads, dequantized or float; None where it has none.
        bias_scale: The scale of an integer bias, shape [] or [channels]; None for a float one.
        widened: How many scales were widened for the bias.
    """

    weight: np.ndarray
    params: QuantParams
    integers: ir.Value
    bias: ir.Value | None
    bias_scale: np.ndarray | None
    widened: int


class QdqWriter:
    """Turns values of a model's main graph into integers.

    Args:
        model: The model, changed in place.
        formats: The integers to write, and what may share a scale.
        shared: Constants that are both an embedding and a weight. They get one scale, so that one copy serves both.
    """

    def __init__(
        self,
        model: ir.Model,
        formats: Formats,
        *,
        shared: Collection[ir.Value],
    ) -> None:
        self.graph = model.graph
        self.formats = formats
        self.shared = shared
        self.domain = formats.domain(opset(model))
        if self.domain:
            model.opset_imports.setdefault(self.domain, 1)
        if formats.weights.bits < 8:
            model.ir_version = max(model.ir_version, INT4_IR_VERSION)
        self.taken = names(model)
        self._tied: dict[ir.Value, QuantParams] = {}
        self._constants: dict[tuple[object, ...], ir.Value] = {}
        self._dequantized: dict[tuple[object, ...], ir.Value] = {}

    def pair(self, value: ir.Value, params: QuantParams, plan: Plan) -> None:
        """Put a quantize / dequantize pair on a computed or fed value and let its integer readers read it.

        Where only an integer kernel computes the value every reader does, and a graph output keeps its name.
        """
        name, everyone = value.name or "", value in plan.integer
        readers = [use for use in value.uses() if everyone or plan.read_as_integer(use.node, use.idx)]
        inputs = self._params(name, params, omit_zero=False)
        q = self._node("QuantizeLinear", name, [value, *inputs], element_type(params.grid), value.shape)
        dq = self._node("DequantizeLinear", name, [q, *inputs], ir.DataType.FLOAT, value.shape)
        self._insert(q, dq, after=value.producer())
        for use in readers:
            use.node.replace_input_with(use.idx, dq)
        if everyone:
            self._take_over(value, dq)

    def constant(self, value: ir.Value, params: QuantParams, plan: Plan) -> None:
        """Store a constant that glue or a matrix product reads as integers of an activation's kind."""
        array = constant(value)
        for use in value.uses():
            if array is not None and plan.read_as_integer(use.node, use.idx):
                use.node.replace_input_with(use.idx, self._stored(value.name or "", array, params, use.node))

    def layer(self, layer: Layer, input_scale: np.ndarray) -> WrittenLayer:
        """Store a layer's weight as integers and its bias as int32 at the scale of the accumulator.

        The bias scale is input scale times weight scale. Where a bias would not fit in 32 bits at it, the weight scale
        of its channel is widened until it does. With one scale per block of a row no scale is the accumulator's: the
        bias stays float.

        Raises:
            InputError: The weight or the bias holds NaN or infinity.
        """
        node, index, stored = layer.node, layer.weight, layer.stored
        assert index is not None
        assert stored is not None
        weight, bias = _scaled_constants(layer)
        name = stored.name or ""
        grid, granularity = self._format(layer)
        # Clipped to 4 bits, products gain 0.6 and 1.8 dB on two language models; convolutions lose 1.5 and 3.2 dB on
        # two networks of four: what they read is rarely negative, so that the errors of clipped weights add up.
        choose = search_qparams if grid.bits < 8 and node.op_type in ("Gemm", "MatMul") else weight_qparams
        params = choose(weight, grid, granularity, name=name)
        rows = summed_rows(layer, weight) if self.formats.pairs_saturate else None
        if rows is not None:
            floor = pair_scale_floor(rows)
            params = with_scale(
                params, np.maximum(params.scale, floor if params.scale.ndim else floor.max(initial=0.0))
            )
        widened = 0
        blocks = isinstance(granularity, PerBlock)
        if bias is not None and not blocks:
            floor = bias_scale_floor(bias, input_scale)
            scale = np.maximum(params.scale, floor if params.scale.ndim else floor.max(initial=0.0))
            widened = int((scale > params.scale).sum())
            params = with_scale(params, scale)
        if stored in self.shared:
            self._tied[stored] = params
        dequantized = self._stored(name, weight, params, node, swap=layer.transpose is not None)
        node.replace_input_with(index, dequantized)
        new_bias = bias_scale = None
        if bias is not None and layer.bias is not None:
            original = node.inputs[layer.bias]
            assert original is not None
            name = original.name or ""
            bias_scale = None if blocks else np.asarray(input_scale * params.scale, np.float32)
            new_bias = (
                self._shared(name, bias) if bias_scale is None else self._stored_bias(name, bias, bias_scale, node)
            )
            node.replace_input_with(layer.bias, new_bias)
        return WrittenLayer(weight, params, _integers_behind(dequantized), new_bias, bias_scale, widened)

    def _format(self, layer: Layer) -> tuple[IntegerGrid, Granularity]:
        """Return the integers of a layer's weight, and what shares a scale.

        Blocks run along the summed axis of a matrix product. A convolution sums over a window as well, and a table that
        is an embedding too is read by rows: these have one scale per channel and one per tensor.
        """
        if layer.stored in self.shared:
            return self.formats.tables, PerTensor()
        if layer.axis is None:
            return self.formats.weights, PerTensor()
        if self.formats.block_size and layer.node.op_type in ("Gemm", "MatMul") and layer.transpose is None:
            return self.formats.weights, PerBlock(1 - layer.axis, self.formats.block_size)
        if self.formats.per_channel:
            return self.formats.weights, PerChannel(layer.axis if layer.transpose is None else 0)
        return self.formats.weights, PerTensor()

    def embedding(self, node: ir.Node) -> None:
        """Store the table of a Gather as integers, one scale per column, and dequantize the rows that it picks.

        A table that a layer has already stored keeps that layer's scale.

        Raises:
            InputError: The table holds NaN or infinity.
        """
        table, output = node.inputs[0], node.outputs[0]
        array = constant(table)
        assert table is not None
        assert array is not None
        per_channel = self.formats.per_channel and table not in self._tied
        granularity = PerChannel(array.ndim - 1) if per_channel else PerTensor()
        grid = self.formats.tables
        params = self._tied.get(table) or weight_qparams(array, grid, granularity, name=table.name or "")
        integers, scales = self._integers(table.name or "", array, params)
        node.replace_input_with(0, integers)
        readers = output.uses()
        axis = -1 if per_channel else None
        dq = self._node("DequantizeLinear", output.name or "", [output, *scales], ir.DataType.FLOAT, output.shape, axis)
        output.type = ir.TensorType(element_type(params.grid))  # copies of a model share types
        self._insert(dq, after=node)
        for use in readers:
            use.node.replace_input_with(use.idx, dq)
        self._take_over(output, dq)

    def _stored(
        self, name: str, array: np.ndarray, params: QuantParams, reader: ir.Node, *, swap: bool = False
    ) -> ir.Value:
        """Return the dequantized form of a constant, made before ``reader``, the first in graph order to read it.

        ``swap``: the reader wants the matrix with its two axes swapped; the integers keep theirs.
        """
        omit_zero = reader.op_type != "Gemm"  # onnxruntime takes QGemm's zero points from the dequantize nodes
        integers, scales = self._integers(name, array, params, omit_zero=omit_zero)
        key = (swap, integers.name, *(scale.name for scale in scales))
        if key not in self._dequantized:
            granularity = params.granularity
            axis = None if isinstance(granularity, PerTensor) else granularity.axis
            size = granularity.size if isinstance(granularity, PerBlock) else 0
            if swap:
                axis = None if axis is None else 1 - axis
                integers = self._node("Transpose", name, [integers], integers.dtype, integers.shape)
                integers.shape = ir.Shape(array.T.shape)
                self._insert(integers, before=reader)
            dq = self._node(
                "DequantizeLinear", name, [integers, *scales], ir.DataType.FLOAT, integers.shape, axis, size
            )
            self._insert(dq, before=reader)
            self._dequantized[key] = dq
        return self._dequantized[key]

    def _stored_bias(self, name: str, bias: np.ndarray, scale: np.ndarray, reader: ir.Node) -> ir.Value:
        integers = self._shared(f"{name}_quantized", quantize_bias(bias, scale, name=name))
        inputs = [integers, self._shared(f"{name}_quantized_scale", scale)]
        dq = self._node("DequantizeLinear", name, inputs, ir.DataType.FLOAT, integers.shape, 0 if scale.ndim else None)
        self._insert(dq, before=reader)
        return dq

    def _integers(
        self, name: str, array: np.ndarray, params: QuantParams, *, omit_zero: bool = True
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Return the integers of a constant and their parameters."""
        stored = quantize(array, params, name=name).astype(element_type(params.grid).numpy())
        integers = self._shared(f"{name}_quantized", stored)
        return integers, self._params(name, params, omit_zero=omit_zero)

    def _params(self, name: str, params: QuantParams, *, omit_zero: bool) -> list[ir.Value]:
        """Return scale and zero point; ``omit_zero``: leave out zero points that are all 0, as ONNX allows."""
        scale = self._shared(f"{name}_scale", params.scale)
        if omit_zero and not params.zero_point.any():
            return [scale]
        zero_point = params.zero_point.astype(element_type(params.grid).numpy())
        return [scale, self._shared(f"{name}_zero_point", zero_point)]

    def _shared(self, name: str, array: np.ndarray) -> ir.Value:
        key = (
            array.dtype,
            array.shape,
            array.tobytes() if array.size < 4096 else hashlib.sha256(array.tobytes()).digest(),
        )
        if key not in self._constants:
            self._constants[key] = add_constant(self.graph, name, array, self.taken)
        return self._constants[key]

    def _node(
        self,
        op_type: str,
        name: str,
        inputs: list[ir.Value],
        dtype: ir.DataType | None,
        shape: ir.Shape | None,
        axis: int | None = None,
        block_size: int = 0,
    ) -> ir.Value:
        """Return the output of a new node named after the value ``name``."""
        output = ir.Value(
            name=unique(f"{name}_{op_type}_Output", self.taken),
            type=None if dtype is None else ir.TensorType(dtype),
            shape=None if shape is None else shape.copy(),
        )
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        if block_size:
            attributes.append(ir.AttrInt64("block_size", block_size))
        integers = dtype if op_type == "QuantizeLinear" else inputs[0].dtype
        everywhere = op_type == "Transpose" or not (block_size or integers in NEWER)
        domain = "" if everywhere else self.domain
        ir.Node(domain, op_type, inputs, attributes, outputs=[output], name=unique(f"{name}_{op_type}", self.taken))
        return output

    def _insert(self, *outputs: ir.Value, after: ir.Node | None = None, before: ir.Node | None = None) -> None:
        """Insert the producers of ``outputs``; without a place, in front of everything."""
        nodes = [node for node in (output.producer() for output in outputs) if node is not None]
        if after is not None:
            self.graph.insert_after(after, nodes)
        else:
            self.graph.insert_before(before or self.graph[0], nodes)

    def _take_over(self, value: ir.Value, new: ir.Value) -> None:
        """Let ``new`` be the graph output that ``value`` was, under its name."""
        if not value.is_graph_output():
            return
        name = value.name or ""
        value.name = unique(f"{name}_float", self.taken)
        new.name = name
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = new


def _integers_behind(dequantized: ir.Value) -> ir.Value:
    """Return the initializer that a stored constant is dequantized from, through the Transpose of a tied table."""
    value: ir.Value | None = dequantized
    while value is not None and (node := value.producer()) is not None:
        value = node.inputs[0]
    assert value is not None
    return value


def _scaled_constants(layer: Layer) -> tuple[np.ndarray, np.ndarray | None]:
    """Return weight and bias (one value per channel) with a Gemm's alpha and beta multiplied in and set to 1."""
    node = layer.node
    weight = constant(layer.stored)
    bias = None if layer.bias is None else constant(node.inputs[layer.bias])
    assert weight is not None
    if node.op_type == "Gemm":
        alpha, beta = (_pop_float(node, name) for name in ("alpha", "beta"))
        weight = weight if alpha == 1 else weight * np.float32(alpha)
        bias = bias if bias is None or beta == 1 else bias * np.float32(beta)
    return weight, None if bias is None else np.broadcast_to(bias.ravel(), layer.channels)


def element_type(grid: IntegerGrid) -> ir.DataType:
    """Return the ONNX element type of a grid's integers."""
    return ir.DataType[grid.type.upper()]


def _pop_float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.pop(name, None)
    return 1.0 if attribute is None else attribute.as_float()
