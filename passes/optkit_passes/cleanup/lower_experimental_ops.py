"""Rewrite operators that ONNX has removed in terms of those it kept."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import NO_LIMIT, add_constant, argument, ints, names, opset, prune, unique
from optkit.model.check_graph import EXPERIMENTAL_OPS
from optkit.model.loading import infer_shapes
from optkit.pipeline import Context, Effect, Pass

Steps = list[tuple[str, tuple[np.ndarray, ...]]]  # operators applied one after the other, with their constants


class LowerExperimentalOps(Pass):
    """Rewrite experimental operators, which ONNX 1.5 removed, in terms of standard ones of the model's own opset.

    * ``ImageScaler``: ``scale * x + bias`` per channel
    * ``Affine``: ``alpha * x + beta``
    * ``Scale``: ``scale * x``
    * ``ScaledTanh``: ``alpha * tanh(beta * x)``
    * ``ParametricSoftplus``: ``alpha * softplus(beta * x)``
    * ``Crop``: ``Slice`` of the last two axes
    * ``DynamicSlice``: ``Slice``; before opset 10 only where its bounds are constant

    ATen, GRUUnit and GivenTensorFill stay: no runtime computes them any more.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-5)

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite node by node, bodies included; each round of shape inference reaches the next of them."""
        taken = names(model)
        pending = [node for node in model.graph.all_nodes() if node.domain == "" and node.op_type in EXPERIMENTAL_OPS]
        lowered = True
        while lowered:
            reasons = {}
            lowered = False
            for node in pending:
                removed, reason = node.op_type, _lower(node, opset(model), taken)
                if reason:
                    reasons[node] = reason
                else:
                    lowered = True
                    context.applied(node, f"replaced {removed}, which ONNX no longer has")
            pending = list(reasons)
            if lowered:
                infer_shapes(model)
        for node, reason in reasons.items():
            context.missed(node, reason)


def _lower(node: ir.Node, version: int, taken: set[str]) -> str:
    """Rewrite one node, or say why not."""
    if node.op_type in ("Crop", "DynamicSlice"):
        return _slice(node, version, taken)
    steps = _steps(node)
    return steps if isinstance(steps, str) else _write(node, steps, taken)


def _steps(node: ir.Node) -> Steps | str:
    """Return a chain of element-wise operators that computes what the node does, or why there is none."""

    def number(name: str, default: float | None = None) -> np.ndarray:
        value = node.attributes.get_float(name, default)
        return np.array(np.nan if value is None else value)

    chain: Steps
    match node.op_type:
        case "ImageScaler":
            bias = np.array(node.attributes.get_floats("bias", ())).reshape(1, -1, 1, 1)
            chain = [("Mul", (number("scale", 1.0),)), ("Add", (bias if bias.size else np.array(0.0),))]
        case "Affine":
            chain = [("Mul", (number("alpha", 1.0),)), ("Add", (number("beta", 0.0),))]
        case "Scale":
            chain = [("Mul", (number("scale", 1.0),))]
        case "ScaledTanh" | "ParametricSoftplus":
            function = "Tanh" if node.op_type == "ScaledTanh" else "Softplus"
            chain = [("Mul", (number("beta"),)), (function, ()), ("Mul", (number("alpha"),))]
            if np.isnan(chain[0][1][0]) or np.isnan(chain[2][1][0]):
                return "its alpha or beta is missing, and there is no default"
        case _:
            return "no runtime computes it, so there is nothing to agree with"
    neutral = {"Mul": 1.0, "Add": 0.0}
    chain = [(op, operands) for op, operands in chain if not operands or not (operands[0] == neutral[op]).all()]
    return chain or [("Identity", ())]


def _slice(node: ir.Node, version: int, taken: set[str]) -> str:
    """Turn Crop (border: left, top, right, bottom; scale: height, width) or DynamicSlice into Slice, or say why not."""
    if node.op_type == "DynamicSlice" and version >= 10:
        node.op_type = "Slice"
        return ""
    if node.op_type == "DynamicSlice":
        read = [ints(node, "", index) for index in (1, 2)]
        starts, ends = read
        axes = ints(node, "", 3, default=range(len(starts or ())))
        if starts is None or ends is None or axes is None:
            return "its bounds are computed at run time, which Slice takes only since opset 10"
    else:
        left, top, right, bottom = node.attributes.get_ints("border", (0, 0, 0, 0))
        size = node.attributes.get_ints("scale", ()) or ()
        starts, axes = [top, left], [2, 3]
        ends = [top + size[0], left + size[1]] if size else [-bottom or NO_LIMIT, -right or NO_LIMIT]
    node.op_type = "Slice"
    node.attributes.clear()
    bounds = node.inputs[1:]
    node.resize_inputs(1)
    prune(bounds)
    settings = {"starts": starts, "ends": ends, "axes": axes}
    if version < 10:
        node.attributes.update({name: ir.AttrInt64s(name, values) for name, values in settings.items()})
        return ""
    assert node.graph is not None
    node.resize_inputs(4)
    for index, (name, values) in enumerate(settings.items(), start=1):
        constant = add_constant(node.graph, f"{node.name}/{name}", np.array(values, np.int64), taken)
        node.replace_input_with(index, constant)
    return ""


def _write(node: ir.Node, steps: Steps, taken: set[str]) -> str:
    """Replace the node by the steps; the last one keeps the node's name and its result."""
    graph, value = node.graph, argument(node, 0)
    if graph is None or value is None or value.dtype is None:
        return "the element type of its input is not known"
    node.attributes.clear()
    for number, (op_type, operands) in enumerate(steps, start=1):
        constants = [
            add_constant(graph, f"{node.name}/{op_type}", operand.astype(value.dtype.numpy()), taken)
            for operand in operands
        ]
        if number == len(steps):
            node.op_type = op_type
            node.resize_inputs(1 + len(constants))
            for index, constant in enumerate([value, *constants]):
                node.replace_input_with(index, constant)
        else:
            step = ir.node(op_type, [value, *constants], name=unique(f"{node.name}/{op_type}", taken))
            step.outputs[0].name = unique(f"{node.name}/{op_type}", taken)
            step.outputs[0].type, step.outputs[0].shape = value.type, value.shape
            step.metadata_props.update(node.metadata_props)
            graph.insert_before(node, step)
            value = step.outputs[0]
    return ""
