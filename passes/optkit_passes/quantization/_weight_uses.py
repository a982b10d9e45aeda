"""Which constants of a model are weights: what reads each, and along which axes its channels lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, is_constant
from optkit.quant.palette import palette_of
from optkit.recipe import PRECISION_KEY

from ._layers import LAYER_OPS

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class WeightUse:
    """One layer's or lookup's use of a constant, through Transposes where there are any.

    Attributes:
        node: The Conv, ConvTranspose, Gemm, MatMul or Gather.
        stored: The constant.
        output_axis: The constant's axis of output channels; of a table, the axis that Gather picks from.
        data: What the weight is multiplied with; None for a table.
        data_axis: That one's axis of input channels.
        input_axis: The constant's axis of input channels.
        group: How many times the input channels of a Conv's weight are repeated to cover those of its input.
    """

    node: ir.Node
    stored: ir.Value
    output_axis: int
    data: ir.Value | None = None
    data_axis: int = 0
    input_axis: int = 0
    group: int = 1

    def importance(self, moments: np.ndarray) -> np.ndarray | None:
        """Return the moments [channels] of the data's channels so that they broadcast to the constant, or None."""
        shape = list(self.stored.shape.numpy()) if self.stored.shape is not None else []
        if self.group == 1:
            wanted = [1] * len(shape)
            wanted[self.input_axis] = shape[self.input_axis]
            return moments.reshape(wanted) if moments.size == shape[self.input_axis] else None
        if self.input_axis != 1 or moments.size != self.group * shape[1] or shape[0] % self.group:
            return None
        rows = np.repeat(moments.reshape(self.group, shape[1]), shape[0] // self.group, axis=0)
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))


def weight_uses(node: ir.Node) -> list[WeightUse] | str:
    """Return how a layer or lookup uses a constant, or why it does not; an empty list for any other operator."""
    if node.domain != "" or node.op_type not in LAYER_OPS | {"Gather"}:
        return []
    if node.op_type == "Gather":
        return _lookup(node)
    if node.op_type == "MatMul":
        left, right = _stored(argument(node, 0)), _stored(argument(node, 1))
        if left is not None and right is not None:
            return "both inputs are constant"
        if left is not None:  # [M, K] times data [.., K, N] or [K]
            data = argument(node, 1)
            rank = 0 if data is None or data.shape is None else len(data.shape)
            uses = _use(node, 0, output_axis=-2, data=1, data_axis=-1 if rank == 1 else -2, input_axis=-1)
            return [replace(use, data=None) for use in uses] if not rank and isinstance(uses, list) else uses
        return _use(node, 1, output_axis=-1, data=0, data_axis=-1, input_axis=-2)
    if node.op_type == "Gemm":
        rows = node.attributes.get_int("transB", 0) != 0
        across = node.attributes.get_int("transA", 0) != 0
        return _use(node, 1, output_axis=1 - rows, data=0, data_axis=1 - across, input_axis=int(rows))
    if node.op_type == "Conv":
        group = node.attributes.get_int("group", 1)
        return _use(node, 1, output_axis=0, data=0, data_axis=1, input_axis=1, group=group)
    return _use(node, 1, output_axis=1, data=0, data_axis=1, input_axis=0)


def _use(
    node: ir.Node, index: int, *, output_axis: int, data: int, data_axis: int, input_axis: int, group: int = 1
) -> list[WeightUse] | str:
    value = argument(node, index)
    found = _stored(value)
    if found is None:
        return _why_not_stored(value)
    stored, axes = found
    if len(axes) < 2:
        return "its constant input is a vector"
    read = argument(node, data)
    return [WeightUse(node, stored, axes[output_axis], read, data_axis, axes[input_axis], group)]


def _lookup(node: ir.Node) -> list[WeightUse] | str:
    found = _stored(argument(node, 0))
    if found is None or not _is_float(found[0]) or palette_of(node) is not None:
        return []  # most Gathers pick from shapes and computed tensors
    stored, axes = found
    return [WeightUse(node, stored, axes[node.attributes.get_int("axis", 0)])] if len(axes) > 1 else []


def _stored(value: ir.Value | None) -> tuple[ir.Value, list[int]] | None:
    """Return the constant that a value is, or is a transposed view of, and which of its axes each axis is."""
    if value is None:
        return None
    if value.is_initializer() and value.const_value is not None:
        return value, list(range(len(value.const_value.shape)))
    node = value.producer()
    found = _stored(node.inputs[0]) if node is not None and _is_transpose(node) else None
    if node is None or found is None:
        return None
    stored, axes = found
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(axes))[::-1]
    return stored, [axes[axis] for axis in order]


def _is_float(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype in FLOATS


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.domain == ""


def _why_not_stored(value: ir.Value | None) -> str:
    producer = None if value is None else value.producer()
    while producer is not None and _is_transpose(producer) and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if palette_of(producer) is not None:
        return "its weights have a LUT already"
    if producer is not None and producer.op_type == "DequantizeLinear":
        return "its weights are already quantized"
    return "its weights are not constant"


def why_kept(stored: ir.Value, uses: list[WeightUse]) -> str:
    """Return why a constant must stay as it is, whatever a LUT would save; empty if nothing forbids it."""
    if not is_constant(stored):
        return f"'{stored.name}' is a default that a caller may override"
    if stored.is_graph_output():
        return f"'{stored.name}' is an output of the model too"
    if stored.const_value is not None and not _is_float(stored):
        return f"'{stored.name}' is {stored.const_value.dtype.name.lower()}, not float32 or float16"
    for use in uses:
        precision = use.node.metadata_props.get(PRECISION_KEY, "")
        if precision.startswith("fp"):
            return f"kept in float by a rule ({precision})" + (f" at '{use.node.name}'" if len(uses) > 1 else "")
    layers = {use.node for use in uses}
    for reader in _readers(stored):
        if reader is None:
            return f"'{stored.name}' is an output of the model too"
        if reader not in layers:
            return f"{reader.op_type} '{reader.name}' reads '{stored.name}' too, and needs it in float"
    return ""


def _readers(value: ir.Value) -> Iterator[ir.Node | None]:
    """Yield what reads a constant, itself or transposed; None where that is an output of a graph."""
    if value.is_graph_output():
        yield None
    for node, _ in value.uses():
        if _is_transpose(node):
            yield from _readers(node.outputs[0])
        else:
            yield node
