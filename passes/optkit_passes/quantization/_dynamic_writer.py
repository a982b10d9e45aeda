"""Writes matrix products on integers whose activations are quantized as they come, in ONNX's own operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, constant, forward, names, remove, unique
from optkit.quant.clipping import search_qparams
from optkit.quant.integers import (
    Granularity,
    IntegerGrid,
    PerChannel,
    PerTensor,
    QuantParams,
    pair_scale_floor,
    quantize,
    weight_qparams,
    with_scale,
)

from ._layers import Layer


@dataclass(frozen=True)
class _Stored:
    """A weight as integers [K, N], its scales [N] or [], its zero points (None: all 0), and their parameters."""

    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


class DynamicWriter:
    """Turns matrix products of a model into their dynamically quantized form, in place.

    ::

        x -> DynamicQuantizeLinear -> q, s, z                                    once for all that read x
        q, w, z, zw -> MatMulInteger -> Cast -> Mul(Mul(s, sw)) -> Add(bias)

    Args:
        model: The model.
        grid: The integers for weights.
        per_channel: Whether weights may have one scale per output channel.
        pairs_saturate: Whether kernels add the products of two neighbouring weights in int16.
        clip: Search scales of smallest squared error instead of covering every weight.
    """

    def __init__(
        self, model: ir.Model, grid: IntegerGrid, *, per_channel: bool, pairs_saturate: bool, clip: bool
    ) -> None:
        self.model, self.grid, self.per_channel = model, grid, per_channel
        self.pairs_saturate, self.clip = pairs_saturate, clip
        self.taken = names(model)
        self._activations: dict[tuple[ir.Graph, ir.Value], Sequence[ir.Value]] = {}
        self._weights: dict[tuple[ir.Value, bool, float], _Stored] = {}
        self._rows: dict[ir.Value, tuple[ir.Value, QuantParams]] = {}

    def layer(self, layer: Layer) -> int:
        """Replace a MatMul or Gemm with constant weights; return the number of scales.

        Raises:
            InputError: The weight holds NaN or infinity.
        """
        node, graph = layer.node, layer.node.graph
        source, stored, old = node.inputs[0], layer.stored, node.outputs[0]
        assert graph is not None
        assert source is not None
        assert stored is not None
        name = node.name or old.name or ""
        weight = self._weight(layer, stored)
        q, scale, zero_point = self._quantized(source, node)
        inputs = [q, weight.integers, zero_point, *([weight.zero_point] if weight.zero_point else [])]
        product = self._node(node, "MatMulInteger", inputs, name, old.shape, ir.DataType.INT32)
        real = self._node(node, "Cast", [product], name, old.shape, to=ir.DataType.FLOAT.value)
        scales = self._node(node, "Mul", [scale, weight.scale], f"{name}/scale", weight.scale.shape)
        result = self._node(node, "Mul", [real, scales], name, old.shape)
        bias = node.inputs[layer.bias] if layer.bias is not None else None
        if bias is not None:
            result = self._node(node, "Add", [result, self._scaled_bias(node, bias)], name, old.shape)
        producer = result.producer()
        assert producer is not None
        producer.metadata_props.update(node.metadata_props)
        title, is_output = old.name, old.is_graph_output()
        forward(old, result)
        remove(node)
        if not is_output:
            result.name = title
        return int(np.prod(weight.scale.shape.numpy())) if weight.scale.shape else 1

    def table(self, node: ir.Node) -> None:
        """Let a Gather pick rows of a table that is a weight too, stored with one scale per row for both.

        ::

            Gather(table, ids) -> (Cast(Gather(integers, ids)) - zero_point) * Gather(scales, ids)

        Raises:
            InputError: The table holds NaN or infinity.
        """
        table, ids, output = node.inputs[0], node.inputs[1], node.outputs[0]
        assert table is not None
        assert ids is not None
        integers, params = self._by_rows(table)
        name, shape = node.name or output.name or "", output.shape
        rows = 0 if table.const_value is None else table.const_value.shape.numpy()[0]
        scales = self._constant(f"{table.name}_row_scale", _column(params.scale, rows))
        picked = self._node(node, "Gather", [integers, ids], name, shape, integers.dtype or ir.DataType.INT8)
        real = self._node(node, "Cast", [picked], name, shape, to=ir.DataType.FLOAT.value)
        if params.zero_point.any():
            zero = self._constant(f"{table.name}_row_zero", _column(params.zero_point, rows))
            real = self._node(node, "Sub", [real, self._node(node, "Gather", [zero, ids], name, None)], name, shape)
        factor = self._node(node, "Gather", [scales, ids], f"{name}/scale", None)
        forward(output, self._node(node, "Mul", [real, factor], name, shape))
        remove(node)

    def _quantized(self, source: ir.Value, reader: ir.Node) -> Sequence[ir.Value]:
        """Return a value's integers, scale and zero point, made before the first node of a graph to want them."""
        graph = reader.graph
        assert graph is not None
        key = (graph, source)
        if key not in self._activations:
            name = source.name or ""
            kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            shapes = (source.shape, ir.Shape([]), ir.Shape([]))
            outputs = [
                ir.Value(name=unique(f"{name}_{what}", self.taken), type=ir.TensorType(kind), shape=shape)
                for what, kind, shape in zip(("quantized", "scale", "zero_point"), kinds, shapes, strict=True)
            ]
            title = unique(f"{name}_DynamicQuantizeLinear", self.taken)
            made = ir.Node("", "DynamicQuantizeLinear", [source], outputs=outputs, name=title)
            graph.insert_before(reader, made)
            self._activations[key] = outputs
        return self._activations[key]

    def _weight(self, layer: Layer, stored: ir.Value) -> _Stored:
        """Return a layer's weight as integers [K, N]; one copy for all who read it the same way."""
        node = layer.node
        by_rows = layer.transpose is not None or (node.op_type == "Gemm" and layer.axis == 0)  # stored as [N, K]
        alpha = node.attributes.get_float("alpha", 1.0)
        key = (stored, by_rows, alpha)
        if by_rows and stored in self._rows:
            integers, params = self._rows[stored]
            integers = self._node(node, "Transpose", [integers], f"{stored.name}/T", None, integers.dtype)
        elif key in self._weights:
            return self._weights[key]
        else:
            array = constant(stored)
            assert array is not None
            array = array.T if by_rows else array
            params = self._params(array, PerChannel(1) if array.ndim == 2 else PerTensor(), stored.name or "")
            integers = self._constant(f"{stored.name}_quantized", quantize(array, params))
        scale = self._constant(f"{stored.name}_scale", (params.scale * np.float32(alpha)).astype(np.float32))
        zero = self._constant(f"{stored.name}_zero_point", params.zero_point) if params.zero_point.any() else None
        self._weights[key] = _Stored(integers, scale, zero)
        return self._weights[key]

    def _by_rows(self, table: ir.Value) -> tuple[ir.Value, QuantParams]:
        """Return a table [N, K] as integers with one scale per row."""
        if table not in self._rows:
            array = constant(table)
            assert array is not None
            by_columns = self._params(array.T, PerChannel(1), table.name or "")
            granularity = PerChannel(0) if isinstance(by_columns.granularity, PerChannel) else PerTensor()
            params = replace(by_columns, granularity=granularity)
            integers = self._constant(f"{table.name}_quantized", quantize(array, params))
            self._rows[table] = integers, params
        return self._rows[table]

    def _params(self, weight: np.ndarray, granularity: Granularity, name: str) -> QuantParams:
        """Return scales and zero points for a weight [..., K, N]."""
        choose = search_qparams if self.clip else weight_qparams
        params = choose(weight, self.grid, granularity if self.per_channel else PerTensor(), name=name)
        if not self.pairs_saturate:
            return params
        rows = np.swapaxes(weight, -1, -2).reshape(-1, weight.shape[-2])
        floor = pair_scale_floor(rows)
        return with_scale(params, np.maximum(params.scale, floor if params.scale.ndim else floor.max(initial=0.0)))

    def _scaled_bias(self, node: ir.Node, bias: ir.Value) -> ir.Value:
        """Return a Gemm's bias with ``beta`` multiplied in."""
        beta, array = node.attributes.get_float("beta", 1.0), constant(bias)
        if beta == 1.0 or array is None:
            return bias
        return self._constant(f"{bias.name}_scaled", array * np.float32(beta))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_constant(self.model.graph, name, array, self.taken)

    def _node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: ir.Shape | None,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        **attributes: int,
    ) -> ir.Value:
        """Return the output of a new node, put in front of another."""
        output = ir.Value(
            name=unique(f"{name}/{op_type}_output", self.taken),
            type=None if dtype is None else ir.TensorType(dtype),
            shape=None if shape is None else shape.copy(),
        )
        settings = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        node = ir.Node("", op_type, inputs, settings, outputs=[output], name=unique(f"{name}/{op_type}", self.taken))
        assert before.graph is not None
        before.graph.insert_before(before, node)
        return output


def _column(values: np.ndarray, rows: int) -> np.ndarray:
    """Return one float32 value per row, [rows, 1]."""
    return np.broadcast_to(values.astype(np.float32).reshape(-1, 1), (rows, 1)).copy()
