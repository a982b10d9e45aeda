# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Quantization of activations (iOS 17)."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.elements import named
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


def along(parameter: Array, axis: Array | None, rank: int) -> Array:
    """Return a scalar as it is, and a vector so that it applies to ``axis`` of a tensor of ``rank`` dimensions."""
    if parameter.ndim != 1 or axis is None:
        return parameter
    shape = [1] * rank
    shape[int(axis)] = -1
    return parameter.reshape(shape)


@executes("quantize")
def quantize(
    input_: Array, scale: Array, output_dtype: str, zero_point: Array | None = None, axis: Array | None = None
) -> Array:
    """Return ``clip(round(input / scale) + zero_point)``, halves to the even number."""
    wanted = named(output_dtype).dtype
    limits = np.iinfo(wanted)
    levels = np.rint(input_ / along(scale, axis, input_.ndim))
    if zero_point is not None:
        levels = levels + along(zero_point, axis, input_.ndim).astype(np.float32)
    return np.clip(np.nan_to_num(levels, nan=0.0), limits.min, limits.max).astype(wanted)


@executes("dequantize")
def dequantize(input_: Array, scale: Array, zero_point: Array | None = None, axis: Array | None = None) -> Array:
    """Return ``scale * (input - zero_point)``."""
    levels = input_.astype(np.float32)
    if zero_point is not None:
        levels = levels - along(zero_point, axis, input_.ndim).astype(np.float32)
    return levels * along(scale, axis, input_.ndim)
