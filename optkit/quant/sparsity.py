"""Which weights of a layer may become 0, and what the others become so that the layer's outputs change least."""

from __future__ import annotations

import numpy as np

from optkit.errors import InputError

ROUNDS = 60  # of conjugate gradients, at most
ENOUGH = 1e-4  # of the first residual: what is left then moves no weight visibly


def keep_largest(saliency: np.ndarray, sparsity: float, *, axis: int | None = None) -> np.ndarray:
    """Return the mask that leaves out the weights of the smallest saliency.

    Exactly ``floor(sparsity * count)`` are left out; of equals, the first.

    Args:
        saliency: What it costs to lose each weight, any shape, finite.
        sparsity: The share to leave out, 0 to 1.
        axis: Leave out this share in each slice along this axis; None: of all weights together.

    Returns:
        bool, in the saliency's shape: which weights stay.

    Raises:
        InputError: ``sparsity`` is not between 0 and 1, or a saliency is not finite.
    """
    if not 0 <= sparsity <= 1:
        raise InputError(f"a sparsity of {sparsity} is not possible", hint="give the share of zeros, 0 to 1")
    _check(saliency)
    moved = saliency.reshape(1, -1) if axis is None else np.moveaxis(saliency, axis, 0)
    rows = moved.reshape(len(moved), -1)
    order = np.argsort(rows, axis=1, kind="stable")
    keep = np.ones(rows.shape, bool)
    np.put_along_axis(keep, order[:, : int(sparsity * rows.shape[1] + 1e-9)], False, axis=1)
    return keep.reshape(saliency.shape) if axis is None else np.moveaxis(keep.reshape(moved.shape), 0, axis)


def keep_pattern(saliency: np.ndarray, kept: int, block: int, *, axis: int) -> np.ndarray:
    """Return the mask that leaves ``kept`` of every ``block`` neighbours along an axis: n:m sparsity.

    Of a short last block as many stay, where it has so many.

    Args:
        saliency: What it costs to lose each weight, any shape, finite.
        kept: n, at least 1.
        block: m, at least n.
        axis: The axis that a layer sums over, along which hardware wants the pattern.

    Returns:
        bool, in the saliency's shape: which weights stay.

    Raises:
        InputError: There is no such pattern, or a saliency is not finite.
    """
    if not 1 <= kept <= block:
        raise InputError(f"a pattern of {kept}:{block} is not possible", hint="2:4 keeps 2 of every 4 weights")
    _check(saliency)
    moved = np.moveaxis(saliency.astype(np.float64), axis, -1)
    spare = -moved.shape[-1] % block
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, spare)], constant_values=-np.inf)
    blocks = padded.reshape(-1, block)
    order = np.argsort(-blocks, axis=1, kind="stable")
    keep = np.zeros(blocks.shape, bool)
    np.put_along_axis(keep, order[:, :kept], True, axis=1)
    return np.moveaxis(keep.reshape(padded.shape)[..., : moved.shape[-1]], -1, axis)


def refit_kept(
    weight: np.ndarray, cross: np.ndarray, hessian: np.ndarray, keep: np.ndarray, *, damping: float = 0.01
) -> np.ndarray:
    r"""Return the weight with zeros where ``keep`` is not set whose outputs come closest to the given one's.

    ``argmin over V, V = 0 off the mask, of ||X W^T - Y V^T||^2 + d ||V - W||^2``, d being ``damping`` times the mean of
    the Hessian's diagonal: in each row S = keep[n] solves ``(H + d I)[S, S] v = (W C + d W)[n, S]``. Frantar & Alistarh
    2023, "SparseGPT", approximate it column by column, since one inverse per row is too much; conjugate gradients with
    all rows in one matrix product need none (Meng et al. 2024, "ALPS", solve the same problem so).

    Args:
        weight: W [N, K].
        cross: C = ``X^T Y`` [K, K] of the float inputs X [tokens, K] and those of the pruned model, Y.
        hessian: H = ``Y^T Y`` [K, K].
        keep: bool [N, K].
        damping: How strongly the result is held to the given weight, above 0.

    Returns:
        float32 [N, K]; where no input was ever anything but 0, the given weight on the mask.

    Raises:
        InputError: Shapes do not agree, damping is not positive, or a matrix holds NaN or infinity.
    """
    columns = weight.shape[1] if weight.ndim == 2 else -1
    if keep.shape != weight.shape or cross.shape != (columns, columns) or hessian.shape != (columns, columns):
        raise InputError(f"moments of {list(hessian.shape)} do not suit a weight of {list(weight.shape)}")
    if not damping > 0:
        raise InputError(f"damping of {damping} holds the weight to nothing")
    if not all(np.isfinite(each).all() for each in (weight, cross, hessian)):
        raise InputError("a weight or its inputs' moments hold values that are not finite")
    held = weight.astype(np.float64)
    start = held * keep
    ridge = damping * float(np.diag(hessian).mean()) if weight.size else 0.0
    if ridge <= 0:
        return np.where(keep, weight, 0.0).astype(np.float32)
    system = hessian.astype(np.float64) + ridge * np.eye(columns)
    goal = (held @ cross + ridge * held) * keep
    scaling = keep / np.diag(system)  # Jacobi's preconditioner, and the projection on the mask
    found, residual = start, goal - (start @ system) * keep
    direction = residual * scaling
    energy = (residual * direction).sum(axis=1)
    first = energy.copy()
    for _ in range(ROUNDS):
        if not (energy > ENOUGH**2 * first).any():
            break
        step = (direction @ system) * keep
        curvature = (direction * step).sum(axis=1)
        length = np.divide(energy, curvature, out=np.zeros_like(energy), where=curvature > 0)[:, None]
        found = found + length * direction
        residual = residual - length * step
        next_ = residual * scaling
        after = (residual * next_).sum(axis=1)
        direction = next_ + np.divide(after, energy, out=np.zeros_like(after), where=energy > 0)[:, None] * direction
        energy = after
    return np.where(keep, found, 0.0).astype(np.float32)


def _check(saliency: np.ndarray) -> None:
    if not np.isfinite(saliency).all():
        raise InputError("weights that are not finite cannot be pruned", hint="keep the nodes that read them in float")
