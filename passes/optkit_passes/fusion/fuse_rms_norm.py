"""Fuse RMSNormalization from the operators that exporters write it with."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from optkit.graph import names, opset
from optkit.pipeline import Context, Effect, Pass
from optkit_passes.fusion.linear import RefusedError
from optkit_passes.fusion.matching import collect, is_operator, produced_by, replace
from optkit_passes.fusion.normalization import (
    FUSED_TYPES,
    Normalized,
    deviation,
    mean_of,
    normalized_dims,
    quotient,
    require_opset,
    scale_of,
    squared,
)

SINCE = 23  # the opset that introduced RMSNormalization


class FuseRmsNorm(Pass):
    """Turn ``x / sqrt(mean(x^2) + epsilon) * scale`` into ``RMSNormalization`` (since opset 23).

    The mean is over the last axes. The division may be a product with the inverse, the inverse may be multiplied with
    the scale first, and the scale may be absent. Where x is cast to float32 before and the quotient back behind it,
    before the scale, the casts are fused too: that is what RMSNormalization does inside (``stash_type`` 1).
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-5)

    def run(self, model: ir.Model, context: Context) -> None:
        """Find the mean of squares, and from there the rest."""
        taken, version = names(model), opset(model)
        for graph in list(model.graphs()):
            for node in list(graph):
                source = squared(node) if node.graph is not None else None
                if source is None or _is_centered(source):
                    continue
                try:
                    match = _match(node, source)
                    count = len(collect(match.root, [*match.operands, source]))
                    require_opset("RMSNormalization", SINCE, version)
                except RefusedError as reason:
                    context.missed(node, str(reason))
                    continue
                replace(match.root, "RMSNormalization", match.inputs(taken), match.attributes())
                context.applied(match.root, f"fused {count} operators that normalize the last {len(match.dims)} axes")


def _is_centered(value: ir.Value) -> bool:
    """Return whether the value is ``x - mean(x)``: its mean of squares is a variance, that of a layer normalization."""
    node = produced_by(value, "Sub")
    return node is not None and mean_of(node.inputs[1]) is node.inputs[0]


def _match(mean: ir.Node, source: ir.Value) -> Normalized:
    """Read the RMS normalization around a mean of squares.

    Raises:
        RefusedError: It is none that RMSNormalization can compute.
    """
    dims, rank = normalized_dims(mean, source), len(source.shape or ())
    measure = deviation(mean)
    root, inner = quotient(measure, lambda value: value is source)
    if inner is None:
        source, root = _without_casts(source, root)
    root, scale = scale_of(root, inner, dims, rank)
    return Normalized(root, source, dims, measure.epsilon, scale)


def _without_casts(source: ir.Value, root: ir.Node) -> tuple[ir.Value, ir.Node]:
    """Return x before its cast to float32, and the cast of the quotient back to x's type; else both as they are."""
    result, up = root.outputs[0], produced_by(source, "Cast")
    narrow = up.inputs[0] if up is not None and source.dtype == ir.DataType.FLOAT else None
    if narrow is None or narrow.dtype not in FUSED_TYPES or len(result.uses()) != 1 or result.is_graph_output():
        return source, root
    down = next(iter(result.uses())).node
    back = is_operator(down, "Cast") and down.attributes.get_int("to", 0) == narrow.dtype and down.graph is root.graph
    return (narrow, down) if back else (source, root)
