"""Fuse LayerNormalization from the operators that exporters write it with."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from optkit.graph import names, opset
from optkit.pipeline import Context, Effect, Pass
from optkit_passes.fusion.linear import RefusedError
from optkit_passes.fusion.matching import collect, is_operator, produced_by, replace, sole_reader
from optkit_passes.fusion.normalization import (
    Deviation,
    Normalized,
    deviation,
    mean_of,
    misfit,
    normalized_dims,
    parameter,
    parameter_behind,
    quotient,
    require_opset,
    scale_of,
    squared,
)

SINCE = 17  # the opset that introduced LayerNormalization


class FuseLayerNorm(Pass):
    """Turn ``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * scale + bias`` into ``LayerNormalization``.

    The means are over the last axes. The division may be a product with the inverse, the inverse may be multiplied with
    the scale first, scale and bias may be absent, and ``x * s + (bias - mean(x) * s)``, with s the scaled inverse, is
    the same. Since opset 17.
    """

    # Both subtract the mean, but round it differently: what is lost there grows with mean / deviation. Measured in
    # float32 for mean / deviation = 1000: 1.6e-5, most of it in the decomposed form.
    effect: ClassVar[Effect] = Effect.reassociate(1e-4)

    def run(self, model: ir.Model, context: Context) -> None:
        """Find the mean of squared differences, and from there the rest."""
        taken, version = names(model), opset(model)
        for graph in list(model.graphs()):
            for node in list(graph):
                difference = squared(node) if node.graph is not None else None
                center = produced_by(difference, "Sub")
                if difference is None or center is None or mean_of(center.inputs[1]) is not center.inputs[0]:
                    continue
                try:
                    match = _match(node, difference, center)
                    count = len(collect(match.root, match.operands))
                    require_opset("LayerNormalization", SINCE, version)
                except RefusedError as reason:
                    context.missed(node, str(reason))
                    continue
                replace(match.root, "LayerNormalization", match.inputs(taken), match.attributes())
                context.applied(match.root, f"fused {count} operators that normalize the last {len(match.dims)} axes")


def _match(variance: ir.Node, difference: ir.Value, center: ir.Node) -> Normalized:
    """Read the layer normalization around a variance.

    Raises:
        RefusedError: It is none that LayerNormalization can compute.
    """
    x, mean = center.inputs
    assert x is not None
    assert mean is not None
    producer = mean.producer()
    assert producer is not None
    dims = normalized_dims(variance, x)
    if normalized_dims(producer, x) != dims:
        raise RefusedError("its mean and its variance are over different axes")
    rank = len(x.shape or ())
    measure = deviation(variance)
    expanded = _expanded(measure, x, mean, dims, rank)
    if expanded is not None:
        return expanded

    def is_difference(value: ir.Value) -> bool:
        node = produced_by(value, "Sub")
        return value is difference or (node is not None and tuple(node.inputs) == (x, mean))

    root, scale = scale_of(*quotient(measure, is_difference), dims, rank)
    root, shift = parameter_behind(root, "Add", dims, rank)
    return Normalized(root, x, dims, measure.epsilon, scale, shift)


def _expanded(measure: Deviation, x: ir.Value, mean: ir.Value, dims: tuple[int, ...], rank: int) -> Normalized | None:
    """Read ``x * s + (bias - mean * s)``, with s the inverse deviation times the scale, as TensorFlow writes it."""
    if not measure.inverse:
        return None
    value, scale = measure.result, None
    reader = sole_reader(value, "Mul")
    if reader is not None:
        value, scale = reader[0].outputs[0], parameter(reader[1], dims, rank)
        if scale is None:
            return None
    readers = [use.node for use in value.uses()]
    products = {
        operand: node
        for node in readers
        for operand in (x, mean)
        if is_operator(node, "Mul") and operand in node.inputs and value in node.inputs
    }
    if len(readers) != 2 or set(products) != {x, mean}:
        return None
    subtraction = [use for use in products[mean].outputs[0].uses() if is_operator(use.node, "Sub") and use.idx == 1]
    final = sole_reader(products[x].outputs[0], "Add")
    if len(subtraction) != 1 or final is None or final[1] is not subtraction[0].node.outputs[0]:
        return None
    bias = subtraction[0].node.inputs[0]
    assert bias is not None
    shift = parameter(bias, dims, rank)
    if shift is None:
        raise RefusedError(misfit(bias, dims))
    return Normalized(final[0], x, dims, measure.epsilon, scale, shift)
