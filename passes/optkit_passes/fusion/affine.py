"""``y = scale * x + shift`` along one axis, and the weights of linear operators that absorb it: arithmetic only.

Everything is computed in float64; whoever stores a result rounds it once to the weight's type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant


@dataclass(frozen=True)
class Affine:
    """``y = scale * x + shift``.

    Attributes:
        scale: One number per channel, shape [C], or [1] for all channels.
        shift: The same.
        axis: The channel axis counted from the end (-1 is the last); None where every channel has the same numbers.
    """

    scale: np.ndarray
    shift: np.ndarray
    axis: int | None


def batch_norm(node: ir.Node) -> Affine | str:
    """Read a BatchNormalization in inference mode, or say why it cannot be read.

    ``scale = gamma / sqrt(var + epsilon)`` and ``shift = beta - mean * scale`` along axis 1 (ONNX BatchNormalization).
    """
    if node.attributes.get_int("training_mode", 0) or any(output.name for output in node.outputs[1:]):
        return "it is in training mode"
    if not node.attributes.get_int("spatial", 1):
        return "it normalizes every position for itself (spatial=0)"
    arrays = [constant(argument(node, index)) for index in range(1, 5)]
    gamma, beta, mean, variance = (None if array is None else array.astype(np.float64) for array in arrays)
    if gamma is None or beta is None or mean is None or variance is None:
        return "its parameters are not constant"
    rank = _rank(node.inputs[0])
    if rank is None or rank < 2:
        return "the rank of its input is not known" if rank is None else "its input has no channel axis"
    variance = variance + node.attributes.get_float("epsilon", 1e-5)
    if not (variance > 0).all():
        return "its variance plus epsilon is not positive"
    scale = gamma / np.sqrt(variance)
    return Affine(scale, beta - mean * scale, 1 - rank)


def arithmetic(node: ir.Node) -> tuple[ir.Value, Affine | str] | None:
    """Read ``Mul``, ``Add``, ``Sub`` or ``Div`` of a floating-point value and a constant.

    Returns:
        The value, and what is done to it or why that is not affine along one axis; None for any other node.
    """
    left, right = (constant(value) for value in node.inputs)
    operand, value = (right, node.inputs[0]) if left is None else (left, node.inputs[1])
    if operand is None or value is None or (node.op_type == "Div" and right is None) or constant(value) is not None:
        return None
    if value.dtype is None or not value.dtype.is_floating_point():
        return None
    rank = _rank(value)
    if rank is None or operand.ndim > rank:
        return value, "the constant may have more axes than the value it is applied to"
    wide = [axis - operand.ndim for axis, size in enumerate(operand.shape) if size != 1]
    if len(wide) > 1:
        return value, "the constant varies along several axes"
    number = operand.astype(np.float64).ravel()
    one, zero = np.ones_like(number), np.zeros_like(number)
    with np.errstate(divide="ignore"):
        if node.op_type in ("Mul", "Div"):
            scale, shift = number if node.op_type == "Mul" else 1 / number, zero
        elif left is None:
            scale, shift = one, number if node.op_type == "Add" else -number
        else:
            scale, shift = one if node.op_type == "Add" else -one, number
    return value, Affine(scale, shift, wide[0] if wide else None)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def output_axis(node: ir.Node, weight: np.ndarray, weight_index: int) -> int:
    """Return the axis of a linear operator's output that its weight makes, counted from the end."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return 1 - weight.ndim
    return -2 if node.op_type == "MatMul" and weight_index == 0 else -1


def output_channels(node: ir.Node, weight: np.ndarray, weight_index: int) -> int:
    """Return the length of that axis."""
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1]) * node.attributes.get_int("group", 1)
    return int(weight.shape[_weight_axis(node, weight, weight_index)])


def input_channels(node: ir.Node, weight: np.ndarray, weight_index: int) -> int:
    """Return how many input channels a linear operator with this weight takes."""
    if node.op_type == "Conv":
        return int(weight.shape[1]) * node.attributes.get_int("group", 1)
    return int(weight.shape[_inner_axis(node, weight, weight_index)])


def _weight_axis(node: ir.Node, weight: np.ndarray, weight_index: int) -> int:
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    if node.op_type == "MatMul":
        return weight.ndim - (2 if weight_index == 0 else 1)
    return 0  # Conv: [C_out, C_in / group, ...]


def _inner_axis(node: ir.Node, weight: np.ndarray, weight_index: int) -> int:
    if node.op_type == "ConvTranspose":
        return 0  # [C_in, C_out / group, ...]
    other = _weight_axis(node, weight, weight_index)
    return 1 - other if node.op_type == "Gemm" else 2 * weight.ndim - 3 - other


def along(vector: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Return [C] shaped to broadcast along one axis of an array of ``rank`` axes."""
    shaped: np.ndarray = vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
    return shaped


def scale_outputs(node: ir.Node, weight: np.ndarray, weight_index: int, scale: np.ndarray) -> np.ndarray:
    """Return the weight of ``scale * linear(x)``; ``scale`` has one number per output channel."""
    if node.op_type != "ConvTranspose":
        scaled: np.ndarray = weight * along(scale, _weight_axis(node, weight, weight_index), weight.ndim)
        return scaled
    return _scale_second(node, weight, scale)  # [C_in, C_out / group, ...]


def scale_inputs(node: ir.Node, weight: np.ndarray, weight_index: int, scale: np.ndarray) -> np.ndarray:
    """Return the weight of ``linear(scale * x)``; ``scale`` has one number per input channel."""
    if node.op_type != "Conv":
        scaled: np.ndarray = weight * along(scale, _inner_axis(node, weight, weight_index), weight.ndim)
        return scaled
    return _scale_second(node, weight, scale)  # [C_out, C_in / group, ...]


def _scale_second(node: ir.Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Scale [A, B / group, ...] by [B]: row ``a`` belongs to group ``a // (A / group)``."""
    group = node.attributes.get_int("group", 1)
    grouped = weight.reshape(group, -1, *weight.shape[1:])
    factors = scale.reshape(group, 1, -1, *[1] * (weight.ndim - 2))
    scaled: np.ndarray = (grouped * factors).reshape(weight.shape)
    return scaled


def shift_inputs(node: ir.Node, weight: np.ndarray, weight_index: int, shift: np.ndarray) -> np.ndarray:
    """Return ``linear(x + shift) - linear(x)`` per output channel, for a linear operator that pads nothing."""
    scaled = scale_inputs(node, weight, weight_index, shift)
    total: np.ndarray
    if node.op_type == "Conv":
        total = scaled.reshape(len(weight), -1).sum(axis=1)
    else:
        total = scaled.sum(axis=_inner_axis(node, weight, weight_index))
        total *= node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
    return total
