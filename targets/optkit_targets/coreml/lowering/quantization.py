"""Quantized activations in 8 bits, and weights that DequantizeLinear expands."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import argument
from optkit_targets.coreml.lowering.forms import dims, dtype, known, needs
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import lowers
from optkit_targets.coreml.lowering.weights import aligned, scaled_of
from optkit_targets.coreml.lowering.writing import FLOATS, Writer, number_type

EIGHT_BITS = {ir.DataType.INT8: np.int8, ir.DataType.UINT8: np.uint8}


@lowers("QuantizeLinear")
def quantize(scope: Scope, node: ir.Node) -> Any:
    """Write integers of 8 bits, ``clip(round(x / scale) + zero point)``, rounded half to even in both.

    MIL's dequantize reads them as they are; for any other reader they become int32, as all integers are here.
    """
    kind = _integer_type(node)
    needs(scope, 17, "a quantized activation")
    x, write = scope.input(node, 0), Writer(scope, node)
    scale, offset = _constants(scope, node)
    number = number_type(x)
    settings = _along_axis(node, dims(x), scale.astype(number), offset.astype(kind))
    result = write.quantize(input=x, output_dtype=np.dtype(kind).name, **settings)
    return result if _only_dequantized(node.outputs[0]) else write.cast(result, "int32")


def _integer_type(node: ir.Node) -> type[np.generic]:
    """Return the type that a QuantizeLinear quantizes to: its zero point's, its attribute's, or uint8."""
    point = argument(node, 2)
    kind = None if point is None else point.dtype
    kind = kind or ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    if kind not in EIGHT_BITS:
        raise CannotLower(f"MIL quantizes activations to INT8 and UINT8, not to {kind.name}")
    return EIGHT_BITS[kind]


def _only_dequantized(value: ir.Value) -> bool:
    """Return whether nothing but DequantizeLinear reads a value."""
    uses = list(value.uses())
    return bool(uses) and not value.is_graph_output() and all(use.node.op_type == "DequantizeLinear" for use in uses)


def _constants(scope: Scope, node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point.

    Raises:
        CannotLower: One is computed at run time, or there is one for every block.
    """
    scale, offset = known(scope, node, 1), known(scope, node, 2)
    if scale is None or (offset is None and argument(node, 2) is not None):
        raise CannotLower("its scale or zero point is computed at run time, and MIL's are constant")
    if node.attributes.get_int("block_size", 0):
        raise CannotLower("MIL has no activations quantized in blocks")
    return scale, np.zeros(scale.shape, np.int8) if offset is None else offset


def _along_axis(node: ir.Node, shape: tuple[int, ...], scale: np.ndarray, offset: np.ndarray) -> dict[str, Any]:
    """Return the settings of quantize and dequantize: scalars, or vectors and the axis that they lie along."""
    if scale.size == 1:
        settings = {"scale": scale.ravel()[0], "zero_point": offset.ravel()[0]}
    else:
        axis = node.attributes.get_int("axis", 1)
        settings = {"scale": scale, "zero_point": offset, "axis": np.int32(axis % len(shape))}
    if not offset.any():
        del settings["zero_point"]
    return settings


@lowers("DequantizeLinear")
def dequantize(scope: Scope, node: ir.Node) -> Any:
    """Write a weight in Core ML's stored form, a quantized activation as MIL's own, other integers as arithmetic."""
    weight = scaled_of(node)
    if weight is not None:
        return weight.write(scope, node.name or "")
    x, write = scope.input(node, 0), Writer(scope, node)
    scale, offset = _constants(scope, node)
    scale = scale if scale.dtype.name in ("float16", "float32") else scale.astype(np.float32)
    if dtype(x) in ("int8", "uint8"):
        kind = EIGHT_BITS[ir.DataType[dtype(x).upper()]]
        return write.dequantize(input=x, **_along_axis(node, dims(x), scale, offset.astype(kind)))
    scale, offset = aligned(node, scale, dims(x)), aligned(node, offset.astype(np.int32), dims(x))
    if offset.any():
        x = write.sub(x=x, y=offset)
    name = next(name for name, kind in FLOATS.items() if kind is scale.dtype.type)
    return write.mul(x=write.cast(x, name), y=scale)
