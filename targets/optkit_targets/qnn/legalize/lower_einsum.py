"""Write Einsum as transposes and one product."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import onnx_ir as ir

from optkit import Context, Effect, Pass
from optkit.graph import static_shape
from optkit_targets.rewriting import RefusedError, Writer, apply


class LowerEinsum(Pass):
    """``Einsum`` of two operands becomes ``MatMul`` of both, transposed and reshaped where it takes that.

    Of each operand's axes, those in both and in the result are the batch, those in both alone are summed over, the
    others are the rows or columns. HTP takes few equations (``ij,jk->ik`` and ``bhqd,bhkd->bhqk`` among them) and
    leaves the others to the CPU (onnxruntime-qnn 2.7); all become one product, whose transposes then merge with others.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-5)

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite node by node, bodies included."""
        apply({"Einsum": _lower}, model, context)


def _lower(node: ir.Node, writer: Writer) -> str:
    left, right, out = _terms(node)
    a, b = node.inputs
    assert a is not None
    assert b is not None
    shapes = [static_shape(a), static_shape(b)]
    if shapes[0] is None or shapes[1] is None:
        raise RefusedError("its operands have no fixed shapes")
    size = dict(zip(left, shapes[0], strict=True)) | dict(zip(right, shapes[1], strict=True))
    if any(size[axis] != dim for axis, dim in zip(left, shapes[0], strict=True)):
        raise RefusedError("one operand is broadcast along an axis")
    batch = [axis for axis in out if axis in left and axis in right]
    summed = [axis for axis in left if axis in right and axis not in out]
    rows = [axis for axis in out if axis in left and axis not in right]
    columns = [axis for axis in out if axis in right and axis not in left]
    if len(batch) + len(rows) + len(columns) != len(out) or len(batch) + len(rows) + len(summed) != len(left):
        raise RefusedError("an axis of one operand alone is summed over")
    if len(batch) + len(columns) + len(summed) != len(right):
        raise RefusedError("an axis of one operand alone is summed over")
    lengths = [prod(size[axis] for axis in axes) for axes in (rows, summed, columns)]
    dims = [size[axis] for axis in batch]
    first = _arrange(writer, a, left, [*batch, *rows, *summed], [*dims, lengths[0], lengths[1]])
    second = _arrange(writer, b, right, [*batch, *summed, *columns], [*dims, lengths[1], lengths[2]])
    product = writer.add("MatMul", first, second)
    natural = [*batch, *rows, *columns]
    if len(rows) != 1 or len(columns) != 1:
        product = writer.add("Reshape", product, writer.ints("shape", [size[axis] for axis in natural]))
    if natural != out:
        product = writer.add("Transpose", product, perm=[natural.index(axis) for axis in out])
    writer.replace(product)
    return "written as one product"


def _terms(node: ir.Node) -> tuple[list[str], list[str], list[str]]:
    """Return the letters of both operands and of the result.

    Raises:
        RefusedError: The equation is none of two operands with distinct axes.
    """
    equation = (node.attributes.get_string("equation") or "").replace(" ", "")
    operands, arrow, result = equation.partition("->")
    terms = operands.split(",")
    if len(terms) != 2 or "." in equation:
        raise RefusedError("it has an ellipsis, or not two operands")
    if not arrow:  # then the letters that occur once, sorted
        result = "".join(sorted(c for c in set(operands) - {","} if operands.count(c) == 1))
    if any(len(set(term)) != len(term) for term in (*terms, result)):
        raise RefusedError("it takes a diagonal")
    return list(terms[0]), list(terms[1]), list(result)


def _arrange(writer: Writer, value: ir.Value, axes: list[str], order: list[str], shape: list[int]) -> ir.Value:
    """Return the operand with its axes in an order, then in a shape."""
    if order != axes:
        value = writer.add("Transpose", value, perm=[axes.index(axis) for axis in order])
    return value if len(shape) == len(order) else writer.add("Reshape", value, writer.ints("shape", shape))
