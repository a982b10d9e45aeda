"""What a model takes and gives, and on which integer grid: what an application must know to feed it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from optkit.graph import argument, constant

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
DOMAINS = ("", "ai.onnx", "com.microsoft")  # onnxruntime's own operators carry 16 bits below opset 21


def interface(model: ir.Model) -> dict[str, Any]:
    """Return a model's inputs and outputs, ready for JSON.

    Each has a ``name``, a ``dtype`` (``float32``), a ``shape`` (integers; names or null where unknown; null without a
    rank), and a ``quantization``: the grid that its values end on, as ``dtype``, ``scale`` and ``zero_point`` with
    real = scale * (q - zero_point). For an input it is that of the QuantizeLinear or DequantizeLinear that reads it,
    for an output that of the one that writes it. It is null where there is none, where the scale is not one constant
    for the whole tensor, and where an input's readers disagree: such a value also counts as it was fed.

    Inputs with an initializer are constants with a default and left out.
    """
    graph = model.graph
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    return {
        "inputs": [_described(value, _read_as(value)) for value in inputs],
        "outputs": [_described(value, _written_as(value)) for value in graph.outputs],
    }


def dtype_name(dtype: ir.DataType | None) -> str | None:
    """Return ONNX's name of a type with the width in it: ``float32``, ``uint8``."""
    if dtype is None:
        return None
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _described(value: ir.Value, quantization: dict[str, Any] | None) -> dict[str, Any]:
    shape = None if value.shape is None else [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return {
        "name": value.name or "",
        "dtype": dtype_name(value.dtype),
        "shape": shape,
        "quantization": quantization,
    }


def _read_as(value: ir.Value) -> dict[str, Any] | None:
    """Return the grid that every reader of an input puts it on, or None."""
    if value.is_graph_output():
        return None
    return _agreed([_grid(use.node) if use.idx == 0 else None for use in value.uses()])


def _written_as(value: ir.Value) -> dict[str, Any] | None:
    node = value.producer()
    return None if node is None else _grid(node)


def _agreed(grids: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    return grids[0] if grids and all(grid == grids[0] for grid in grids) else None


def _grid(node: ir.Node) -> dict[str, Any] | None:
    """Return the grid of a quantizing or dequantizing node with one constant scale, or None."""
    if node.op_type not in (QUANTIZE, DEQUANTIZE) or node.domain not in DOMAINS:
        return None
    scale, zero = constant(argument(node, 1)), constant(argument(node, 2))
    integers = node.outputs[0] if node.op_type == QUANTIZE else node.inputs[0]
    if scale is None or scale.size != 1 or integers is None or (zero is None and argument(node, 2) is not None):
        return None
    dtype = dtype_name(integers.dtype or _declared(node))
    if dtype is None:
        return None
    number = float(str(scale.reshape(-1)[0]))  # the shortest text that reads back as the same float32
    if not math.isfinite(number):
        return None
    zero_point = 0 if zero is None else int(zero.reshape(-1)[0])
    return {"dtype": dtype, "scale": number, "zero_point": zero_point}


def _declared(node: ir.Node) -> ir.DataType | None:
    """Return the integer type that a node without shape inference behind it says itself."""
    zero = argument(node, 2)
    if zero is not None:
        return zero.dtype
    if node.op_type == QUANTIZE:
        given = node.attributes.get("output_dtype")
        return ir.DataType(given.as_int()) if given is not None and given.as_int() else ir.DataType.UINT8
    return None
