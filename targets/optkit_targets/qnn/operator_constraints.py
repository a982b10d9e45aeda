"""Which constraints hold for which operator."""

from __future__ import annotations

import onnx_ir as ir

from optkit.graph import argument, constant
from optkit.target import Target
from optkit_targets.qnn import data_constraints as data
from optkit_targets.qnn import layer_constraints as layers
from optkit_targets.qnn.constraints import Constraint
from optkit_targets.qnn.units import producer, unit_at

# Settings that must be constants, by operator: the inputs that hold them.
CONSTANT_INPUTS = {
    "Clip": (1, 2),
    "CumSum": (1,),
    "Expand": (1,),
    "Pad": (1, 2),
    "Range": (0, 1, 2),
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
    unit = unit_at(node, model)
    for index in CONSTANT_INPUTS.get(node.op_type, ()):
        value = argument(node, index)
        source = producer(value)
        if source in unit.dequantize:
            value = source.inputs[0] if source is not None else None
        if value is not None and constant(value) is None:
            return f"'{value.name}' is computed"
    return ""


_NORM = (layers.constraint_norm_weight, layers.constraint_one_scale)
_REDUCE = (data.constraint_reduce, data.constraint_reduce_5d)
BY_OPERATOR: dict[str, tuple[Constraint, ...]] = {
    "ArgMax": (data.constraint_arg,),
    "ArgMin": (data.constraint_arg,),
    "AveragePool": (layers.constraint_pool,),
    "BatchNormalization": (layers.constraint_batch_normalization, layers.constraint_batch_unit),
    "Cast": (data.constraint_cast,),
    "CastLike": (data.constraint_cast,),
    "Conv": (
        layers.constraint_conv_3d,
        layers.constraint_weights_16,
        layers.constraint_same_padding,
        layers.constraint_depthwise,
    ),
    "ConvTranspose": (
        layers.constraint_conv_transpose,
        layers.constraint_conv_3d,
        layers.constraint_weights_16,
        layers.constraint_grouped_scales,
    ),
    "CumSum": (data.constraint_cum_sum,),
    "Gather": (data.constraint_gather, data.constraint_indices),
    "GatherElements": (data.constraint_indices,),
    "GatherND": (data.constraint_gather_nd,),
    "Gemm": (
        layers.constraint_gemm,
        layers.constraint_gemm_bias,
        layers.constraint_whole_unit,
        layers.constraint_weights_16,
    ),
    "Einsum": (layers.constraint_einsum, layers.constraint_whole_unit, layers.constraint_one_scale),
    "GRU": (layers.constraint_recurrent, layers.constraint_one_scale),
    "GridSample": (layers.constraint_grid_sample,),
    "LSTM": (layers.constraint_recurrent,),
    "InstanceNormalization": (layers.constraint_one_scale,),
    "LayerNormalization": (
        layers.constraint_layer_normalization,
        layers.constraint_norm_weight,
        layers.constraint_one_scale,
    ),
    "RMSNormalization": _NORM,
    "Reciprocal": (layers.constraint_whole_unit,),
    "LpNormalization": (layers.constraint_lp_normalization,),
    "LpPool": (layers.constraint_lp_pool, layers.constraint_pool),
    "MatMul": (layers.constraint_matmul, layers.constraint_weights_16),
    "Max": (data.constraint_operands, data.constraint_extremum),
    "Mean": (data.constraint_operands,),
    "MaxPool": (layers.constraint_pool,),
    "Min": (data.constraint_operands, data.constraint_extremum),
    "Mod": (data.constraint_mod,),
    "OneHot": (data.constraint_one_hot,),
    "Pow": (data.constraint_pow,),
    "RoiAlign": (layers.constraint_roi_align,),
    "Sum": (data.constraint_operands,),
    "PRelu": (layers.constraint_slope,),
    "Pad": (data.constraint_pad, data.constraint_pad_rank),
    "ReduceL2": _REDUCE,
    "ReduceLogSumExp": _REDUCE,
    "ReduceMax": _REDUCE,
    "ReduceMean": _REDUCE,
    "ReduceMin": _REDUCE,
    "ReduceSum": _REDUCE,
    "Reshape": (data.constraint_reshape,),
    "Resize": (layers.constraint_resize_modes, layers.constraint_resize_nearest, layers.constraint_resize_axes),
    "ScatterElements": (data.constraint_scatter_elements,),
    "ScatterND": (data.constraint_scatter_nd,),
    "Slice": (data.constraint_slice, data.constraint_slice_integers),
}


def specific(node: ir.Node) -> tuple[Constraint, ...]:
    """Return the constraints of a node's operator."""
    return (constraint_constant_inputs, *BY_OPERATOR.get(node.op_type, ()))
