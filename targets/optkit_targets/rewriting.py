"""What legalization passes share: writing nodes in the place of one, and giving a reason for not doing so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from optkit import Context
from optkit.graph import add_constant, forward, names, opset, remove, unique
from optkit.model.loading import infer_shapes

Attribute = int | float | str | Sequence[int]
# Operators that compute element by element, of one operand and of several that are broadcast.
UNARY = {"Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"}
UNARY |= {"Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu"}
UNARY |= {"Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"}
BROADCAST = {"Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean"}
BROADCAST |= {"Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"}


class RefusedError(Exception):
    """Why a node stays as it is; the model was not changed."""


class Writer:
    """Writes nodes before one node, named after it, until the last of them takes its place.

    Args:
        node: The node to be replaced.
        taken: The names of the model; grows.
        version: The model's version of the default operator set.
    """

    def __init__(self, node: ir.Node, taken: set[str], version: int) -> None:
        assert node.graph is not None
        self.node, self.taken, self.version, self._graph = node, taken, version, node.graph

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return a new initializer."""
        return add_constant(self._graph, f"{self.node.name}/{name}", array, self.taken)

    def ints(self, name: str, values: Sequence[int]) -> ir.Value:
        """Return a new initializer of int64, one axis."""
        return self.constant(name, np.array(values, np.int64))

    def add(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        shape: Sequence[int] | None = None,
        **attributes: Attribute,
    ) -> ir.Value:
        """Insert a node of one result, by default of the first input's element type, and return the result."""
        return self.insert(ir.node(op_type, inputs, attributes), dtype, shape)

    def insert(self, node: ir.Node, dtype: ir.DataType | None = None, shape: Sequence[int] | None = None) -> ir.Value:
        """Insert a node whose results have an element type, by default the first input's, and return the first."""
        name = f"{self.node.name}/{node.op_type}"
        node.name = unique(name, self.taken)
        source = node.inputs[0] if node.inputs else None
        kind = dtype or (source.dtype if source is not None else None)
        for value in node.outputs:
            value.name = unique(name, self.taken)
            value.type = ir.TensorType(kind) if kind is not None else None
            value.shape = value.shape if shape is None else ir.Shape(shape)
        node.metadata_props.update(self.node.metadata_props)
        self._graph.insert_before(self.node, node)
        return node.outputs[0]

    def replace(self, value: ir.Value) -> None:
        """Let a result of ``add`` stand for the node's first output; its node keeps the name of the old one."""
        old, producer = self.node.outputs[0], value.producer()
        assert producer is not None
        value.shape, value.type = old.shape or value.shape, old.type or value.type
        name = old.name
        forward(old, value)
        value.name = name
        remove(self.node)
        producer.name = self.node.name


W = TypeVar("W", bound=Writer)
# What to do with an operator: rewrite it and say so, return nothing where it is fine, or raise RefusedError.
Rule = Callable[[ir.Node, Writer], str | None]


def apply(
    rules: Mapping[str, Callable[[ir.Node, W], str | None]],
    model: ir.Model,
    context: Context,
    writer: Callable[[ir.Node, set[str], int], W] = Writer,  # type: ignore[assignment]  # W is Writer by default
) -> None:
    """Apply each standard operator's rule to its nodes, bodies included; remark on each rewrite and refusal."""
    taken, version, changed = names(model), opset(model), False
    for graph in list(model.graphs()):
        for node in list(graph):
            rule = rules.get(node.op_type) if node.domain == "" and node.graph is graph else None
            if rule is None:
                continue
            try:
                message = rule(node, writer(node, taken, version))
            except RefusedError as reason:
                context.missed(node, str(reason))
                continue
            if message:
                context.applied(node, message)
                changed = True
    if changed:
        infer_shapes(model)
