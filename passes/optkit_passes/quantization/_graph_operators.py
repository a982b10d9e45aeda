"""What a graph of complete quantized units needs to know about one operator: what it reads, and the range it returns.

A unit is an operator whose float inputs are all dequantized right before it and whose output is quantized right after
it; runtimes without float layers in between compute it on integers. Found by giving Qualcomm's execution provider
(onnxruntime-qnn 2.7, HTP V75) units of one operator each and comparing its emulator with onnxruntime on the CPU:

- It takes all operators listed here in 8 and 16 bits, and requantizes by itself where a movement operator's output has
  another scale than its input. Erf, ReduceProd, Softsign and Trilu have no implementation at all, not even in float.
- A layer must read and return one type. Otherwise it is computed in float, and the DequantizeLinear of its weights
  falls to the CPU, as does any DequantizeLinear of a constant that feeds no unit.
- Weights: int8 per tensor and per channel in Conv (also depthwise and of one axis), ConvTranspose (axis 1), Gemm and
  MatMul; int4 likewise, but a convolution's int4 weights only per channel (per tensor the compiler refuses them). A
  table that Gather picks rows of has one scale.
- The right factor of a product of two 16-bit activations is computed in 8 bits (38 dB) unless it is symmetric int16
  (76 dB), which V73 and later take; V68 and V69 leave such a product to the CPU and want 8 bits written.
- A LayerNormalization with 8-bit scale and int32 bias is computed on integers. With scale and bias of 16 bits it is no
  unit but computed in float16, which loses less beside 16-bit activations; V68, which has none, leaves it to the CPU.
  The slope of a 16-bit PRelu must have 8 bits: with 16 the compiler fails.
- 4-bit weights without a zero point are misread, though ONNX takes it for 0 then.
- Softmax takes any axis from opset 13 on, and its output range [0, 1] at scale 1/255 as well as 1/256.
- A BatchNormalization of 16 bits falls to the CPU and one of 8 bits is computed wrongly.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, is_constant

from ._layers import MOVEMENT_OPS, glue_inputs, why_float

# Operators that only pick, move or repeat values of their first input. With an index input that stays as it is.
MOVING_OPS = MOVEMENT_OPS - {"Concat"} | {
    "GatherElements", "GatherND", "GlobalMaxPool", "Identity", "ReduceMax", "ReduceMin", "ReverseSequence", "Upsample",
}  # fmt: skip
# Their outputs hold the same whatever they read.
FIXED_RANGES = {"HardSigmoid": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)}

_UNARY_OPS = frozenset({
    "Abs", "AveragePool", "Clip", "Elu", "Gelu", "GlobalAveragePool", "HardSwish", "LeakyRelu", "LogSoftmax", "Mish",
    "Neg", "ReduceMean", "ReduceSum", "Relu", "Selu", "Softplus",
})  # fmt: skip
_BINARY_OPS = frozenset({"Add", "Max", "Min", "Mul", "Sub"})
_NORMALIZATIONS = frozenset({"InstanceNormalization", "LayerNormalization", "RMSNormalization"})
UNIT_OPS = (
    MOVING_OPS | FIXED_RANGES.keys() | _UNARY_OPS | _BINARY_OPS | _NORMALIZATIONS
    | {"Concat", "PRelu", "Where"}
)  # fmt: skip

# Their results span so many orders of magnitude that no integer of 8 or 16 bits holds them: 1/x, exp(x), x^2 before a
# root. They are computed in float where the target has it.
FLOAT_OPS = frozenset({"Div", "Exp", "Log", "Pow", "Reciprocal", "ReduceL2", "ReduceSumSquare", "Sqrt"})


HIDDEN = -1e4  # constants from here on stand for minus infinity


def unit_inputs(node: ir.Node, *, floats: bool) -> tuple[int, ...] | str:
    """Return which inputs of an operator carry float values that must be quantized, or why it stays in float.

    Layers (see `describe`) are not asked about here.

    Args:
        node: The node, of the standard domain.
        floats: Whether the target computes in float what integers hold badly.
    """
    op = node.op_type
    if op not in UNIT_OPS | FLOAT_OPS:
        return "the operator has no quantized form"
    if floats and op in FLOAT_OPS and (op != "Div" or constant(argument(node, 1)) is None):
        return "its results span too many orders of magnitude for integers"
    indices: tuple[int, ...] = (0,)
    if op in _BINARY_OPS or op in ("Concat", "Div", "PRelu", "Pow") or op in _NORMALIZATIONS:
        indices = tuple(index for index, value in enumerate(node.inputs) if value is not None)
    elif op == "Where":
        indices = (1, 2)
    elif op in ("GlobalMaxPool", "MaxPool", "Pad", "Resize", "Clip"):
        found = glue_inputs(node)
        if isinstance(found, str):
            return found
    refusal = why_float(node, indices)
    if refusal:
        return refusal
    dtype = node.outputs[0].dtype
    if dtype != ir.DataType.FLOAT:
        return f"its result is {'of an unknown type' if dtype is None else dtype.name.lower()}, not float32"
    if all(is_constant(node.inputs[index]) for index in indices) and op != "Gather":
        return "all its inputs are constant"
    for value in (node.inputs[index] for index in indices):
        array = constant(value)
        if array is None or value is None or not array.size:
            continue
        if not np.isfinite(array).all():
            return f"its constant '{value.name}' holds values that are not finite"
        if array.min() <= HIDDEN < 0 and op in ("Add", "Where", "Sub"):
            return (
                f"its constant '{value.name}' reaches {float(array.min()):.4g}: beside that no other value has a step"
            )
    if op in _NORMALIZATIONS and any(constant(argument(node, index)) is None for index in indices[1:]):
        return "its scale is computed"
    return indices


def is_moving(node: ir.Node) -> bool:
    """Whether the operator's output is a choice of its first input's values."""
    return node.op_type in MOVING_OPS
