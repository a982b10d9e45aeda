"""Count negative indices from the front, where HTP does not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import argument, constant, static_shape
from optkit_targets.rewriting import RefusedError, Writer, apply

NEVER_NEGATIVE = {"Abs", "ArgMax", "ArgMin", "NonZero", "TopK"}
KEEP = {"Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile"}
KEEP |= {"Transpose", "Unsqueeze"}  # negative only where their input is


class WrapIndices(Pass):
    """Computed indices ``i`` become ``Where(i < 0, i + size, i)``: a negative one counts from the end of the axis.

    Of ``GatherElements``, ``ScatterElements``, ``ScatterND`` and ``OneHot``, which read or write another place for a
    negative index that is fed or computed (onnxruntime-qnn 2.7); constant ones are right, as are Gather and GatherND.
    What is never negative stays: the results of ArgMax, ArgMin, TopK, NonZero and Abs.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite node by node, bodies included."""
        elements = dict.fromkeys(("GatherElements", "ScatterElements"), _elements)
        apply({**elements, "ScatterND": _scatter_nd, "OneHot": _one_hot}, model, context)


def _elements(node: ir.Node, writer: Writer) -> str | None:
    shape = static_shape(argument(node, 0))
    return _wrap(node, 1, writer, None if shape is None else [shape[node.attributes.get_int("axis", 0) or 0]])


def _scatter_nd(node: ir.Node, writer: Writer) -> str | None:
    shape, indices = static_shape(argument(node, 0)), static_shape(argument(node, 1))
    return _wrap(node, 1, writer, None if shape is None or not indices else shape[: indices[-1]])


def _one_hot(node: ir.Node, writer: Writer) -> str | None:
    depth = constant(argument(node, 1))
    return _wrap(node, 0, writer, None if depth is None else [int(depth.item())])


def _wrap(node: ir.Node, place: int, writer: Writer, sizes: list[int] | None) -> str | None:
    """Add the size of the axis to negative indices; several sizes belong to the last axis of the indices."""
    indices = argument(node, place)
    if indices is None or constant(indices) is not None or _is_natural(indices):
        return None
    if indices.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        raise RefusedError("its indices are not of int32 or int64")
    if sizes is None:
        raise RefusedError("the size of the axis that they count on is not fixed")
    size = np.array(sizes if len(sizes) > 1 else sizes[0]).astype(indices.dtype.numpy())
    zero = writer.constant("zero", np.zeros((), indices.dtype.numpy()))
    negative = writer.add("Less", indices, zero, dtype=ir.DataType.BOOL)
    wrapped = writer.add("Add", indices, writer.constant("size", size))
    node.replace_input_with(place, writer.add("Where", negative, wrapped, indices, dtype=indices.dtype))
    return f"negative indices count from {'x'.join(map(str, sizes))}"


def _is_natural(value: ir.Value) -> bool:
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type in NEVER_NEGATIVE:
        return True
    if node.op_type == "Where":  # what this pass writes
        test = node.inputs[0].producer() if node.inputs[0] is not None else None
        return test is not None and test.op_type == "Less" and test.inputs[0] is node.inputs[2]
    sources = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return node.op_type in KEEP and all(_is_natural_or_constant(source) for source in sources)


def _is_natural_or_constant(value: ir.Value | None) -> bool:
    array = constant(value)
    return bool((array >= 0).all()) if array is not None else value is not None and _is_natural(value)
