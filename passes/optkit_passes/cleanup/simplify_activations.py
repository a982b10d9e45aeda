"""Merge chains of clamping activations, and drop those that change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, argument, cannot_forward, constant, forward, names, opset, prune, remove
from optkit.pipeline import EXACT, Context, Effect, Pass
from optkit_passes.cleanup.signs import non_negative


class SimplifyActivations(Pass):
    """Turn chains of ``Relu``, ``Clip``, ``Max(x, c)`` and ``Min(x, c)`` into one ``Relu`` or ``Clip``.

    Each of them clamps to an interval, and so does their composition ``[g(f_low), g(f_high)]``. An activation that its
    input already satisfies (``Relu`` of a Sigmoid, of a Softmax, of the pooled result of a Relu) is dropped.
    ``Max(x, a * x)`` with ``0 < a < 1`` becomes ``LeakyRelu(x)``.

    Bit-equal for NaN, which every one of them passes on, and for infinities: a missing bound of Clip is the largest
    finite number, that of Relu, Max and Min infinity. Only the sign of a zero may change.
    """

    effect: ClassVar[Effect] = EXACT

    def run(self, model: ir.Model, context: Context) -> None:
        """Simplify in execution order, so that a chain collapses from its beginning."""
        taken, version = names(model), opset(model)
        for graph in list(model.graphs()):
            for node in list(graph):
                if node.domain or node.graph is None or node.op_type not in ("Relu", "Clip", "Max", "Min"):
                    continue
                if node.op_type == "Max" and _leaky_relu(node):
                    context.applied(node, "Max(x, a * x) is LeakyRelu(x)")
                    continue
                clamp = _clamp(node, version)
                if isinstance(clamp, str):
                    context.missed(node, clamp)
                elif clamp is not None:
                    _simplify(node, clamp, version, taken, context)


@dataclass(frozen=True)
class _Clamp:
    """``min(max(source, low), high)``."""

    source: ir.Value
    low: float
    high: float

    def __call__(self, x: float) -> float:
        return min(max(x, self.low), self.high)


def _clamp(node: ir.Node, version: int) -> _Clamp | str | None:
    """Read an activation as a clamp; a reason where its bounds are unusable, None where it is none."""
    bounds: tuple[np.ndarray | None, ...]
    if node.op_type in ("Max", "Min"):
        if len(node.inputs) != 2 or version < 8:  # no broadcasting before opset 8
            return None
        index = 0 if constant(node.inputs[1]) is not None else 1
        source, bound = node.inputs[index], constant(node.inputs[1 - index])
        rank = len(source.shape) if source is not None and source.shape is not None else 0
        if bound is None or source is None or bound.size != 1 or bound.ndim > rank:
            return None
        bounds = (bound, None) if node.op_type == "Max" else (None, bound)
    elif node.op_type == "Relu":
        source, bounds = node.inputs[0], (np.array(0), None)
    else:
        source = node.inputs[0]
        inputs = [argument(node, index) for index in (1, 2)]
        read = [constant(value) for value in inputs]
        if any(value is not None and array is None for value, array in zip(inputs, read, strict=True)):
            return "its bounds are computed at run time"
        attributes = [node.attributes.get_float(name, None) for name in ("min", "max")]  # until opset 10
        bounds = tuple(np.array(a) if a is not None else b for a, b in zip(attributes, read, strict=True))
    if source is None or source.dtype is None:
        return "the element type of its input is not known"
    low, high = (None if bound is None else bound.ravel()[0].item() for bound in bounds)
    lowest, highest = _limits(source.dtype, version, finite=node.op_type == "Clip")
    low, high = lowest if low is None else low, highest if high is None else high
    if not low <= high:
        return "its lower bound is above its upper bound"
    return _Clamp(source, low, high)


def _limits(dtype: ir.DataType, version: int, *, finite: bool) -> tuple[float, float]:
    """Return what a missing bound means: the type's largest finite numbers, or infinity where there is one.

    Until opset 10 the bounds of Clip are attributes, whose defaults are float32's limits whatever the type.
    """
    if not dtype.is_floating_point():
        return int(dtype.min), int(dtype.max)
    if not finite:
        return -np.inf, np.inf
    finite_type = ir.DataType.FLOAT if version < 11 else dtype
    return float(finite_type.min), float(finite_type.max)


def _simplify(node: ir.Node, clamp: _Clamp, version: int, taken: set[str], context: Context) -> None:
    source = clamp.source
    before = source.producer()
    inner = _clamp(before, version) if before is not None and _is_activation(before) else None
    if not isinstance(inner, _Clamp):
        inner = None
    floating = source.dtype is not None and source.dtype.is_floating_point()
    idle = floating and clamp.low <= 0 and clamp.high == np.inf and non_negative(source)
    if idle or (inner is not None and (clamp(inner.low), clamp(inner.high)) == (inner.low, inner.high)):
        objection = cannot_forward(node.outputs[0], source)
        if objection:
            context.missed(node, objection)
            return
        forward(node.outputs[0], source)
        remove(node)
        context.applied(node, f"its input from {before.op_type if before else 'a constant'} is within its bounds")
        return
    if inner is not None and before is not None:
        if len(source.uses()) > 1 or source.is_graph_output():
            context.missed(node, f"the result of {before.op_type} '{before.name}' is used elsewhere too")
        else:
            merged = _Clamp(inner.source, clamp(inner.low), clamp(inner.high))
            if _write(node, merged, version, taken):
                remove(before)
                context.applied(node, f"merged with {before.op_type} '{before.name}'")
                return
    old = node.op_type
    if (old in ("Max", "Min") or (old == "Clip" and (clamp.low, clamp.high) == (0, np.inf))) and _write(
        node, clamp, version, taken
    ):
        context.applied(node, f"{old} with a constant is {node.op_type}")
    elif old == "Clip" and (clamp.low, clamp.high) == _limits(source.dtype or ir.DataType.FLOAT, version, finite=True):
        context.missed(node, "it has no bounds, but makes infinities finite")


def _is_activation(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in ("Relu", "Clip", "Max", "Min")


def _write(node: ir.Node, clamp: _Clamp, version: int, taken: set[str]) -> bool:
    """Make the node this clamp, as Relu or Clip; False where the opset has neither for its type."""
    dtype, graph = clamp.source.dtype, node.graph
    assert dtype is not None
    assert graph is not None
    floating = dtype.is_floating_point()
    lowest, highest = _limits(dtype, version, finite=True)
    relu = clamp.low == 0 and clamp.high == (np.inf if floating else highest) and (floating or version >= 14)
    if not relu and not floating and version < 12:
        return False
    bounds = (None if clamp.low == lowest else clamp.low, None if clamp.high == highest else clamp.high)
    node.attributes.clear()
    node.op_type = "Relu" if relu else "Clip"
    used = node.inputs
    node.resize_inputs(1)
    node.replace_input_with(0, clamp.source)
    if not relu:
        for index, (name, bound) in enumerate(zip(("min", "max"), bounds, strict=True), start=1):
            if bound is None:
                continue
            if version < 11:
                node.attributes.add(ir.AttrFloat32(name, bound))
                continue
            node.resize_inputs(max(index + 1, len(node.inputs)))
            array = np.array(bound, dtype.numpy())
            node.replace_input_with(index, add_constant(graph, f"{node.name}/{name}", array, taken))
    prune(used)
    return True


def _leaky_relu(node: ir.Node) -> bool:
    """Turn ``Max(x, a * x)`` into ``LeakyRelu(x, alpha=a)``: equal for every ``0 < a < 1``, NaN and infinities too."""
    if len(node.inputs) != 2:
        return False
    for x, product in (node.inputs, node.inputs[::-1]):
        multiply = product.producer() if product is not None else None
        if x is None or x.dtype != ir.DataType.FLOAT or product is None:
            continue
        if multiply is None or multiply.domain or multiply.op_type != "Mul":
            continue
        slopes = [constant(v) for v in multiply.inputs if v is not x]
        slope = slopes[0] if len(slopes) == 1 else None
        if slope is None or slope.size != 1 or slope.ndim > len(x.shape or ()) or not 0 < slope.item() < 1:
            continue
        node.op_type = "LeakyRelu"
        node.resize_inputs(1)
        node.replace_input_with(0, x)
        node.attributes.add(ir.AttrFloat32("alpha", slope.item()))
        if not product.uses() and not product.is_graph_output():
            remove(multiply)
        return True
    return False
