# mypy: disable-error-code="no-any-return"
# NumPy's stubs make arithmetic on arrays Any.
"""Pooling, axis by axis: maxima and sums of a box are those of its rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from optkit_targets.coreml.interpreter.kernels.convolution import integers, spatial_pads
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray
Combine = Callable[[Array, Array], Array]


class Window:
    """Where a pooling's windows lie.

    Attributes:
        pads: The padding before and after each spatial axis, without what ``ceil_mode`` looks at beyond it.
        sizes: The output's spatial shape.
    """

    def __init__(
        self, x: Array, kernel_sizes: Array, strides: Array | None, pad_type: str, pad: Array | None, ceil_mode: bool
    ) -> None:
        rank = x.ndim - 2
        self.kernel = [int(size) for size in kernel_sizes]
        self.steps = integers(strides, 1, rank)
        self.pads = spatial_pads(pad_type, pad, x.shape[2:], self.kernel, self.steps)
        self.sizes = []
        for size, kernel, step, (before, after) in zip(x.shape[2:], self.kernel, self.steps, self.pads, strict=True):
            room = size + before + after - kernel
            count = (-(-room // step) if ceil_mode else room // step) + 1
            # The last window must begin within the input or the padding before it.
            if ceil_mode and before + after > 0 and (count - 1) * step >= size + before:
                count -= 1
            self.sizes.append(count)

    def pool(self, x: Array, fill: float, combine: Combine) -> Array:
        """Return what ``combine`` makes of each window; ``fill`` stands where a window leaves the input."""
        for axis, (kernel, step, (before, _), count) in enumerate(
            zip(self.kernel, self.steps, self.pads, self.sizes, strict=True), start=2
        ):
            beyond = max(0, (count - 1) * step + kernel - before - x.shape[axis])
            if before or beyond:
                widths = [(before, beyond) if each == axis else (0, 0) for each in range(x.ndim)]
                x = np.pad(x, widths, constant_values=fill)
            pooled: Array | None = None
            for offset in range(kernel):
                cut = [slice(None)] * x.ndim
                cut[axis] = slice(offset, offset + (count - 1) * step + 1, step)
                pooled = x[tuple(cut)] if pooled is None else combine(pooled, x[tuple(cut)])
            x = x if pooled is None else pooled
        return x


@executes("max_pool")
def max_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    ceil_mode: Array | bool = False,
) -> Array:
    """Return the maxima of windows."""
    window = Window(x, kernel_sizes, strides, pad_type, pad, bool(ceil_mode))
    return window.pool(x, -np.inf, np.maximum)


@executes("avg_pool")
def avg_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    exclude_padding_from_average: Array | bool = False,
    ceil_mode: Array | bool = False,
) -> Array:
    """Return the means of windows; padding counts unless it is excluded, what lies beyond it never does."""
    window = Window(x, kernel_sizes, strides, pad_type, pad, bool(ceil_mode))
    ones = np.ones((1, 1, *x.shape[2:]), np.float32)
    if exclude_padding_from_average:
        return window.pool(x, 0.0, np.add) / window.pool(ones, 0.0, np.add)
    padded = np.pad(ones, [(0, 0), (0, 0), *window.pads], constant_values=1.0)
    counted = Window(x, kernel_sizes, strides, pad_type, pad, bool(ceil_mode))
    counted.pads = [(0, 0)] * len(window.pads)
    return window.pool(x, 0.0, np.add) / counted.pool(padded, 0.0, np.add)


@executes("l2_pool")
def l2_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    ceil_mode: Array | bool = False,
) -> Array:
    """Return the square roots of the sums of squares of windows."""
    window = Window(x, kernel_sizes, strides, pad_type, pad, bool(ceil_mode))
    return np.sqrt(window.pool(np.square(x), 0.0, np.add))
