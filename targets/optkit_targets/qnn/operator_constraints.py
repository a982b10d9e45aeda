"""What HTP asks of single operators. The docstring of each constraint is the sentence the user reads."""

from __future__ import annotations

import re

import onnx_ir as ir

from optkit.graph import argument, constant, ints, opset, static_shape
from optkit.target import Target
from optkit_targets.qnn.constraints import Constraint
from optkit_targets.qnn.units import DEQUANTIZE, INTEGERS_8, dtype, producer, unit_at

# Settings that must be constants, by operator: the inputs that hold them.
CONSTANT_INPUTS = {
    "Clip": (1, 2),
    "CumSum": (1,),
    "Expand": (1,),
    "Pad": (1, 2),
    "ReduceL2": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "BatchNormalization": (1, 2, 3, 4),
}


def constraint_constant_inputs(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Settings that newer opsets give as inputs must be constants."""
    for index in CONSTANT_INPUTS.get(node.op_type, ()):
        value = argument(node, index)
        if value is not None and _array(value) is None:
            return f"'{value.name}' is computed"
    return ""


def constraint_conv_3d(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A convolution in three dimensions takes weights of 8 bits or floats, no signed 16 bits, and no dilations."""
    if len(static_shape(node.inputs[0]) or ()) != 5:
        return ""
    if set(node.attributes.get_ints("dilations", [1])) != {1}:
        return f"dilations {list(node.attributes.get_ints('dilations', []))}"
    weight, unit = dtype_of_weight(node, model), unit_at(node, model)
    if unit.quantize and unit.input_type(0) == ir.DataType.INT16:
        return "int16 activations"
    return f"{weight.name.lower()} weights" if unit.quantize and weight and weight not in INTEGERS_8 else ""


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


def constraint_lp_normalization(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The norm's p must be 2."""
    p = node.attributes.get_int("p", 2)
    return f"p = {p}" if p != 2 else ""


def constraint_matmul(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Products of five dimensions take neither a constant matrix nor a scale per channel on their right."""
    shapes = [static_shape(value) for value in node.inputs]
    if max((len(shape) for shape in shapes if shape is not None), default=0) < 5:
        return ""
    source = producer(node.inputs[1])
    fixed = _array(node.inputs[1]) is not None
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


def constraint_batch_normalization(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Batch normalization takes the statistics of training as constants."""
    return "training_mode = 1" if node.attributes.get_int("training_mode", 0) else ""


def constraint_layer_normalization(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Layer normalization runs over the last axis and gives one output."""
    shape = static_shape(node.inputs[0])
    axis = node.attributes.get_int("axis", -1)
    if shape is not None and axis not in (-1, len(shape) - 1):
        return f"axis {axis} of {len(shape)}"
    extra = [value for value in node.outputs[1:] if value.name]
    return f"{len(extra) + 1} outputs" if extra else ""


def constraint_reduce(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A reduction must name its axes where empty ones mean none."""
    if not node.attributes.get_int("noop_with_empty_axes", 0):
        return ""
    return "" if ints(node, "axes", 1, ()) else "no axes and noop_with_empty_axes = 1"


def constraint_arg(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Of equal values the first counts."""
    return "select_last_index = 1" if node.attributes.get_int("select_last_index", 0) else ""


def constraint_reshape(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A size of 0 means that the dimension stays."""
    return "allowzero = 1" if node.attributes.get_int("allowzero", 0) else ""


def constraint_slice(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Something must remain of every axis."""
    shape = static_shape(node.outputs[0])
    return "nothing remains" if shape is not None and 0 in shape else ""


def constraint_gather(node: ir.Node, model: ir.Model, target: Target) -> str:
    """An int64 row taken by a scalar index is not computed in 32 bits."""
    data, index = node.inputs[0], node.inputs[1]
    whole = static_shape(data) or [1]
    if dtype(data) == ir.DataType.INT64 and static_shape(index) == [] and len(whole) > 1:
        return f"int64 of {len(whole)} dimensions"
    return ""


def constraint_indices(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Constant indices must lie within the axis."""
    shape, index = static_shape(node.inputs[0]), constant(node.inputs[1])
    if shape is None or index is None or not index.size or not shape:
        return ""
    size = shape[node.attributes.get_int("axis", 0)]
    wrong = [int(value) for value in (index.min(), index.max()) if not -size <= value < size]
    return f"{wrong[0]} of {size}" if wrong else ""


def constraint_gather_nd(node: ir.Node, model: ir.Model, target: Target) -> str:
    """GatherND takes no batch dimensions."""
    count = node.attributes.get_int("batch_dims", 0)
    return f"batch_dims = {count}" if count else ""


def constraint_scatter_nd(node: ir.Node, model: ir.Model, target: Target) -> str:
    """ScatterND replaces, adds or multiplies."""
    return _attribute(node, "reduction", "none", ("none", "add", "mul"))


def constraint_scatter_elements(node: ir.Node, model: ir.Model, target: Target) -> str:
    """ScatterElements replaces; in a QDQ unit it also adds, multiplies or keeps the largest."""
    taken = ("none", "add", "mul", "max") if unit_at(node, model).quantized else ("none",)
    return _attribute(node, "reduction", "none", taken)


def constraint_pad(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Padding is constant, reflected or of the edge, over all axes, and reflects no more than there is."""
    if found := _attribute(node, "mode", "constant", ("constant", "reflect", "edge")):
        return found
    if argument(node, 3) is not None:
        return "the input axes"
    mode, pads, shape = (
        node.attributes.get_string("mode", "constant"),
        ints(node, "pads", 1),
        static_shape(node.inputs[0]),
    )
    if mode == "reflect" and pads and shape:
        for axis, size in enumerate(shape):
            if max(pads[axis], pads[axis + len(shape)]) >= size:
                return f"{max(pads[axis], pads[axis + len(shape)])} reflected of {size}"
    return ""


def constraint_pad_rank(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Reflections and edges are taken in four dimensions, reflections in five where they are in a QDQ unit."""
    mode = node.attributes.get_string("mode", "constant")
    rank = len(static_shape(node.inputs[0]) or ())
    allowed = 5 if mode == "constant" or (mode == "reflect" and unit_at(node, model).quantized) else 4
    return f"{mode} in {rank} dimensions" if rank > allowed else ""


def constraint_resize_modes(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A resize's coordinates are half_pixel, pytorch_half_pixel, asymmetric or align_corners, without antialiasing."""
    if node.attributes.get_int("antialias", 0):
        return "antialias = 1"
    taken = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
    return _attribute(node, "coordinate_transformation_mode", "half_pixel", taken)


def constraint_resize_nearest(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Nearest neighbours are rounded by floor or round_prefer_ceil at asymmetric coordinates, others taken in 4-D."""
    if node.attributes.get_string("mode", "nearest") != "nearest" or opset(model) < 11:
        return ""
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    if mode == "asymmetric" and rounding not in ("floor", "round_prefer_ceil"):
        return f"nearest_mode = {rounding}"
    rank = len(static_shape(node.inputs[0]) or ())
    return (
        f"{mode}, {rounding} in {rank} dimensions" if rank != 4 and (mode, rounding) != ("asymmetric", "floor") else ""
    )


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
    return _attribute(node, "mode", "linear", ("linear", "bilinear", "nearest"))


def constraint_one_hot(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The depth and the two values must be constant, and the values no int64."""
    for value in node.inputs[1:]:
        if value is not None and constant(value) is None:
            return f"'{value.name}' is computed"
    return "int64 values" if dtype(node.inputs[2]) == ir.DataType.INT64 else ""


def constraint_roi_align(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Regions are averaged."""
    return _attribute(node, "mode", "avg", ("avg",))


def constraint_recurrent(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A recurrence runs over time first, with the standard activations and without clipping."""
    if "clip" in node.attributes:
        return f"clip = {node.attributes.get_float('clip', 0.0):g}"
    if node.attributes.get_int("layout", 0):
        return "layout = 1"
    standard = ["sigmoid", "tanh", "tanh"] if node.op_type == "LSTM" else ["sigmoid", "tanh"]
    given = [name.lower() for name in node.attributes.get_strings("activations", standard)]
    return f"activations {given}" if given != standard * (len(given) // len(standard)) else ""


def constraint_operands(node: ir.Node, model: ir.Model, target: Target) -> str:
    """There must be two inputs or more."""
    return "" if len(node.inputs) > 1 else "one input"


def constraint_pow(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The compiler fails on a power of five dimensions whose base is broadcast."""
    base, out = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    return f"{base} to {out}" if base is not None and out is not None and len(out) > 4 and base != out else ""


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


def constraint_cum_sum(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Sums run forward and include the element itself."""
    wrong = [name for name in ("exclusive", "reverse") if node.attributes.get_int(name, 0)]
    return " and ".join(f"{name} = 1" for name in wrong)


def constraint_extremum(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The compiler fails on the Max and Min of a tensor of 8 bits and a constant one."""
    unit = unit_at(node, model)
    if unit.input_type(0) not in INTEGERS_8 or not unit.quantized or len(node.inputs) != 2:
        return ""
    full = static_shape(node.outputs[0])
    fixed = [value for value in node.inputs if _array(value) is not None and static_shape(value) == full]
    return f"'{fixed[0].name}' is constant" if fixed and fixed[0] is not None else ""


CASTS = {
    "f32": "f32 f16 i32 u8 u32 b", "f16": "f32 f16 i32", "i16": "i32", "i32": "f32 f16 i32 i64 u8 u32 b",
    "i64": "f32 f16 i32 i64 u8 u32 b", "u8": "f32 f16 i32 u8 u32 b", "u32": "f32 i32 i64 u8 u32 b",
    "b": "f32 f16 i32 u8 u32 b",
}  # fmt: skip
_SHORT = {
    "FLOAT": "f32",
    "FLOAT16": "f16",
    "INT16": "i16",
    "INT32": "i32",
    "INT64": "i64",
    "UINT8": "u8",
    "UINT32": "u32",
    "BOOL": "b",
}


def constraint_cast(node: ir.Node, model: ir.Model, target: Target) -> str:
    """HTP must have the conversion between the two element types."""
    source, goal = dtype(node.inputs[0]), dtype(node.outputs[0])
    if source is None or goal is None or _SHORT.get(goal.name) in CASTS.get(_SHORT.get(source.name, ""), "").split():
        return ""
    return f"{source.name.lower()} to {goal.name.lower()}"


_REDUCE = (constraint_reduce,)
BY_OPERATOR: dict[str, tuple[Constraint, ...]] = {
    "ArgMax": (constraint_arg,),
    "ArgMin": (constraint_arg,),
    "AveragePool": (constraint_pool,),
    "BatchNormalization": (constraint_batch_normalization,),
    "Cast": (constraint_cast,),
    "CastLike": (constraint_cast,),
    "Conv": (constraint_conv_3d,),
    "ConvTranspose": (constraint_conv_transpose, constraint_conv_3d),
    "CumSum": (constraint_cum_sum,),
    "Gather": (constraint_gather, constraint_indices),
    "GatherElements": (constraint_indices,),
    "GatherND": (constraint_gather_nd,),
    "Gemm": (constraint_gemm, constraint_gemm_bias),
    "Einsum": (constraint_einsum,),
    "GRU": (constraint_recurrent,),
    "GridSample": (constraint_grid_sample,),
    "LSTM": (constraint_recurrent,),
    "LayerNormalization": (constraint_layer_normalization,),
    "LpNormalization": (constraint_lp_normalization,),
    "LpPool": (constraint_lp_pool, constraint_pool),
    "MatMul": (constraint_matmul,),
    "Max": (constraint_operands, constraint_extremum),
    "Mean": (constraint_operands,),
    "MaxPool": (constraint_pool,),
    "Min": (constraint_operands, constraint_extremum),
    "OneHot": (constraint_one_hot,),
    "Pow": (constraint_pow,),
    "RoiAlign": (constraint_roi_align,),
    "Sum": (constraint_operands,),
    "Pad": (constraint_pad, constraint_pad_rank),
    "ReduceL2": _REDUCE,
    "ReduceLogSumExp": _REDUCE,
    "ReduceMax": _REDUCE,
    "ReduceMean": _REDUCE,
    "ReduceMin": _REDUCE,
    "ReduceSum": _REDUCE,
    "Reshape": (constraint_reshape,),
    "Resize": (constraint_resize_modes, constraint_resize_nearest, constraint_resize_axes),
    "ScatterElements": (constraint_scatter_elements,),
    "ScatterND": (constraint_scatter_nd,),
    "Slice": (constraint_slice,),
}


def specific(node: ir.Node) -> tuple[Constraint, ...]:
    """Return the constraints of a node's operator."""
    return (constraint_constant_inputs, *BY_OPERATOR.get(node.op_type, ()))


def dtype_of_weight(node: ir.Node, model: ir.Model) -> ir.DataType | None:
    """Return the element type of a node's second input, of the integers where it is dequantized."""
    return unit_at(node, model).input_type(1)


def _array(value: ir.Value | None) -> object | None:
    """Return the array of a constant, dequantized or not."""
    source = producer(value)
    return constant(source.inputs[0] if source is not None and source.op_type == DEQUANTIZE else value)


def _attribute(node: ir.Node, name: str, default: str, taken: tuple[str, ...]) -> str:
    given = node.attributes.get_string(name, default)
    return "" if given in taken else f"{name} = {given}"
