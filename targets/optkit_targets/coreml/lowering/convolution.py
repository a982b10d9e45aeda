"""Convolutions and transposed convolutions of one to three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from optkit_targets.coreml.lowering.forms import dims, needs, reshaped
from optkit_targets.coreml.lowering.padding import SAME, split, windows
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import lowers
from optkit_targets.coreml.lowering.weights import weight_input
from optkit_targets.coreml.lowering.writing import Writer

AXES = (1, 2, 3)


@lowers("Conv")
def conv(scope: Scope, node: ir.Node) -> Any:
    """Write a convolution; its pads are explicit, begin and end of each axis."""
    x, weight, write = scope.input(node, 0), weight_input(scope, node, 1), Writer(scope, node)
    moves = windows(scope, node, _spatial(x), dims(weight)[2:])
    if not weight.is_descendant_of_const and set(moves.dilations) != {1}:
        raise CannotLower("its weight is computed at run time, and MIL dilates constant ones alone")
    pads = moves.mil_pads
    result = write.conv(
        x=x,
        weight=weight,
        **_bias(scope, node),
        strides=list(moves.strides),
        dilations=list(moves.dilations),
        groups=node.attributes.get_int("group", 1),
        **({"pad_type": "custom", "pad": pads} if any(pads) else {"pad_type": "valid"}),
    )
    return _with_computed_bias(scope, node, write, result)


def _spatial(x: Any) -> tuple[int, ...]:
    """Return the spatial dimensions of an image or its like."""
    lengths = dims(x)[2:]
    if len(lengths) not in AXES:
        raise CannotLower(f"it moves along {len(lengths)} axes, MIL along one to three")
    return lengths


def _bias(scope: Scope, node: ir.Node) -> dict[str, Any]:
    """Return a constant bias as MIL's input."""
    bias = scope.optional(node, 2)
    return {"bias": bias} if bias is not None and bias.val is not None else {}


def _with_computed_bias(scope: Scope, node: ir.Node, write: Writer, result: Any) -> Any:
    """Return a result with the bias that was not constant added."""
    bias = scope.optional(node, 2)
    if bias is None or bias.val is not None:
        return result
    return write.add(x=result, y=reshaped(scope, bias, [1, dims(bias)[0], *[1] * (len(dims(result)) - 2)]))


@lowers("ConvTranspose")
def conv_transpose(scope: Scope, node: ir.Node) -> Any:
    """Write a transposed convolution; what MIL cannot crop itself is cut off, or added as zeros, behind it.

    The whole result of an axis has ``stride·(length - 1) + dilation·(kernel - 1) + 1`` elements, of which ``pads`` are
    dropped at either end; ``output_padding`` and ``output_shape`` ask for more, which hold the bias alone.
    """
    x, weight, write = scope.input(node, 0), weight_input(scope, node, 1), Writer(scope, node)
    if not weight.is_descendant_of_const:
        needs(scope, 17, "a transposed convolution with a computed weight")
    axes = len(_spatial(x))
    strides = scope.ints(node, "strides", [1] * axes) or []
    dilations = scope.ints(node, "dilations", [1] * axes) or []
    whole = [
        stride * (length - 1) + dilation * (size - 1) + 1
        for stride, length, dilation, size in zip(strides, _spatial(x), dilations, dims(weight)[2:], strict=True)
    ]
    begins, ends = _crops(scope, node, whole, [s * n for s, n in zip(strides, _spatial(x), strict=True)])
    native = begins == ends and min(begins) >= 0
    bias = _bias(scope, node) if native or min(begins + ends) >= 0 else {}
    pads = [amount for pair in zip(begins, ends, strict=True) for amount in pair]
    result = write.conv_transpose(
        x=x,
        weight=weight,
        **bias,
        strides=strides,
        dilations=dilations,
        groups=node.attributes.get_int("group", 1),
        **({"pad_type": "custom", "pad": pads} if native and any(pads) else {"pad_type": "valid"}),
    )
    if not native:
        result = _cropped(write, result, begins, ends)
    if not bias and scope.optional(node, 2) is not None:
        vector = scope.input(node, 2)
        return write.add(x=result, y=reshaped(scope, vector, [1, dims(vector)[0], *[1] * axes]))
    return result


def _crops(scope: Scope, node: ir.Node, whole: Sequence[int], same: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return how many elements to drop in front and behind on each axis; a negative number adds as many.

    Args:
        scope: The program being written.
        node: The transposed convolution.
        whole: Elements of the whole result.
        same: Elements of the result that ``auto_pad`` SAME asks for.
    """
    axes = len(whole)
    extra = scope.ints(node, "output_padding", [0] * axes) or []
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    wanted = scope.ints(node, "output_shape")
    if wanted is None and automatic in SAME:
        wanted = [size + more for size, more in zip(same, extra, strict=True)]
    if wanted is None:
        pads = [0] * 2 * axes if automatic == "VALID" else scope.ints(node, "pads", [0] * 2 * axes) or []
    else:
        totals = [size + more - goal for size, more, goal in zip(whole, extra, wanted[-axes:], strict=True)]
        pads = split(totals, more_in_front=automatic != "SAME_UPPER")
    return pads[:axes], [end - more for end, more in zip(pads[axes:], extra, strict=True)]


def _cropped(write: Writer, x: Any, begins: Sequence[int], ends: Sequence[int]) -> Any:
    """Return a tensor without some elements of its spatial axes, or with zeros where the numbers are negative."""
    missing = [max(-amount, 0) for pair in zip(begins, ends, strict=True) for amount in pair]
    if any(missing):
        x = write.pad(x=x, pad=missing, mode="constant", constant_val=0.0)
    lengths = dims(x)
    front = [max(amount, 0) for amount in begins]
    kept = [size - begin - max(end, 0) for size, begin, end in zip(lengths[2:], front, ends, strict=True)]
    if list(lengths[2:]) == kept:
        return x
    return write.slice_by_size(x=x, begin=[0, 0, *front], size=[*lengths[:2], *kept])
