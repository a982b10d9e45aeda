"""What the passes of this folder share: writing nodes with their shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from optkit_targets import rewriting

AXES_ARE_INPUT = {"ReduceMean": 18, "ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13}  # opset; before, an attribute
SIZES_ARE_INPUT = 13  # of Split


class Writer(rewriting.Writer):
    """Writes nodes in front of one node, named after it, in the first input's element type."""

    def like(self, name: str, number: float, value: ir.Value) -> ir.Value:
        """Return a new scalar of a value's element type."""
        assert value.dtype is not None
        return self.constant(name, np.array(number).astype(value.dtype.numpy()))

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
        self.insert(node, shape=[length if place == axis else size for place, size in enumerate(shape)])
        return node.outputs
