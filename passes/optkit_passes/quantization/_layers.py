"""What quantize-static needs to know about one operator: which inputs are activations, weights and bias, or why not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, is_constant
from optkit.quant.integers import SMALLEST_SCALE
from optkit.recipe import PRECISION_KEY

INT8_STEPS = 127

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
LAYER_OPS = CONVOLUTIONS | {"Gemm", "MatMul"}

# Operators that compute the same on integers when input and output share scale and zero point.
MOVEMENT_OPS = frozenset({
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Resize", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
# Operators with an output range of their own that runtimes compute on integers.
ARITHMETIC_OPS = frozenset({"Add", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"})
# Operators that bound a range; the quantizer's own clamping can do their work.
CLAMP_OPS = frozenset({"Clip", "Relu"})

GLUE_OPS = MOVEMENT_OPS | ARITHMETIC_OPS | CLAMP_OPS


@dataclass(frozen=True)
class Layer:
    """A node with integer kernels for its multiplications.

    Attributes:
        node: The node.
        activations: Indices of the inputs that are computed at run time.
        weight: Index of the constant input that is stored as integers, or None.
        axis: The weight's output channel axis; None: one scale for the whole weight.
        bias: Index of the constant bias, or None.
        channels: Number of output channels that the weight and the bias have; 0 without a weight.
        transpose: The node between the constant and this one that swaps its two axes, or None. It stays, on integers,
            so that a table that is both embedding and output layer is stored once.
    """

    node: ir.Node
    activations: tuple[int, ...]
    weight: int | None = None
    axis: int | None = None
    bias: int | None = None
    channels: int = 0
    transpose: ir.Node | None = None

    @property
    def stored(self) -> ir.Value | None:
        """The constant that holds the weight."""
        if self.weight is None:
            return None
        return self.transpose.inputs[0] if self.transpose is not None else self.node.inputs[self.weight]


def describe(node: ir.Node) -> Layer | str:
    """Return the layer that a Conv, ConvTranspose, Gemm or MatMul is, or the reason why it stays in float."""
    refusal = why_float(node, (0, 1, 2))
    if refusal:
        return refusal
    layer = {"MatMul": _matmul, "Gemm": _gemm}.get(node.op_type, _convolution)(node)
    return layer if isinstance(layer, str) else _unfit_constants(layer) or layer


def _unfit_constants(layer: Layer) -> str:
    """Return why the weights or the bias of a layer have no 8-bit form that means the same; empty if they have."""
    bias = None if layer.bias is None else constant(layer.node.inputs[layer.bias])
    if bias is not None and np.isinf(bias).any():
        return "its bias holds infinite values"  # masked columns
    weight = constant(layer.stored)
    largest = 0.0 if weight is None or not weight.size else float(max(-weight.min(), weight.max()))
    if 0 < largest < INT8_STEPS * SMALLEST_SCALE:
        return f"its weights are below {INT8_STEPS * SMALLEST_SCALE:.1g}, too small for a scale"
    return ""


def why_float(node: ir.Node, inputs: tuple[int, ...]) -> str:
    """Return why a node must not be quantized whatever stands around it; empty if nothing forbids it."""
    precision = node.metadata_props.get(PRECISION_KEY, "")
    if precision.startswith("fp"):
        return f"kept in float by a rule ({precision})"
    for value in (argument(node, index) for index in inputs):
        if value is None:
            continue
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            return f"input '{value.name}' is already quantized"
        if value.is_initializer() and value.is_graph_input():
            return f"input '{value.name}' is a default that a caller may override"
        if value.dtype is not None and value.dtype != ir.DataType.FLOAT:
            return f"input '{value.name}' is {value.dtype.name.lower()}, not float32"
    return ""


def _convolution(node: ir.Node) -> Layer | str:
    weight, bias = constant(argument(node, 1)), argument(node, 2)
    if weight is None:
        return "its weights are not constant"
    if bias is not None and not is_constant(bias):
        return "its bias is not constant"
    group = _group(node)
    axis: int | None = 0
    channels = weight.shape[0]
    if node.op_type == "ConvTranspose":  # weights are [C, M / group, ...]: axis 1 names a channel only without groups
        axis = 1 if group == 1 else None
        channels = weight.shape[1] * group
    return Layer(node, (0,), 1, axis, None if bias is None else 2, channels)


def _gemm(node: ir.Node) -> Layer | str:
    weight, bias = constant(argument(node, 1)), argument(node, 2)
    if bias is not None and not is_constant(bias):
        return "its bias is not constant"
    if weight is None:
        return Layer(node, (0, 1)) if bias is None else "its weights are not constant and it has a bias"
    axis = 0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1
    channels = weight.shape[axis]
    if bias is not None:
        shape = tuple(bias.shape or ())
        if any(dim != 1 for dim in shape[:-1]) or (shape and shape[-1] not in (1, channels)):
            return f"its bias has shape {list(shape)}, not one value per output column"
    return Layer(node, (0,), 1, axis, None if bias is None else 2, channels)


def _matmul(node: ir.Node) -> Layer | str:
    left, right = constant(argument(node, 0)), constant(argument(node, 1))
    transpose = _swapped_constant(argument(node, 1))
    if transpose is not None:
        right = constant(transpose.inputs[0])
        return Layer(node, (0,), 1, 1, channels=0 if right is None else right.shape[0], transpose=transpose)
    if left is not None and right is not None:
        return "both inputs are constant"
    if (left is not None and left.ndim < 2) or (right is not None and right.ndim < 2):
        return "its constant input is a vector"
    if right is None:
        return Layer(node, (0, 1))  # a constant on the left is quantized like an activation
    axis = 1 if right.ndim == 2 else None
    return Layer(node, (0,), 1, axis, channels=right.shape[-1])


def summed_rows(layer: Layer, weight: np.ndarray) -> np.ndarray | None:
    """Return the stored weight as [channels, K] in the order in which onnxruntime's kernels sum over K.

    Convolutions run on [N, H, W, C] and sum over (kernel position, input channel). None where products are not added in
    pairs: depthwise kernels multiply in 32 bits, and ConvTranspose has no integer kernel.
    """
    node = layer.node
    if node.op_type == "Conv":
        depthwise = weight.ndim == 4 and weight.shape[1] == 1 and _group(node) == weight.shape[0]
        return None if depthwise else np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    if node.op_type == "ConvTranspose":
        return None
    along_rows = layer.transpose is not None or (node.op_type == "Gemm" and layer.axis == 0)
    rows = weight if along_rows else np.swapaxes(weight, -1, -2)
    return rows.reshape(-1, rows.shape[-1])


def _group(node: ir.Node) -> int:
    return node.attributes["group"].as_int() if "group" in node.attributes else 1


def _swapped_constant(value: ir.Value | None) -> ir.Node | None:
    """Return the Transpose that makes ``value`` out of a constant matrix, or None."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or node.domain != "" or why_float(node, (0,)):
        return None
    matrix = constant(node.inputs[0])
    swaps = "perm" not in node.attributes or list(node.attributes["perm"].as_ints()) == [1, 0]
    return node if swaps and matrix is not None and matrix.ndim == 2 else None


def glue_inputs(node: ir.Node) -> tuple[int, ...] | str:
    """Return which inputs of a glue operator carry values to quantize, or why its form does not allow integers."""
    op = node.op_type
    if op in ("Add", "Mul"):
        return (0, 1)
    if op == "Concat":
        return tuple(range(len(node.inputs)))
    if op == "MaxPool" and len(node.outputs) > 1:
        return "its indices are read"
    if op == "Resize":
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "nearest"
        transform = node.attributes.get("coordinate_transformation_mode")
        if mode == "cubic" or (transform is not None and transform.as_string() == "tf_crop_and_resize"):
            return "its result may leave the range of its input"
    if op == "Pad":
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
        filler = argument(node, 2)
        filled = constant(filler)
        if mode == "constant" and filler is not None and (filled is None or filled.any()):
            return "it pads with a value other than 0"
    if op == "Clip" and clamp_bounds(node) is None:
        return "its bounds are not constant"
    return (0,)


def clamp_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return the bounds of a Relu or Clip, infinite where there is none; None where they are computed."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        value = argument(node, index)
        array = constant(value)
        if value is not None and array is None:
            return None
        bounds.append(default if array is None else float(array.ravel()[0]))
    return bounds[0], bounds[1]


def embedding_table(node: ir.Node) -> np.ndarray | None:
    """Return the constant float table [rows, columns] that a Gather picks rows of, or None."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if node.op_type != "Gather" or node.domain != "" or axis != 0 or why_float(node, (0,)):
        return None
    table = constant(node.inputs[0])
    return table if table is not None and table.ndim == 2 and not is_constant(node.inputs[1]) else None
