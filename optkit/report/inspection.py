"""Plain facts about a model: interface, dimensions, operators, parameters by dtype, tied weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from optkit.model.loading import dynamic_dims, graph_inputs
from optkit.pipeline import STANDARD_DOMAINS


@dataclass(frozen=True)
class TensorFacts:
    """Name, element type and shape of an input or output; dynamic dimensions keep their names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True)
class ModelFacts:
    """What a model is made of.

    Attributes:
        opsets: Opset version by domain (``ai.onnx`` for the default one).
        nodes: Nodes, those of If/Loop/Scan bodies included.
        ops: How often each operator occurs, most frequent first.
        parameters: Elements of all floating-point and quantized weights, a tied tensor counted once.
        weight_bytes: Bytes of all initializers, a tied tensor counted once.
        bytes_by_dtype: The same by element type.
        tied: Names of tensors with several users, and how many.
        custom_domains: Operators outside the domains that ONNX defines, as ``domain::op``.
    """

    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    dynamic_dims: tuple[str, ...]
    nodes: int
    ops: Mapping[str, int]
    parameters: int
    weight_bytes: int
    bytes_by_dtype: Mapping[str, int]
    tied: Mapping[str, int]
    custom_domains: tuple[str, ...]


def inspect_model(model: ir.Model) -> ModelFacts:
    """Return the facts of a loaded model."""
    ops = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.all_nodes())
    unique: dict[int, ir.Value] = {}
    tied: dict[str, int] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                unique.setdefault(id(value.const_value), value)
                users = len(value.uses())
                if users > 1 and value.const_value.size > 1:
                    tied[value.name or ""] = users
    by_dtype: Counter[str] = Counter()
    parameters = 0
    for value in unique.values():
        tensor = value.const_value
        if tensor is not None:
            by_dtype[tensor.dtype.name.lower()] += tensor.nbytes
            parameters += tensor.size if tensor.dtype not in (ir.DataType.INT64, ir.DataType.BOOL) else 0
    custom = {f"{n.domain}::{n.op_type}" for n in model.graph.all_nodes() if n.domain not in STANDARD_DOMAINS}
    return ModelFacts(
        model.ir_version or 0,
        {domain or "ai.onnx": version for domain, version in sorted(model.opset_imports.items())},
        tuple(_facts(value) for value in graph_inputs(model)),
        tuple(_facts(value) for value in model.graph.outputs),
        tuple(dynamic_dims(model)),
        sum(ops.values()),
        dict(sorted(ops.items(), key=lambda item: (-item[1], item[0]))),
        parameters,
        sum(by_dtype.values()),
        dict(sorted(by_dtype.items())),
        tied,
        tuple(sorted(custom)),
    )


def _facts(value: ir.Value) -> TensorFacts:
    dtype = value.dtype.name.lower() if value.dtype is not None else "unknown"
    shape = None if value.shape is None else tuple(d if isinstance(d, int) else d.value or "?" for d in value.shape)
    return TensorFacts(value.name or "", dtype, shape)
