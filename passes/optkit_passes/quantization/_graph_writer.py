"""Writes quantize and dequantize nodes around every operator of a graph that is to be a complete quantized unit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, is_constant, opset
from optkit.quant.integers import (
    Granularity,
    IntegerGrid,
    PerTensor,
    QuantParams,
    bias_scale_floor,
    choose_qparams,
    integer_grid,
)

from ._formats import CONTRIB, WIDTHS_OPSET, Formats
from ._graph_plan import is_unit
from ._layers import CONVOLUTIONS, Layer
from ._qdq import QdqWriter, WrittenLayer
from ._regions import Plan

FACTOR = integer_grid("int16", symmetric=True)  # the right factor of a product of two 16-bit activations
BYTES = integer_grid("uint8", symmetric=False)


@dataclass(frozen=True)
class Widths:
    """Which units compute with wide activations, and which values that no unit computes are rounded to them.

    Attributes:
        narrow: The integers of all other activations.
        wide: The wide integers; the same as ``narrow`` where nothing is wide.
        units: Nodes that read and return wide integers.
        values: Fed values and those computed in float that are rounded to wide integers.
        exact_factors: Whether both factors of a product of activations may be wide: the right one in symmetric int16.
            Else it has 8 bits.
    """

    narrow: IntegerGrid
    wide: IntegerGrid
    units: Collection[ir.Node] = frozenset()
    values: Collection[ir.Value] = frozenset()
    exact_factors: bool = True

    def of_unit(self, node: ir.Node) -> IntegerGrid:
        """Return the integers that a unit reads and returns."""
        return self.wide if node in self.units else self.narrow

    def of_input(self, node: ir.Node, index: int) -> IntegerGrid:
        """Return the integers that a unit reads at an index."""
        grid = self.of_unit(node)
        if grid.bits == 8 or index != 1:
            return grid
        if node.op_type in ("Gemm", "MatMul"):
            return FACTOR if self.exact_factors else BYTES
        small = node.op_type == "PRelu" or (node.op_type == "LayerNormalization" and not self.exact_factors)
        return BYTES if small else grid

    def of_value(self, value: ir.Value, plan: Plan) -> IntegerGrid:
        """Return the integers that a computed or fed value is rounded to first."""
        producer = value.producer()
        if producer is not None and is_unit(producer, plan):
            return self.of_unit(producer)
        return self.wide if value in self.values else self.narrow


def regrid(params: QuantParams, grid: IntegerGrid, name: str = "") -> QuantParams:
    """Return parameters that cover the same range with other integers."""
    if grid == params.grid:
        return params
    low, high = params.limits()
    return choose_qparams(low, high, grid, name=name)


class GraphWriter(QdqWriter):
    """Turns values of a model's main graph into integers of the width that each of their readers wants.

    Args:
        model: The model, changed in place.
        formats: The integers of weights, and what may share a scale.
        plan: What is to be quantized.
        params: Scale and zero point of every quantized value, in any integers.
        widths: The integers of activations.
    """

    def __init__(
        self, model: ir.Model, formats: Formats, plan: Plan, params: Mapping[ir.Value, QuantParams], widths: Widths
    ) -> None:
        super().__init__(model, formats, shared=())
        self.model, self.plan, self.params, self.widths = model, plan, params, widths
        if opset(model) < WIDTHS_OPSET:
            self.domain = CONTRIB

    def _activation(self, value: ir.Value) -> None:
        """Put a quantize / dequantize pair on a value, and another for readers that want other integers.

        Who reads the result of a unit reads it rounded. What is fed or computed in float goes to float readers as it
        is, and to each kind of units rounded once.
        """
        name, everyone, producer = value.name or "", value in self.plan.integer, value.producer()
        readers = [use for use in value.uses() if everyone or self.plan.read_as_integer(use.node, use.idx)]
        own = regrid(self.params[value], self.widths.of_value(value, self.plan), name)
        made: dict[IntegerGrid, ir.Value] = {}
        last = producer
        if everyone:
            made[own.grid], last = self._pair(value, own, name, producer)
        for use in readers:
            grid = own.grid
            if self.plan.read_as_integer(use.node, use.idx):
                grid = self.widths.of_input(use.node, use.idx)
            if grid not in made:
                source = made[own.grid] if everyone else value
                made[grid], last = self._pair(source, regrid(own, grid, name), name, last)
            use.node.replace_input_with(use.idx, made[grid])
        if everyone:
            self._take_over(value, made[own.grid])

    def write(self) -> list[tuple[Layer, WrittenLayer]]:
        """Write everything in the plan; return the layers that have weights, in graph order."""
        scales = {
            node: regrid(self.params[value], self.widths.of_input(node, 0)).scale
            for node in self.plan.layers
            if (value := node.inputs[0]) is not None and value in self.params
        }
        self._read = {node: [v for v in node.inputs if v is not None] for node in self.plan.glue}
        for value in self.plan.quantized:
            if is_constant(value):
                self._constant(value)
            else:
                self._activation(value)
        return [
            (layer, self.layer(layer, scales[node]))
            for node, layer in self.plan.layers.items()
            if layer.weight is not None
        ]

    def _pair(
        self, value: ir.Value, params: QuantParams, name: str, after: ir.Node | None
    ) -> tuple[ir.Value, ir.Node | None]:
        """Return ``value`` rounded, and the last of the nodes that do it, which stand behind ``after``."""
        inputs = self._params(name, params, omit_zero=False)
        q = self._node("QuantizeLinear", name, [value, *inputs], ir.DataType[params.grid.type.upper()], value.shape)
        dq = self._node("DequantizeLinear", name, [q, *inputs], ir.DataType.FLOAT, value.shape)
        self._insert(q, dq, after=after)
        return dq, dq.producer()

    def _constant(self, value: ir.Value) -> None:
        """Store a constant that units read, once for each kind of integers that they want."""
        array = constant(value)
        for use in value.uses():
            if array is None or not self.plan.read_as_integer(use.node, use.idx):
                continue
            if use.node.op_type == "LayerNormalization" and use.idx == 2 and self._is_integer(use.node):
                use.node.replace_input_with(2, self._shift(value.name or "", array, use.node))
                continue
            grid = self.widths.of_input(use.node, use.idx)
            params = regrid(self.params[value], grid, value.name or "")
            first = self.graph[0]  # equal constants are one, whoever reads them first
            use.node.replace_input_with(use.idx, self._stored(value.name or "", array, params, first))

    def _is_integer(self, node: ir.Node) -> bool:
        """Whether a LayerNormalization is written so that it is computed on integers: scale in 8 bits, bias in 32."""
        return self.widths.of_input(node, 1).bits == 8

    def _shift(self, name: str, bias: np.ndarray, node: ir.Node) -> ir.Value:
        """Return the bias of a LayerNormalization, stored as a layer's: int32 at input scale times scale's scale."""
        scales = (
            regrid(self.params[value], self.widths.of_input(node, index)).scale.astype(np.float64)
            for index, value in enumerate(self._read[node][:2])
        )
        floor = bias_scale_floor(np.abs(bias).max(initial=0, keepdims=True), np.ones(1)).max()
        return self._stored_bias(name, bias, np.asarray(np.maximum(np.prod(list(scales)), floor), np.float32), node)

    def _params(self, name: str, params: QuantParams, *, omit_zero: bool) -> list[ir.Value]:
        """Return scale and zero point, also where all are 0: HTP misreads 4-bit weights without one."""
        del omit_zero
        return super()._params(name, params, omit_zero=False)

    def _node(self, op_type: str, *arguments: object, **options: object) -> ir.Value:
        output = super()._node(op_type, *arguments, **options)  # type: ignore[arg-type]
        producer = output.producer()
        if producer is not None and producer.domain == CONTRIB:
            self.model.opset_imports.setdefault(CONTRIB, 1)
        return output

    def _format(self, layer: Layer) -> tuple[IntegerGrid, Granularity]:
        """Return the integers of a layer's weight: convolutions take 4 bits with scales per channel only."""
        grid, granularity = super()._format(layer)
        if layer.node.op_type in CONVOLUTIONS and isinstance(granularity, PerTensor):
            return self.formats.tables, granularity
        return grid, granularity
