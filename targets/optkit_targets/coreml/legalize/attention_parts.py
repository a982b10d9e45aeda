"""Attention as exporters write it, ``softmax(scale Q K' + mask) V`` of all heads at once, taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from optkit.graph import argument, constant, static_shape
from optkit_targets.rewriting import RefusedError

AXES = 4
SWAPPED = [0, 1, 3, 2]
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16}


@dataclass(frozen=True)
class Heads:
    """A query, key or value.

    Attributes:
        value: ``[B, heads, S, D]``, or ``[B, heads, D, S]`` where ``swapped``; of a key or value that several queries
            share, before it was repeated for them.
        heads: How many it has of its own.
        swapped: Whether tokens come last.
        repeated: ``value`` is to be read in the shape ``[B, heads, ., .]``: it has an axis of size 1 behind heads.
    """

    value: ir.Value
    heads: int
    swapped: bool
    repeated: bool = False


@dataclass(frozen=True)
class Attention:
    """The parts of an attention.

    Attributes:
        product: The MatMul of weights and values, whose result is ``[B, H, Sq, D]``.
        factor: What the scores are multiplied with.
        masks: What is added to them, each a constant or computed.
        shape: ``[B, H, Sq, Sk]`` of the scores.
        width: D of query and key, and that of the value.
    """

    product: ir.Node
    query: Heads
    key: Heads
    value: Heads
    factor: float
    masks: tuple[ir.Value, ...]
    shape: tuple[int, int, int, int]
    width: tuple[int, int]


def attention_of(softmax: ir.Node, version: int) -> Attention | None:
    """Return the attention whose weights a Softmax computes; None where it is none at all.

    Raises:
        RefusedError: It is one of another form.
    """
    uses = list(softmax.outputs[0].uses())
    product = uses[0].node if uses else None
    if product is None or (product.domain, product.op_type) != ("", "MatMul") or uses[0].idx != 0:
        return None
    shape = static_shape(softmax.outputs[0])
    scores, factor, masks = _scores(softmax.inputs[0])
    if scores is None or constant(scores.inputs[0]) is not None or constant(scores.inputs[1]) is not None:
        return None
    if shape is None or len(shape) != AXES or 0 in shape:
        raise RefusedError("its scores have no fixed shape of batch, heads, queries and keys")
    if softmax.attributes.get_int("axis", -1 if version >= 13 else 1) not in (-1, AXES - 1):
        raise RefusedError("its softmax is not over the keys")
    if len(uses) > 1 or softmax.outputs[0].is_graph_output():
        raise RefusedError("its weights are read elsewhere too")
    batch, heads, queries, keys = shape
    wide, narrow = static_shape(scores.inputs[0]), static_shape(product.outputs[0])
    if wide is None or narrow is None or wide[:3] != shape[:3] or narrow[:3] != shape[:3]:
        raise RefusedError("its query and result have not the batch and heads of its scores")
    width = wide[3], narrow[3]
    key = _heads(scores.inputs[1], [batch, heads, width[0], keys], swapped=True)
    value = _heads(product.inputs[1], [batch, heads, keys, width[1]], swapped=False)
    query = _heads(scores.inputs[0], wide, swapped=False)
    if query.repeated:
        query = Heads(scores.inputs[0], heads, swapped=False)  # type: ignore[arg-type]
    if softmax.outputs[0].dtype not in FLOATS:
        raise RefusedError("its element type is neither float32 nor float16")
    return Attention(product, query, key, value, factor, tuple(masks), (batch, heads, queries, keys), width)


def _scores(value: ir.Value | None) -> tuple[ir.Node | None, float, list[ir.Value]]:
    """Return the product of query and key that a softmax is of, its factor, and what was added to it."""
    factor, masks, node = 1.0, list[ir.Value](), None if value is None else value.producer()
    while node is not None and node.domain == "" and node.op_type != "MatMul":
        output = node.outputs[0]
        if node.op_type not in ("Add", "Div", "Mul") or len(output.uses()) > 1 or output.is_graph_output():
            return None, factor, masks
        first, second = node.inputs
        if node.op_type == "Add":
            if factor != 1.0:
                raise RefusedError("its mask is scaled")
            if _is_scores(second) and not _is_scores(first):
                first, second = second, first
            if first is None or second is None or static_shape(first) != static_shape(output):
                return None, factor, masks
            masks.append(second)
        else:
            if constant(first) is not None and node.op_type == "Mul":
                first, second = second, first
            array = constant(second)
            if array is None or array.size != 1 or array.ndim > AXES:
                return None, factor, masks
            factor = factor * float(array.item()) if node.op_type == "Mul" else factor / float(array.item())
        node = None if first is None else first.producer()
    found = node is not None and len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output()
    return (node if found else None), factor, masks


def _is_scores(value: ir.Value | None) -> bool:
    """Whether a value comes from a product, through constants that it is multiplied with or divided by."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Add", "Div", "Mul"):
        inner = [given for given in node.inputs if given is not None and constant(given) is None]
        node = inner[0].producer() if inner else None
    return node is not None and node.op_type == "MatMul"


def _heads(value: ir.Value | None, shape: list[int], *, swapped: bool) -> Heads:
    """Return a key or value, traced back to before its heads were repeated.

    Raises:
        RefusedError: It has not the shape, or broadcasts to it.
    """
    if value is None or static_shape(value) != shape:
        raise RefusedError("its keys or values have not the batch and heads of its scores")
    before = value.producer()
    source = before.inputs[0] if before is not None and _swaps(before) else None
    if source is not None and static_shape(source) is not None:
        value, swapped, before = source, not swapped, source.producer()
    few = _shared(before)
    if few is not None:
        return Heads(few, (static_shape(few) or [])[1], swapped, repeated=True)
    return Heads(value, shape[1], swapped)


def _swaps(node: ir.Node) -> bool:
    """Whether a node transposes the last two of four axes."""
    perm = list(node.attributes.get_ints("perm") or ()) if node.op_type == "Transpose" else []
    return node.domain == "" and perm == SWAPPED


def _shared(node: ir.Node | None) -> ir.Value | None:
    """Return ``[B, few, 1, ., .]`` of ``Reshape(Expand([B, few, 1, ., .]))`` to ``[B, few * times, ., .]``."""
    if node is None or (node.domain, node.op_type) != ("", "Reshape") or node.inputs[0] is None:
        return None
    expand = node.inputs[0].producer()
    if expand is None or expand.domain != "" or expand.op_type not in ("Expand", "Tile"):
        return None
    few, many = static_shape(argument(expand, 0)), static_shape(expand.outputs[0])
    if few is None or many is None or len(few) != AXES + 1 or len(many) != AXES + 1:
        return None
    after = static_shape(node.outputs[0])
    same = few[2] == 1 and [*few[:2], *few[3:]] == [*many[:2], *many[3:]]
    return expand.inputs[0] if same and after == [many[0], prod(many[1:3]), *many[3:]] else None
