"""Evaluate what depends on constants alone, and take the branch of an If whose condition is constant."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import argument, bodies, constant, is_constant, is_unused, remove
from optkit.model.loading import infer_shapes
from optkit.quant.palette import LUT_BITS_KEY
from optkit.session import CannotRunError, Session
from optkit_passes.cleanup.branches import take_branches
from optkit_passes.cleanup.known_shapes import from_shapes, result_bytes, tensor_bytes

QUANTIZATION = {"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"}
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
# Whose result can be much larger than the inputs: evaluated only once its size is known.
ENLARGING = {"CenterCropPad", "ConstantOfShape", "Expand", "EyeLike", "OneHot", "Pad", "Range", "Resize", "Tile"}
ENLARGING |= {"BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix", "Upsample"}
# Whose result is a rearrangement of the first input: a second copy of it while that is used elsewhere.
COPYING = {"Cast", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
COPYING |= {"Unsqueeze"}
SMALL_BYTES = 1024


class FoldConstants(Pass):
    """Replace every node whose inputs are constants by its result, evaluated with the kernel that would run it.

    Shapes and sizes of statically shaped values are constants too, and an If with a constant condition becomes the
    nodes of the branch it takes. Quantize and dequantize nodes, palettized weights, random numbers, training mode and
    what onnxruntime has no kernel for stay. Of a chain only what something else uses is stored.
    """

    max_bytes: int = 1 << 20  # results larger than this and the node's inputs together are not evaluated
    max_growth_bytes: int = 1 << 16  # results may add this much to the constants that they make superfluous

    def run(self, model: ir.Model, context: Context) -> None:
        """Fold and infer shapes in turn until nothing changes; each round is one inference session."""
        given_up: dict[ir.Node, str] = {}
        while take_branches(model, context) or self._round(model, given_up, context):
            infer_shapes(model)
        for node, reason in given_up.items():
            if node.graph is not None and not all(is_unused(output) for output in node.outputs):
                context.missed(node, reason)

    def _round(self, model: ir.Model, given_up: dict[ir.Node, str], context: Context) -> bool:
        known: dict[ir.Value, np.ndarray] = {}
        for node in model.graph.all_nodes():
            array = None if all(is_unused(output) for output in node.outputs) else from_shapes(node)
            if array is not None:
                known[node.outputs[0]] = array
        later: dict[ir.Node, str] = {}  # refused in this round: their size may become known
        while True:
            nodes = list(_candidates(model.graph, known, set(), given_up, later))
            refused = self._too_large(nodes, known)
            if not refused:
                break
            later.update(refused)
        results = _evaluate(model, [node for node in nodes if node.outputs[0] not in known], known, given_up)
        nodes = [node for node in nodes if node not in given_up and all(v in results for v in node.outputs if v.name)]
        for group in _groups(nodes):
            growth = _growth(group, set(nodes), results)
            if growth > self.max_growth_bytes:
                reason = f"folding would add {growth} bytes to the constants of the model"
                later.update(dict.fromkeys(group, reason))
                given_up.update(dict.fromkeys(group, reason))
        nodes = [node for node in nodes if node not in given_up]
        _replace(nodes, results, context)
        if not nodes:
            given_up.update(later)
        return bool(nodes)

    def _too_large(self, nodes: list[ir.Node], known: dict[ir.Value, np.ndarray]) -> dict[ir.Node, str]:
        """Return the nodes that are not worth evaluating, or could not be held."""
        inside, refused = set(nodes), dict[ir.Node, str]()
        sizes = {value: array.nbytes for value, array in known.items()}
        for node in nodes:
            size = result_bytes(node)
            if size is None and node.op_type in ENLARGING:
                refused[node] = "the size of its result is not known"
            given = sum(sizes.get(v, tensor_bytes(v)) for v in dict.fromkeys(node.inputs) if v is not None)
            source = argument(node, 0)
            if size is not None and size > self.max_bytes + given:
                refused[node] = f"its result of {size} bytes is too large to evaluate"
            elif node.op_type in COPYING and source is not None and is_constant(source) and (size or 0) > SMALL_BYTES:
                elsewhere = {user for user, _ in source.uses()} - inside
                if elsewhere or source.is_graph_output():
                    refused[node] = f"'{source.name}' is used elsewhere too: folding would store it twice"
            sizes.update(dict.fromkeys(node.outputs, size or given))
        return refused


def _groups(nodes: list[ir.Node]) -> list[list[ir.Node]]:
    """Return the nodes in groups that share no result and no large constant."""
    parent: dict[ir.Node | ir.Value, ir.Node | ir.Value] = {node: node for node in nodes}

    def root(member: ir.Node | ir.Value) -> ir.Node | ir.Value:
        while parent.setdefault(member, member) is not member:
            parent[member] = member = parent[parent[member]]
        return member

    for node in nodes:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in parent:
                parent[root(producer)] = root(node)
            elif value is not None and tensor_bytes(value) > SMALL_BYTES:
                parent[root(value)] = root(node)
    groups: dict[ir.Node | ir.Value, list[ir.Node]] = defaultdict(list)
    for node in nodes:
        groups[root(node)].append(node)
    return list(groups.values())


def _growth(group: list[ir.Node], inside: set[ir.Node], results: dict[ir.Value, np.ndarray]) -> int:
    """Return the bytes of the results to store, equal ones once, less those of the constants they supersede."""
    stored = {}
    for value in (value for node in group for value in node.outputs):
        if value.is_graph_output() or {user for user, _ in value.uses()} - inside:
            array = results[value]
            stored[array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest()] = array.nbytes
    inputs = dict.fromkeys(value for node in group for value in node.inputs if value is not None)
    freed = [v for v in inputs if not v.is_graph_output() and {user for user, _ in v.uses()} <= inside]
    return sum(stored.values()) - sum(tensor_bytes(value) for value in freed)


def _candidates(
    graph: ir.Graph,
    known: dict[ir.Value, np.ndarray],
    found: set[ir.Value],
    given_up: dict[ir.Node, str],
    later: dict[ir.Node, str],
) -> Iterator[ir.Node]:
    """Yield, in order, the nodes of a graph and its bodies that depend on constants alone."""
    for node in graph:
        inputs = [*node.inputs, *_captured(node)]
        constants = all(value is None or is_constant(value) or value in found for value in inputs)
        used = not all(is_unused(output) for output in node.outputs)
        is_output = node.op_type == "Constant" and node.outputs[0].is_graph_output()
        if (node.outputs[0] in known and node not in given_up) or (
            constants and used and not is_output and node not in given_up and node not in later
        ):
            refusal = "" if node.outputs[0] in known else _refusal(node)
            if refusal:
                given_up[node] = refusal
            elif all(isinstance(output.type, ir.TensorType | None) for output in node.outputs):
                found.update(node.outputs)
                yield node
        for body in bodies(node):
            yield from _candidates(body, known, found, given_up, later)


def _captured(node: ir.Node) -> list[ir.Value]:
    """Return what the bodies of a node take from the graphs around them."""
    inner = [each for body in bodies(node) for each in body.all_nodes()]
    own = {body for each in [node, *inner] for body in bodies(each)}
    return [value for each in inner for value in each.inputs if value is not None and value.graph not in own]


def _refusal(node: ir.Node) -> str:
    """Return why a node stays although its inputs are constants."""
    if bodies(node):
        return "its inputs are constants, but loops are not unrolled"
    if node.domain == "" and node.op_type in QUANTIZATION:
        return "folding would undo the quantization"
    if LUT_BITS_KEY in node.metadata_props:
        return "folding would expand a weight that is stored as indices into a LUT"
    if node.domain == "" and node.op_type in RANDOM:
        return "it draws random numbers"
    training = constant(argument(node, 2)) if node.op_type == "Dropout" else None
    if training is not None and training.any():
        return "it runs in training mode"
    if node.op_type == "BatchNormalization" and (
        len(node.outputs) > 1 or node.attributes.get_int("training_mode", 0) != 0
    ):
        return "it runs in training mode"
    return ""


def _evaluate(
    model: ir.Model, nodes: list[ir.Node], known: dict[ir.Value, np.ndarray], given_up: dict[ir.Node, str]
) -> dict[ir.Value, np.ndarray]:
    """Return the results of the nodes, all in one session, or one by one where onnxruntime refuses one of them."""
    results = dict(known)
    try:
        results.update(_run(model, nodes, known))
    except CannotRunError:
        for node in nodes:
            try:
                if all(value is None or is_constant(value) or value in results for value in node.inputs):
                    results.update(_run(model, [node], results))
            except CannotRunError as error:
                given_up[node] = f"it cannot be evaluated: {error.what}"
    for node in nodes:
        if any(isinstance(results.get(value), np.ndarray) and results[value].dtype == object for value in node.outputs):
            given_up[node] = "its result holds strings"
    return results


def _run(model: ir.Model, nodes: list[ir.Node], known: dict[ir.Value, np.ndarray]) -> dict[ir.Value, np.ndarray]:
    """Run the nodes as a model of their own; values are renamed, since those of two bodies may share a name."""
    if not nodes:
        return {}
    copies: dict[ir.Value, ir.Value] = {}
    initializers, copied_nodes = [], []
    for node in nodes:
        for value in node.inputs:
            if value is None or value in copies:
                continue
            tensor = ir.tensor(known[value]) if value in known else value.const_value
            copies[value] = ir.Value(name=f"v{len(copies)}", type=value.type, shape=value.shape, const_value=tensor)
            initializers.append(copies[value])
        attributes = list(node.attributes.values())
        inputs = [None if value is None else copies[value] for value in node.inputs]
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=node.name)
        for value, output in zip(node.outputs, copy.outputs, strict=True):
            output.name = f"v{len(copies)}" if value.name else ""
            output.type = value.type
            copies[value] = output
        copied_nodes.append(copy)
    wanted = [value for node in nodes for value in node.outputs if value.name]
    graph = ir.Graph(
        [],
        [copies[value] for value in wanted],
        nodes=copied_nodes,
        initializers=initializers,
        opset_imports=dict(model.opset_imports),
        name="constants",
    )
    arrays = Session(ir.Model(graph, ir_version=model.ir_version)).run({})
    return {value: arrays[copies[value].name or ""] for value in wanted}


def _replace(nodes: list[ir.Node], results: dict[ir.Value, np.ndarray], context: Context) -> None:
    """Put initializers in the place of the results that nodes other than these use."""
    inside = set(nodes)
    for node in nodes:
        context.applied(node, "it depends on constants alone")
    for node in nodes:
        for value in node.outputs:
            if is_unused(value) or (not value.is_graph_output() and {user for user, _ in value.uses()} <= inside):
                continue
            tensor = ir.tensor(results[value], name=value.name)
            stored = ir.Value(
                name=value.name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(results[value].shape),
                const_value=tensor,
                metadata_props=dict(value.metadata_props),
            )
            if node.graph is not None:
                node.graph.register_initializer(stored)
            value.replace_all_uses_with(stored, replace_graph_outputs=True)
    for node in reversed(nodes):
        remove(node)
