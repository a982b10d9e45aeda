"""Affine integer quantization in NumPy, apart from any graph: ``real = scale * (q - zero_point)``.

Rounding is to nearest, ties to even, as ONNX QuantizeLinear specifies. The real value 0 is always representable
exactly, because padding, ReLU and masks produce it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optkit.errors import InputError

# Ranges narrower than this quantize to 0: the product of two scales (a bias scale) must stay a normal float32.
SMALLEST_SCALE = 2.0**-62


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scales have shape []."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of one axis: for weights [M, C, kH, kW] and axis 0, scales have shape [M]."""

    axis: int


Granularity = PerTensor | PerChannel


@dataclass(frozen=True)
class IntegerGrid:
    """The integers that values are rounded to: ``low`` to ``high``, stored as ``dtype``.

    A symmetric grid has as many steps below its fixed zero point as above: [-127, 127] around 0 for int8, [1, 255]
    around 128 for uint8.
    """

    dtype: np.dtype[np.generic]
    low: int
    high: int
    symmetric: bool

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return (self.low + self.high) // 2

    @property
    def steps(self) -> int:
        """Number of steps between the lowest and the highest integer."""
        return self.high - self.low


def integer_grid(dtype: str, *, symmetric: bool, reduced_range: bool = False) -> IntegerGrid:
    """Return the grid of an ONNX integer type.

    Args:
        dtype: ``int8``, ``uint8``, ``int16`` or ``uint16``.
        symmetric: Leave the lowest integer out, so that both signs have equally many steps and -128 never occurs:
            (-128)(-128)*2 overflows the int16 in which some int8 kernels add pairs of products.
        reduced_range: Use one bit less, for kernels that saturate when they add two products of full range.
    """
    kind = np.dtype(dtype)
    bits = 8 * kind.itemsize - reduced_range
    offset = 0 if kind.kind == "u" else -(1 << (bits - 1))
    return IntegerGrid(kind, offset + symmetric, offset + (1 << bits) - 1, symmetric)


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of one tensor.

    Attributes:
        scale: float32, shape [] per tensor or [channels]; positive.
        zero_point: The grid's dtype, same shape.
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
        return self.scale * (self.grid.low - zero), self.scale * (self.grid.high - zero)


def choose_qparams(
    low: np.ndarray | float,
    high: np.ndarray | float,
    grid: IntegerGrid,
    granularity: Granularity = PerTensor(),
    *,
    name: str = "",
) -> QuantParams:
    """Return scale and zero point for real values between ``low`` and ``high``; the range is widened to include 0.

    A range without extent (all values 0) gets scale 1, so that it stays 0.

    Args:
        low: Lowest real value, shape [] or [channels].
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
    if grid.symmetric:
        above = np.maximum(-below, above)
        below = -above
    with np.errstate(under="ignore"):
        scale = ((above - below) / grid.steps).astype(np.float32)
    scale = np.maximum(scale, np.float32(SMALLEST_SCALE))
    scale = np.where(above > below, scale, np.float32(1)).astype(np.float32)
    if grid.symmetric:
        zero_point = np.full(scale.shape, grid.middle)
    else:
        zero_point = np.clip(np.rint(grid.low - below / scale), grid.low, grid.high)
    return QuantParams(scale, zero_point.astype(grid.dtype), grid, granularity)


def weight_qparams(weight: np.ndarray, grid: IntegerGrid, granularity: Granularity, *, name: str = "") -> QuantParams:
    """Return scale and zero point that cover every value of a constant tensor, per tensor or per channel.

    Raises:
        InputError: The tensor holds NaN or infinity.
    """
    axes = tuple(i for i in range(weight.ndim) if not isinstance(granularity, PerChannel) or i != granularity.axis)
    low = weight.min(axis=axes, initial=0.0)
    high = weight.max(axis=axes, initial=0.0)
    return choose_qparams(low, high, grid, granularity, name=name)


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
    size = np.abs(rows.astype(np.float64))
    pairs = np.pad(size, ((0, 0), (0, size.shape[1] % 2))).reshape(len(size), -1, 2).sum(axis=2)
    return np.asarray(pairs.max(axis=1, initial=0.0) / 127.0)


def with_scale(params: QuantParams, scale: np.ndarray) -> QuantParams:
    """Return symmetric parameters with another scale of the same shape."""
    return QuantParams(scale.astype(np.float32), params.zero_point, params.grid, params.granularity)


def quantize(values: np.ndarray, params: QuantParams, *, name: str = "") -> np.ndarray:
    """Return ``clip(round(values / scale) + zero_point)`` in the grid's dtype, shape unchanged.

    Raises:
        InputError: A value is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise _not_finite(name)
    scale, zero_point = (
        _aligned(array, values.ndim, params.granularity) for array in (params.scale, params.zero_point)
    )
    with np.errstate(over="ignore"):
        rounded = np.rint(values.astype(np.float32, copy=False) / scale)  # infinite where scale is tiny: clipped
    clipped = np.clip(rounded + zero_point.astype(np.float32), params.grid.low, params.grid.high)
    return np.asarray(clipped.astype(params.grid.dtype))


def dequantize(integers: np.ndarray, params: QuantParams) -> np.ndarray:
    """Return ``scale * (integers - zero_point)`` as float32, shape unchanged."""
    scale, zero_point = (_aligned(a, integers.ndim, params.granularity) for a in (params.scale, params.zero_point))
    return np.asarray((integers.astype(np.int32) - zero_point.astype(np.int32)) * scale, np.float32)


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


def _aligned(array: np.ndarray, rank: int, granularity: Granularity) -> np.ndarray:
    """Return per-channel values as [1, .., channels, .., 1], so that they broadcast along their axis."""
    if isinstance(granularity, PerTensor):
        return array
    shape = [1] * rank
    shape[granularity.axis] = -1
    return array.reshape(shape)
