"""From a graph to plain descriptions of work: what each node computes, reads and writes, as a runtime would run it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from optkit.cost.arithmetic import Arithmetic, arithmetic, computes_in_int8, is_known
from optkit.cost.fused import DEQUANTIZE, INTEGER_BITS, Fused, fused
from optkit.cost.roofline import Work
from optkit.cost.shapes import static_shape, value_bytes, with_shapes
from optkit.model.loading import tensors
from optkit.quant.palette import palette_of

ROWS_ONLY = frozenset({"Gather", "GatherElements", "GatherND", "GatherBlockQuantized", "Slice", "DynamicSlice"})
# 8-bit integers of either sign run in the same instructions, and so do 16-bit ones.
_ARITHMETIC = {"uint8": "int8", "uint16": "int16", "uint4": "int4", "uint2": "int2"}


def describe(
    model: ir.Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    sample: Mapping[str, np.ndarray] | None = None,
) -> list[Work]:
    """Return the work of one run of the model, in execution order.

    Quantize and dequantize nodes around an integer operator, and activations behind a product, are part of that
    operator's work (see `optkit.cost.fused`) and have no entry of their own; ``Work.covers`` names them. The body of a
    Loop or Scan counts as often as it runs, once where that is not known; of an If the branch with the most MACs.

    Args:
        model: The model; not changed.
        shapes: Shapes of the inputs by name, where the model leaves them open.
        sample: Input values; see `optkit.cost.shapes.with_shapes`.

    Raises:
        InputError: A shape contradicts the model's.
    """
    return describe_static(with_shapes(model, shapes, sample))


def describe_static(
    model: ir.Model, bits: Collection[int] = INTEGER_BITS, *, reads_palettes: bool = False
) -> list[Work]:
    """Return the work of a model whose values carry all shapes that can be known (`optkit.cost.shapes.with_shapes`).

    Args:
        model: The model; not changed.
        bits: Widths that integer operators take (`optkit.cost.roofline.integer_bits`).
        reads_palettes: Whether palettized weights are read as indices and LUTs (`optkit.target.Target.reads_palettes`).
    """
    return _describe(model.graph, set(), bits, reads_palettes)


def bytes_by_dtype(model: ir.Model) -> dict[str, int]:
    """Return the bytes of all stored constants by element type, largest first; tied tensors count once."""
    sums: dict[str, int] = {}
    for tensor in {id(tensor): tensor for _, tensor in tensors(model)}.values():
        if tensor.dtype != ir.DataType.STRING:
            name = _dtype_name(tensor.dtype)
            sums[name] = sums.get(name, 0) + tensor.nbytes
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def _dtype_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _describe(graph: ir.Graph, seen: set[int], bits: Collection[int], reads_palettes: bool) -> list[Work]:
    groups = fused(graph, bits)
    covered: dict[ir.Node, list[ir.Node]] = {}
    for node, lead in groups.lead.items():
        while lead in groups.lead:
            lead = groups.lead[lead]
        covered.setdefault(lead, []).append(node)
    works: list[Work] = []
    for node in graph:
        if node.op_type in ("If", "Loop", "Scan") and node.domain == "":
            works += _control(node, seen, bits, reads_palettes)
        elif node not in groups.lead and node not in groups.loaded:
            works.append(_node(node, covered.get(node, []), groups, seen, reads_palettes))
    return works


def _node(node: ir.Node, inside: Sequence[ir.Node], groups: Fused, seen: set[int], reads_palettes: bool) -> Work:
    """Describe one node together with the nodes that run inside it."""
    read = {id(v): v for v in (groups.read(node, value) for value in node.inputs if value is not None)}.values()
    written = list({id(v): v for v in map(groups.stored, node.outputs) if v.uses() or v.is_graph_output()}.values())
    given = [value for n in (node, *inside) for value in n.inputs if value is not None]
    stored, read_bytes = _weights([value for value in given if value.const_value], seen)
    expanded = dict.fromkeys(value for value in given if value in groups.expanded)
    stored += _weights((source for value in expanded for source in groups.expanded[value]), seen)[0]
    packed = {value: palette_of(value.producer()) for value in expanded if reads_palettes}
    palettes = {value: palette for value, palette in packed.items() if palette is not None}
    read_bytes += sum(value_bytes(value) or 0 for value in expanded if value not in palettes)
    indices = sum(-(-palette.indices.size * palette.bits // 8) for palette in palettes.values())
    read_bytes += indices + sum(palette.lut.nbytes for palette in palettes.values())
    work = Work(
        name=node.name or "",
        op_type=node.op_type,
        kind="view",
        dtype=_arithmetic_dtype(node, groups),
        weight_bytes=stored,
        weight_read_bytes=None if read_bytes == stored else read_bytes,
        integer_read_bytes=indices + _integer_bytes(given),
        covers=(node.name or "", *(n.name or "" for n in inside)),
        note=_note(node, inside, groups, palettes),
    )
    if not is_known(node):
        domain = f"{node.domain}::" if node.domain else ""
        return replace(work, unpriced=f"no cost model for {domain}{node.op_type}", weight_read_bytes=None)
    inputs = [None if value is None else static_shape(value) for value in node.inputs]
    result = arithmetic(node, inputs, [static_shape(value) for value in node.outputs])
    if result is not None and result.kind == "view":
        return replace(work, weight_read_bytes=0 if stored else None)
    computed = [value for value in read if value.const_value is None and value not in groups.expanded]
    moved = [*computed, *(value for value in written if value.const_value is None)]
    unknown = [value.name for value in moved if value_bytes(value) is None]
    if result is None or unknown:
        names = " and ".join(f"'{name}'" for name in unknown) or "its operands"
        return replace(work, unpriced=f"the shape or type of {names} is not known", weight_read_bytes=None)
    return _with_traffic(work, result, node, computed, written, read_bytes)


def _with_traffic(
    work: Work, result: Arithmetic, node: ir.Node, read: Sequence[ir.Value], written: Sequence[ir.Value], constants: int
) -> Work:
    input_bytes = sum(value_bytes(value) or 0 for value in read)
    output_bytes = sum(value_bytes(value) or 0 for value in written)
    if node.op_type in ROWS_ONLY:  # what is not picked is not read: a table of embeddings costs its rows
        input_bytes, constants = min(input_bytes, 2 * output_bytes), min(constants, 2 * output_bytes)
    return replace(
        work,
        kind=result.kind,
        macs=result.macs,
        operations=result.operations,
        m=result.m,
        n=result.n,
        k=result.k,
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        weight_read_bytes=None if constants == work.weight_bytes else constants,
    )


def _weights(values: Iterable[ir.Value], seen: set[int]) -> tuple[int, int]:
    """Return (bytes of constants not seen before, bytes of all of them); ``seen`` is updated."""
    first = every = 0
    here: set[int] = set()
    for value in values:
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or id(tensor) in here:
            continue
        here.add(id(tensor))
        every += tensor.nbytes
        if id(tensor) not in seen:
            seen.add(id(tensor))
            first += tensor.nbytes
    return first, every


def _integer_bytes(values: Iterable[ir.Value]) -> int:
    """Return the bytes of the constants that are integers."""
    tensors_ = {id(value.const_value): value.const_value for value in values if value.const_value is not None}
    kinds = (tensor for tensor in tensors_.values() if tensor.dtype != ir.DataType.STRING)
    return sum(tensor.nbytes for tensor in kinds if not tensor.dtype.is_floating_point())


def _arithmetic_dtype(node: ir.Node, groups: Fused) -> str:
    value = next((groups.read(node, value) for value in node.inputs if value is not None), None)
    dtype = value.dtype if value is not None else None
    if dtype is None:
        dtype = next((value.dtype for value in node.outputs if value.dtype is not None), None)
    name = _dtype_name(dtype) if dtype is not None else "float32"
    if node.op_type == DEQUANTIZE or node.op_type == "Cast":
        name = "float32"  # both sides go through float registers
    if computes_in_int8(node):
        name = "int8"
    return _ARITHMETIC.get(name, name)


def _note(node: ir.Node, inside: Sequence[ir.Node], groups: Fused, palettes: Collection[ir.Value]) -> str:
    activations = [n.op_type for n in inside if n.op_type not in ("QuantizeLinear", DEQUANTIZE)]
    notes = [f"{name} runs inside" for name in activations]
    if palettes or (any(n.op_type == DEQUANTIZE for n in inside) and node not in groups.integer):
        notes.append("weights are unpacked on the fly")
    if any(value in groups.expanded and value not in palettes for value in node.inputs if value is not None):
        notes.append("constants are expanded when the model is loaded")
    return "; ".join(notes)


def _control(node: ir.Node, seen: set[int], bits: Collection[int], reads_palettes: bool) -> list[Work]:
    """Describe an If, Loop or Scan: its body's work, and an entry of its own that says how it was counted."""
    name = node.name or ""
    if node.op_type == "If":
        graphs = [node.attributes[key].as_graph() for key in ("then_branch", "else_branch")]
        branches = [_describe(graph, seen, bits, reads_palettes) for graph in graphs]
        heavy = max(branches, key=_weight)
        stored = sum(work.weight_bytes for branch in branches if branch is not heavy for work in branch)
        own = Work(name, "If", "view", weight_bytes=stored, weight_read_bytes=0 if stored else None, covers=(name,))
        return [replace(own, note="the branch with the most work is counted"), *heavy]
    body = _describe(node.attributes["body"].as_graph(), seen, bits, reads_palettes)
    trips, note = _trips(node)
    own = Work(name, node.op_type, "view", covers=(name,), note=note)
    return [own, *(replace(work, count=work.count * trips) for work in body)]


def _weight(works: Sequence[Work]) -> tuple[int, int, int]:
    return (
        sum(work.macs * work.count for work in works),
        sum(work.operations * work.count for work in works),
        sum(work.activation_bytes * work.count for work in works),
    )


def _trips(node: ir.Node) -> tuple[int, str]:
    unknown = (1, "the number of runs is not known: counted once")
    if node.op_type == "Loop":
        limit = node.inputs[0].const_value if node.inputs[0] is not None else None
        if limit is None or not _always_true(node):
            return unknown
        trips = max(0, int(limit.numpy().item()))
    else:
        count = node.attributes.get_int("num_scan_inputs", 0)
        axes = node.attributes.get_ints("scan_input_axes", ()) or (0,)
        first = node.inputs[len(node.inputs) - count] if 0 < count <= len(node.inputs) else None
        shape = static_shape(first) if first is not None else None
        if shape is None:
            return unknown
        trips = shape[axes[0]]
    return trips, f"the body runs {trips} times"


def _always_true(loop: ir.Node) -> bool:
    """Whether a Loop has no condition, or one that its body passes on and that starts as true."""
    start = loop.inputs[1] if len(loop.inputs) > 1 else None
    if start is not None and (start.const_value is None or not bool(start.const_value.numpy().item())):
        return False
    body = loop.attributes["body"].as_graph()
    condition: ir.Value | None = body.outputs[0]
    while condition is not None and (producer := condition.producer()) is not None and producer.op_type == "Identity":
        condition = producer.inputs[0]
    if condition is None or condition.const_value is not None:
        return condition is not None and bool(np.all(condition.const_value.numpy()))  # type: ignore[union-attr]
    return condition is body.inputs[1]
