"""Fuse Gelu from the operators that exporters write it with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi, sqrt
from typing import ClassVar

import onnx_ir as ir

from optkit.graph import opset
from optkit.pipeline import Context, Effect, Pass
from optkit_passes.fusion.linear import RefusedError, only_use
from optkit_passes.fusion.matching import collect, is_operator, replace
from optkit_passes.fusion.polynomial import ARITHMETIC, Polynomial, T, X, agree, polynomial

SINCE = 20  # the opset that introduced Gelu
CONTRIB = "com.microsoft"
MOST_CANDIDATES = 16  # values before Erf or Tanh that may be x; the nearest first

# Hendrycks and Gimpel, "Gaussian Error Linear Units", section 2: x * Phi(x), and its approximation by tanh
ARGUMENT: dict[str, Polynomial] = {
    "Erf": {(1, 0): 1 / sqrt(2)},
    "Tanh": {(1, 0): sqrt(2 / pi), (3, 0): sqrt(2 / pi) * 0.044715},
}
RESULT: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}  # x / 2 + x / 2 * t
WORDS = {"Erf": "x / sqrt(2)", "Tanh": "sqrt(2 / pi) * (x + 0.044715 * x^3)"}

# How far products of constants rounded to the type are from the formula's; float32's allows for 5 written digits.
ROUNDED = {ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 2e-2}


class FuseGelu(Pass):
    """Turn ``x / 2 * (1 + erf(x / sqrt(2)))`` into ``Gelu(x)``, and its approximation by tanh into its ``tanh`` form.

    The formula may be written in any order, with products or divisions, and multiplied out. Since opset 20.

    Attributes:
        contrib: Below opset 20, write onnxruntime's own operators of the domain com.microsoft, Gelu and FastGelu.
    """

    # 2e-7 where Gelu ends, but what follows may amplify it: on random inputs, 4e-4 at the output of a real model whose
    # normalizations compute the variance as mean(x^2) - mean(x)^2.
    effect: ClassVar[Effect] = Effect.reassociate(1e-3)

    contrib: bool = False

    def run(self, model: ir.Model, context: Context) -> None:
        """Find Erf or Tanh, x before it and the product behind it."""
        version = opset(model)
        for graph in list(model.graphs()):
            for node in list(graph):
                if node.graph is None or not is_operator(node, "Erf", "Tanh"):
                    continue
                try:
                    match = _match(node)
                    if match is None:
                        continue
                    count = len(collect(match.root, [match.x]))
                    if version < SINCE and not self.contrib:
                        raise RefusedError(
                            f"Gelu exists since opset {SINCE}, and the model has {version}: raise-opset raises it, "
                            f"or the option contrib allows onnxruntime's own operators"
                        )
                except RefusedError as reason:
                    context.missed(node, str(reason))
                    continue
                tanh = node.op_type == "Tanh"
                _write(model, match, tanh, standard=version >= SINCE)
                form = "its approximation by tanh" if tanh else "x / 2 * (1 + erf(x / sqrt(2)))"
                context.applied(match.root, f"fused {count} operators: {form}")


@dataclass(frozen=True)
class _Match:
    """``root`` computes Gelu of ``x``."""

    root: ir.Node
    x: ir.Value


def _match(node: ir.Node) -> _Match | None:
    """Read the Gelu around Erf or Tanh; None where a Tanh is no part of one.

    Raises:
        RefusedError: It nearly is one.
    """
    goal = ARGUMENT[node.op_type]
    argument = node.inputs[0]
    assert argument is not None
    rtol = ROUNDED.get(argument.dtype or ir.DataType.FLOAT, 1e-5)
    cubic = False
    for x in _candidates(argument):
        rank = _rank(x)
        read = polynomial(argument, {x: X}, rank)
        if agree(read, goal, rtol):
            return _Match(_root(node, x, rtol), x)
        cubic |= read is not None and bool(read.get((3, 0)))
    if node.op_type == "Erf" or cubic:
        raise RefusedError(f"what {node.op_type} takes is not {WORDS[node.op_type]}")
    return None


def _candidates(argument: ir.Value) -> Iterator[ir.Value]:
    """Yield the values that an argument is computed from by arithmetic, itself first."""
    found = [argument]
    for value in found:  # grows while it is read
        yield value
        node = value.producer()
        if node is not None and is_operator(node, *ARITHMETIC) and len(found) < MOST_CANDIDATES:
            found += [v for v in node.inputs if v is not None and v not in found and not v.is_initializer()]


def _root(node: ir.Node, x: ir.Value, rtol: float) -> ir.Node:
    """Follow the result of Erf or Tanh to the product with x.

    Raises:
        RefusedError: It goes elsewhere.
    """
    t = node.outputs[0]
    value = t
    while True:
        reader, _ = only_use(value)
        value = reader.outputs[0]
        read = polynomial(value, {x: X, t: T}, _rank(x))
        if agree(read, RESULT, rtol):
            return reader
        if read is None:
            name = f"{node.op_type.lower()}({WORDS[node.op_type]})"
            raise RefusedError(f"{reader.op_type} makes something else of it than x / 2 * (1 + {name})")


def _write(model: ir.Model, match: _Match, tanh: bool, *, standard: bool) -> None:
    if standard:
        replace(match.root, "Gelu", [match.x], [ir.AttrString("approximate", "tanh")] if tanh else [])
    else:
        model.opset_imports.setdefault(CONTRIB, 1)
        replace(match.root, "FastGelu" if tanh else "Gelu", [match.x], domain=CONTRIB)


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0
