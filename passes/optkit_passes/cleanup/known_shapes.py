"""What inferred shapes say: the results of Shape and Size nodes, and how large a result will be."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, ints, is_constant, static_shape


def from_shapes(node: ir.Node) -> np.ndarray | None:
    """Return the result of Shape, Size, or of Gather or Slice on a Shape, where the dimensions it takes are static."""
    source = argument(node, 0)
    if node.domain != "" or source is None:
        return None
    if node.op_type == "Size":
        dims = static_shape(source)
        return None if dims is None else np.array(math.prod(dims), np.int64)
    taken: list[int | ir.SymbolicDim] | None = None
    form: tuple[int, ...] = (-1,)
    if node.op_type == "Shape":
        taken = _shape_of(node)
    elif (producer := source.producer()) is not None and (dims_of := _shape_of(producer)) is not None:
        if node.op_type == "Gather" and (indices := constant(argument(node, 1))) is not None:
            taken, form = [dims_of[int(index)] for index in indices.ravel()], indices.shape
        elif node.op_type == "Slice":
            starts, ends, steps = ints(node, "starts", 1), ints(node, "ends", 2), ints(node, "steps", 4, default=[1])
            if starts and ends and steps:
                taken = dims_of[starts[0] : ends[0] : steps[0]]
    sizes = [dim for dim in taken or [] if isinstance(dim, int)]
    return np.array(sizes, np.int64).reshape(form) if taken is not None and len(sizes) == len(taken) else None


def _shape_of(node: ir.Node) -> list[int | ir.SymbolicDim] | None:
    source = argument(node, 0)
    if (node.domain, node.op_type) != ("", "Shape") or source is None or source.shape is None:
        return None
    end = node.attributes.get_int("end") if "end" in node.attributes else None
    return list(source.shape)[node.attributes.get_int("start", 0) : end]


def tensor_bytes(value: ir.Value | None) -> int:
    """Return the bytes of a constant, 0 for any other value."""
    tensor = value.const_value if value is not None and is_constant(value) else None
    return tensor.nbytes if tensor is not None else 0


def result_bytes(node: ir.Node) -> int | None:
    """Return the bytes of all results, from inferred shapes or from constant inputs; None where they are unknown."""
    total = 0
    for value in node.outputs:
        dims = static_shape(value)
        if not value.name:
            continue
        if dims is None and node.op_type in ("ConstantOfShape", "Expand", "Tile"):
            setting = constant(argument(node, 0 if node.op_type == "ConstantOfShape" else 1))
            source = constant(argument(node, 0))
            if setting is not None and source is not None:  # an upper bound
                dims = [*setting.tolist(), 1 if node.op_type == "ConstantOfShape" else source.size]
        if dims is None or value.dtype is None:
            return None
        total += math.ceil(math.prod(dims) * value.dtype.itemsize)
    return total
