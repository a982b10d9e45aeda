"""Linear layers with constant weights, and their weights as those of a 1x1 convolution, compressed ones as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, is_constant, static_shape
from optkit.quant.palette import palette_of, write_palette
from optkit_targets.coreml.legalize.channels_first import FEWEST_AXES, FLOATS
from optkit_targets.coreml.legalize.writing import Writer
from optkit_targets.rewriting import RefusedError

RANKS = (FEWEST_AXES, 3)  # of what a linear layer reads: [S, C] and [B, S, C]
LINEAR = {"Gemm", "MatMul"}


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        node: The MatMul or Gemm.
        stored: The constant, or the result of the DequantizeLinear or Gather that expands it.
        rows: Whether that is [N, C], else [C, N].
        channels: N.
        bias: Constant, [N].
        last: The node whose result is the layer's: an Add of the bias, else ``node`` itself.
    """

    node: ir.Node
    stored: ir.Value
    rows: bool
    channels: int
    bias: np.ndarray | None
    last: ir.Node


def linear_layer(node: ir.Node) -> Linear | None:
    """Return the linear layer that a node is; None for other nodes, products of two computed values included.

    Raises:
        RefusedError: It is one, and cannot be a convolution.
    """
    x, weight = argument(node, 0), argument(node, 1)
    if node.domain != "" or node.op_type not in LINEAR or x is None or weight is None or constant(x) is not None:
        return None
    found = _stored(weight)
    if found is None:
        return None
    stored, swapped = found
    shape, dims = static_shape(x), static_shape(weight)
    if x.dtype not in FLOATS or dims is None or len(dims) != FEWEST_AXES:
        return None
    if shape is None:
        raise RefusedError("its input has no fixed shape")
    if len(shape) not in RANKS or 0 in shape or 0 in dims:
        raise RefusedError(f"its input has {len(shape)} axes, not batch, tokens and channels, or no elements")
    across = False
    if node.op_type == "Gemm":
        across = bool(node.attributes.get_int("transB", 0))
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        if node.attributes.get_int("transA", 0) or factors != [1.0, 1.0]:
            raise RefusedError("it transposes its input, or multiplies by alpha or beta")
    if other := _other_reader(stored):
        raise RefusedError(f"{other.op_type} '{other.name}' reads its weight too: a convolution would need a copy")
    count = dims[0] if across else dims[1]
    bias, last = _bias(node, count)
    return Linear(node, stored, across != swapped, count, bias, last)


def _stored(value: ir.Value) -> tuple[ir.Value, bool] | None:
    """Return what a weight is stored in, and whether it is transposed behind that; None where it is computed."""
    if is_constant(value):
        return value, False
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Transpose" and node.inputs[0] is not None:
        found = _stored(node.inputs[0])
        moved = list(node.attributes.get_ints("perm") or (1, 0)) == [1, 0]
        return None if found is None else (found[0], found[1] != moved)
    if node.op_type == "DequantizeLinear" and all(each is None or is_constant(each) for each in node.inputs):
        return value, False
    return (value, False) if palette_of(node) is not None else None


def _other_reader(stored: ir.Value) -> ir.Node | None:
    """Return what reads a weight besides linear layers, itself or transposed, or what it is expanded from."""
    expanding = stored.producer()
    data = None if expanding is None else _integers(expanding)
    for node, _ in () if data is None else data.uses():
        if node is not expanding and (expanding is None or node is not _caster(expanding)):
            return node
    for node, index in stored.uses():
        transposed = node.op_type == "Transpose" and node.domain == ""
        other = _other_reader(node.outputs[0]) if transposed else None
        if other is not None or (not transposed and (node.op_type not in LINEAR or node.domain != "" or index != 1)):
            return other or node
    return None


def _integers(node: ir.Node) -> ir.Value | None:
    """Return the integers or indices that a DequantizeLinear or a palette's Gather expands."""
    if node.op_type == "DequantizeLinear":
        return node.inputs[0]
    caster = _caster(node)
    return None if caster is None else caster.inputs[0]


def _caster(node: ir.Node) -> ir.Node | None:
    """Return the Cast of a palette's indices."""
    while node.op_type in ("Add", "Gather") and (value := node.inputs[int(node.op_type == "Gather")]) is not None:
        before = value.producer()
        if before is None or before.op_type == "Cast":
            return before
        node = before
    return None


def _bias(node: ir.Node, channels: int) -> tuple[np.ndarray | None, ir.Node]:
    """Return the bias of a layer, and the node that adds it."""
    if node.op_type == "Gemm" and argument(node, 2) is not None:
        array = constant(argument(node, 2))
        if array is None or array.size not in (1, channels) or (array.size > 1 and array.shape[-1] != channels):
            raise RefusedError("its bias is computed, or differs from token to token")
        return np.broadcast_to(array.ravel(), channels).copy(), node
    result = node.outputs[0]
    uses = list(result.uses())
    if len(uses) == 1 and not result.is_graph_output() and (uses[0].node.domain, uses[0].node.op_type) == ("", "Add"):
        reader = uses[0].node
        array = constant(argument(reader, 1 - uses[0].idx))
        rank = len(result.shape or ())
        fits = array is not None and array.shape[-1:] == (channels,) == (array.size,) and array.ndim <= rank
        if fits and array is not None and reader.graph is node.graph and static_shape(reader.outputs[0]) is not None:
            return array.ravel(), reader
    return None, node


def conv_weight(layer: Linear, writer: Writer) -> ir.Value:
    """Return a layer's weight as [N, C, 1, 1]: integers and indices are moved, no floats are made of them.

    Raises:
        RefusedError: The form of its integers cannot be moved.
    """
    array = constant(layer.stored)
    if array is not None:
        return writer.constant("weight", _kernel(array, rows=layer.rows))
    node = layer.stored.producer()
    assert node is not None
    palette = palette_of(node)
    if palette is not None:
        axis = palette.axis if layer.rows or len(palette.lut) == 1 else 1 - palette.axis
        moved = replace(palette, indices=_kernel(palette.indices, rows=layer.rows), axis=axis)
        return write_palette(writer.node, f"{writer.node.name}/weight", moved, writer.version, writer.taken)
    return _dequantized(node, layer, writer)


def _kernel(array: np.ndarray, *, rows: bool) -> np.ndarray:
    """Return [N, C] or [C, N] as [N, C, 1, 1]."""
    return np.ascontiguousarray(array if rows else array.T)[..., None, None]


def _dequantized(node: ir.Node, layer: Linear, writer: Writer) -> ir.Value:
    """Write the integers of a weight, with one scale, one for each channel, or one for each block."""
    data, scale, point = (constant(argument(node, index)) for index in range(3))
    assert data is not None
    assert scale is not None
    axis, block = node.attributes.get_int("axis", 1) % FEWEST_AXES, node.attributes.get_int("block_size", 0)
    values = [("weight", _kernel(data, rows=layer.rows))]
    for name, array in (("scale", scale), ("zero_point", point)):
        if array is not None:
            values.append((name, _kernel(array, rows=layer.rows) if array.ndim == FEWEST_AXES else array))
    attributes: dict[str, int] = {"axis": axis if layer.rows else 1 - axis}
    if block:
        attributes["block_size"] = block
    inputs = [writer.constant(name, array) for name, array in values]
    made = writer.insert(ir.node("DequantizeLinear", inputs, attributes))
    made.type, made.shape = layer.stored.type, ir.Shape(values[0][1].shape)
    return made
