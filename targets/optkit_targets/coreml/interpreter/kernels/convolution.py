"""Convolutions, which onnxruntime computes in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optkit_targets.coreml.interpreter.kernels.sessions import run
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


def spatial_pads(
    pad_type: str, pad: Array | None, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the padding before and after each spatial axis.

    Args:
        pad_type: ``valid``, ``custom``, or ``same`` and ``same_lower``, by which the output is ``ceil(size / stride)``
            long and an odd element lies after, and before.
        pad: The paddings of ``custom``: before and after the first axis, and so on.
        sizes: The input's spatial shape.
        kernel: The window's, dilated.
        strides: The strides.
    """
    if pad_type == "custom" and pad is not None:
        return [(int(before), int(after)) for before, after in pad.reshape(-1, 2)]
    if pad_type not in ("same", "same_lower"):
        return [(0, 0)] * len(kernel)
    totals = [max(0, (-(-size // s) - 1) * s + k - size) for size, k, s in zip(sizes, kernel, strides, strict=True)]
    lower = pad_type == "same_lower"
    return [(total - total // 2, total // 2) if lower else (total // 2, total - total // 2) for total in totals]


def integers(values: Array | None, default: int, count: int) -> list[int]:
    """Return a list of integers, or ``default`` times ``count`` where there is none."""
    return [default] * count if values is None else [int(value) for value in values]


@executes("conv")
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: Array | int = 1,
) -> Array:
    """Return the convolution of ``x`` [N, C, ...] with ``weight`` [out, C / groups, ...]."""
    rank = x.ndim - 2
    steps, gaps = integers(strides, 1, rank), integers(dilations, 1, rank)
    kernel = [(size - 1) * gap + 1 for size, gap in zip(weight.shape[2:], gaps, strict=True)]
    pads = spatial_pads(pad_type, pad, x.shape[2:], kernel, steps)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return run(
        "Conv",
        *inputs,
        strides=tuple(steps),
        dilations=tuple(gaps),
        group=int(groups),
        pads=(*(before for before, _ in pads), *(after for _, after in pads)),
    )


@executes("conv_transpose")
def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    pad: Array | None = None,
    output_shape: Array | None = None,
    pad_type: str = "valid",
    strides: Array | None = None,
    dilations: Array | None = None,
    groups: Array | int = 1,
) -> Array:
    """Return the transposed convolution of ``x`` [N, C, ...] with ``weight`` [C, out / groups, ...].

    The whole result is computed, and cut: ``custom`` takes ``pad`` off its ends; ``same`` leaves ``size * stride``, and
    ``output_shape`` its own size, of which what the result does not reach is zero. The bias comes last.
    """
    rank = x.ndim - 2
    steps, gaps = integers(strides, 1, rank), integers(dilations, 1, rank)
    whole = run("ConvTranspose", x, weight, strides=tuple(steps), dilations=tuple(gaps), group=int(groups))
    for axis in range(rank):
        length = whole.shape[axis + 2]
        begin, end = (
            (int(pad[2 * axis]), int(pad[2 * axis + 1])) if pad_type == "custom" and pad is not None else (0, 0)
        )
        wanted = length - begin - end
        if pad_type == "same":
            wanted = x.shape[axis + 2] * steps[axis]
        if output_shape is not None:
            wanted = int(output_shape[axis + 2])
        if pad_type == "same":
            begin = max(0, length - wanted) // 2
        cut = [slice(None)] * whole.ndim
        cut[axis + 2] = slice(begin, begin + wanted)
        whole = whole[tuple(cut)]
        lacking = wanted - whole.shape[axis + 2]
        if lacking:
            whole = np.pad(whole, [(0, lacking if each == axis + 2 else 0) for each in range(whole.ndim)])
    return whole if bias is None else whole + bias.reshape((-1,) + (1,) * rank)
