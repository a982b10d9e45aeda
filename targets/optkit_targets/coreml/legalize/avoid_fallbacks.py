"""Write forms that the Neural Engine leaves to the CPU, or computes less exactly, as others that mean the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit import Context, Effect, Pass
from optkit.graph import argument, constant, ints, prune, static_shape
from optkit_targets.coreml.legalize.writing import AXES_ARE_INPUT, Writer
from optkit_targets.rewriting import RefusedError, apply

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16}
ENDS_ARE_INPUT = 10  # of Slice
FACTORS = (2, 3, 4, 8)  # by which the engine repeats [ane-guide A]
MOST_COPIES = 64


class AvoidFallbacks(Pass):
    """Replace what placement leaves to the CPU, where another form is exactly the same.

    * ``Gather`` of neighbours by constant indices: ``Slice``, and a view where it drops the axis. Picking needs
      generation 14, and is a lookup; a slice is a view everywhere.
    * ``Tile`` by other factors than products of 2, 3, 4 and 8: ``Concat``.
    * ``Trilu`` with a constant diagonal: ``Where`` with a constant mask.
    * ``Pow`` with exponent 2, 0.5 or -1: ``Mul``, ``Sqrt``, ``Reciprocal``, which need no logarithm in float16.
    * ``MatMul`` with a constant of more columns than an axis may have elements: parts, side by side. The result still
      is longer than that, but the products run on the engine.

    Attributes:
        longest: Columns of a product; the axes of all generations here hold as many.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-6)  # Pow is rounded otherwise than Mul and Sqrt

    longest: int = Field(default=16384, ge=1)

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite node by node, bodies included."""
        rules: dict[str, Callable[[ir.Node, Writer], str | None]] = {**RULES, "MatMul": self._matmul}
        apply(rules, model, context, Writer)

    def _matmul(self, node: ir.Node, writer: Writer) -> str | None:
        weight = argument(node, 1)
        shape, out = static_shape(weight), static_shape(node.outputs[0])
        if shape is None or len(shape) < 2 or shape[-1] <= self.longest:
            return None
        array = constant(weight)
        if array is None:
            raise RefusedError(f"its {shape[-1]} columns are no dense constants that could be divided")
        others = [use.node.name for use in weight.uses() if use.node is not node] if weight is not None else []
        if others or out is None:
            raise RefusedError(f"'{others[0]}' reads its weight too" if others else "its result has no fixed shape")
        count = -(-shape[-1] // self.longest)
        parts = [
            writer.add("MatMul", node.inputs[0], writer.constant("part", part), shape=[*out[:-1], part.shape[-1]])
            for part in np.array_split(array, count, axis=-1)
        ]
        writer.replace(writer.add("Concat", *parts, shape=out, axis=len(out) - 1))
        prune([weight])
        return f"its {shape[-1]} columns are computed in {count} parts"


def _gather(node: ir.Node, writer: Writer) -> str | None:
    x, indices = argument(node, 0), constant(argument(node, 1))
    shape = static_shape(x)
    if x is None or indices is None or x.dtype not in FLOATS or constant(x) is not None or indices.ndim > 1:
        return None
    if shape is None:
        raise RefusedError("its input has no fixed shape")
    axis = node.attributes.get_int("axis", 0) % len(shape)
    places = [int(place) % shape[axis] for place in indices.ravel()] if shape[axis] else []
    if not places or places != list(range(places[0], places[0] + len(places))):
        raise RefusedError("its indices are no neighbours in their order")
    part = [len(places) if place == axis else size for place, size in enumerate(shape)]
    start, end = [places[0]], [places[-1] + 1]
    if writer.version >= ENDS_ARE_INPUT:
        bounds = (writer.ints("starts", start), writer.ints("ends", end), writer.ints("axes", [axis]))
        result = writer.add("Slice", x, *bounds, shape=part)
    else:
        result = writer.add("Slice", x, shape=part, starts=start, ends=end, axes=[axis])
    if indices.ndim == 0:
        rest = [size for place, size in enumerate(shape) if place != axis]
        if writer.version >= AXES_ARE_INPUT["Squeeze"]:
            result = writer.add("Squeeze", result, writer.ints("axes", [axis]), shape=rest)
        else:
            result = writer.add("Squeeze", result, shape=rest, axes=[axis])
    writer.replace(result)
    return f"is a slice from {places[0]} to {places[-1]}"


def _tile(node: ir.Node, writer: Writer) -> str | None:
    shape, repeats = static_shape(argument(node, 0)), ints(node, "repeats", 1)
    if repeats is None or all(_composed(factor) for factor in repeats):
        return None
    if shape is None:
        raise RefusedError("its input has no fixed shape")
    if (most := max(repeats)) > MOST_COPIES or min(repeats) < 1:
        raise RefusedError(f"it would take {most} copies side by side, at most {MOST_COPIES}, or none")
    value = node.inputs[0]
    for axis, factor in enumerate(repeats):
        if factor > 1:
            shape[axis] *= factor
            value = writer.add("Concat", *[value] * factor, shape=shape, axis=axis)
    assert value is not None
    writer.replace(value)
    return f"is copied {'x'.join(map(str, repeats))} times"


def _composed(factor: int) -> bool:
    """Whether a factor is a product of those that the engine repeats by."""
    return factor == 1 or any(factor % part == 0 and _composed(factor // part) for part in FACTORS if factor >= part)


def _trilu(node: ir.Node, writer: Writer) -> str | None:
    x, shape, k = argument(node, 0), static_shape(argument(node, 0)), argument(node, 1)
    diagonal = 0 if k is None else constant(k)
    if x is None or shape is None or diagonal is None:
        raise RefusedError("its input has no fixed shape, or its diagonal is computed")
    if x.dtype not in FLOATS:
        return None
    ones, offset = np.ones(shape[-2:], np.bool_), int(diagonal)
    mask = np.triu(ones, offset) if node.attributes.get_int("upper", 1) else np.tril(ones, offset)
    zero = writer.like("zero", 0, x)
    made = writer.add("Where", writer.constant("mask", mask), x, zero, shape=shape)
    made.type = x.type
    writer.replace(made)
    return "is a choice by a constant mask"


def _pow(node: ir.Node, writer: Writer) -> str | None:
    x, power = argument(node, 0), constant(argument(node, 1))
    if x is None or x.dtype not in FLOATS or power is None or power.size != 1:
        return None
    if power.ndim > len(x.shape if x.shape is not None else ()):
        return None
    exponent, shape = float(power.item()), static_shape(x)
    if exponent not in (2.0, 0.5, -1.0):
        return None
    if exponent == 2.0:
        writer.replace(writer.add("Mul", x, x, shape=shape))
    else:
        writer.replace(writer.add("Sqrt" if exponent == 0.5 else "Reciprocal", x, shape=shape))
    return f"is the power {exponent:g} without a logarithm"


RULES: dict[str, Callable[[ir.Node, Writer], str | None]] = {
    "Gather": _gather,
    "Pow": _pow,
    "Tile": _tile,
    "Trilu": _trilu,
}
