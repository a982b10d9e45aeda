"""Remove what only describes the model, where that takes a large part of the file."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

import onnx
import onnx_ir as ir
from pydantic import Field

from optkit import Context, Pass
from optkit.graph import opset
from optkit.model.loading import weight_bytes

# Defaults that the operators' documentation gives and their schemas do not.
DOCUMENTED_ONES, DOCUMENTED_ZEROS = ("dilations", "strides"), ("pads",)
WINDOW_OPS = {"AveragePool", "Conv", "ConvTranspose", "MaxPool"}
TYPE_BYTES = 24  # of a value's element type and shape in a file, about

ALPHABET = string.ascii_letters + string.digits


class PruneMetadata(Pass):
    """Shorten names and drop what a runtime derives, in models whose weights are small beside them.

    In a network for a microcontroller the names of tensors take more flash than the weights of a layer. Inputs and
    outputs keep their names and nodes that compute keep theirs, so that reports still speak of them; quantize and
    dequantize nodes go without, all other values get names of one to three characters. Types of values inside the
    graph, documentation and attributes at their default go.
    """

    min_share: float = Field(default=0.25, ge=0, le=1)  # names and types, of all bytes, above which it is worth it

    def run(self, model: ir.Model, context: Context) -> None:
        """Prune the whole model, bodies included, or nothing."""
        described = _description_bytes(model)
        share = described / max(described + weight_bytes(model), 1)
        if share < self.min_share:
            context.missed("model", f"names and types take {share:.0%} of its bytes, less than {self.min_share:.0%}")
            return
        interface = {*model.graph.inputs, *model.graph.outputs}
        names = _short_names({value.name for value in interface})
        values = [v for graph in model.graphs() for v in _values(graph) if v not in interface and v.name]
        short = list(itertools.islice(names, len(values)))
        renamed = len(values) if short != [value.name for value in values] else 0
        if renamed:  # all of them, so that initializers keep their order
            for number, value in enumerate(values):
                value.name = f"prune-metadata/{number}"  # out of the way: another value may still hold the short name
            for value, name in zip(values, short, strict=True):
                value.name = name
        dropped = 0
        for value in values:
            dropped += value.doc_string is not None
            value.doc_string = None
            if not (value.is_graph_input() or value.is_graph_output()):  # of a body
                dropped += value.type is not None
                value.type = value.shape = None  # a constant's tensor has its own
        for node in model.graph.all_nodes():
            dropped += node.doc_string is not None
            node.doc_string = None
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                dropped += bool(node.name)
                node.name = ""
            for name in [name for name, value in node.attributes.items() if _is_default(node, value, opset(model))]:
                node.attributes.pop(name)
                dropped += 1
        if renamed or dropped:
            context.applied("model", f"shortened the names of {renamed} values")


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from list(graph.initializers.values())
    for node in graph:
        yield from node.outputs


def _description_bytes(model: ir.Model) -> int:
    """Return the bytes of all names, as often as they are written, and of the types of values inside the graph."""
    total = 0
    for graph in model.graphs():
        total += sum(len(name) for name in graph.initializers)
        for node in graph:
            total += len(node.name or "") + sum(len(value.name or "") for value in node.inputs if value is not None)
            total += sum(2 * len(value.name or "") + TYPE_BYTES for value in node.outputs if value.type is not None)
    return total


def _short_names(taken: set[str | None]) -> Iterator[str]:
    """Yield a, b, ..., 9, aa, ab, ...; what is taken is left out."""
    for length in itertools.count(1):
        for letters in itertools.product(ALPHABET, repeat=length):
            name = "".join(letters)
            if name not in taken:
                yield name


def _is_default(node: ir.Node, attribute: ir.Attr, version: int) -> bool:
    """Return whether the operator means the same without this attribute."""
    if node.domain != "" or attribute.is_ref():
        return False
    if node.op_type in WINDOW_OPS and attribute.type == ir.AttributeType.INTS:
        wanted = 1 if attribute.name in DOCUMENTED_ONES else 0 if attribute.name in DOCUMENTED_ZEROS else None
        return wanted is not None and all(item == wanted for item in attribute.as_ints())
    try:
        declared = onnx.defs.get_schema(node.op_type, version, "").attributes.get(attribute.name)
    except onnx.defs.SchemaError:
        return False
    if declared is None or not declared.default_value.name:
        return False
    default = ir.from_proto(declared.default_value)
    return bool(default.type == attribute.type and default.value == attribute.value)
