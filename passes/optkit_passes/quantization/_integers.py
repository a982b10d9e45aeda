"""Reads integers out of a QDQ graph: what a value is dequantized from, and what results are quantized to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant


@dataclass(frozen=True)
class Zeros:
    """A zero point that the graph leaves out, to be written as a constant of this type and shape."""

    dtype: ir.DataType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Integers:
    """An integer tensor, and what its integers mean.

    Attributes:
        value: The integers.
        scale: Its scale, a constant.
        zero_point: Its zero point, or the zeros that are meant where there is none.
        axis: The axis with one scale per index; None: one scale for all.
    """

    value: ir.Value
    scale: ir.Value
    zero_point: ir.Value | Zeros
    axis: int | None = None

    @property
    def params(self) -> tuple[ir.Value, ir.Value | Zeros]:
        """Scale and zero point, as most operators take them."""
        return self.scale, self.zero_point

    @property
    def dtype(self) -> ir.DataType:
        """The type of the integers."""
        zero = self.zero_point
        return zero.dtype if isinstance(zero, Zeros) else _dtype(zero)

    def means(self, other: Integers) -> bool:
        """Whether equal integers of both are equal numbers."""
        numbers = [(array_of(each.scale).ravel(), each.zeros().ravel()) for each in (self, other)]
        return self.dtype == other.dtype and all(np.array_equal(a, b) for a, b in zip(*numbers, strict=True))

    def zeros(self) -> np.ndarray:
        """Return the zero points."""
        zero = self.zero_point
        return np.zeros(zero.shape, int) if isinstance(zero, Zeros) else array_of(zero).astype(int)


def read_integers(value: ir.Value | None) -> Integers | str:
    """Return what a value is dequantized from, or why no operator can read that."""
    node = None if value is None else value.producer()
    name = "" if value is None else value.name
    if value is None or node is None or node.op_type != "DequantizeLinear":
        return f"input '{name}' is computed in float"
    return _described(node, node.inputs[0])


def read_results(node: ir.Node) -> tuple[Integers, ...] | str:
    """Return what the outputs of a node are quantized to, or why they are needed in float."""
    found = []
    for output in node.outputs:
        uses = list(output.uses())
        if output.is_graph_output():
            return f"its result '{output.name}' is an output of the graph"
        if len(uses) != 1 or uses[0].node.op_type != "QuantizeLinear" or uses[0].idx != 0:
            readers = ", ".join(dict.fromkeys(use.node.op_type for use in uses))
            return f"its result is read in float by {readers}" if readers else "its result is not read"
        if uses[0].node.graph is not node.graph:
            return "its result is quantized inside a body"
        described = _described(uses[0].node, uses[0].node.outputs[0])
        if isinstance(described, str):
            return described
        if described.axis is not None:
            return f"'{output.name}' has one scale per channel"
        found.append(described)
    return tuple(found)


def _described(node: ir.Node, integers: ir.Value | None) -> Integers | str:
    """Return the integers of a quantize or dequantize node, or why they are none that an operator reads."""
    scale, zero = argument(node, 1), argument(node, 2)
    name = "" if integers is None else integers.name
    numbers = constant(scale)
    if integers is None or scale is None or numbers is None or (zero is not None and constant(zero) is None):
        return f"the scale or the zero point of '{name}' is not constant"
    if scale.dtype != ir.DataType.FLOAT:
        return f"the scale of '{name}' is not float32"
    if "block_size" in node.attributes and node.attributes["block_size"].as_int():
        return f"'{name}' has one scale per block"
    default = ir.DataType.UINT8 if node.op_type == "QuantizeLinear" else integers.dtype
    if zero is None and "output_dtype" in node.attributes and node.attributes["output_dtype"].as_int():
        default = ir.DataType(node.attributes["output_dtype"].as_int())
    kind = default if zero is None else _dtype(zero)
    if kind is None:
        return f"the type of '{name}' is not known"
    axis = None
    if numbers.size != 1:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    return Integers(integers, scale, zero if zero is not None else Zeros(kind, numbers.shape), axis)


def _dtype(value: ir.Value) -> ir.DataType:
    """Return the element type of a constant."""
    assert value.const_value is not None
    return value.const_value.dtype


def array_of(value: ir.Value) -> np.ndarray:
    """Return the array of a constant."""
    array = constant(value)
    assert array is not None
    return array
