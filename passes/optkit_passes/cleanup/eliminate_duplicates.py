"""Compute each result once and store each tensor once."""

from __future__ import annotations

import hashlib
from collections import ChainMap, defaultdict
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import bodies, cannot_forward, constant, forward, names, prune, unique

DETERMINISTIC_DOMAINS = {"", "ai.onnx.ml"}
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
COMMUTATIVE = {"Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Mul", "Or", "Xor"}
Key = tuple[Hashable, ...]


class EliminateDuplicates(Pass):
    """Let equal nodes share one result and equal initializers one tensor.

    Nodes are equal when operator, attributes, inputs, and ``optkit.`` metadata are. A body may take the result of the
    graph around it, never that of another body. Initializers are equal when type, shape and bytes are; those that two
    bodies hold move to the main graph. Inputs and outputs of the model stay what they are.
    """

    min_shared_bytes: int = 1024  # smaller tensors stay in their own body, where ONNX's shape inference can read them

    def run(self, model: ir.Model, context: Context) -> None:
        """Merge initializers first: nodes are equal only if their inputs are the same values."""
        taken = names(model)
        for values in _equal_initializers(model, self.min_shared_bytes):
            _share(model, values, taken, context)
        _nodes(model.graph, ChainMap(), context)


def _equal_initializers(model: ir.Model, min_shared_bytes: int) -> list[list[ir.Value]]:
    """Return groups of equal initializers, the main graph's first; small ones are grouped within their graph."""
    alike: dict[Key, list[ir.Value]] = defaultdict(list)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING:
                home = id(graph) if tensor.nbytes < min_shared_bytes else 0
                alike[home, tensor.dtype, tuple(tensor.shape)].append(value)
    equal: dict[Key, list[ir.Value]] = defaultdict(list)
    for kind, values in alike.items():
        for value in values if len(values) > 1 else ():
            if value.const_value is not None:
                equal[*kind, hashlib.sha256(value.const_value.tobytes()).digest()].append(value)
    return [values for values in equal.values() if len(values) > 1]


def _share(model: ir.Model, values: list[ir.Value], taken: set[str], context: Context) -> None:
    """Keep one of several equal initializers."""
    fixed = [value for value in values if value.is_graph_input() or value.is_graph_output()]
    for value in fixed:
        context.missed(value, "it equals another initializer, but its name is an input or output of the graph")
    written = [value for value in values if any(_trains(node) for node, _ in value.uses())]
    for value in written:
        context.missed(value, "it equals another initializer, but a BatchNormalization in training mode writes over it")
    free = [value for value in values if value not in fixed and value not in written]
    homes = {id(value.graph) for value in free}
    kept = free[0] if free else None
    if kept is None or kept.name is None or kept.graph is None:
        return
    if len(homes) > 1 and kept.graph is not model.graph:
        kept.graph.initializers.pop(kept.name)
        kept.name = unique(f"{kept.name}/shared", taken)
        model.graph.register_initializer(kept)
        context.applied(kept, "the bodies that hold this tensor share it in the main graph")
    for value in free[1:]:
        context.applied(value, f"the same tensor as '{kept.name}'")
        forward(value, kept)
        prune([value])


def _trains(node: ir.Node) -> bool:
    """Whether a BatchNormalization is in training mode, where onnxruntime writes over its running mean and variance."""
    mode = node.attributes.get("training_mode")
    return node.op_type == "BatchNormalization" and mode is not None and bool(mode.as_int())


def _attribute(attribute: ir.Attr) -> Hashable | None:
    """Return an attribute's value by its bits, so that 0.0 and -0.0 differ; None where it cannot be compared."""
    kind = attribute.type
    if attribute.is_ref():
        return None
    if kind == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.dtype == ir.DataType.STRING:
            return None
        return kind, tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()
    if kind in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        return kind, np.asarray(attribute.value, np.float32).tobytes()
    if kind in (ir.AttributeType.INT, ir.AttributeType.STRING):
        return kind, attribute.value
    if kind in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return kind, tuple(attribute.value)
    return None


def _key(node: ir.Node) -> Key | None:
    """Return what makes a node the same as another; None where it is like no other."""
    attributes = {name: _attribute(attribute) for name, attribute in node.attributes.items()}
    if None in attributes.values() or node.op_type in RANDOM:
        return None
    mode = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
    training = constant(mode)
    if mode is not None and (training is None or training.any()):
        return None
    inputs = [id(value) if value is not None else 0 for value in node.inputs]
    return (
        node.op_identifier(),
        tuple(sorted(inputs) if node.op_type in COMMUTATIVE else inputs),
        tuple(sorted(attributes.items())),
        tuple(bool(output.name) for output in node.outputs),
        tuple(sorted(item for item in node.metadata_props.items() if item[0].startswith("optkit."))),
    )


def _nodes(graph: ir.Graph, seen: ChainMap[Key, ir.Node], context: Context) -> None:
    for node in list(graph):
        for body in bodies(node):
            _nodes(body, seen.new_child(), context)
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            _merge(node, first, context)


def _merge(node: ir.Node, first: ir.Node, context: Context) -> None:
    """Let the results of ``first`` stand in for those of an equal node after it."""
    if node.domain not in DETERMINISTIC_DOMAINS:
        context.missed(node, f"it equals '{first.name}', but an operator of domain '{node.domain}' may be random")
        return
    objections = [cannot_forward(*pair) for pair in zip(node.outputs, first.outputs, strict=True)]
    if any(objections):
        if node.op_type != "Identity":
            context.missed(node, f"it equals '{first.name}', but {next(filter(None, objections))}")
        return
    context.applied(node, f"it equals '{first.name}'")
    for old, new in zip(node.outputs, first.outputs, strict=True):
        if old.name:
            forward(old, new)
    for name, text in node.metadata_props.items():
        first.metadata_props.setdefault(name, text)
    if node.graph is not None:
        node.graph.remove(node, safe=True)
