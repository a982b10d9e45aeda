# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Products of matrices."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


@executes("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return ``x @ weight.T + bias``, for ``weight`` [out, in]."""
    product = np.matmul(x, weight.T)
    return product if bias is None else product + bias


@executes("matmul")
def matmul(x: Array, y: Array, transpose_x: Array | bool = False, transpose_y: Array | bool = False) -> Array:
    """Return ``x @ y`` with NumPy's broadcasting, after transposing the last two axes of either."""
    left = np.swapaxes(x, -1, -2) if transpose_x and x.ndim > 1 else x
    right = np.swapaxes(y, -1, -2) if transpose_y and y.ndim > 1 else y
    return np.asarray(np.matmul(left, right))


@executes("einsum")
def einsum(values: tuple[Array, ...], equation: str) -> Array:
    """Return a sum of products; axes of size 1 are broadcast, which MIL allows and NumPy's einsum does not."""
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    shapes = [tuple(sizes[letter] for letter in term) for term in terms]
    operands = [np.broadcast_to(value, shape) for value, shape in zip(values, shapes, strict=True)]
    return np.asarray(np.einsum(equation, *operands, optimize=True))
