"""Compute in five axes or fewer what a graph writes with more."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import argument, static_shape, unique
from optkit_targets.rewriting import BROADCAST, UNARY, RefusedError, Writer, apply

MOST_AXES = 5


class ReduceRank(Pass):
    """Write ``Transpose``, ``MatMul`` and operators element by element with more than five axes between reshapes.

    HTP takes no tensor of six axes; the provider itself merges only a Reshape, Transpose and Reshape that have an axis
    of size 1. A transpose loses the axes of size 1, and those that stay side by side become one:
    ``[1, C, r, r, H, W]``, a pixel shuffle as exporters write it, is one of five. A product's batch axes become one,
    and where all shapes are equal the axes do not matter at all. The reshapes merge with those before and behind them
    (collapse-reshapes), which leaves no value of six axes.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite node by node, bodies included."""
        rules = dict.fromkeys((*UNARY, *BROADCAST), _flatten)
        apply({**rules, "Transpose": _transpose, "MatMul": _matmul}, model, context)


def _shape(value: ir.Value | None) -> list[int] | None:
    """Return the shape of a value that has too many axes, or None where it has not.

    Raises:
        RefusedError: It has too many, and one of them is open.
    """
    if value is None or value.shape is None or len(value.shape) <= MOST_AXES:
        return None
    shape = static_shape(value)
    if shape is None:
        raise RefusedError(f"it has {len(value.shape)} axes, and one of them has no fixed size")
    return shape


def merged(shape: list[int], perm: list[int]) -> tuple[list[int], list[int]]:
    """Return a transpose of fewer axes that moves the same elements to the same places: shape and permutation."""
    long = [axis for axis in perm if shape[axis] != 1]
    order = sorted(long)
    runs: list[list[int]] = []  # axes that stay side by side, in the order of the result
    for axis in long:
        if runs and order.index(axis) == order.index(runs[-1][-1]) + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    by_input = sorted(runs)
    return [prod(shape[axis] for axis in run) for run in by_input], [by_input.index(run) for run in runs]


def _transpose(node: ir.Node, writer: Writer) -> str | None:
    x = argument(node, 0)
    shape = _shape(x)
    if x is None or shape is None:
        return None
    perm = list(node.attributes.get_ints("perm") or range(len(shape))[::-1])
    fewer, order = merged(shape, perm)
    if len(fewer) > MOST_AXES:
        raise RefusedError(f"{len(fewer)} of its axes move apart: no transpose of {MOST_AXES} does the same")
    value = x
    if order != sorted(order):
        flat = writer.add("Reshape", x, writer.ints("shape", fewer))
        value = writer.add("Transpose", flat, perm=order)
    writer.replace(writer.add("Reshape", value, writer.ints("shape", [shape[axis] for axis in perm])))
    return f"{len(fewer)} axes in place of {len(shape)}"


def _flatten(node: ir.Node, writer: Writer) -> str | None:
    shape = _shape(node.outputs[0])
    if shape is None:
        return None
    if any(value is not None and static_shape(value) not in (shape, []) for value in node.inputs):
        raise RefusedError(f"its operands have different shapes in {len(shape)} axes")
    flat = [prod(shape[:-1]), shape[-1]]
    for index, value in enumerate(node.inputs):
        if value is not None and static_shape(value) == shape:
            node.replace_input_with(index, writer.add("Reshape", value, writer.ints("shape", flat)))
    return _reshape_back(node, writer, flat, shape)


def _matmul(node: ir.Node, writer: Writer) -> str | None:
    shape = _shape(node.outputs[0])
    if shape is None:
        return None
    operands = [static_shape(value) for value in node.inputs]
    batches = [None if each is None or len(each) < 3 else each[:-2] for each in operands]
    if any(each is None for each in operands) or batches[0] != shape[:-2] or batches[1] not in (None, shape[:-2]):
        raise RefusedError("its batch axes differ, or have no fixed size")
    for index, (value, dims, batch) in enumerate(zip(node.inputs, operands, batches, strict=True)):
        if value is not None and dims is not None and batch is not None:
            fewer = writer.ints("shape", [prod(batch), *dims[-2:]])
            node.replace_input_with(index, writer.add("Reshape", value, fewer))
    return _reshape_back(node, writer, [prod(shape[:-2]), *shape[-2:]], shape)


def _reshape_back(node: ir.Node, writer: Writer, flat: list[int], shape: list[int]) -> str:
    """Reshape the result of a node that now computes fewer axes."""
    old = node.outputs[0]
    name = unique(f"{node.name}/{node.op_type}", writer.taken)
    copy = ir.node(node.op_type, node.inputs, node.attributes, name=name)
    result = writer.insert(copy, old.dtype)
    result.shape = ir.Shape(flat)
    writer.replace(writer.add("Reshape", result, writer.ints("shape", shape)))
    return f"{len(flat)} axes in place of {len(shape)}"
