"""The operators on integers, by the float operator that they stand for: their inputs, types and limits.

Integers stay as they are stored, ``real = scale * (q - zero_point)``. Limits are those of the schemas and of
onnxruntime's CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optkit.graph import argument

from ._integers import Integers, Zeros, array_of, read_integers, read_results
from ._layers import MOVEMENT_OPS, glue_inputs

CONTRIB = "com.microsoft"
EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


Input = ir.Value | Zeros | None


@dataclass(frozen=True)
class Reading:
    """An operator between integers.

    Attributes:
        node: The operator.
        inputs: Its data inputs.
        results: Its outputs as they are quantized; empty: read in float.
        version: The opset.
    """

    node: ir.Node
    inputs: tuple[Integers, ...]
    results: tuple[Integers, ...]
    version: int


@dataclass(frozen=True)
class Form:
    """The operator on integers: its type, inputs, attributes, domain, and whether it returns integers too."""

    op_type: str
    inputs: Sequence[Input]
    attributes: Mapping[str, ir.Attr] = field(default_factory=dict)
    domain: str = ""
    quantized: bool = True


def integer_form(node: ir.Node, version: int) -> Form | str:
    """Return the operator on integers that a node and the dequantize and quantize nodes around it are, or why none is.

    Args:
        node: The node.
        version: The model's opset.
    """
    if node.op_type not in FORMS:
        return "no operator computes it on integers"
    indices = (0, 1) if node.op_type in PRODUCTS else glue_inputs(node)
    if isinstance(indices, str):
        return indices
    inputs = [read_integers(argument(node, index)) for index in indices]
    refusal = next((found for found in inputs if isinstance(found, str)), "")
    results = read_results(node)
    if isinstance(results, str):
        if node.op_type not in FLOAT_RESULTS:
            return refusal or results
        results = ()
    if refusal:
        return refusal
    read = tuple(found for found in inputs if isinstance(found, Integers))
    return _typed_form(Reading(node, read, results, version))


def _typed_form(reading: Reading) -> Form | str:
    node, inputs, results = reading.node, reading.inputs, reading.results
    for integers in (*inputs, *results):
        if integers.dtype not in EIGHT_BITS:
            return f"'{integers.value.name}' is {integers.dtype.name.lower()}: only 8-bit integers have such operators"
    for integers in inputs[:1] if node.op_type in PRODUCTS else inputs:
        if integers.axis is not None:
            return f"'{integers.value.name}' has one scale per channel"
        if results and integers.dtype != results[0].dtype:
            return "its input and its result have different integer types"
    return FORMS[node.op_type](reading)


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _flat(integers: Integers) -> tuple[Input, ...]:
    return integers.value, *integers.params


def _conv(reading: Reading) -> Form | str:
    x, w = reading.inputs
    if w.axis not in (None, 0):
        return f"'{w.value.name}' has one scale per index of axis {w.axis}, not per output channel"
    if x.dtype == ir.DataType.INT8 and w.dtype != ir.DataType.INT8:
        return "its input is signed and its weights are not"
    bias = _bias(reading, 1.0)
    if isinstance(bias, str):
        return bias
    inputs = [*_flat(x), *_flat(w), *reading.results[0].params, *bias]
    return Form("QLinearConv", inputs, reading.node.attributes)


def _matmul(reading: Reading) -> Form | str:
    a, b = reading.inputs
    refusal = _unfit_matrix(a, b)
    rank = None if b.value.shape is None else len(b.value.shape)
    if b.axis is not None and (rank != 2 or b.axis % 2 != 1):
        return f"'{b.value.name}' has one scale per index of axis {b.axis}, not per column of a matrix"
    if refusal:
        return refusal
    if reading.results:
        return Form("QLinearMatMul", [*_flat(a), *_flat(b), *reading.results[0].params])
    inputs = [a.value, b.value, a.scale, b.scale, a.zero_point, b.zero_point]
    return Form("MatMulIntegerToFloat", inputs, domain=CONTRIB, quantized=False)


def _unfit_matrix(a: Integers, b: Integers) -> str:
    if a.dtype == ir.DataType.INT8 and b.dtype != ir.DataType.INT8:
        return "its left input is signed and its right one is not"
    return ""


def _gemm(reading: Reading) -> Form | str:
    node, (a, b) = reading.node, reading.inputs
    transposed = _integer(node, "transB", 0)
    if b.axis is not None and b.axis % 2 != 1 - transposed:
        return f"'{b.value.name}' has one scale per index of axis {b.axis}, not per output column"
    alpha, beta = (node.attributes[name].as_float() if name in node.attributes else 1.0 for name in ("alpha", "beta"))
    if beta != 1.0 and argument(node, 2) is not None:
        return f"beta is {beta:g}, not 1"
    refusal, bias = _unfit_matrix(a, b), _bias(reading, alpha)
    if refusal or isinstance(bias, str):
        return refusal or str(bias)
    inputs: list[Input] = [*_flat(a), *_flat(b), *bias, *([] if bias else [None])]
    inputs += reading.results[0].params if reading.results else []
    attributes = {name: value for name, value in node.attributes.items() if name != "beta"}
    return Form("QGemm", inputs, attributes, CONTRIB, quantized=bool(reading.results))


def _bias(reading: Reading, alpha: float) -> list[ir.Value] | str:
    """Return the bias as the accumulator's integers: none, or one; or why it is not."""
    bias = argument(reading.node, 2)
    if bias is None:
        return []
    x, w = reading.inputs
    found = read_integers(bias)
    if isinstance(found, str) or found.dtype != ir.DataType.INT32 or found.zeros().any():
        return f"its bias '{bias.name}' is not int32 at the scale of the accumulator"
    scale = np.float64(alpha) * array_of(x.scale).ravel() * array_of(w.scale).ravel()
    if not np.allclose(array_of(found.scale).ravel(), scale, rtol=1e-5, atol=0):
        return f"its bias '{bias.name}' is not int32 at the scale of the accumulator"
    return [found.value]


def _binary(reading: Reading) -> Form:
    inputs = [item for integers in reading.inputs for item in _flat(integers)]
    return Form(f"QLinear{reading.node.op_type}", [*inputs, *reading.results[0].params], domain=CONTRIB)


def _unary(reading: Reading) -> Form | str:
    node = reading.node
    gaps = node.attributes["dilations"].as_ints() if "dilations" in node.attributes else ()
    if any(gap != 1 for gap in gaps):
        return "its window has gaps"
    attributes = {name: value for name, value in node.attributes.items() if name != "dilations"}
    inputs = [*_flat(reading.inputs[0]), *reading.results[0].params]
    return Form(f"QLinear{node.op_type}", inputs, attributes, CONTRIB)


def _softmax(reading: Reading) -> Form:
    axis = _integer(reading.node, "axis", -1)
    attributes = {"axis": ir.AttrInt64("axis", axis), "opset": ir.AttrInt64("opset", reading.version)}
    inputs = [*_flat(reading.inputs[0]), *reading.results[0].params]
    return Form("QLinearSoftmax", inputs, attributes, CONTRIB)


def _concat(reading: Reading) -> Form | str:
    inputs = [item for integers in reading.inputs for item in _flat(integers)]
    if all(reading.results[0].means(integers) for integers in reading.inputs):
        return _move(reading)
    return Form("QLinearConcat", [*reading.results[0].params, *inputs], reading.node.attributes, CONTRIB)


def _move(reading: Reading) -> Form | str:
    """Return the operator itself, on integers that mean the same before and after."""
    node, x = reading.node, reading.inputs[0]
    if not all(x.means(other) for other in reading.results):
        return "its input and its result have different scales"
    inputs = [*(integers.value for integers in reading.inputs), *node.inputs[len(reading.inputs) :]]
    return Form(node.op_type, inputs, node.attributes)


def _resize(reading: Reading) -> Form | str:
    mode = reading.node.attributes["mode"].as_string() if "mode" in reading.node.attributes else "nearest"
    return _move(reading) if mode == "nearest" else "it interpolates, and would cut what is between two integers"


def _pad(reading: Reading) -> Form | str:
    moved, node = _move(reading), reading.node
    if isinstance(moved, str) or ("mode" in node.attributes and node.attributes["mode"].as_string() != "constant"):
        return moved
    value, pads = moved.inputs[:2]
    return Form("Pad", [value, pads, reading.inputs[0].zero_point, *moved.inputs[3:]], moved.attributes)


PRODUCTS = ("Conv", "MatMul", "Gemm")
FLOAT_RESULTS = ("MatMul", "Gemm")  # their operators on integers can return float

FORMS: Mapping[str, Callable[[Reading], Form | str]] = {
    **dict.fromkeys(MOVEMENT_OPS, _move),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"), _unary),
    **dict.fromkeys(("Add", "Mul"), _binary),
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Softmax": _softmax,
    "Concat": _concat,
    "Resize": _resize,
    "Pad": _pad,
}
