"""Indices into LUTs chosen together: each column of a weight makes up for the errors of the columns before it.

The rule of `optkit.quant.gptq` with another nearest value: column k is rounded to the LUT of its row instead of to a
grid. Where inputs are correlated that is worth more than better LUTs. Afterwards the entries are fitted to the indices.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from optkit.quant.gptq import LAZY, moments_factor

STEADY = 1e-6  # of the mean curvature: how firmly entries that hardly matter are held


def round_to_luts(
    weight: np.ndarray,
    luts: np.ndarray,
    hessian: np.ndarray,
    *,
    keep: np.ndarray | None = None,
    damping: float = 0.01,
    name: str = "",
) -> np.ndarray:
    """Return indices with a small error of the layer's outputs, ``tr(D H D^T)`` for ``D = W - lut[indices]``.

    Args:
        weight: W [N, K], K being the axis that the layer sums over.
        luts: The LUT of each row, ascending, [N, entries].
        hessian: ``X^T X`` [G, K, K] of the inputs X [tokens, K] of each of G equal groups of rows.
        keep: bool [N, K]; where it is not set the weight is 0 and stays so, and the index means nothing.
        damping: This times the mean of the Hessian's diagonal is added to it.
        name: The weight, for errors.

    Returns:
        uint8 [N, K].

    Raises:
        InputError: The Hessian is not positive semidefinite.
    """
    groups, columns = hessian.shape[:2]
    rows = len(weight) // groups
    order = np.argsort(-np.diagonal(hessian, axis1=1, axis2=2), kind="stable")  # [G, K]
    factor = np.stack(
        [moments_factor(own[np.ix_(to, to)], damping, name) for own, to in zip(hessian, order, strict=True)]
    )
    factor /= np.diagonal(factor, axis1=1, axis2=2)[:, None]
    entries = luts.astype(np.float64).reshape(groups, rows, -1)
    middles = (entries[..., 1:] + entries[..., :-1]) / 2  # [G, N / G, entries - 1]
    wanted = np.take_along_axis(_by_column(weight, groups).astype(np.float64), order[..., None], axis=1)
    kept = None if keep is None else np.take_along_axis(_by_column(keep, groups), order[..., None], axis=1)
    error = np.empty((groups, columns, rows))
    found = np.empty((groups, columns, rows), np.uint8)
    for first in range(0, columns, LAZY):
        last = min(first + LAZY, columns)
        corrected = wanted[:, first:last] + factor[:, :first, first:last].swapaxes(1, 2) @ error[:, :first]
        for k in range(first, last):
            value = corrected[:, k - first] + (factor[:, None, first:k, k] @ error[:, first:k])[:, 0]
            index = (value[..., None] > middles).sum(axis=-1)
            found[:, k] = index
            lost = wanted[:, k] - np.take_along_axis(entries, index[..., None], axis=-1)[..., 0]
            error[:, k] = lost if kept is None else np.where(kept[:, k], lost, 0.0)
    indices = np.empty_like(found)
    np.put_along_axis(indices, order[..., None], found, axis=1)
    return np.ascontiguousarray(indices.swapaxes(1, 2).reshape(weight.shape))


def _by_column(array: np.ndarray, groups: int) -> np.ndarray:
    """Return [N, K] as [G, K, N / G], so that a column of a group is contiguous."""
    return np.ascontiguousarray(array.reshape(groups, -1, array.shape[1]).swapaxes(1, 2))


def fit_entries(
    weight: np.ndarray,
    luts: np.ndarray,
    indices: np.ndarray,
    block: np.ndarray,
    pieces: Iterable[tuple[slice, np.ndarray, np.ndarray]],
    *,
    fixed: int = 0,
) -> np.ndarray:
    """Return the LUTs that suit given indices: the least squares of ``||X W^T - Y V^T||^2`` over V = lut[indices].

    With M_e [N, K] the places of entry e, the entries L of a block of rows solve ``A L = r``,
    ``A[e, f] = sum(M_e H * M_f)`` and ``r[e] = sum(M_e * W C)``.

    Args:
        weight: W [N, K].
        luts: [blocks, entries].
        indices: [N, K].
        block: The LUT of each row, ascending, int [N].
        pieces: Columns, H = ``Y^T Y`` and C = ``X^T Y`` of them, [G, K, K] for G equal groups of rows.
        fixed: How many of the first entries stay as they are; they are 0.

    Returns:
        float64 [blocks, entries].
    """
    rows, entries = len(weight), luts.shape[1]
    firsts = np.flatnonzero(np.diff(block, prepend=-1))
    curvature, goal = np.zeros((len(luts), entries, entries)), np.zeros((len(luts), entries))
    for columns, hessian, cross in pieces:
        part = indices[:, columns]
        places = (np.arange(rows)[:, None] * entries + part).ravel()
        goal += _by_block(places, times(weight[:, columns].astype(np.float64), cross), entries, firsts)
        for entry in range(fixed, entries):
            chosen = part == entry
            if chosen.any():
                curvature[:, entry] += _by_block(places, times(chosen, hessian), entries, firsts)
    found = luts.astype(np.float64)
    free = slice(fixed, entries)
    for number, (matrix, right) in enumerate(zip(curvature, goal, strict=True)):
        ridge = STEADY * float(np.trace(matrix)) / entries
        if ridge > 0:
            own = matrix[free, free] + ridge * np.eye(entries - fixed)
            found[number, free] = np.linalg.solve(own, right[free] + ridge * found[number, free])
    return found


def times(rows: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Return the products [N, K] of rows [N, K] with the moments [G, K, K] of their group."""
    return np.asarray((rows.reshape(len(moments), -1, rows.shape[1]) @ moments).reshape(rows.shape))


def _by_block(places: np.ndarray, values: np.ndarray, entries: int, firsts: np.ndarray) -> np.ndarray:
    """Return the sums [blocks, entries] of values [N, K] that lie at each entry, by blocks of rows."""
    sums = np.bincount(places, weights=values.ravel(), minlength=len(values) * entries).reshape(-1, entries)
    return np.asarray(np.add.reduceat(sums, firsts, axis=0))
