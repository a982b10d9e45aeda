"""Affine integer quantization in NumPy, apart from any graph: ``real = scale * (q - zero_point)``.

Rounding is to nearest, ties to even, as ONNX QuantizeLinear specifies. The real value 0 is always representable
exactly, because padding, ReLU and masks produce it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from optkit.errors import InputError

# Ranges narrower than this quantize to 0: the product of two scales (a bias scale) must stay a normal float32.
SMALLEST_SCALE = 2.0**-62
MOST_PAIR = 128  # the largest |q0| + |q1| whose products with 255 do not overflow int16: 255 * 128 <= 32767


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scales have shape []."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of one axis: for weights [M, C, kH, kW] and axis 0, scales have shape [M]."""

    axis: int


@dataclass(frozen=True)
class PerBlock:
    """One scale per ``size`` neighbours along one axis; the last block may be short.

    Scales have the tensor's shape with that axis divided: for weights [N, K], axis 1 and size 32, [N, ceil(K / 32)].
    """

    axis: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"a block has at least one element, not {self.size}")


Granularity = PerTensor | PerChannel | PerBlock


@dataclass(frozen=True)
class IntegerGrid:
    """The integers that values are rounded to: ``low`` to ``high``.

    The zero point of a symmetric grid is fixed. There are as many steps below it as above, [-127, 127] around 0 for
    int8, [1, 255] around 128 for uint8, or one more below: [-8, 7] around 0 for int4 of full range.

    Attributes:
        type: ONNX element type in lower case, such as ``uint4``.
        low: Lowest integer.
        high: Highest integer.
        symmetric: Whether the zero point is fixed at ``middle``.
    """

    type: str
    low: int
    high: int
    symmetric: bool

    @property
    def bits(self) -> int:
        """Bits of the element type."""
        return int(self.type.partition("int")[2])

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The NumPy type that stores one integer: int8 or uint8 for types of less than 8 bits."""
        return np.dtype(f"{self.type.partition('int')[0]}int{max(self.bits, 8)}")

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return (self.low + self.high + 1) // 2

    @property
    def full_range(self) -> bool:
        """Whether a symmetric grid has a step more below its zero point than above."""
        return self.symmetric and self.middle - self.low > self.high - self.middle

    @property
    def steps(self) -> int:
        """Number of steps between the lowest and the highest integer."""
        return self.high - self.low


def integer_grid(dtype: str, *, symmetric: bool, reduced_range: bool = False, full_range: bool = False) -> IntegerGrid:
    """Return the grid of an ONNX integer type.

    Args:
        dtype: ``int2``, ``int4``, ``int8``, ``int16``, their unsigned kin, or ``int3`` and ``uint3``, which ONNX lacks.
        symmetric: Fix the zero point at the middle and leave the lowest integer out, so that both signs have equally
            many steps and -128 never occurs: (-128)(-128)*2 overflows the int16 in which some int8 kernels add pairs
            of products.
        reduced_range: Use one bit less, for kernels that saturate when they add two products of full range.
        full_range: Keep the lowest integer of a symmetric grid. Scales may then be negative, so that the value of
            largest magnitude falls on the side that has a step more: one level of 16 or of 4 that is not wasted.

    Raises:
        InputError: There is no such type, or fewer than 2 bits would be used.
    """
    if not re.fullmatch(r"u?int(2|3|4|8|16)", dtype):
        raise InputError(
            f"'{dtype}' is no integer type to quantize to", hint="choose 2, 3, 4, 8 or 16 bits, such as int4 or uint8"
        )
    bits = int(dtype.partition("int")[2]) - reduced_range
    if bits < 2:
        raise InputError(f"the range of '{dtype}' cannot be reduced", hint="reduce the range of 8-bit weights")
    offset = 0 if dtype.startswith("u") else -(1 << (bits - 1))
    return IntegerGrid(dtype, offset + (symmetric and not full_range), offset + (1 << bits) - 1, symmetric)


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of one tensor.

    Attributes:
        scale: float32, shape [] per tensor, [channels], or the tensor's with one axis divided into blocks; not 0, and
            positive unless the grid is symmetric with a step more on one side.
        zero_point: Same shape; the grid's dtype, or float32 for runtimes whose zero points need not be integers.
        grid: The integers used.
        granularity: What one scale covers.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    grid: IntegerGrid
    granularity: Granularity = PerTensor()

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest real values that are representable, shaped like the scale."""
        zero = self.zero_point.astype(np.float64)
        ends = self.scale * (self.grid.low - zero), self.scale * (self.grid.high - zero)
        return np.minimum(*ends), np.maximum(*ends)


def choose_qparams(
    low: np.ndarray | float,
    high: np.ndarray | float,
    grid: IntegerGrid,
    granularity: Granularity = PerTensor(),
    *,
    name: str = "",
) -> QuantParams:
    """Return scale and zero point for real values between ``low`` and ``high``; the range is widened to include 0.

    Every value of the range is represented within half a step. A range without extent (all values 0) gets scale 1, so
    that it stays 0.

    Args:
        low: Lowest real value, shape of the scales.
        high: Highest real value, same shape.
        grid: The integers to use.
        granularity: What one scale covers.
        name: The tensor, for the error.

    Raises:
        InputError: A bound is NaN or infinite.
    """
    below = np.minimum(np.asarray(low, np.float64), 0.0)
    above = np.maximum(np.asarray(high, np.float64), 0.0)
    if not (np.isfinite(below).all() and np.isfinite(above).all()):
        raise _not_finite(name)
    if grid.full_range:
        # the larger side gets the spare step; half a step beyond its last integer the other side still rounds to it
        larger, smaller = np.maximum(-below, above), np.minimum(-below, above)
        size = np.maximum(larger / (grid.middle - grid.low), smaller / (grid.high - grid.middle + 0.5))
    elif grid.symmetric:
        size = 2 * np.maximum(-below, above) / grid.steps
    else:
        size = (above - below) / grid.steps
    with np.errstate(under="ignore"):
        scale = np.maximum(size.astype(np.float32), np.float32(SMALLEST_SCALE))
    scale = np.where(above > below, scale, np.float32(1)).astype(np.float32)
    if grid.symmetric:
        zero_point = np.full(scale.shape, grid.middle)
        if grid.full_range:
            scale = np.where(above > -below, -scale, scale)
    else:
        zero_point = np.clip(np.rint(grid.low - below / scale), grid.low, grid.high)
    return QuantParams(scale, zero_point.astype(grid.dtype), grid, granularity)


def weight_qparams(weight: np.ndarray, grid: IntegerGrid, granularity: Granularity, *, name: str = "") -> QuantParams:
    """Return scale and zero point that cover every value of a constant tensor, one pair per unit of the granularity.

    Raises:
        InputError: The tensor holds NaN or infinity.
    """
    low, high = (reduce_per_scale(reduction, weight, granularity) for reduction in (np.minimum, np.maximum))
    return choose_qparams(low, high, grid, granularity, name=name)


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor of the given shape."""
    if isinstance(granularity, PerTensor):
        return ()
    if isinstance(granularity, PerChannel):
        return (shape[granularity.axis],)
    axis = range(len(shape))[granularity.axis]
    return (*shape[:axis], -(-shape[axis] // granularity.size), *shape[axis + 1 :])


def reduce_per_scale(reduction: np.ufunc, values: np.ndarray, granularity: Granularity) -> np.ndarray:
    """Return ``minimum``, ``maximum`` or ``add`` over the values that share a scale, shaped like the scales.

    Where a scale covers no value the result is 0, and 0 takes part in every minimum and maximum.
    """
    if isinstance(granularity, PerBlock) and values.size:
        axis = range(values.ndim)[granularity.axis]
        if values.shape[axis] % granularity.size == 0 and axis < values.ndim - 1:  # reduceat is slow on outer axes
            blocks = (*values.shape[:axis], -1, granularity.size, *values.shape[axis + 1 :])
            reduced = reduction.reduce(values.reshape(blocks), axis=axis + 1)
        else:
            reduced = reduction.reduceat(values, np.arange(0, values.shape[axis], granularity.size), axis=axis)
    elif isinstance(granularity, PerBlock):
        reduced = np.zeros(scale_shape(values.shape, granularity), values.dtype)
    else:
        kept = range(values.ndim)[granularity.axis] if isinstance(granularity, PerChannel) else -1
        reduced = reduction.reduce(values, axis=tuple(i for i in range(values.ndim) if i != kept), initial=0)
    return np.asarray(reduction(reduced, values.dtype.type(0)))


def spread(per_scale: np.ndarray, shape: tuple[int, ...], granularity: Granularity) -> np.ndarray:
    """Return scales or zero points so that they broadcast with a tensor of the given shape.

    Raises:
        InputError: There are not as many of them as the tensor has blocks.
    """
    if isinstance(granularity, PerTensor):
        return per_scale
    if isinstance(granularity, PerChannel):
        aligned = [1] * len(shape)
        aligned[granularity.axis] = -1
        return per_scale.reshape(aligned)
    expected = scale_shape(shape, granularity)
    if per_scale.shape != expected:
        raise InputError(f"scales of shape {list(per_scale.shape)} where a tensor {list(shape)} needs {list(expected)}")
    axis = range(len(shape))[granularity.axis]
    repeated = np.repeat(per_scale, granularity.size, axis=axis)
    return repeated[(slice(None),) * axis + (slice(shape[axis]),)]


def pair_scale_floor(rows: np.ndarray) -> np.ndarray:
    r"""Return the smallest scales at which no two neighbours' products with 255 overflow int16 when they are added.

    Kernels that multiply unsigned activations with signed weights by ``vpmaddubsw`` (x86 without VNNI) add the products
    of elements 2j and 2j + 1 of a row in int16: 255 (\|q0\| + \|q1\|) <= 32767 asks for \|q0\| + \|q1\| <= 128.
    Rounding adds at most 1/2 to each, so (\|w0\| + \|w1\|) / scale <= 127 is enough. Where the largest weights have
    small neighbours this costs far less than the whole bit of a reduced range, and never more.

    Args:
        rows: Weights [channels, K], each row in the order in which the kernel sums.

    Returns:
        float64 [channels].
    """
    return largest_pairs(rows) / (MOST_PAIR - 1.0)


def largest_pairs(rows: np.ndarray) -> np.ndarray:
    r"""Return the largest \|a\| + \|b\| of elements 2j and 2j + 1 in each row of [channels, K], float64 [channels]."""
    size = np.abs(rows.astype(np.float64))
    pairs = np.pad(size, ((0, 0), (0, size.shape[1] % 2))).reshape(len(size), -1, 2).sum(axis=2)
    return np.asarray(pairs.max(axis=1, initial=0.0))


def with_scale(params: QuantParams, scale: np.ndarray) -> QuantParams:
    """Return symmetric parameters with another scale of the same shape."""
    return QuantParams(scale.astype(np.float32), params.zero_point, params.grid, params.granularity)


def quantize(values: np.ndarray, params: QuantParams, *, name: str = "") -> np.ndarray:
    """Return ``clip(round(values / scale) + zero_point)`` in the grid's dtype, shape unchanged.

    A zero point that is no integer is added before the rounding.

    Raises:
        InputError: A value is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise _not_finite(name)
    scale, zero_point = (spread(array, values.shape, params.granularity) for array in (params.scale, params.zero_point))
    with np.errstate(over="ignore"):
        steps = np.asarray(values.astype(np.float32, copy=False) / scale)  # infinite where scale is tiny: clipped
    zero = zero_point.astype(np.float32, copy=False)
    if zero_point.dtype.kind == "f":
        steps += zero
        np.rint(steps, out=steps)
    else:
        np.rint(steps, out=steps)
        steps += zero
    return np.asarray(np.clip(steps, params.grid.low, params.grid.high, out=steps).astype(params.grid.dtype))


def dequantize(integers: np.ndarray, params: QuantParams) -> np.ndarray:
    """Return ``scale * (integers - zero_point)`` as float32, shape unchanged."""
    scale, zero_point = (spread(a, integers.shape, params.granularity) for a in (params.scale, params.zero_point))
    steps = np.asarray(integers.astype(np.float32) - zero_point.astype(np.float32))  # exact for integer zero points
    return np.asarray(np.multiply(steps, scale, out=steps), np.float32)


def quantize_bias(bias: np.ndarray, scale: np.ndarray, *, name: str = "") -> np.ndarray:
    """Return ``round(bias / scale)`` as int32, where ``scale`` is input scale times weight scale, shape [] or [M].

    Raises:
        InputError: A value is NaN or infinite, or does not fit in 32 bits; ``bias_scale_floor`` prevents the latter.
    """
    if not np.isfinite(bias).all():
        raise _not_finite(name)
    rounded = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    if not (np.abs(rounded) < 2.0**31).all():
        raise InputError("it does not fit in 32 bits at its scale", where=f"tensor '{name}'")
    return rounded.astype(np.int32)


def bias_scale_floor(bias: np.ndarray, input_scale: np.ndarray) -> np.ndarray:
    """Return the smallest weight scales, shape of ``bias``, at which ``|bias / (input_scale * scale)| <= 2^30``.

    One bit less than int32 holds: the accumulator must take the products on top of the bias.
    """
    return np.asarray(np.abs(bias.astype(np.float64)) / (input_scale.astype(np.float64) * 2.0**30))


def _not_finite(name: str) -> InputError:
    return InputError("it holds values that are not finite and cannot be quantized", where=f"tensor '{name}'")
