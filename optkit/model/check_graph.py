"""What a model must satisfy to be loaded; each refusal is one sentence that names the node or the tensor.

The checks run on the file's own structure, before it becomes a graph of values, so that they can say what stands there.
``onnx.checker`` has the last word; these come first because their sentences name things as their author did.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optkit.errors import InputError, did_you_mean
from optkit.model.check_tensor import bodies, check_tensor, proto_tensors

OLDEST_OPSET = 7

# Removed from ONNX before 1.5 but still run by onnxruntime and still found in old files (onnx Changelog, opset 10).
EXPERIMENTAL_OPS = frozenset({"ATen", "Affine", "Crop", "DynamicSlice", "GRUUnit", "GivenTensorFill", "ImageScaler"})
EXPERIMENTAL_OPS |= {"ParametricSoftplus", "Scale", "ScaledTanh"}

FunctionKey = tuple[str, str, str]


def check_proto(proto: onnx.ModelProto, file: Path) -> None:
    """Check versions, names, operators and tensors of a parsed model.

    Raises:
        InputError: The first thing that is wrong.
    """
    if proto.ir_version > onnx.IR_VERSION:
        what = f"IR version {proto.ir_version} is newer than onnx {onnx.__version__} knows ({onnx.IR_VERSION})"
        raise InputError(what, where=str(file), hint="upgrade the onnx package")
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    _check_recursion(functions, file)
    body = _Body(file, _opsets(proto.opset_import, file), functions)
    body.check_graph(proto.graph, (), "the graph")
    for function in proto.functions:
        label = f"function '{_function_name(function)}'"
        opsets = _opsets(function.opset_import, file)
        _Body(file, opsets, functions).check_nodes(function.node, ({*function.input},), function.output, label)
    folder = file.parent.resolve()
    for name, tensor in proto_tensors(proto):
        check_tensor(tensor, folder, f"{file}: tensor '{name}'")


def _function_name(function: onnx.FunctionProto) -> str:
    return f"{function.domain}::{function.name}" if function.domain else str(function.name)


def _label(node: onnx.NodeProto) -> str:
    """Name a node: by its name, or by what it produces where it has none."""
    if node.name:
        return f"node '{node.name}' ({node.op_type})"
    return f"{node.op_type} that produces '{node.output[0]}'" if node.output else f"a {node.op_type}"


def _opsets(imports: Iterable[onnx.OperatorSetIdProto], file: Path) -> dict[str, int]:
    """Return the imported opsets by domain ('' is ai.onnx), refusing ai.onnx versions that cannot be read."""
    opsets = {"" if item.domain == "ai.onnx" else item.domain: item.version for item in imports}
    opset, newest = opsets.get(""), onnx.defs.onnx_opset_version()
    if opset is not None and opset < OLDEST_OPSET:
        what = f"opset {opset} is older than {OLDEST_OPSET}, the oldest that is read"
        raise InputError(what, where=str(file), hint="convert it with onnx.version_converter")
    if opset is not None and opset > newest:
        what = f"opset {opset} is newer than onnx {onnx.__version__} knows ({newest})"
        raise InputError(what, where=str(file), hint="upgrade the onnx package")
    return opsets


def _check_recursion(functions: dict[FunctionKey, onnx.FunctionProto], file: Path) -> None:
    def calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[FunctionKey]:
        for node in nodes:
            if (key := (node.domain, node.op_type, node.overload)) in functions:
                yield key
            for attribute in node.attribute:
                for graph in bodies(attribute):
                    yield from calls(graph.node)

    try:
        graphlib.TopologicalSorter({key: set(calls(f.node)) for key, f in functions.items()}).prepare()
    except graphlib.CycleError as error:
        circle = sorted({_function_name(functions[key]) for key in error.args[1]})
        if len(circle) == 1:
            raise InputError(f"function '{circle[0]}' calls itself", where=str(file)) from None
        names = " and ".join(f"'{name}'" for name in circle)
        raise InputError(f"functions {names} call each other in a circle", where=str(file)) from None


@dataclass(frozen=True)
class _Body:
    """The nodes of a graph or function, and what they may refer to."""

    file: Path
    opsets: dict[str, int]
    functions: dict[FunctionKey, onnx.FunctionProto]

    def check_graph(self, graph: onnx.GraphProto, outer: tuple[set[str], ...], label: str) -> None:
        inputs = _unique([value.name for value in graph.input], f"{label} has two inputs", self.file)
        for value in graph.input:
            if value.type.WhichOneof("value") is None:
                raise InputError(f"{label} has an input '{value.name}' without an element type", where=str(self.file))
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise InputError(
                "it is stored sparse, which is not read",
                where=f"{self.file}: tensor '{name}'",
                hint="store it as a dense initializer",
            )
        initializers = _unique([t.name for t in graph.initializer], f"{label} has two initializers", self.file)
        if "" in inputs | initializers:
            raise InputError(f"{label} has an input or initializer without a name", where=str(self.file))
        outputs = [value.name for value in graph.output]
        if not outputs:
            raise InputError(f"{label} has no output", where=str(self.file), hint="export it with its results")
        self.check_nodes(graph.node, (*outer, inputs | initializers), outputs, label)

    def check_nodes(
        self, nodes: Sequence[onnx.NodeProto], scopes: tuple[set[str], ...], outputs: Iterable[str], label: str
    ) -> None:
        """Check nodes whose last scope holds the names of their inputs and initializers; it receives their outputs."""
        own = scopes[-1]
        producers: dict[str, onnx.NodeProto] = {}
        for node in nodes:
            for name in filter(None, node.output):
                if name in producers:
                    what = f"'{name}' is produced twice: by {_label(producers[name])} and by {_label(node)}"
                    raise InputError(what, where=str(self.file))
                if name in own:
                    what = f"it produces '{name}', which is already an input or initializer"
                    raise InputError(what, where=f"{self.file}: {_label(node)}")
                own.add(name)
                producers[name] = node
        for node in nodes:
            for name in filter(None, node.input):
                if not any(name in scope for scope in scopes):
                    what = f"it reads '{name}', which nothing produces"
                    raise InputError(what, where=f"{self.file}: {_label(node)}")
            self.check_node(node)
            for attribute in node.attribute:
                for graph in bodies(attribute):
                    self.check_graph(graph, scopes, f"the body '{attribute.name}' of {_label(node)}")
        for name in outputs:
            if name not in own:
                raise InputError(f"{label} has an output '{name}', which nothing in it produces", where=str(self.file))

    def check_node(self, node: onnx.NodeProto) -> None:
        """Check the operator, the number of its inputs and outputs, and its attributes."""
        where = f"{self.file}: {_label(node)}"
        domain = "" if node.domain == "ai.onnx" else node.domain
        for attribute in node.attribute:
            if attribute.type in (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS):
                what = f"its attribute '{attribute.name}' is a sparse tensor, which is not read"
                raise InputError(what, where=where, hint="store it dense")
        if domain not in self.opsets:
            what = f"it is of the domain '{domain or 'ai.onnx'}', for which the model declares no opset"
            raise InputError(what, where=where)
        function = self.functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            _check_count(len(node.input), 0, len(function.input), "input", where)
        elif domain == "" and node.op_type not in EXPERIMENTAL_OPS:
            operator = schema(node.op_type, self.opsets[""])
            if operator is None:
                raise _unknown_operator(node.op_type, self.opsets[""], where)
            _check_count(len(node.input), operator.min_input, operator.max_input, "input", where)
            _check_count(len(node.output), operator.min_output, operator.max_output, "output", where)
            _check_attributes(node, operator, where)


def _unique(names: Sequence[str], what: str, file: Path) -> set[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{what} named '{name}'", where=str(file))
        seen.add(name)
    return seen


def _check_count(given: int, least: int, most: int, what: str, where: str) -> None:
    if least <= given <= most:
        return
    bound = least if given < least else most
    takes = "" if least == most else "at least " if given < least else "at most "
    verb = "takes" if what == "input" else "produces"
    has = f"{given} {what}{'' if given == 1 else 's'}"
    raise InputError(f"it has {has}, but {verb} {takes}{bound} {what}{'' if bound == 1 else 's'}", where=where)


def _check_attributes(node: onnx.NodeProto, operator: onnx.defs.OpSchema, where: str) -> None:
    given = {attribute.name for attribute in node.attribute}
    for attribute in node.attribute:
        known = operator.attributes.get(attribute.name)
        if known is None:
            what = f"{node.op_type} has no attribute '{attribute.name}' in this opset"
            hint = did_you_mean(attribute.name, operator.attributes) if operator.attributes else ""
            raise InputError(what, where=where, hint=hint)
        if attribute.type != known.type.value:
            takes = known.type.name.lower()
            kind = onnx.AttributeProto.AttributeType.Name(attribute.type).lower()
            raise InputError(f"its attribute '{attribute.name}' is {kind}, but must be {takes}", where=where)
    for name, attribute in operator.attributes.items():
        if attribute.required and name not in given:
            raise InputError(f"it lacks the attribute '{name}', which {node.op_type} requires", where=where)


@lru_cache(maxsize=4096)
def schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    """Return an ai.onnx operator as that opset defines it; None where it has no such operator."""
    try:
        found = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    return None if found.deprecated else found


def _unknown_operator(op_type: str, opset: int, where: str) -> InputError:
    versions = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain == "" and s.name == op_type]
    first = min((s.since_version for s in versions), default=0)
    if first > opset:
        what = f"{op_type} exists since opset {first}, and the model declares opset {opset}"
        return InputError(what, where=where, hint="export it with that opset")
    later = min((s.since_version for s in versions if s.since_version > opset and not s.deprecated), default=0)
    if later:
        what = f"{op_type} of opset {opset} is deprecated: ONNX has defined it anew in opset {later}"
        return InputError(what, where=where, hint=f"export it with opset {later} or newer")
    if versions:
        removed = min(s.since_version for s in versions if s.deprecated)
        what = f"{op_type} was removed from ONNX in opset {removed}, and the model declares opset {opset}"
        return InputError(what, where=where, hint="export it with an older opset, or with the operator's successor")
    known = {s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}
    hint = did_you_mean(op_type, known)
    if not hint.startswith("did"):
        hint = "an operator of your own needs a domain of its own"
    return InputError(f"ai.onnx has no operator '{op_type}'", where=where, hint=hint)


def find_cycle(proto: onnx.ModelProto) -> str:
    """Return the names of nodes that depend on each other in a circle, as the end of a sentence."""
    functions = [onnx.GraphProto(node=function.node) for function in proto.functions]
    for body in [graph for root in (proto.graph, *functions) for graph in all_graphs(root)]:
        producers = {name: number for number, node in enumerate(body.node) for name in node.output if name}
        reads = {n: {producers[name] for name in _reads(node) if name in producers} for n, node in enumerate(body.node)}
        try:
            graphlib.TopologicalSorter(reads).prepare()
        except graphlib.CycleError as error:
            circle = [_label(body.node[number]) for number in error.args[1][:-1]]
            return " -> ".join([*circle[:4], *(["..."] if len(circle) > 4 else []), circle[0]])
    return ""


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and every body in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in bodies(attribute):
                yield from all_graphs(body)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that a node and its bodies read."""
    yield from node.input
    for attribute in node.attribute:
        for body in bodies(attribute):
            for inner in body.node:
                yield from _reads(inner)


def run_checker(copy: ir.Model, file: Path) -> None:
    """Run ``onnx.checker`` on the sorted structure: weights are left out, so that any size is checked the same way.

    Args:
        copy: A copy of the model as it would be stored; changed in place.
        file: Where it came from, for the sentence.

    Raises:
        InputError: The checker's sentence.
    """
    for value in [*copy.graph.inputs, *copy.graph.outputs]:
        if isinstance(value.type, ir.TensorType) and value.shape is None:
            value.shape = ir.Shape([])  # onnxruntime runs values of unknown rank, which the checker refuses
    for value in [value for graph in copy.graphs() for value in graph.initializers.values()]:
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _without_values(value.const_value)
    for node in copy.graph.all_nodes():
        if node.domain == "" and node.op_type in EXPERIMENTAL_OPS:
            node.domain = "experimental"  # the checker has forgotten them
            copy.opset_imports["experimental"] = 1
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _without_values(attribute.value))
    try:
        ir_passes.CheckerPass()(copy)
    except Exception as error:
        raise InputError(f"the ONNX checker refuses the graph: {innermost(error)}", where=str(file)) from error


def _without_values(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """Return an empty tensor of the same type: the checker would look for the file in the working directory."""
    return ir.Tensor(np.empty(0, tensor.dtype.numpy()), dtype=tensor.dtype, name=tensor.name)


def innermost(error: BaseException) -> str:
    """Return the first line of the error at the root of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
