"""Do in 32 bits what HTP refuses in 64."""

from __future__ import annotations

import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import argument
from optkit_targets.rewriting import RefusedError, Writer, apply


class NarrowInt64(Pass):
    """Cast to int32 around ``Transpose`` of int64, and before int64 that leaves the graph.

    The provider computes int64 in 32 bits by itself (onnxruntime-qnn 2.7: inputs, outputs, indices, constants,
    arithmetic, comparisons, ArgMax and TopK; more than 32 bits wrap around). It refuses three forms: ``Transpose`` of
    int64, and ``Cast`` from floats or bools to an int64 that is a graph output. They go through int32, so that nothing
    is narrowed that was not narrowed before; inputs and outputs of the graph keep their types.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite node by node, bodies included."""
        apply({"Transpose": _transpose, "Cast": _cast}, model, context)


def _transpose(node: ir.Node, writer: Writer) -> str | None:
    x = argument(node, 0)
    if x is None or x.dtype != ir.DataType.INT64:
        return None
    if x.shape is None and "perm" not in node.attributes:
        raise RefusedError("the rank of its input is not known")
    narrow = writer.add("Cast", x, dtype=ir.DataType.INT32, to=int(ir.DataType.INT32))
    perm = node.attributes.get_ints("perm") or list(range(len(x.shape or ())))[::-1]
    moved = writer.add("Transpose", narrow, perm=list(perm))
    writer.replace(writer.add("Cast", moved, dtype=ir.DataType.INT64, to=int(ir.DataType.INT64)))
    return "transposes int32 in place of int64"


def _cast(node: ir.Node, writer: Writer) -> str | None:
    x = argument(node, 0)
    if node.attributes.get_int("to", 0) != ir.DataType.INT64 or not node.outputs[0].is_graph_output():
        return None
    if x is None or x.dtype is None or x.dtype.is_integer():
        return None
    narrow = writer.add("Cast", x, dtype=ir.DataType.INT32, to=int(ir.DataType.INT32))
    writer.replace(writer.add("Cast", narrow, dtype=ir.DataType.INT64, to=int(ir.DataType.INT64)))
    return "casts to int32 before int64"
