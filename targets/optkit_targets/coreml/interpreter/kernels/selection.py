# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Operators that sort, select and accumulate."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.elements import named
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


def order(x: Array, axis: int, ascending: bool) -> Array:
    """Return the indices that sort ``x`` along an axis; among equals, the first one comes first."""
    if ascending:
        return np.argsort(x, axis=axis, kind="stable")
    length = x.shape[axis]
    return length - 1 - np.flip(np.argsort(np.flip(x, axis), axis=axis, kind="stable"), axis)


@executes("argsort", widen=False)
def argsort(x: Array, axis: Array | int = -1, ascending: Array | bool = False, output_dtype: str = "int32") -> Array:
    """Return the indices that sort ``x``, descending by default."""
    return order(x, int(axis), bool(ascending)).astype(named(output_dtype).dtype)


@executes("topk", widen=False)
def topk(
    x: Array,
    k: Array | int = 1,
    axis: Array | int = -1,
    ascending: Array | bool = False,
    sort: Array | bool = True,
    return_indices: Array | bool = True,
    output_indices_dtype: str = "int32",
) -> Array | tuple[Array, Array]:
    """Return the ``k`` largest elements along an axis, or smallest, and where they are; -1 is all of them."""
    at = int(axis) % x.ndim
    count = x.shape[at] if int(k) == -1 else int(k)
    chosen = np.take(order(x, at, bool(ascending)), np.arange(count), axis=at)
    values = np.take_along_axis(x, chosen, axis=at)
    return (values, chosen.astype(named(output_indices_dtype).dtype)) if return_indices else values


@executes("non_zero", widen=False)
def non_zero(x: Array) -> Array:
    """Return where ``x`` is not zero, [n, rank]."""
    return np.argwhere(x).astype(np.int32)


@executes("cumsum")
def cumsum(x: Array, axis: Array | int = 0, exclusive: Array | bool = False, reverse: Array | bool = False) -> Array:
    """Return the sums of all elements up to each along an axis."""
    at = int(axis)
    directed = np.flip(x, at) if reverse else x
    sums = np.cumsum(directed, axis=at, dtype=x.dtype)
    if exclusive:
        sums = sums - directed
    return np.flip(sums, at) if reverse else sums


@executes("classify")
def classify(probabilities: Array, classes: tuple[str, ...]) -> tuple[Array, Array]:
    """Return the best class, and the probability of each, which Core ML keys by the class."""
    return np.array(classes[int(probabilities.argmax())]), probabilities.reshape(-1)
