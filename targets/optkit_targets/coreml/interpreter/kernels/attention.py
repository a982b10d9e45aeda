# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Attention (iOS 18)."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.kernels.activations import softmax
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


@executes("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """Return ``softmax(Q K^T / sqrt(E) + mask) V``; what a boolean mask denies counts as minus infinity."""
    scores = np.matmul(query, np.swapaxes(key, -1, -2)) / np.float32(np.sqrt(query.shape[-1]))
    if attn_mask is not None and attn_mask.dtype.kind == "b":
        scores = np.where(attn_mask, scores, np.float32(-np.inf))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return np.matmul(softmax(scores), value)
