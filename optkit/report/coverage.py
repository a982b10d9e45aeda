"""What of a model ended in the precision asked for, and what did not and why: by weights and by multiply-accumulates.

A weight is a constant with two axes or more, or one that a product or a lookup reads as such; biases, scales, zero
points and palettes are not weights. It counts once, by its elements, whoever shares it; a weight that is stored in both
forms counts in both. Its bits are those it is stored in: of an index where it is a palette's, of a packed block where
it is one of those, 16 where a Cast widens it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optkit.cost.arithmetic import COMPUTE
from optkit.pipeline import Remark
from optkit.precision import Precision
from optkit.quant.palette import LUT_BITS_KEY
from optkit.report.contents import CostSummary, Coverage, Left

FLOAT_BITS, FLOAT_BYTES = 32, 4  # weights are compared by what they would take in float32
FLOATS = {16: "half precision", 32: "float32", 64: "float64"}
TABLE_BITS = 8  # of a table that counts as covered where fewer were asked for
NAMED = 5  # nodes of one reason that the report names

# The inputs of integer operators that hold weights; what else these take are scales, zero points and biases.
STORED_INPUTS = {
    "ConvInteger": (1,),
    "DequantizeLinear": (0,),
    "DynamicQuantizeLSTM": (1, 2),
    "DynamicQuantizeMatMul": (1,),
    "GatherBlockQuantized": (0,),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "MatMulNBits": (1,),
    "QAttention": (1,),
    "QGemm": (0, 3),
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
    "QuantizeLinear": (0,),
}
BIASES = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "LSTM": 3, "GRU": 3, "RNN": 3}  # and every input after it
PACKED = frozenset({"MatMulNBits", "GatherBlockQuantized"})
LOOKUPS = frozenset({"Gather", "GatherElements", "GatherND"})
# What passes a constant on: the reader is behind it.
CARRIERS = frozenset({
    "Cast", "CastLike", "Concat", "DequantizeLinear", "Expand", "Flatten", "Identity", "QuantizeLinear", "Reshape",
    "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip


@dataclass(frozen=True)
class StoredWeight:
    """A weight as the model holds it.

    Attributes:
        name: The constant.
        elements: How many weights it holds.
        bits: Bits of each.
        readers: The nodes that compute with it.
    """

    name: str
    elements: int
    bits: int
    readers: tuple[ir.Node, ...]


@dataclass(frozen=True)
class _Use:
    node: ir.Node
    index: int
    bits: int | None = None  # where an operator says it


def stored_weights(model: ir.Model) -> list[StoredWeight]:
    """Return every weight of a model, bodies included, in whatever form it is stored; a tied one once."""
    found: dict[int, list[ir.Value]] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING:
                found.setdefault(id(value.const_value), []).append(value)
    weights = []
    for values in found.values():
        weight = _weight(values)
        if weight is not None:
            weights.append(weight)
    return weights


def _weight(values: Sequence[ir.Value]) -> StoredWeight | None:
    """Return the weight that a tensor is, under the names it has, or None."""
    tensor = values[0].const_value
    assert tensor is not None
    floating = tensor.dtype.is_floating_point()
    if tensor.size < 2 or not (floating or (tensor.dtype.bitwidth <= 16 and tensor.dtype != ir.DataType.BOOL)):
        return None
    uses = [use for value in values for use in _uses(value)]
    matrix = len(tensor.shape) > 1
    read = [use for use in uses if matrix or _multiplies(use)]
    if not read and not (floating and matrix and any(value.is_graph_output() for value in values)):
        return None
    bits = min((use.bits for use in read if use.bits is not None), default=tensor.dtype.bitwidth)
    elements = min((_packed_elements(use, tensor) for use in read), default=tensor.size)
    return StoredWeight(values[0].name or "", elements, bits, tuple(dict.fromkeys(use.node for use in read)))


def _packed_elements(use: _Use, tensor: ir.TensorProtocol) -> int:
    """Return how many weights a reader finds in a tensor: several in one byte where it is packed."""
    if use.node.op_type == "MatMulNBits":  # rows may be filled up to whole blocks
        return use.node.attributes.get_int("N", 0) * use.node.attributes.get_int("K", 0)
    if use.node.op_type == "GatherBlockQuantized" and use.bits is not None:
        return tensor.size * (tensor.dtype.bitwidth // use.bits)
    return tensor.size


def _uses(value: ir.Value, bits: int | None = None) -> Iterator[_Use]:
    """Yield the places that read a constant as numbers, behind everything that only passes it on."""
    for node, index in value.uses():
        inside = node.op_type in STORED_INPUTS and index in STORED_INPUTS[node.op_type]
        if node.op_type in STORED_INPUTS and not inside:
            continue  # a scale, a zero point, a bias
        if index >= BIASES.get(node.op_type, math.inf):
            continue
        if LUT_BITS_KEY in node.metadata_props:
            if index != (1 if node.op_type == "Gather" else 0):
                continue  # the palette itself, or where each channel's begins
            yield from _uses(node.outputs[0], int(node.metadata_props[LUT_BITS_KEY]))
        elif node.op_type in CARRIERS and node.domain in ("", "com.microsoft") and _is_carried(node):
            for output in node.outputs:
                yield from _uses(output, bits)
        elif node.op_type in PACKED:
            narrow = node.op_type != "MatMulNBits" and value.dtype is not None and value.dtype.bitwidth < 8
            yield _Use(node, index, None if narrow else node.attributes.get_int("bits", 4))
        else:
            yield _Use(node, index, bits)


def _is_carried(node: ir.Node) -> bool:
    """Whether all that a node reads is constant: then its result is the constant in another shape or type."""
    return all(value is None or value.is_initializer() or _is_computed(value) for value in node.inputs)


def _is_computed(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type in CARRIERS and _is_carried(producer)


def _multiplies(use: _Use) -> bool:
    return use.node.op_type in COMPUTE or (use.node.op_type in LOOKUPS and use.index == 0)


def coverage(
    model: ir.Model, cost: CostSummary, precision: Precision, remarks: Iterable[Remark], passes: Iterable[str]
) -> Coverage:
    """Return how much of a compiled model is in the precision asked for, and what is not and why.

    A weight is covered where it is stored in the bits asked for or fewer. A multiply-accumulate is covered where its
    weights are and, with activations of 8 bits or fewer, it is computed in integers; with a float type, where it is
    computed in that width.

    Args:
        model: The model as packaged.
        cost: Its cost, node by node.
        precision: What was asked for.
        remarks: Everything that the passes said.
        passes: The passes whose refusals are reasons: those that change numbers.
    """
    weights = stored_weights(model)
    reasons = _Reasons(remarks, set(passes))
    most = precision.weight_bits if precision.weight_bits < FLOAT_BITS else math.inf  # float32 asks for nothing
    held: dict[ir.Node, int] = {}
    sizes: dict[int, int] = {}
    left: list[Left] = []
    wide: dict[str, str] = {}  # why the weights of a node have more bits
    for weight in weights:
        sizes[weight.bits] = sizes.get(weight.bits, 0) + weight.elements
        for node in weight.readers:
            held[node] = max(held.get(node, 0), weight.bits)
        if weight.bits > most:
            names = tuple(node.name or "" for node in weight.readers) or (weight.name,)
            left.append(Left(reasons.weight(weight), FLOAT_BYTES * weight.elements, 0, 1, names))
            wide.update(dict.fromkeys(names, left[-1].reason))
    bits = {node.name or "": number for node, number in held.items()}
    for row in (row for row in cost.nodes if row.macs and most < math.inf):
        reason = _why_not(row.dtype, bits.get(row.name), precision)
        if reason:
            left.append(Left(wide.get(row.name) or reasons.node(row.name) or reason, 0, row.macs, 0, (row.name,)))
    elements = sum(sizes.values())
    covered = sum(number for width, number in sizes.items() if width <= most)
    tables = sum(weight.elements for weight in weights if most < weight.bits <= TABLE_BITS and _is_table(weight))
    missed = sum(entry.macs for entry in left)
    return Coverage(
        weights=covered / elements if elements else 1.0,
        macs=1 - missed / cost.macs if cost.macs else 1.0,
        tables=tables / elements if elements else 0.0,
        elements_by_bits=dict(sorted(sizes.items())),
        left=_grouped(left),
    )


def _is_table(weight: StoredWeight) -> bool:
    return all(node.op_type in LOOKUPS or node.op_type == "GatherBlockQuantized" for node in weight.readers)


def _why_not(dtype: str, bits: int | None, precision: Precision) -> str:
    """Return why products of this arithmetic with weights of these bits are not covered; empty if they are."""
    width = int(re.sub(r"\D", "", dtype) or 32)
    if precision.is_float:
        return "" if width <= precision.activation_bits else f"computed in {dtype}"
    if bits is not None and bits > precision.weight_bits:
        return f"its weights are in {bits} bits"
    if precision.integer_activations:
        integer = dtype.startswith("int") and width <= 8
        return (
            ""
            if integer
            else f"computed in {dtype}: its weights are in {bits} bits"
            if bits
            else f"computed in {dtype}"
        )
    return "a product of two activations: it has no weights" if bits is None else ""


class _Reasons:
    """Why a node or a constant was left, in the words of the pass that left it; the last one's where several did."""

    def __init__(self, remarks: Iterable[Remark], passes: set[str]) -> None:
        self.missed = {r.node: r.message for r in remarks if r.kind == "missed" and r.pass_name in passes}

    def node(self, name: str) -> str:
        return self.missed.get(name, "")

    def weight(self, weight: StoredWeight) -> str:
        names = [weight.name, *(node.name or "" for node in weight.readers)]
        said = next((self.missed[name] for name in names if name in self.missed), "")
        if said and (weight.bits >= min(FLOATS) or "bit" in said):  # what was said of integers may be about else
            return said
        ops = " and ".join(dict.fromkeys(node.op_type for node in weight.readers)) or "the model's output"
        return f"read by {ops}, left in {FLOATS.get(weight.bits, f'{weight.bits} bits')}"


def _grouped(left: Sequence[Left]) -> tuple[Left, ...]:
    """Sum what was left for reasons that differ in numbers and names only; the most bytes first, then MACs."""
    groups: dict[str, list[Left]] = {}
    for entry in left:
        groups.setdefault(re.sub(r"'[^']*'|\d+(\.\d+)?(e[+-]?\d+)?", "…", entry.reason), []).append(entry)
    rows = []
    for pattern, entries in groups.items():
        reason = entries[0].reason if len({entry.reason for entry in entries}) == 1 else pattern
        names = dict.fromkeys(name for entry in entries for name in entry.nodes)
        weight_bytes, macs = (sum(getattr(entry, key) for entry in entries) for key in ("weight_bytes", "macs"))
        rows.append(Left(reason, weight_bytes, macs, len(names), tuple(names)[:NAMED]))
    return tuple(sorted(rows, key=lambda row: (-row.weight_bytes, -row.macs, row.reason)))
