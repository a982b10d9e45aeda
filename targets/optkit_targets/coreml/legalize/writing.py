"""What the passes of this folder share: writing nodes in front of one, and giving a reason for not doing so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, forward, remove, unique

Attribute = int | float | str | Sequence[int]
AXES_ARE_INPUT = {"ReduceMean": 18, "ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13}  # opset; before, an attribute
SIZES_ARE_INPUT = 13  # of Split


class RefusedError(Exception):
    """Why a node stays as it is; the model was not changed."""


class Writer:
    """Writes nodes in front of one node, named after it.

    Args:
        node: The node that is to be replaced, or that new nodes stand in front of.
        taken: The names of the model; grows.
        version: The model's version of the default operator set.
    """

    def __init__(self, node: ir.Node, taken: set[str], version: int) -> None:
        assert node.graph is not None
        self.node, self.taken, self.version, self._graph = node, taken, version, node.graph

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return a new initializer."""
        return add_constant(self._graph, f"{self.node.name}/{name}", array, self.taken)

    def ints(self, name: str, values: Sequence[int]) -> ir.Value:
        """Return a new initializer of int64, one axis."""
        return self.constant(name, np.array(values, np.int64))

    def like(self, name: str, number: float, value: ir.Value) -> ir.Value:
        """Return a new scalar of a value's element type."""
        assert value.dtype is not None
        return self.constant(name, np.array(number).astype(value.dtype.numpy()))

    def add(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        shape: Sequence[int] | None = None,
        **attributes: Attribute,
    ) -> ir.Value:
        """Insert a node of one result, of the first input's element type, and return the result."""
        return self.insert(ir.node(op_type, inputs, attributes), shape)[0]

    def insert(self, node: ir.Node, shape: Sequence[int] | None = None) -> Sequence[ir.Value]:
        """Insert a node whose results have the first input's element type and, if it is given, one shape."""
        node.name = unique(f"{self.node.name}/{node.op_type}", self.taken)
        node.metadata_props.update(self.node.metadata_props)
        source = node.inputs[0]
        for value in node.outputs:
            value.name = unique(f"{node.name}_output", self.taken)
            value.type = ir.TensorType(source.dtype) if source is not None and source.dtype is not None else None
            value.shape = None if shape is None else ir.Shape(shape)
        self._graph.insert_before(self.node, node)
        return node.outputs

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Return the value in a shape; itself where that is its own."""
        if value.shape is not None and list(value.shape) == list(shape):
            return value
        return self.add("Reshape", value, self.ints("shape", shape), shape=shape)

    def transpose(self, value: ir.Value, perm: Sequence[int], shape: Sequence[int]) -> ir.Value:
        """Return a value of a shape with its axes in another order; where only axes of size 1 move, a reshape of it."""
        moved = [shape[axis] for axis in perm]
        order = [axis for axis in perm if shape[axis] != 1]
        if order == sorted(order):
            return self.reshape(value, moved)
        return self.add("Transpose", value, shape=moved, perm=list(perm))

    def reduce_mean(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the mean along an axis, which stays."""
        if self.version >= AXES_ARE_INPUT["ReduceMean"]:
            return self.add("ReduceMean", value, self.ints("axes", [axis]), keepdims=1)
        return self.add("ReduceMean", value, axes=[axis], keepdims=1)

    def split(self, value: ir.Value, axis: int, parts: int, shape: Sequence[int]) -> Sequence[ir.Value]:
        """Return equal parts of a value of a shape."""
        length = shape[axis] // parts
        if parts == 1:
            return [value]
        sizes = [length] * parts
        names = [ir.Value() for _ in range(parts)]
        if self.version >= SIZES_ARE_INPUT:
            node = ir.node("Split", [value, self.ints("split", sizes)], {"axis": axis}, outputs=names)
        else:
            node = ir.node("Split", [value], {"axis": axis, "split": sizes}, outputs=names)
        return self.insert(node, [length if place == axis else size for place, size in enumerate(shape)])

    def replace(self, value: ir.Value) -> None:
        """Let a result of ``add`` stand for the node's first output; its node keeps the name of the old one."""
        old, producer = self.node.outputs[0], value.producer()
        assert producer is not None
        value.shape, value.type = old.shape or value.shape, old.type or value.type
        name = old.name
        forward(old, value)
        value.name = name
        remove(self.node)
        producer.name = self.node.name
