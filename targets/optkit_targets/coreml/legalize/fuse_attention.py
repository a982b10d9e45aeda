"""Join the operators of an attention, where Core ML has one for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from optkit import Context, Effect, Pass
from optkit.graph import static_shape
from optkit_targets.coreml.deployment import deployments
from optkit_targets.coreml.legalize.attention_parts import AXES, SWAPPED, Attention, Heads, attention_of
from optkit_targets.coreml.legalize.writing import Writer
from optkit_targets.rewriting import RefusedError, apply

SINCE = 23  # the opset that introduced Attention
NATIVE = 18  # the iOS that introduced scaled_dot_product_attention


class FuseAttention(Pass):
    """Attention of all heads at once becomes one ``Attention``, where iOS 18 or newer is asked for.

    ::

        MatMul [B, H, Q, D] x [B, H, D, K] ─▶ Mul ─▶ Add mask ─▶ Softmax ─▶ MatMul [B, H, K, D]

    Core ML has it as ``scaled_dot_product_attention``, and lays it out itself. Keys and values that several queries
    share are not repeated for them. ``Attention`` came with opset 23: ``raise-opset`` before this pass gives it.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-4)  # the scale comes before the product

    def run(self, model: ir.Model, context: Context) -> None:
        """Look for every Softmax of scores, bodies included."""
        wanted = context.target is None or deployments(context.target).start >= NATIVE

        def fuse(softmax: ir.Node, writer: Writer) -> str | None:
            found = attention_of(softmax, writer.version)
            if found is None:
                return None
            _check(found, writer.version, wanted=wanted)
            _fuse(found, Writer(found.product, writer.taken, writer.version))
            return f"attention of {found.shape[1]} heads as one operator"

        apply({"Softmax": fuse}, model, context, Writer)


def _check(found: Attention, version: int, *, wanted: bool) -> None:
    if not wanted:
        raise RefusedError(f"Core ML has one operator for attention from iOS {NATIVE} on, if that is asked for")
    if version < SINCE:
        raise RefusedError(f"Attention needs opset {SINCE}, the model has {version}")
    for mask in found.masks:
        shape = static_shape(mask)
        if shape is None or len(shape) > AXES:
            raise RefusedError("its mask has no fixed shape")


def _fuse(found: Attention, writer: Writer) -> None:
    batch, heads, queries, keys = found.shape
    width, narrow = found.width
    query = _plain(writer, found.query, [batch, heads, queries, width])
    key = _plain(writer, found.key, [batch, found.key.heads, keys, width])
    value = _plain(writer, found.value, [batch, found.value.heads, keys, narrow])
    masks = [writer.reshape(mask, _whole(mask)) for mask in found.masks]
    inputs = [query, key, value]
    if masks:
        mask = masks[0]
        for other in masks[1:]:
            mask = writer.add("Add", mask, other, shape=_broadcast(_whole(mask), _whole(other)))
        full = [*_whole(mask)[:2], queries, keys]
        if _whole(mask) != full:
            mask = writer.add("Expand", mask, writer.ints("scores", full), shape=full)
        inputs.append(mask)
    shape = [batch, heads, queries, narrow]
    writer.replace(writer.add("Attention", *inputs, shape=shape, scale=found.factor))


def _plain(writer: Writer, part: Heads, shape: Sequence[int]) -> ir.Value:
    """Return a part as ``[B, heads, S, D]``."""
    batch, heads, tokens, width = shape
    value = part.value
    if part.repeated:
        value = writer.reshape(value, [batch, heads, *((width, tokens) if part.swapped else (tokens, width))])
    return writer.add("Transpose", value, shape=shape, perm=SWAPPED) if part.swapped else value


def _whole(mask: ir.Value) -> list[int]:
    """Return the shape of a mask with ones in front, four axes."""
    shape = static_shape(mask)
    assert shape is not None
    return [*[1] * (AXES - len(shape)), *shape]


def _broadcast(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [max(pair) for pair in zip(first, second, strict=True)]
