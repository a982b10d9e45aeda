"""Reductions: one number from many along some axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml.lowering.forms import (
    attribute_or_input,
    axes_of,
    axis_of,
    cast,
    dims,
    dtype,
    is_float,
    label,
    required,
    reshaped,
    setting,
    through,
    volume,
)
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import lowers

REDUCTIONS = {
    "ReduceSum": "reduce_sum",
    "ReduceMean": "reduce_mean",
    "ReduceMax": "reduce_max",
    "ReduceMin": "reduce_min",
    "ReduceProd": "reduce_prod",
    "ReduceL1": "reduce_l1_norm",
    "ReduceL2": "reduce_l2_norm",
    "ReduceLogSum": "reduce_log_sum",
    "ReduceLogSumExp": "reduce_log_sum_exp",
    "ReduceSumSquare": "reduce_sum_square",
}
# What integers have no exact result for: computed in floats and cut off, as ONNX Runtime does.
FRACTIONAL = frozenset({"ReduceMean", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"})
# What a tensor reduced along no axis becomes.
ALONE: dict[str, Callable[[Any, Any], Any]] = {
    "ReduceL1": lambda mb, x: mb.abs(x=x),
    "ReduceL2": lambda mb, x: mb.abs(x=x),
    "ReduceLogSum": lambda mb, x: mb.log(x=x),
    "ReduceSumSquare": lambda mb, x: mb.square(x=x),
}


@lowers(*REDUCTIONS)
def reduce(scope: Scope, node: ir.Node) -> Any:
    """Write a reduction along ``axes``, along all without them, or along none with ``noop_with_empty_axes``."""
    data = scope.input(node, 0)
    own = dims(data)
    axes = axes_of(attribute_or_input(scope, node, "axes", 1) or [], len(own))
    if not own or (not axes and node.attributes.get_int("noop_with_empty_axes", 0) != 0):
        return ALONE.get(node.op_type, lambda mb, x: x)(scope.mb, data)
    operation = getattr(scope.mb, REDUCTIONS[node.op_type])
    keep = node.attributes.get_int("keepdims", 1) != 0
    axes = axes or list(range(len(own)))

    def work(values: Any) -> Any:
        return operation(x=values, axes=axes, keep_dims=keep, name=label(scope, node))

    if dtype(data) == "bool" and node.op_type not in ("ReduceMax", "ReduceMin"):
        raise CannotLower("a sum of truth values has no meaning")
    if node.op_type in FRACTIONAL and not is_float(data):
        return cast(scope, work(cast(scope, data, "fp32")), dtype(data))
    return through(scope, data, ("fp16", "fp32", "int32"), "int32", work)


@lowers("CumSum")
def cumulate(scope: Scope, node: ir.Node) -> Any:
    """Write running sums along an axis, from either end, each with or without its own element."""
    data = scope.input(node, 0)
    axis = axis_of(required(setting(scope, node, 1, "axis"), "axis")[0], len(dims(data)))
    return scope.mb.cumsum(
        x=data,
        axis=axis,
        exclusive=bool(node.attributes.get_int("exclusive", 0)),
        reverse=bool(node.attributes.get_int("reverse", 0)),
        name=label(scope, node),
    )


@lowers("Hardmax")
def hard_max(scope: Scope, node: ir.Node) -> Any:
    """Write 1 at the first largest element along an axis, 0 elsewhere; before opset 13, of all axes from it on."""
    data = scope.input(node, 0)
    own, name = dims(data), label(scope, node)
    recent = scope.opset >= 13
    axis = axis_of(node.attributes.get_int("axis", -1 if recent else 1), len(own))
    rows = data if recent else reshaped(scope, data, [volume(own[:axis]), volume(own[axis:])])
    axis = axis if recent else 1
    found = scope.mb.reduce_argmax(x=rows, axis=axis, keep_dims=False)
    kind = np.float16 if dtype(data) == "fp16" else np.float32
    ones = scope.mb.one_hot(
        indices=found, one_hot_vector_size=dims(rows)[axis], axis=axis, on_value=kind(1), off_value=kind(0), name=name
    )
    return reshaped(scope, ones, own)
