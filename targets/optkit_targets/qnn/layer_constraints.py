"""What HTP asks of layers: convolutions, products, recurrences, normalizations, images."""

from __future__ import annotations

import re

import onnx_ir as ir

from optkit.graph import argument, constant, opset, static_shape
from optkit.target import Target
from optkit_targets.qnn.constraints import FLOAT_ARCH, architecture, attribute
from optkit_targets.qnn.units import DEQUANTIZE, INTEGERS_8, INTEGERS_16, dtype, producer, stored, unit_at


def constraint_weights_16(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Constant weights of 16 bits need architecture 69."""
    unit = unit_at(node, model)
    weight = unit.input_type(1)
    old = architecture(target) < FLOAT_ARCH and unit.quantized and stored(node.inputs[1]) is not None
    return f"{weight.name.lower()} on {architecture(target)}" if old and weight in INTEGERS_16 and weight else ""


def constraint_conv_3d(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A convolution in three dimensions takes weights of 8 bits or floats, no signed 16 bits, and no dilations."""
    if len(static_shape(node.inputs[0]) or ()) != 5:
        return ""
    if set(node.attributes.get_ints("dilations", [1])) != {1}:
        return f"dilations {list(node.attributes.get_ints('dilations', []))}"
    weight, unit = unit_at(node, model).input_type(1), unit_at(node, model)
    if unit.quantize and unit.input_type(0) == ir.DataType.INT16:
        return "int16 activations"
    return f"{weight.name.lower()} weights" if unit.quantize and weight and weight not in INTEGERS_8 else ""


def constraint_same_padding(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The padding SAME takes no dilations."""
    padding, dilations = node.attributes.get_string("auto_pad", "NOTSET"), node.attributes.get_ints("dilations", [1])
    return f"{padding}, dilations {list(dilations)}" if padding.startswith("SAME") and set(dilations) != {1} else ""


def constraint_depthwise(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A depthwise convolution takes strides or dilations, both only in a QDQ unit and even in all directions."""
    shape, group = static_shape(node.inputs[0]), node.attributes.get_int("group", 1)
    strides, dilations = set(node.attributes.get_ints("strides", [1])), set(node.attributes.get_ints("dilations", [1]))
    if shape is None or group == 1 or group != shape[1] or strides == {1} or dilations == {1}:
        return ""
    even = len(strides) == len(dilations) == 1 and unit_at(node, model).quantized
    return "" if even else f"strides {sorted(strides)}, dilations {sorted(dilations)}"


def constraint_grouped_scales(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A grouped transposed convolution with a bias takes one scale."""
    source = producer(node.inputs[1])
    if node.attributes.get_int("group", 1) == 1 or argument(node, 2) is None or source is None:
        return ""
    scale = constant(source.inputs[1]) if source.op_type == DEQUANTIZE else None
    return f"{scale.size} scales" if scale is not None and scale.size > 1 else ""


def constraint_slope(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Slopes of 16 bits have one dimension at most."""
    rank = len(static_shape(node.inputs[1]) or ())
    wide = unit_at(node, model).quantized and unit_at(node, model).input_type(1) in INTEGERS_16
    return f"{rank} dimensions" if wide and rank > 1 else ""


def constraint_conv_transpose(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A transposed convolution takes no dilations."""
    dilations = list(node.attributes.get_ints("dilations", [1]))
    return f"dilations {dilations}" if set(dilations) != {1} else ""


def constraint_pool(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Pooling takes no dilations, and gives no indices."""
    dilations = list(node.attributes.get_ints("dilations", [1]))
    if set(dilations) != {1}:
        return f"dilations {dilations}"
    return "the output Indices" if len([value for value in node.outputs if value.name]) > 1 else ""


def constraint_lp_pool(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The norm's p must be 1 or 2, and the output's size rounded down."""
    p = node.attributes.get_int("p", 2)
    if p not in (1, 2):
        return f"p = {p}"
    return "ceil_mode = 1" if node.attributes.get_int("ceil_mode", 0) else ""


def constraint_matmul(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Products of five dimensions take neither a constant matrix nor a scale per channel on their right."""
    shapes = [static_shape(value) for value in node.inputs]
    if max((len(shape) for shape in shapes if shape is not None), default=0) < 5:
        return ""
    source = producer(node.inputs[1])
    fixed = stored(node.inputs[1]) is not None
    if fixed and shapes[1] is not None and len(shapes[1]) == 2:
        return "a constant matrix"
    scale = constant(source.inputs[1]) if source is not None and source.op_type == DEQUANTIZE else None
    return f"{scale.size} scales" if scale is not None and scale.size > 1 else ""


def constraint_gemm(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A Gemm takes alpha = 1 and beta = 1, or 0."""
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    return "" if alpha == 1.0 and beta in (0.0, 1.0) else f"alpha = {alpha:g}, beta = {beta:g}"


def constraint_gemm_bias(node: ir.Node, model: ir.Model, target: Target) -> str:
    """In a QDQ unit the bias must be one number per column."""
    bias, out = static_shape(argument(node, 2)), static_shape(node.outputs[0])
    if bias is None or out is None or not unit_at(node, model).quantized or bias in ([out[1]], [1, out[1]]):
        return ""
    return f"shape {bias}"


def constraint_einsum(node: ir.Node, model: ir.Model, target: Target) -> str:
    """An equation must be a batched matrix product, its right side transposed or not, as the provider reads it."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    terms = re.fullmatch(r"([a-z]{2,}),([a-z]{2,})->([a-z]{2,})", equation)
    if terms is None or not _is_product(*terms.groups(), quantized=unit_at(node, model).quantized):
        return equation
    return ""


def _is_product(left: str, right: str, out: str, *, quantized: bool) -> bool:
    """Return whether the provider lowers an equation (``einsum_op_builder.cc`` of onnxruntime-qnn 2.7)."""
    if len(left) == len(right) == len(out):
        batch = left[:-2] == right[:-2] == out[:-2]
        plain = (left[-2], left[-1], right[-1]) == (out[-2], right[-2], out[-1])
        turned = (left[-2], left[-1], right[-2]) == (out[-2], right[-1], out[-1])
        whole = len(left) == 4 and left[0] == right[0] == out[0]
        crossed = whole and (left[3], left[1], right[1]) == (out[3], right[3], out[1])
        return (batch and (plain or turned)) or crossed
    if (len(left), len(right), len(out)) != (4, 3, 4) or left[:3] != out[:3] or left[3] != right[2]:
        return False
    by_row = right[0] == left[1]  # bhwc,hkc->bhwk
    by_column = right[0] == left[2] and not quantized  # bhwc,wkc->bhwk
    return right[1] == out[3] and (by_row or by_column)


def constraint_recurrent(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A recurrence runs over time first, with the standard activations and without clipping."""
    if "clip" in node.attributes:
        return f"clip = {node.attributes.get_float('clip', 0.0):g}"
    if node.attributes.get_int("layout", 0):
        return "layout = 1"
    standard = ["sigmoid", "tanh", "tanh"] if node.op_type == "LSTM" else ["sigmoid", "tanh"]
    given = [name.lower() for name in node.attributes.get_strings("activations", standard)]
    return f"activations {given}" if given != standard * (len(given) // len(standard)) else ""


def constraint_batch_normalization(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Batch normalization takes the statistics of training as constants."""
    return "training_mode = 1" if node.attributes.get_int("training_mode", 0) else ""


def constraint_batch_unit(node: ir.Node, model: ir.Model, target: Target) -> str:
    """In a QDQ unit of 16 bits mean and variance stay floats, and no weights have 4 bits."""
    unit = unit_at(node, model)
    weight = unit.input_type(1)
    if unit.quantized and weight in (ir.DataType.INT4, ir.DataType.UINT4):
        return f"{weight.name.lower()} weights"
    if len(unit.dequantize) > 3 and unit.input_type(0) in INTEGERS_16:
        return "they are quantized"
    return ""


def constraint_layer_normalization(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Layer normalization runs over the last axis and gives one output."""
    shape = static_shape(node.inputs[0])
    axis = node.attributes.get_int("axis", -1)
    if shape is not None and axis not in (-1, len(shape) - 1):
        return f"axis {axis} of {len(shape)}"
    extra = [value for value in node.outputs[1:] if value.name]
    return f"{len(extra) + 1} outputs" if extra else ""


def constraint_norm_weight(node: ir.Node, model: ir.Model, target: Target) -> str:
    """In a QDQ unit the weights must be signed where the data is."""
    unit = unit_at(node, model)
    data, weight = unit.input_type(0), unit.input_type(1)
    if not unit.quantized or data is None or weight is None or data.is_signed() == weight.is_signed():
        return ""
    return f"{weight.name.lower()} beside {data.name.lower()}"


def constraint_lp_normalization(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The norm's p must be 2."""
    p = node.attributes.get_int("p", 2)
    return f"p = {p}" if p != 2 else ""


def constraint_whole_unit(node: ir.Node, model: ir.Model, target: Target) -> str:
    """With all inputs dequantized the output must be quantized again."""
    unit = unit_at(node, model)
    return "its output is not quantized" if unit.quantized and not unit.quantize else ""


def constraint_one_scale(node: ir.Node, model: ir.Model, target: Target) -> str:
    """In a QDQ unit the weights must have one scale."""
    for source in unit_at(node, model).dequantize[1:]:
        scale = constant(source.inputs[1])
        if scale is not None and scale.size > 1 and dtype(source.inputs[0]) != ir.DataType.INT32:
            return f"'{source.inputs[0].name}' has {scale.size}" if source.inputs[0] is not None else "more than one"
    return ""


def constraint_resize_modes(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A resize's coordinates are half_pixel, pytorch_half_pixel, asymmetric or align_corners, without antialiasing."""
    if node.attributes.get_int("antialias", 0):
        return "antialias = 1"
    taken = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
    return attribute(node, "coordinate_transformation_mode", "half_pixel", taken)


# The roundings of nearest neighbours that are taken of one or three axes.
NEAREST = {("asymmetric", "floor"), ("half_pixel", "floor"), ("align_corners", "round_prefer_ceil")}


def constraint_resize_nearest(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Nearest neighbours are rounded by floor or round_prefer_ceil where asymmetric, and most others taken in 4-D."""
    if node.attributes.get_string("mode", "nearest") != "nearest" or opset(model) < 11:
        return ""
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    rank = len(static_shape(node.inputs[0]) or ())
    wrong = mode == "asymmetric" and rounding not in ("floor", "round_prefer_ceil")
    return f"{mode}, {rounding} in {rank}-D" if wrong or (rank != 4 and (mode, rounding) not in NEAREST) else ""


def constraint_resize_axes(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A resize leaves batch and channels as they are."""
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if before is None or after is None or before[:2] == after[:2]:
        return ""
    return f"{before} to {after}"


def constraint_grid_sample(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Samples are linear or nearest, of images."""
    if len(static_shape(node.inputs[0]) or ()) > 4:
        return "of volumes"
    return attribute(node, "mode", "linear", ("linear", "bilinear", "nearest"))


def constraint_roi_align(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Regions are averaged."""
    return attribute(node, "mode", "avg", ("avg",))
