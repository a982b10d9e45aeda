"""What a Pad node pads, whichever opset it is written for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, ints


@dataclass(frozen=True)
class Padding:
    """What a Pad node adds.

    Attributes:
        begins: Elements before each axis; negative numbers crop.
        ends: Elements after each axis.
        mode: ``constant``, ``reflect``, ``edge`` or ``wrap``.
        value: The number that ``constant`` adds.
    """

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    mode: str
    value: float


def padding(node: ir.Node) -> Padding | str:
    """Read a Pad node (pads as attribute before opset 11, as input since; ``axes`` since 18), or say why not."""
    pads = ints(node, "pads", 1)
    if pads is None:
        return "the amount of padding is computed at run time"
    mode = node.attributes.get_string("mode", "constant") or "constant"
    value = node.attributes.get_float("value", 0.0) or 0.0
    operand = argument(node, 2)
    if operand is not None:
        array = constant(operand)
        if array is None:
            return "the padding value is computed at run time"
        value = float(array.astype(np.float64).ravel()[0]) if array.size else 0.0
    begins, ends = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    if argument(node, 3) is None:
        return Padding(tuple(begins), tuple(ends), mode, value)
    axes, shape = ints(node, "axes", 3), node.inputs[0].shape if node.inputs[0] is not None else None
    if axes is None or shape is None:
        return "the padded axes are not known"
    rank = len(shape)
    wide: list[list[int]] = [[0] * rank, [0] * rank]
    for axis, begin, end in zip(axes, begins, ends, strict=True):
        wide[0][axis % rank], wide[1][axis % rank] = begin, end
    return Padding(tuple(wide[0]), tuple(wide[1]), mode, value)
