# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Elementwise operators: one and two operands, comparisons, casts, and the choice between two."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from optkit_targets.coreml.interpreter.elements import named
from optkit_targets.coreml.interpreter.kernels.sessions import run
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray

UNARY: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "round": np.rint,  # halves to the even number
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
}
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "floor_div": np.floor_divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,  # the sign is the divisor's
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}


def _enter_unary(operator: str, function: Callable[[Array], Array]) -> None:
    @executes(operator)
    def unary(x: Array) -> Array:
        return np.asarray(function(x)).astype(x.dtype, copy=False)


def _enter_binary(operator: str, function: Callable[[Array, Array], Array]) -> None:
    @executes(operator)
    def binary(x: Array, y: Array) -> Array:
        return np.asarray(function(x, y))


for _operator, _function in UNARY.items():
    _enter_unary(_operator, _function)
for _operator, _pair in BINARY.items():
    _enter_binary(_operator, _pair)


@executes("real_div")
def real_div(x: Array, y: Array) -> Array:
    """Return ``x / y``; integers are divided towards zero."""
    quotient = np.true_divide(x, y)
    return quotient if x.dtype.kind == "f" else np.trunc(quotient).astype(x.dtype)


@executes("pow")
def power(x: Array, y: Array) -> Array:
    """Return ``x ** y``, for integers by way of float64."""
    if x.dtype.kind == "f":
        return np.asarray(np.power(x, y))
    return np.trunc(np.power(x.astype(np.float64), y)).astype(x.dtype)


@executes("logical_not", widen=False)
def logical_not(x: Array) -> Array:
    """Return what is false."""
    return np.logical_not(x)


@executes("erf")
def erf(x: Array) -> Array:
    """Return the error function."""
    return run("Erf", x)


@executes("inverse")
def inverse(x: Array, epsilon: Array | float = 1e-4) -> Array:
    """Return ``1 / (x + epsilon)``."""
    return np.reciprocal(x + np.float32(epsilon))


@executes("log")
def log(x: Array, epsilon: Array | float = 1e-45) -> Array:
    """Return ``log(x + epsilon)``."""
    return np.log(x + np.float32(epsilon))


@executes("rsqrt")
def rsqrt(x: Array, epsilon: Array | float = 1e-12) -> Array:
    """Return ``1 / sqrt(x + epsilon)``."""
    return np.reciprocal(np.sqrt(x + np.float32(epsilon)))


@executes("clip")
def clip(x: Array, alpha: Array, beta: Array) -> Array:
    """Return ``min(max(x, alpha), beta)``."""
    return np.minimum(np.maximum(x, alpha), beta)


@executes("threshold")
def threshold(x: Array, alpha: Array) -> Array:
    """Return ``max(x, alpha)``."""
    return np.maximum(x, alpha)


@executes("select", widen=False)
def select(cond: Array, a: Array | None = None, b: Array | None = None) -> Array:
    """Return ``a`` where ``cond`` holds, else ``b``; without them, where it holds, [n, rank]."""
    if a is None or b is None:
        return np.argwhere(cond).astype(np.int32)
    return np.where(cond, a, b)


@executes("identity", widen=False)
def identity(x: Array) -> Array:
    """Return ``x``."""
    return x


@executes("cast", widen=False)
def cast(x: Array, dtype: str) -> Array:
    """Return ``x`` in another type: floats towards zero and within what an integer type holds, NaN as 0."""
    wanted = named(dtype).dtype
    if wanted.kind == "b":
        return x != 0
    if wanted.kind == "f":
        # The interpreter rounds to float16, where an overflow is seen; float64 holds every int32.
        return x if x.dtype.kind == "f" and wanted == np.float16 else x.astype(np.promote_types(wanted, np.float32))
    if x.dtype.kind != "f":
        return x.astype(wanted)
    limits = np.iinfo(wanted)
    whole = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=limits.max, neginf=limits.min)
    return np.clip(whole, limits.min, limits.max).astype(wanted)
