"""What the passes of this folder share: writing nodes in the place of one, and giving a reason for not doing so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from optkit import Context
from optkit.graph import add_constant, forward, names, opset, remove, unique
from optkit.model.loading import infer_shapes

Attribute = int | float | str | Sequence[int]


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
        **attributes: Attribute,
    ) -> ir.Value:
        """Insert a node of one result, by default of the first input's element type, and return the result."""
        node = ir.node(op_type, inputs, attributes, name=unique(f"{self.node.name}/{op_type}", self.taken))
        source = inputs[0] if inputs else None
        return self.insert(node, dtype or (source.dtype if source is not None else None))

    def insert(self, node: ir.Node, dtype: ir.DataType | None) -> ir.Value:
        """Insert a node of one result, and return the result."""
        result = node.outputs[0]
        result.name = unique(f"{self.node.name}/{node.op_type}", self.taken)
        result.type = ir.TensorType(dtype) if dtype is not None else None
        node.metadata_props.update(self.node.metadata_props)
        self._graph.insert_before(self.node, node)
        return result

    def replace(self, value: ir.Value) -> None:
        """Let a result of ``add`` stand for the node's first output; its node keeps the name of the old one."""
        old, producer = self.node.outputs[0], value.producer()
        assert producer is not None
        if value.shape is None:
            value.shape = old.shape
        name = old.name
        forward(old, value)
        value.name = name
        remove(self.node)
        producer.name = self.node.name


# What to do with an operator: rewrite it and say so, return nothing where it is fine, or raise RefusedError.
Rule = Callable[[ir.Node, Writer], str | None]


def apply(rules: Mapping[str, Rule], model: ir.Model, context: Context) -> None:
    """Apply each standard operator's rule to its nodes, bodies included; remark on each rewrite and refusal."""
    taken, version, changed = names(model), opset(model), False
    for graph in list(model.graphs()):
        for node in list(graph):
            rule = rules.get(node.op_type) if node.domain == "" and node.graph is graph else None
            if rule is None:
                continue
            try:
                message = rule(node, Writer(node, taken, version))
            except RefusedError as reason:
                context.missed(node, str(reason))
                continue
            if message:
                context.applied(node, message)
                changed = True
    if changed:
        infer_shapes(model)
