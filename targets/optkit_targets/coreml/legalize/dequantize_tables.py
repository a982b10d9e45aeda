"""Dequantize tables of integers where they stand, and not the rows picked from them."""

from __future__ import annotations

import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import argument, constant, forward, remove, static_shape
from optkit_targets.rewriting import RefusedError, Writer, apply

INTEGERS = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4}


class DequantizeTables(Pass):
    """``DequantizeLinear(Gather(table, i))`` becomes ``Gather(DequantizeLinear(table), i)``, for a constant table.

    Core ML stores a constant as integers where it is dequantized itself; it widens those that ``gather`` picks from to
    32 bits. Scales are per tensor, or per index of an axis that the Gather leaves alone.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite Gather by Gather, bodies included."""
        apply({"Gather": _gather}, model, context)


def _gather(node: ir.Node, writer: Writer) -> str | None:
    table, picked = node.inputs[0], node.outputs[0]
    readers = [use.node for use in picked.uses()]
    dequantized = {(reader.domain, reader.op_type) for reader in readers} == {("", "DequantizeLinear")}
    if table is None or constant(table) is None or table.dtype not in INTEGERS or not dequantized:
        return None
    if len(readers) > 1 or picked.is_graph_output():
        raise RefusedError("the integers that it picks are read more than once")
    reader = readers[0]
    scale, zero, result = reader.inputs[1], argument(reader, 2), reader.outputs[0]
    scales = constant(scale)
    if scale is None or scales is None or (zero is not None and constant(zero) is None):
        raise RefusedError("the scale of its table is computed at run time")
    axes = {"axis": _table_axis(node, reader)} if scales.size > 1 else {}
    inputs = [table, *reader.inputs[1:]]
    floats = writer.add("DequantizeLinear", *inputs, dtype=scale.dtype, shape=static_shape(table), **axes)
    axis = node.attributes.get_int("axis", 0)
    rows = writer.add("Gather", floats, node.inputs[1], shape=static_shape(result), axis=axis)
    forward(result, rows)
    remove(reader)
    return "its table is dequantized, and not the rows that it picks"


def _table_axis(node: ir.Node, reader: ir.Node) -> int:
    """Return the axis of the table that has the scales of an axis of the rows."""
    table, indices = node.inputs[0], node.inputs[1]
    if table is None or table.shape is None or indices is None or indices.shape is None:
        raise RefusedError("the axes of its table or indices are not known")
    rank, added = len(table.shape), len(indices.shape) - 1
    if reader.attributes.get_int("block_size", 0):
        raise RefusedError("the rows that it picks have scales by block")
    gathered = (node.attributes.get_int("axis", 0)) % rank
    axis = reader.attributes.get_int("axis", 1) % (rank + added)
    if gathered <= axis <= gathered + added:
        raise RefusedError("its rows have scales by index, which are not those of the table")
    return axis if axis < gathered else axis - added
