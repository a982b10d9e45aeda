"""Say how a float becomes an integer, where HTP would round it."""

from __future__ import annotations

import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import argument
from optkit_targets.rewriting import Writer, apply

INTEGRAL = {"ArgMax", "ArgMin", "Ceil", "Floor", "Round", "Sign"}  # their results have no fraction
KEEP = {"Concat", "Expand", "Flatten", "Gather", "Identity", "Neg", "Relu", "Reshape", "Slice", "Split"}
KEEP |= {"Squeeze", "Tile", "Transpose", "Unsqueeze"}  # nor have theirs, where their input has none


class LowerCasts(Pass):
    """``Cast`` of floats to integers becomes ``Cast(Sign(x) * Floor(Abs(x)))``: ONNX truncates, HTP rounds.

    HTP truncates only where the integers leave the graph at once (onnxruntime-qnn 2.7); inside, 1.7 becomes 2. A Cast
    of what has no fraction stays: the result of Floor, Ceil, Round or Sign, and of Cast from integers or bools.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite cast by cast, bodies included."""
        apply({"Cast": _lower}, model, context)


def _lower(node: ir.Node, writer: Writer) -> str | None:
    x, to = argument(node, 0), ir.DataType(node.attributes.get_int("to", 0) or 0)
    if x is None or x.dtype is None or not x.dtype.is_floating_point() or not to.is_integer():
        return None
    if _has_no_fraction(x):
        return None
    sign, whole = writer.add("Sign", x), writer.add("Floor", writer.add("Abs", x))
    node.replace_input_with(0, writer.add("Mul", sign, whole))
    return f"truncates before the cast to {to.name.lower()}"


def _has_no_fraction(value: ir.Value) -> bool:
    node = value.producer()
    if node is None or node.domain != "":
        return False
    source = node.inputs[0] if node.inputs else None
    if node.op_type in INTEGRAL:
        return True
    if node.op_type == "Cast":
        return source is not None and source.dtype is not None and not source.dtype.is_floating_point()
    if node.op_type == "Mul":  # what this pass writes
        return all(each is not None and _has_no_fraction(each) for each in node.inputs)
    if node.op_type == "Concat":
        return all(each is not None and _has_no_fraction(each) for each in node.inputs)
    return node.op_type in KEEP and source is not None and _has_no_fraction(source)
