"""AWQ: input channels scaled up before their weights are rounded, where inputs are large, and down again in the inputs.

Lin et al. 2023, "AWQ: Activation-aware weight quantization for LLM compression and acceleration", section 3.2: with
``W s`` in place of W and ``X / s`` in place of X the layer computes the same, but what a large input is multiplied with
is rounded more finely than the rest. ``s = magnitude^alpha``, and alpha is searched for on the layer's own outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from optkit.errors import InputError

ALPHAS = np.linspace(0.0, 1.0, 21)  # 0: all scales 1
SMALLEST = 1e-4  # of the mean magnitude: below, a channel is scaled as if it had this


def awq_scales(
    weights: Sequence[np.ndarray],
    magnitude: np.ndarray,
    inputs_sample: np.ndarray,
    quantizer: Callable[[np.ndarray], np.ndarray],
    *,
    name: str = "",
) -> np.ndarray:
    """Return the scales of the input channels with the smallest squared error of the layers' outputs.

    The error is ``sum over i of ||X W_i^T - (X / s) Q(W_i s)^T||^2``; all scales are 1 unless it gets smaller.

    Args:
        weights: [N_i, K] of every layer that reads the inputs.
        magnitude: Mean magnitude of each input channel, [K].
        inputs_sample: Inputs X [tokens, K].
        quantizer: Returns a weight [N, K] as it will be after rounding, in float.
        name: The inputs, for the errors.

    Returns:
        float32 [K], positive; its largest and smallest are each other's inverse.

    Raises:
        InputError: Shapes do not agree, or a magnitude or an input is NaN, infinite or negative.
    """
    columns = magnitude.size
    _check(weights, magnitude, inputs_sample, name)
    ones = np.ones(columns, np.float32)
    mean = float(magnitude.mean()) if columns else 0.0
    if mean == 0.0 or not inputs_sample.size:
        return ones
    relative = np.maximum(magnitude.astype(np.float64) / mean, SMALLEST)
    sample = (inputs_sample / mean).astype(np.float32)
    moment = sample.T @ sample if len(sample) > columns else None
    best, scales = np.inf, ones
    for alpha in ALPHAS:
        tried = relative**alpha
        tried = (tried / np.sqrt(tried.max() * tried.min())).astype(np.float32)
        error = 0.0
        for weight in weights:
            difference = quantizer(weight * tried) / tried - weight
            outputs = difference @ moment if moment is not None else sample @ difference.T
            error += float(np.vdot(outputs, difference if moment is not None else outputs))
        if error < best:
            best, scales = error, tried
    return scales


def _check(weights: Sequence[np.ndarray], magnitude: np.ndarray, sample: np.ndarray, name: str) -> None:
    where = f"tensor '{name}'"
    if magnitude.ndim != 1 or sample.ndim != 2 or sample.shape[1] != magnitude.size:
        shapes = f"inputs {list(sample.shape)} and magnitudes {list(magnitude.shape)}"
        raise InputError(f"{shapes} are not of the same channels", where=where)
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != magnitude.size:
            raise InputError(f"a weight {list(weight.shape)} does not read its {magnitude.size} channels", where=where)
    if not (np.isfinite(sample).all() and np.isfinite(magnitude).all()):
        raise InputError("it holds values that are not finite", where=where)
    if (magnitude < 0).any():
        raise InputError("a magnitude is negative", where=where)
