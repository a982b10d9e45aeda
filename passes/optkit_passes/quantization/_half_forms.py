"""What convert-float16 needs to know about one operator: whether it has a half-precision form, or why not.

Which types an operator takes is read from its ONNX schema at the model's opset. Lists by hand say only what loses too
much in half precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from optkit.graph import argument, bodies, is_constant
from optkit.model.check_graph import schema
from optkit.recipe import PRECISION_KEY

from ._extremes import Extremes
from ._float_types import FLOAT

# Operators whose multiplications half precision makes cheaper. All others go along where that saves Casts.
PRODUCT_OPS = frozenset({
    "Attention", "Conv", "ConvTranspose", "DeformConv", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN",
})  # fmt: skip
# Operators that read the form of a tensor, not its values: any type will do.
FORM_OPS = frozenset({"Shape", "Size"})
# Operators on integers, whose scales stay in float32.
INTEGER_OPS = frozenset({
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
    "QuantizeLinear",
})  # fmt: skip

_SUMS = "adds up many values"
_STEEP = "makes large differences of small ones"
_CHOICE = "chooses among values that half precision may round to one"
_SENSITIVE = {
    **dict.fromkeys(
        (
            "BatchNormalization", "CumSum", "GroupNormalization", "InstanceNormalization", "LRN", "LpNormalization",
            "LpPool", "GlobalLpPool", "MeanVarianceNormalization", "NegativeLogLikelihoodLoss", "ReduceL1", "ReduceL2",
            "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare",
            "SoftmaxCrossEntropyLoss", "DFT", "STFT",
        ),
        _SUMS,
    ),
    **dict.fromkeys(("Acosh", "Asinh", "Atanh", "Cosh", "Exp", "Log", "Pow", "Sinh", "Tan", "Det"), _STEEP),
    **dict.fromkeys(("ArgMax", "ArgMin", "Hardmax", "NonMaxSuppression", "TopK", "Unique"), _CHOICE),
    **dict.fromkeys(("Ceil", "Floor", "Mod", "Range", "Round"), "computes whole numbers, exact up to 2048 only"),
    **dict.fromkeys(("Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike"), "draws random numbers"),
}  # fmt: skip
# Sums of as many terms as their axes are long. float16 has 11 significant bits: beyond 2048 terms, adding one more of
# the same size changes nothing any more.
_LONG_SUMS = ("AveragePool", "GlobalAveragePool", "LogSoftmax", "Softmax")
LONGEST_SUM = 2048


@dataclass(frozen=True)
class HalfForm:
    """The inputs and outputs of a node that change to half precision together."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def takes(op_type: str, opset: int, dtype: ir.DataType) -> bool:
    """Whether an operator has anything to do with a type at an opset."""
    operator = schema(op_type, opset)
    kinds = () if operator is None else operator.type_constraints
    return any(_type_name(dtype) in kind.allowed_type_strs for kind in kinds)


def _type_name(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"


def reads_values(node: ir.Node) -> bool:
    """Whether a node reads more of its inputs than their form."""
    return node.op_type not in FORM_OPS or node.domain not in ("", "ai.onnx")


def half_form(node: ir.Node, opset: int, dtype: ir.DataType, seen: dict[str, Extremes]) -> HalfForm | str | None:
    """Return the half-precision form of a node, why it stays in float32, or None where it has nothing to do with it.

    Args:
        node: The node.
        opset: The version of the default operator set.
        dtype: float16 or bfloat16.
        seen: What calibration saw, by tensor.
    """
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    if bodies(node):
        return "its bodies compute in float32, where values cannot be observed"
    if not reads_values(node):
        return None
    unknown = next((value.name for value in values if value.type is None), None)
    if unknown is not None:
        return f"the type of '{unknown}' is not known"
    inputs = [i for i, value in enumerate(node.inputs) if value is not None and value.dtype == FLOAT]
    outputs = [i for i, value in enumerate(node.outputs) if value.dtype == FLOAT and value.name]
    if not inputs and not outputs:
        return None
    if not all(isinstance(value.type, ir.TensorType) for value in values if value.dtype == FLOAT):
        return "it reads or makes a sequence, which keeps its type"
    precision = node.metadata_props.get(PRECISION_KEY, "")
    if precision.startswith("fp32"):
        return f"kept in float by a rule ({precision})"
    operator = schema(node.op_type, opset) if node.domain in ("", "ai.onnx") else None
    if operator is None:
        return f"an operator of the domain '{node.domain}', whose types are not known"
    if node.op_type in INTEGER_OPS:
        return _scaled(node, opset, dtype)
    return _sensitivity(node, opset, seen) or _form_by_schema(node, operator, opset, inputs, outputs, dtype)


def _scaled(node: ir.Node, opset: int, dtype: ir.DataType) -> HalfForm | str:
    """Return the form of a node between floats and integers: its scale has the type of the floats."""
    forms = {"DequantizeLinear": HalfForm((1,), (0,)), "QuantizeLinear": HalfForm((0, 1), ())}
    form = forms.get(node.op_type)
    if form is None or not is_constant(argument(node, 1)):
        return "its scales of integers stay in float32"
    return (
        form if takes(node.op_type, opset, dtype) else f"{node.op_type} of opset {opset} takes no {dtype.name.lower()}"
    )


def _sensitivity(node: ir.Node, opset: int, seen: dict[str, Extremes]) -> str:
    """Return why the operator loses too much in half precision; empty if it does not."""
    if node.op_type in _SENSITIVE:
        return f"it {_SENSITIVE[node.op_type]}"
    if node.op_type == "Cast" and node.outputs[0].dtype not in (FLOAT, ir.DataType.BOOL):
        return "it computes whole numbers, exact up to 2048 only"
    if node.op_type in _LONG_SUMS:
        terms = _terms(node, opset, seen)
        if terms is None:
            return "it adds up an unknown number of values"
        if terms > LONGEST_SUM:
            return f"it adds up {terms} values"
    return ""


def _terms(node: ir.Node, opset: int, seen: dict[str, Extremes]) -> int | None:
    """Return how many values the operator adds up for one result; None where that is not known."""
    if node.op_type == "AveragePool":
        return math.prod(node.attributes["kernel_shape"].as_ints())
    value = node.inputs[0]
    assert value is not None
    observed = seen.get(value.name or "")
    dims = list(observed.dims) if observed is not None else list(value.shape or ())
    if not dims:
        return None
    if node.op_type == "GlobalAveragePool":
        dims = dims[2:]
    else:  # before opset 13 (default axis 1) all axes behind it are added up as well
        axis = node.attributes.get_int("axis", -1 if opset >= 13 else 1)
        dims = [dims[axis]] if opset >= 13 else dims[axis:]
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(sizes) if len(sizes) == len(dims) else None


def _form_by_schema(
    node: ir.Node, operator: onnx.defs.OpSchema, opset: int, inputs: list[int], outputs: list[int], dtype: ir.DataType
) -> HalfForm | str:
    """Return which inputs and outputs change, by the type variables of the operator's schema.

    A variable changes where a result has it and its constraint allows the type. What only inputs have (the scales of a
    Resize, the statistics of a normalization) stays float32.
    """
    allowed = {item.type_param_str: item.allowed_type_strs for item in operator.type_constraints}
    ins = {index: operator.inputs[min(index, len(operator.inputs) - 1)].type_str for index in inputs}
    outs = {index: operator.outputs[min(index, len(operator.outputs) - 1)].type_str for index in outputs}
    if not outs:
        return f"it {_CHOICE}"
    fit = {kind for kind in outs.values() if _type_name(dtype) in allowed.get(kind, ())}
    if not fit:
        return f"{node.op_type} of opset {opset} takes no {dtype.name.lower()}"
    # a result whose type no input gives has it from an attribute
    named = node.op_type == "Cast" or (node.op_type == "ConstantOfShape" and "value" in node.attributes)
    fit &= set(outs.values()) if named else set(ins.values())
    if node.op_type == "RMSNormalization":  # its result has the scale's type, and onnxruntime wants one for everything
        fit |= set(ins.values())
    if not fit:
        return "it makes float32 values out of none"
    form = [tuple(index for index, kind in kinds.items() if kind in fit) for kinds in (ins, outs)]
    return HalfForm(*form)
