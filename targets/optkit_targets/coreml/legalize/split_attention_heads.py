"""Write attention head by head, each product over channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit import Context, Effect, Pass
from optkit.graph import constant, static_shape
from optkit_targets.coreml.legalize.attention_parts import AXES, SWAPPED, Attention, Heads, attention_of
from optkit_targets.coreml.legalize.writing import Writer
from optkit_targets.rewriting import RefusedError, apply

SINCE = 12  # the opset that introduced Einsum
SCORES, MIXED = "bkhc,bchq->bkhq", "bchk,bkhq->bchq"  # MIL's own einsum, "nchw,nwhu->nchu", twice
Masks = dict[tuple[ir.Value, ir.Graph], Sequence[ir.Value]]


class SplitAttentionHeads(Pass):
    """Attention of all heads at once becomes one product over channels for each head.

    ::

        MatMul [B, H, Q, D] x [B, H, D, K] ─▶ Softmax ─▶ MatMul [B, H, K, D]
        Split ─▶ H times: Einsum bkhc,bchq->bkhq ─▶ Softmax over k ─▶ Einsum bchk,bkhq->bchq ─▶ Concat

    Of each head, queries and values are ``[B, D, 1, S]``, keys ``[B, S, 1, D]`` and scores ``[B, K, 1, Q]``, so that
    only the keys are transposed: "Deploying Transformers on the Apple Neural Engine" (machinelearning.apple.com, 2022),
    principles 2 (smaller chunks stay in the cache, and are spread over the cores) and 3. The scale is multiplied into
    the queries; keys and values that several queries share are not repeated for them.

    Attributes:
        most_heads: Attention with more heads stays: every head costs five operations.
        fewest_queries: Attention with fewer queries stays, a decoder's single token above all: its scores are small.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-4)  # the scale comes before the product, sums in another order

    most_heads: int = Field(default=16, ge=1)
    fewest_queries: int = Field(default=2, ge=1)

    def run(self, model: ir.Model, context: Context) -> None:
        """Look for every Softmax of scores, bodies included."""
        masks: Masks = {}

        def split(softmax: ir.Node, writer: Writer) -> str | None:
            found = attention_of(softmax, writer.version)
            if found is None:
                return None
            self._check(found, writer.version)
            _split(found, masks, Writer(found.product, writer.taken, writer.version))
            return f"{found.shape[1]} heads, each a product of its own over channels"

        apply({"Softmax": split}, model, context, Writer)

    def _check(self, found: Attention, version: int) -> None:
        _, heads, queries, _ = found.shape
        if version < SINCE:
            raise RefusedError(f"Einsum needs opset {SINCE}, the model has {version}")
        if heads == 1:
            raise RefusedError("it has one head")
        if heads > self.most_heads:
            raise RefusedError(f"it has {heads} heads, more than {self.most_heads}")
        if queries < self.fewest_queries:
            raise RefusedError(f"it has {queries} queries, fewer than {self.fewest_queries}")
        for mask in found.masks:
            shape = static_shape(mask)
            if shape is None or len(shape) > AXES:
                raise RefusedError("its mask has no fixed shape")


def _split(found: Attention, masks: Masks, writer: Writer) -> None:
    """Write an attention head by head."""
    (batch, heads, queries, keys), (width, narrow) = found.shape, found.width
    query = _channels(writer, found.query, batch, width, queries)
    if found.factor != 1.0:
        scale = writer.like("scale", found.factor, query)
        query = writer.add("Mul", query, scale, shape=[batch, heads * width, 1, queries])
    parts = writer.split(query, 1, heads, [batch, heads * width, 1, queries])
    shared = found.key.heads
    key = writer.split(_tokens(writer, found.key, batch, width, keys), 3, shared, [batch, keys, 1, shared * width])
    shared = found.value.heads
    value = _channels(writer, found.value, batch, narrow, keys)
    values = writer.split(value, 1, shared, [batch, shared * narrow, 1, keys])
    added = [_mask(writer, mask, heads, masks) for mask in found.masks]
    mixed, shape = [], [batch, keys, 1, queries]
    for head, part in enumerate(parts):
        scores = writer.add("Einsum", key[head * len(key) // heads], part, shape=shape, equation=SCORES)
        for mask in reversed(added):
            scores = writer.add("Add", scores, mask[head % len(mask)], shape=shape)
        weights = writer.add("Softmax", scores, shape=shape, axis=1)
        inputs = values[head * len(values) // heads], weights
        mixed.append(writer.add("Einsum", *inputs, shape=[batch, narrow, 1, queries], equation=MIXED))
    joined = writer.add("Concat", *mixed, shape=[batch, heads * narrow, 1, queries], axis=1)
    apart = writer.reshape(joined, [batch, heads, narrow, queries])
    result = writer.add("Transpose", apart, shape=[batch, heads, queries, narrow], perm=SWAPPED)
    writer.replace(result)


def _channels(writer: Writer, part: Heads, batch: int, width: int, tokens: int) -> ir.Value:
    """Return queries or values as ``[B, H * D, 1, S]``."""
    value = _plain(writer, part, batch, width, tokens)
    if not part.swapped:
        shape = [batch, part.heads, width, tokens]
        value = writer.add("Transpose", value, shape=shape, perm=SWAPPED)
    return writer.reshape(value, [batch, part.heads * width, 1, tokens])


def _tokens(writer: Writer, part: Heads, batch: int, width: int, tokens: int) -> ir.Value:
    """Return keys as ``[B, S, 1, H * D]``."""
    value = _plain(writer, part, batch, width, tokens)
    channels = part.heads * width
    if part.swapped:
        flat = writer.reshape(value, [batch, channels, 1, tokens])
        return writer.transpose(flat, [0, 3, 2, 1], [batch, channels, 1, tokens])
    turned = writer.transpose(value, [0, 2, 1, 3], [batch, part.heads, tokens, width])
    return writer.reshape(turned, [batch, tokens, 1, channels])


def _plain(writer: Writer, part: Heads, batch: int, width: int, tokens: int) -> ir.Value:
    """Return a part without the axis along which it would have been repeated."""
    if not part.repeated:
        return part.value
    return writer.reshape(part.value, [batch, part.heads, *((width, tokens) if part.swapped else (tokens, width))])


def _mask(writer: Writer, mask: ir.Value, heads: int, masks: Masks) -> Sequence[ir.Value]:
    """Return a mask, ``[B, H, Q, K]`` or what broadcasts to it, as ``[B, K, 1, Q]``: one for all heads, or one each."""
    graph = writer.node.graph
    assert graph is not None
    if (mask, graph) in masks:
        return masks[mask, graph]
    shape = static_shape(mask)
    assert shape is not None
    full = [*[1] * (AXES - len(shape)), *shape]
    moved, count = [full[0], full[3], full[1], full[2]], full[1]
    array = constant(mask)
    if array is not None:
        turned = np.transpose(array.reshape(full), (0, 3, 1, 2))
        made = [writer.constant("mask", np.ascontiguousarray(turned[:, :, [head]])) for head in range(count)]
    else:
        turned_value = writer.transpose(writer.reshape(mask, full), [0, 3, 1, 2], full)
        made = list(writer.split(turned_value, 2, count, moved))
    return masks.setdefault((mask, graph), made)
