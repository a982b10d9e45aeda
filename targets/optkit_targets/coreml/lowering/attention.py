"""Attention: ONNX's operators, and the products that exporters write, in the form that the deployment target has.

From iOS 18 on MIL has ``scaled_dot_product_attention``, with a scale of ``1 / sqrt(size of a head)`` and a mask that is
added. Masks are additive here and never below ``FLOOR``: minus infinity makes NaN of rows without any key in float16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import argument
from optkit_targets.coreml.lowering.forms import cast, dims, dtype, is_float, label, reshaped, transposed
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import lowers

FLOOR = -3e4  # within float16, even twice
NATIVE = 18  # the first deployment target with scaled_dot_product_attention
SCORES, WEIGHTS = 0, 3  # what ``qk_matmul_output_mode`` can show


@lowers("Attention")
def attention(scope: Scope, node: ir.Node) -> Any:
    """Write ``softmax(scale · Q Kᵀ + mask) V`` by heads, and the keys and values with what the cache had."""
    flat = len(dims(scope.input(node, 0))) == 3
    heads = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    query, key, value = (_heads(scope, scope.input(node, place), heads[min(place, 1)]) for place in range(3))
    past = scope.optional(node, 4)
    if past is not None:
        key = scope.mb.concat(values=[past, key], axis=2)
        value = scope.mb.concat(values=[scope.input(node, 5), value], axis=2)
    present = key, value
    key, value = (_repeated(scope, part, dims(query)[1]) for part in present)
    bias, empty_rows = _bias(scope, node, query, dims(key)[2], 0 if past is None else dims(past)[2])
    scale = node.attributes.get_float("scale", 1 / math.sqrt(dims(query)[-1]))
    softcap = node.attributes.get_float("softcap", 0.0)
    shown = len(node.outputs) > 3
    mode = node.attributes.get_int("qk_matmul_output_mode", SCORES) if shown else SCORES
    if scope.deployment >= NATIVE and not softcap and not shown:
        result, scores = _native(scope, query, key, value, bias, scale), None
    else:
        result, scores = _written_out(scope, query, key, value, bias, scale, softcap, mode)
    if empty_rows:  # a row without any key is zero, not the mean of the values
        alive = _alive(scope, bias)
        result = scope.mb.mul(x=result, y=alive)
        scores = scope.mb.mul(x=scores, y=alive) if shown and mode == WEIGHTS else scores
    if flat:
        batch, count, length, size = dims(result)
        result = reshaped(scope, transposed(scope, result, [0, 2, 1, 3]), [batch, length, count * size])
    return [result, *present, *([] if scores is None else [scores])]


def _heads(scope: Scope, variable: Any, count: int) -> Any:
    """Return [batch, heads, length, size] from that, or from [batch, length, heads·size]."""
    shape = dims(variable)
    if len(shape) == 4:
        return variable
    parts = reshaped(scope, variable, [shape[0], shape[1], count, shape[2] // count])
    return transposed(scope, parts, [0, 2, 1, 3])


def _repeated(scope: Scope, variable: Any, count: int) -> Any:
    """Return keys or values with each head repeated for the queries that share it."""
    batch, heads, length, size = dims(variable)
    if heads == count:
        return variable
    parts = scope.mb.tile(x=scope.mb.expand_dims(x=variable, axes=[2]), reps=[1, 1, count // heads, 1, 1])
    return reshaped(scope, parts, [batch, count, length, size])


def _bias(scope: Scope, node: ir.Node, query: Any, keys: int, past: int) -> tuple[Any | None, bool]:
    """Return what is added to the scores, [..., queries, keys], and whether a row may have no key at all."""
    kind = np.float16 if dtype(query) == "fp16" else np.float32
    queries = dims(query)[2]
    lengths, given = scope.optional(node, 6), scope.optional(node, 3)
    offset = None if lengths is not None and not past else past
    windows = [node.attributes.get_int(name, -1) for name in ("left_window_size", "right_window_size")]
    ahead = np.arange(keys)[None, :] - np.arange(queries)[:, None]  # how far the key is ahead of the query
    terms, risk = [], False
    if offset is None and max(windows) >= 0:
        raise CannotLower("it has a window over caches of computed lengths")
    allowed = np.ones((queries, keys), np.bool_)
    if offset is not None:
        if node.attributes.get_int("is_causal", 0):
            allowed &= ahead <= offset
        allowed &= (windows[0] < 0) | (offset - ahead <= windows[0])
        allowed &= (windows[1] < 0) | (ahead - offset <= windows[1])
    elif node.attributes.get_int("is_causal", 0):
        terms.append(_closed(scope, _within(scope, ahead + queries, lengths), kind))
    if lengths is not None:
        terms.append(_closed(scope, _within(scope, np.arange(1, keys + 1)[None, :], lengths), kind))
        risk = True
    if not allowed.all():
        terms.append(scope.mb.const(val=np.where(allowed, 0, FLOOR).astype(kind)))
        risk = risk or not allowed.any(axis=-1).all()
    if given is not None:
        terms.append(_padded(scope, _mask(scope, given, kind), keys, kind))
        risk = risk or _has_empty_rows(terms)
    if not terms:
        return None, False
    total = terms[0]
    for term in terms[1:]:
        total = scope.mb.maximum(x=scope.mb.add(x=total, y=term), y=kind(FLOOR))
    return total, risk


def _has_empty_rows(terms: list[Any]) -> bool:
    """Return whether rows may be masked whole: so they are in constants, or the mask is computed."""
    if any(term.val is None for term in terms):
        return True
    return bool((sum(np.asarray(term.val) for term in terms).max(axis=-1) <= FLOOR).any())  # type: ignore[union-attr]


def _within(scope: Scope, places: np.ndarray, lengths: Any) -> Any:
    """Return where ``places`` are at most each sample's length: [batch, 1, queries or 1, keys]."""
    column = reshaped(scope, cast(scope, lengths, "int32"), [dims(lengths)[0], 1, 1, 1])
    return scope.mb.less_equal(x=places[None, None].astype(np.int32), y=column)


def _closed(scope: Scope, allowed: Any, kind: Any) -> Any:
    """Return 0 where a key may be seen and ``FLOOR`` elsewhere."""
    name = "fp16" if kind is np.float16 else "fp32"
    seen = scope.mb.cast(x=allowed, dtype=name)
    return scope.mb.mul(x=scope.mb.sub(x=kind(1), y=seen), y=kind(FLOOR))


def _mask(scope: Scope, given: Any, kind: Any) -> Any:
    """Return a mask, of truth values or to be added, as an addend."""
    if not is_float(given):
        return _closed(scope, cast(scope, given, "bool"), kind)
    return scope.mb.maximum(x=given, y=kind(FLOOR))


def _padded(scope: Scope, mask: Any, keys: int, kind: Any) -> Any:
    """Return a mask that covers all keys: what it does not speak of is not seen."""
    missing = keys - dims(mask)[-1]
    if missing <= 0 or dims(mask)[-1] == 1:
        return mask
    rims = [0] * (2 * len(dims(mask)) - 1) + [missing]
    return scope.mb.pad(x=mask, pad=rims, constant_val=kind(FLOOR))


def _alive(scope: Scope, bias: Any) -> Any:
    """Return 1 for rows that see a key, 0 for the others."""
    best = scope.mb.reduce_max(x=bias, axes=[-1], keep_dims=True)
    kind = np.float16 if dtype(bias) == "fp16" else np.float32
    return cast(scope, scope.mb.greater(x=best, y=kind(FLOOR)), dtype(bias))


def _scaled(scope: Scope, variable: Any, factor: float) -> Any:
    if math.isclose(factor, 1.0, rel_tol=1e-6):
        return variable
    kind = np.float16 if dtype(variable) == "fp16" else np.float32
    return scope.mb.mul(x=variable, y=kind(factor))


def _native(scope: Scope, query: Any, key: Any, value: Any, bias: Any | None, scale: float) -> Any:
    """Return MIL's own attention; another scale than its own goes to the queries."""
    query = _scaled(scope, query, scale * math.sqrt(dims(query)[-1]))
    mask = {} if bias is None else {"attn_mask": bias}
    return scope.mb.scaled_dot_product_attention(query=query, key=key, value=value, **mask)


def _written_out(
    scope: Scope, query: Any, key: Any, value: Any, bias: Any | None, scale: float, softcap: float, mode: int
) -> tuple[Any, Any]:
    """Return the same by products and a softmax, and the scores or weights that ``mode`` asks for."""
    if mode not in (SCORES, WEIGHTS):
        raise CannotLower(f"qk_matmul_output_mode {mode} shows scores between the steps")
    scores = scope.mb.matmul(x=_scaled(scope, query, scale), y=key, transpose_y=True)
    capped = scores
    if softcap:
        capped = _scaled(scope, scope.mb.tanh(x=_scaled(scope, scores, 1 / softcap)), softcap)
    weights = scope.mb.softmax(x=capped if bias is None else scope.mb.add(x=capped, y=bias), axis=-1)
    return scope.mb.matmul(x=weights, y=value), scores if mode == SCORES else weights


def fused(scope: Scope, node: ir.Node, weights: Any, values: Any) -> Any | None:
    """Return MIL's attention in place of a node that multiplies values by weights, where those were written as its own.

    ::

        matmul(q, kᵀ) ─▶ [mul | real_div] ─▶ [add mask] ─▶ softmax ─▶ matmul(·, v)

    Returns:
        The attention; None where the deployment target lacks it, the operations before are others, or the weights
        are read elsewhere too. The operations before, which nothing reads any more, are not saved.
    """
    read = argument(node, 0)
    if read is None or len(read.uses()) > 1 or read.is_graph_output():
        return None
    if scope.deployment < NATIVE or _kind(weights) != "softmax" or not is_float(values):
        return None
    rank = len(dims(weights))
    if rank < 3 or int(weights.op.axis.val) % rank != rank - 1:
        return None
    scores, mask = _split_mask(weights.op.x)
    scores, factor = _split_scale(scores)
    if _kind(scores) != "matmul" or bool(scores.op.transpose_x.val):
        return None
    query, key = scores.op.x, scores.op.y
    shapes = [dims(part) for part in (query, key, values)]
    if len({shape[:-2] for shape in shapes}) > 1 or query.dtype != values.dtype:
        return None
    if not bool(scores.op.transpose_y.val):
        key = transposed(scope, key, [*range(rank - 2), rank - 1, rank - 2])
    if mask is not None and (
        mask.dtype != query.dtype or dims(mask)[-1:] != dims(key)[-2:-1] or len(dims(mask)) > rank
    ):
        return None
    return _native(scope, query, key, values, mask, factor)


def _kind(variable: Any) -> str:
    return "" if variable.op is None else str(variable.op.op_type)


def _split_mask(scores: Any) -> tuple[Any, Any | None]:
    """Return the scores and the mask that was added to them."""
    if _kind(scores) != "add":
        return scores, None
    pair = scores.op.x, scores.op.y
    for part, other in (pair, pair[::-1]):
        if _kind(part) in ("mul", "real_div", "matmul") and part.shape == scores.shape:
            return part, other
    return scores, None


def _split_scale(scores: Any) -> tuple[Any, float]:
    """Return the scores without the constants that scale them, and the constants' product."""
    factor = 1.0
    while _kind(scores) in ("mul", "real_div"):
        x, y = scores.op.x, scores.op.y
        if y.val is None and _kind(scores) == "mul":
            x, y = y, x
        if y.val is None or np.size(y.val) != 1 or x.shape != scores.shape:
            break
        number = float(np.asarray(y.val).ravel()[0])
        factor = factor * number if _kind(scores) == "mul" else factor / number
        scores = x
    return scores, factor


@lowers("RotaryEmbedding")
def rotary_embedding(scope: Scope, node: ir.Node) -> Any:
    """Write pairs of features turned by the angles of their positions: [batch, heads, length, size]."""
    data = scope.input(node, 0)
    flat = len(dims(data)) == 3
    data = _heads(scope, data, node.attributes.get_int("num_heads", 0) or 1)
    batch, heads, length, size = dims(data)
    width = node.attributes.get_int("rotary_embedding_dim", 0) or size
    cosine, sine = (_angles(scope, node, place) for place in (1, 2))
    rest = []
    if width < size:
        data, left = scope.mb.split(x=data, split_sizes=[width, size - width], axis=3)
        rest = [left]
    if node.attributes.get_int("interleaved", 0):
        pairs = reshaped(scope, data, [batch, heads, length, width // 2, 2])
        turned = _turned(scope, pairs, cosine, sine, True)
    else:
        turned = _turned(scope, data, cosine, sine, False)
    turned = reshaped(scope, turned, [batch, heads, length, width])
    result = scope.mb.concat(values=[turned, *rest], axis=3, name=label(scope, node)) if rest else turned
    if flat:
        return reshaped(scope, transposed(scope, result, [0, 2, 1, 3]), [batch, length, heads * size])
    return result


def _angles(scope: Scope, node: ir.Node, index: int) -> Any:
    """Return cosines or sines of every position: [batch or 1, 1, length, half]."""
    table, positions = scope.input(node, index), scope.optional(node, 3)
    if positions is not None:
        table = scope.mb.gather(x=table, indices=cast(scope, positions, "int32"), axis=0)
    shape = dims(table)
    return reshaped(scope, table, [shape[0] if len(shape) == 3 else 1, 1, *shape[-2:]])


def _turned(scope: Scope, data: Any, cosine: Any, sine: Any, interleaved: bool) -> Any:
    """Return ``(c·a - s·b, s·a + c·b)`` for the halves or the pairs of the last axes."""
    mb, axis = scope.mb, len(dims(data)) - 1
    if interleaved:
        cosine, sine = mb.expand_dims(x=cosine, axes=[4]), mb.expand_dims(x=sine, axes=[4])
    first, second = mb.split(x=data, num_splits=2, axis=axis)
    real = mb.sub(x=mb.mul(x=cosine, y=first), y=mb.mul(x=sine, y=second))
    imaginary = mb.add(x=mb.mul(x=sine, y=first), y=mb.mul(x=cosine, y=second))
    return mb.concat(values=[real, imaginary], axis=axis)
