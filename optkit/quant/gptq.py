"""GPTQ: rounds a weight one input column after another, each making up for the errors of the columns before it.

Frantar et al. 2022, "GPTQ: Accurate post-training quantization for generative pre-trained transformers", minimise the
error of a layer's outputs, ``tr(D H D^T)`` for ``D = W - W_q`` and ``H = X^T X``. Algorithm 1 there takes the upper
factor of ``H^-1 = U^T U`` and subtracts ``e_i U[i, i+1:]``, ``e_i = (w_i' - q_i) / U_ii``, from the columns to come;
``w_i'`` is what the earlier columns made of column i. So ``D = E U``; with ``R = U^-1``, the upper factor of
``H = R R^T``, that reads ``E = D R``, and column k

    w_k' = w_k + sum over i < k of (w_i - q_i) R[i, k] / R[k, k]

needs no inverse: one Cholesky factorisation of H from its last row backwards (Chen et al. 2025, "The geometry of LLM
quantization: GPTQ as Babai's nearest plane algorithm", read the algorithm this way).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from optkit.errors import InputError
from optkit.quant.integers import SMALLEST_SCALE, PerBlock, PerChannel, QuantParams, spread

LAZY = 128  # columns whose corrections by all earlier ones are one matrix product
STIFFEST = 1.0  # times the mean diagonal: what is added at most to a Hessian that cannot be factored otherwise


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    params: QuantParams,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    name: str = "",
) -> np.ndarray:
    """Return a weight's integers, chosen for the smallest error of the layer's outputs.

    Scales are fixed beforehand, so blocks keep their place whatever the order of the columns. A column whose inputs
    were always 0 is rounded to nearest and affects no other.

    Args:
        weight: [N, K], K being the axis that the layer sums over.
        hessian: ``X^T X`` [K, K] of inputs X [tokens, K].
        params: Scales and zero points of the weight.
        act_order: Begin with the columns of the largest inputs, while many are left to make up for their errors;
            otherwise from first to last.
        damping: This times the mean of the Hessian's diagonal is added to it. More is added where it is so nearly
            singular that it cannot be factored.
        name: The weight, for the errors.

    Returns:
        The grid's dtype, [N, K].

    Raises:
        InputError: Shapes do not agree, the weight or the Hessian holds NaN or infinity, or the Hessian is none: not
            positive semidefinite.
    """
    _check(weight, {"Hessian": hessian}, name)
    shape = rows, columns = weight.shape
    if not weight.size:
        return np.zeros(shape, params.grid.dtype)
    diagonal = np.diag(hessian)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(columns)
    factor = moments_factor(hessian[np.ix_(order, order)], damping, name)
    factor /= np.diag(factor)  # column k divided by R[k, k]
    # transposed, so that a column of the weight is contiguous
    scale, zero = (
        np.ascontiguousarray(np.broadcast_to(spread(values, shape, params.granularity), shape).T[order], np.float64)
        for values in (params.scale, params.zero_point)
    )
    wanted = weight.T[order].astype(np.float64)
    error = np.empty((columns, rows))
    integers = np.empty((columns, rows), params.grid.dtype)
    float_zero = params.zero_point.dtype.kind == "f"
    for first in range(0, columns, LAZY):
        last = min(first + LAZY, columns)
        corrected = wanted[first:last] + factor[:first, first:last].T @ error[:first]
        for k in range(first, last):
            value = corrected[k - first] + factor[first:k, k] @ error[first:k]
            value /= scale[k]
            steps = np.rint(value + zero[k]) if float_zero else np.rint(value) + zero[k]
            np.clip(steps, params.grid.low, params.grid.high, out=steps)
            integers[k] = steps
            error[k] = wanted[k] - (steps - zero[k]) * scale[k]
    found = np.empty(shape, params.grid.dtype)
    found[:, order] = integers.T
    return found


def refit(
    weight: np.ndarray, cross: np.ndarray, hessian: np.ndarray, *, damping: float = 0.01, name: str = ""
) -> np.ndarray:
    r"""Return the weight whose outputs from quantized inputs come closest to the float weight's from float inputs.

    ``argmin over V of ||X_float W^T - X_quantized V^T||^2 + d ||V - W||^2``, that is
    ``V = (W cross + d W) (hessian + d I)^-1`` with d = damping times the mean of the Hessian's diagonal: ridge
    regression towards W. Before ``gptq`` it lets a layer make up for the errors of the layers before it.

    Args:
        weight: W [N, K].
        cross: ``X_float^T X_quantized`` [K, K].
        hessian: ``X_quantized^T X_quantized`` [K, K].
        damping: How strongly the result is held to the given weight, above 0.
        name: The weight, for the errors.

    Returns:
        float32 [N, K].

    Raises:
        InputError: Shapes do not agree, damping is not positive, or a matrix holds NaN or infinity.
    """
    _check(weight, {"Hessian": hessian, "cross product": cross}, name)
    if not damping > 0:
        raise InputError(f"damping of {damping} holds the weight to nothing", where=f"tensor '{name}'")
    ridge = damping * float(np.diag(hessian).mean()) if weight.size else 0.0
    if ridge <= 0:  # no input was ever anything but 0
        return weight.astype(np.float32)
    held = weight.astype(np.float64)
    right = held @ cross.astype(np.float64) + ridge * held
    return np.linalg.solve(hessian.T + ridge * np.eye(len(hessian)), right.T).T.astype(np.float32)


def fit_scales(
    weight: np.ndarray,
    hessian: np.ndarray,
    integers: np.ndarray,
    params: QuantParams,
    *,
    damping: float = 0.01,
    sweeps: int = 3,
    name: str = "",
) -> QuantParams:
    """Return parameters whose scales fit given integers with the smallest error of the layer's outputs.

    ``tr(D H D^T)`` is quadratic in the scales: one block of columns after another gets, in every row, the scale at
    which its derivative is 0 (Gauss-Seidel), so the error never grows. After ``gptq`` this makes up for scales that
    were chosen before the columns were corrected; both cost the same.

    Args:
        weight: W [N, K].
        hessian: ``X^T X`` [K, K] of inputs X [tokens, K].
        integers: [N, K].
        params: Their scales, per row or per block of a row, and zero points, which are kept.
        damping: This times the mean of the Hessian's diagonal is added to it.
        sweeps: How often every block is visited.
        name: The weight, for the errors.

    Raises:
        InputError: Shapes do not agree, scales are shared by rows, or a matrix holds NaN or infinity.
    """
    _check(weight, {"Hessian": hessian}, name)
    size = weight.shape[1] if params.granularity == PerChannel(0) else None
    if isinstance(params.granularity, PerBlock) and params.granularity.axis in (1, -1):
        size = params.granularity.size
    if size is None:
        raise InputError("its scales are shared by rows and are not fitted row by row", where=f"tensor '{name}'")
    if not weight.size:
        return params
    damped = hessian.astype(np.float64)
    damped[np.diag_indices_from(damped)] += damping * np.diag(hessian).mean()
    zero = spread(params.zero_point, weight.shape, params.granularity)
    steps = integers.astype(np.float64) - zero
    scale = params.scale.reshape(len(weight), -1).copy()
    slope = (weight - steps * spread(params.scale, weight.shape, params.granularity)) @ damped  # of the error, D H
    for _ in range(sweeps):
        for block in range(scale.shape[1]):
            columns = slice(block * size, (block + 1) * size)
            part = steps[:, columns]
            curvature = np.einsum("nk,nk->n", part @ damped[columns, columns], part)
            change = np.einsum("nk,nk->n", part, slope[:, columns]) / np.where(curvature > 0, curvature, np.inf)
            fitted = (scale[:, block] + change).astype(np.float32)
            fitted = np.where(fitted * np.sign(scale[:, block]) >= SMALLEST_SCALE, fitted, scale[:, block])
            slope -= ((fitted.astype(np.float64) - scale[:, block])[:, None] * part) @ damped[columns]
            scale[:, block] = fitted
    return replace(params, scale=scale.reshape(params.scale.shape))


def moments_factor(hessian: np.ndarray, damping: float, name: str) -> np.ndarray:
    """Return the upper triangular R of ``hessian + damping mean(diag) I = R R^T``, float64."""
    given, hessian = damping, hessian.astype(np.float64)
    diagonal = np.diag(hessian).copy()
    if (diagonal < 0).any():
        raise _not_positive(name)
    mean = float(diagonal.mean()) or 1.0
    while damping <= max(STIFFEST, given):
        # a dead column's row and column are 0: any value on its diagonal keeps it apart from the others
        np.fill_diagonal(hessian, np.where(diagonal > 0, diagonal + damping * mean, mean))
        try:
            return np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1].copy()
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-6)
    raise _not_positive(name)


def _not_positive(name: str) -> InputError:
    return InputError("the Hessian of its inputs is not positive semidefinite", where=f"tensor '{name}'")


def _check(weight: np.ndarray, moments: dict[str, np.ndarray], name: str) -> None:
    where = f"tensor '{name}'"
    if weight.ndim != 2:
        raise InputError(f"it has {weight.ndim} axes where GPTQ takes a matrix", where=where)
    if not np.isfinite(weight).all():
        raise InputError("it holds values that are not finite and cannot be quantized", where=where)
    for kind, moment in moments.items():
        if moment.shape != (weight.shape[1],) * 2:
            needed = [weight.shape[1]] * 2
            raise InputError(f"the {kind} of its inputs is {list(moment.shape)} and not {needed}", where=where)
        if not np.isfinite(moment).all():
            raise InputError(f"the {kind} of its inputs holds values that are not finite", where=where)
