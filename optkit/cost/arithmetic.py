"""The arithmetic of each operator, from shapes alone: MACs, other operations, and the matrix product it amounts to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optkit.cost.roofline import Kind
from optkit.cost.shapes import Shape

Shapes = Sequence[Shape | None]

# Vector operations of one exp, log, tanh, erf or pow: range reduction (3), a polynomial of degree 5 in FMAs (6), and
# scaling by a power of two (3), as in Cephes' expf and everything descended from it.
TRANSCENDENTAL = 12


@dataclass(frozen=True)
class Arithmetic:
    """What an operator computes, in numbers; see `optkit.cost.roofline.Work` for the fields."""

    kind: Kind
    macs: int = 0
    operations: int = 0
    m: int | None = None
    n: int | None = None
    k: int | None = None


def _ops(names: str, kind: Kind, per_element: int) -> dict[str, tuple[Kind, int]]:
    return dict.fromkeys(names.split(), (kind, per_element))


# Operations per element of the first output.
PER_OUTPUT: dict[str, tuple[Kind, int]] = {
    **_ops("Reshape Flatten Squeeze Unsqueeze Identity Dropout Shape Size Constant", "view", 0),
    **_ops("Transpose Concat Split Slice DynamicSlice Gather GatherElements GatherND Scatter", "movement", 0),
    **_ops("ScatterElements ScatterND Pad Expand Tile DepthToSpace SpaceToDepth OneHot ConstantOfShape", "movement", 0),
    **_ops("EyeLike ReverseSequence Compress Trilu CenterCropPad Crop MaxUnpool QLinearConcat", "movement", 0),
    **_ops("TensorScatter GatherBlockQuantized", "movement", 0),
    **_ops("Abs Neg Relu LeakyRelu PRelu ThresholdedRelu Clip Ceil Floor Round Sign Not IsNaN IsInf", "elementwise", 1),
    **_ops("Cast CastLike Reciprocal Sqrt Add Sub Mul Div And Or Xor Equal Greater Less", "elementwise", 1),
    **_ops("GreaterOrEqual LessOrEqual Where Mod BitShift BitwiseAnd BitwiseOr BitwiseXor", "elementwise", 1),
    **_ops("BitwiseNot Range Shrink BitCast", "elementwise", 1),
    **_ops("HardSigmoid HardSwish ImageScaler Affine DequantizeLinear", "elementwise", 2),
    **_ops("QuantizeLinear Softsign", "elementwise", 3),  # scale, round, saturate
    **_ops("QLinearAdd QLinearMul QLinearLeakyRelu QLinearWhere RotaryEmbedding", "elementwise", 4),
    **_ops("DynamicQuantizeLinear", "elementwise", 5),  # the range, then as QuantizeLinear
    **_ops("Exp Log Sigmoid Tanh Erf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh", "elementwise", TRANSCENDENTAL),
    **_ops("Atanh Softplus Elu Celu Selu Mish Gelu FastGelu QuickGelu BiasGelu Swish", "elementwise", TRANSCENDENTAL),
    **_ops("QLinearSigmoid Bernoulli RandomNormal RandomNormalLike", "elementwise", TRANSCENDENTAL),
    **_ops("RandomUniform RandomUniformLike ParametricSoftplus ScaledTanh", "elementwise", TRANSCENDENTAL),
    **_ops("Pow", "elementwise", 2 * TRANSCENDENTAL),
    **_ops("BatchNormalization", "normalization", 2),  # a multiply and an add, mean and variance folded into both
    **_ops("RMSNormalization SimplifiedLayerNormalization LpNormalization", "normalization", 4),
    **_ops("LayerNormalization InstanceNormalization GroupNormalization", "normalization", 6),
    **_ops("MeanVarianceNormalization SkipSimplifiedLayerNormalization", "normalization", 6),
    **_ops("SkipLayerNormalization", "normalization", 8),
    **_ops("Softmax QLinearSoftmax", "normalization", TRANSCENDENTAL + 4),  # max, subtract, exp, sum, divide
    **_ops("LogSoftmax", "normalization", TRANSCENDENTAL + 4),
}

# Operations per element of the first input.
PER_INPUT: dict[str, tuple[Kind, int]] = {
    **_ops("ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ArgMax ArgMin CumSum CumProd", "reduction", 1),
    **_ops("NonZero Col2Im Hardmax QLinearReduceMean", "reduction", 1),
    **_ops("ReduceL1 ReduceL2 ReduceSumSquare", "reduction", 2),
    **_ops("ReduceLogSum ReduceLogSumExp", "reduction", TRANSCENDENTAL + 2),
    **_ops("GlobalAveragePool GlobalMaxPool QLinearGlobalAveragePool", "pooling", 1),
    **_ops("GlobalLpPool", "pooling", 2),
}


def _conv(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    weight = x[3] if node.op_type == "QLinearConv" else x[1]
    if x[0] is None or weight is None or y[0] is None:
        return None
    groups = node.attributes.get_int("group", 1)
    kernel = weight[2:]
    transposed = node.op_type == "ConvTranspose"
    # Conv: every output sums Cin/g x kernel products. ConvTranspose: every input spreads into Cout/g x kernel.
    macs = math.prod(x[0] if transposed else y[0]) * math.prod(weight[1:])
    channels_in, channels_out = x[0][1], y[0][1]
    kind: Kind = "conv"
    if groups > 1:
        kind = "depthwise" if groups in (channels_in, channels_out) else "grouped"
    elif math.prod(kernel) == 1:
        kind = "conv1x1"
    elif not transposed and kernel == (3, 3) and _is_dense(node):
        kind = "conv3x3"
    if transposed:
        m, n, k = x[0][0] * math.prod(x[0][2:]), math.prod(weight[1:]), channels_in // groups
    else:
        m, n, k = y[0][0] * math.prod(y[0][2:]), channels_out // groups, math.prod(weight[1:])
    return Arithmetic(kind, macs, 0, m, n, k)


def _is_dense(node: ir.Node) -> bool:
    steps = [*node.attributes.get_ints("strides", ()), *node.attributes.get_ints("dilations", ())]
    return all(step == 1 for step in steps)


def _matmul(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    b = x[3] if node.op_type == "QLinearMatMul" else x[1]
    if x[0] is None or b is None or y[0] is None or not x[0]:
        return None
    k = x[0][-2] if node.attributes.get_int("transA", 0) and len(x[0]) > 1 else x[0][-1]
    total = math.prod(y[0])
    n = y[0][-1] if len(b) > 1 and y[0] else 1
    batch = math.prod(y[0][:-2]) if len(b) > 2 else 1  # a product per batch, each with its own right side
    return Arithmetic("gemm", total * k, 0, total // (n * batch) if n * batch else 0, n, k)


def _gemm(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    if x[0] is None or y[0] is None:
        return None
    k = x[0][0] if node.attributes.get_int("transA", 0) else x[0][1]
    m, n = y[0]
    return Arithmetic("gemm", m * n * k, 0, m, n, k)


def _matmul_nbits(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    n, k = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    if x[0] is None or not k:
        return None
    m = math.prod(x[0]) // k
    return Arithmetic("gemm", m * n * k, 0, m, n, k)


def _einsum(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    """One multiply-accumulate per point of the space of all indices and factor after the first."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, x, strict=False):
        if shape is None:
            return None
        before, dots, after = term.partition("...")
        letters = [*before, *(f".{i}" for i in range(len(shape) - len(before) - len(after))), *after]
        if dots:  # broadcast axes align at the right
            letters = [f".{len(letters) - len(after) - i}" if s.startswith(".") else s for i, s in enumerate(letters)]
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    points = math.prod(sizes.values())
    if len(terms) == 1:
        return Arithmetic("reduction" if y[0] is not None and math.prod(y[0]) < points else "movement")
    return Arithmetic("gemm", points * (len(terms) - 1))


def _recurrent(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    if x[0] is None or x[1] is None or x[2] is None:
        return None
    steps = x[0][0] * x[0][1]  # sequence and batch, in either layout
    batch = x[0][0] if node.attributes.get_int("layout", 0) else x[0][1]
    directions, gates = x[2][0], max(x[2][1:])  # R is [directions, gates x hidden, hidden], or its transpose
    hidden = min(x[2][1:])
    macs = steps * (math.prod(x[1]) + math.prod(x[2]))
    operations = steps * directions * gates * TRANSCENDENTAL
    return Arithmetic("gemm", macs, operations, batch, gates, x[0][2] + hidden)


def _attention(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    """Scores and weighted values: sequence x total sequence x (width of the queries + width of the outputs)."""
    if x[0] is None or y[0] is None:
        return None
    batch, sequence = x[0][0], x[0][-2]
    width_out = math.prod(y[0]) // (batch * sequence)
    width = math.prod(x[0]) // (batch * sequence)  # heads x head size
    heads = node.attributes.get_int("num_heads", node.attributes.get_int("q_num_heads", 0)) or x[0][1]
    # queries, keys and values from one input
    packed = node.op_type in ("Attention", "QAttention") and node.domain == "com.microsoft"
    if x[1] is None and not packed:
        return None
    projection = batch * sequence * math.prod(x[1] or ()) if packed else 0
    width = width_out if packed else width
    present = y[1] if len(y) > 1 else None  # the cache after this step: [..., total sequence, head size]
    total = present[-2] if present is not None else sequence if packed or x[1] is None else x[1][-2]
    macs = projection + batch * sequence * total * (width + width_out)
    softmax = batch * heads * sequence * total * (TRANSCENDENTAL + 4)
    return Arithmetic("gemm", macs, softmax, sequence, total, width // heads if heads else None)


def _pool(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    if y[0] is None:
        return None
    per_tap = 2 if node.op_type == "LpPool" else 1
    return Arithmetic("pooling", 0, math.prod(y[0]) * math.prod(node.attributes.get_ints("kernel_shape", ())) * per_tap)


def _resize(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    if x[0] is None or y[0] is None:
        return None
    taps = {"nearest": 0, "linear": 2, "bilinear": 2, "cubic": 4}.get(node.attributes.get_string("mode", "nearest"), 4)
    axes = sum(a != b for a, b in zip(x[0], y[0], strict=True))
    return Arithmetic("movement" if not taps else "elementwise", 0, math.prod(y[0]) * taps**axes if taps else 0)


def _grid_sample(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    if y[0] is None:
        return None
    mode = node.attributes.get_string("mode", "linear")
    taps = 1 if mode == "nearest" else 4 if "cubic" in mode else 2
    return Arithmetic("elementwise", 0, math.prod(y[0]) * taps ** (len(y[0]) - 2))


def _lrn(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    per_element = node.attributes.get_int("size", 1) + 2 * TRANSCENDENTAL
    return None if y[0] is None else Arithmetic("normalization", 0, math.prod(y[0]) * per_element)


def _variadic(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    return None if y[0] is None else Arithmetic("elementwise", 0, math.prod(y[0]) * max(1, len(node.inputs) - 1))


def _top_k(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    """Every element against a heap of k."""
    if x[0] is None or y[0] is None:
        return None
    axis = node.attributes.get_int("axis", -1)
    return Arithmetic("reduction", 0, math.prod(x[0]) * max(1, math.ceil(math.log2(y[0][axis] + 1))))


def _fourier(node: ir.Node, x: Shapes, y: Shapes) -> Arithmetic | None:
    """5 n log2 n operations for n complex points (Cooley and Tukey); outputs are pairs of real numbers."""
    if x[0] is None or y[0] is None:
        return None
    if node.op_type == "STFT":
        window = x[2] if len(x) > 2 and x[2] is not None else None
        points = window[0] if window else 2 * (y[0][-2] - 1)
        transforms = math.prod(y[0][:-2])
    else:
        points = y[0][node.attributes.get_int("axis", -2)]
        transforms = math.prod(y[0][:-1]) // max(1, points)
    return Arithmetic("reduction", 0, transforms * 5 * points * max(1, math.ceil(math.log2(max(2, points)))))


_Formula = Callable[[ir.Node, Shapes, Shapes], Arithmetic | None]


def _all(names: str, formula: _Formula) -> dict[str, _Formula]:
    return dict.fromkeys(names.split(), formula)


COMPUTE: dict[str, _Formula] = {
    **_all("Conv ConvTranspose ConvInteger QLinearConv FusedConv", _conv),
    **_all("MatMul MatMulInteger QLinearMatMul FusedMatMul MatMulIntegerToFloat DynamicQuantizeMatMul", _matmul),
    **_all("Gemm FusedGemm QGemm", _gemm),
    **_all("MatMulNBits", _matmul_nbits),
    **_all("Einsum", _einsum),
    **_all("RNN GRU LSTM DynamicQuantizeLSTM", _recurrent),
    **_all("Attention QAttention MultiHeadAttention GroupQueryAttention", _attention),
}
FORMULAS: dict[str, _Formula] = {
    **COMPUTE,
    **_all("MaxPool AveragePool LpPool QLinearAveragePool", _pool),
    **_all("Resize Upsample", _resize),
    **_all("GridSample", _grid_sample),
    **_all("LRN", _lrn),
    **_all("Max Min Sum Mean", _variadic),
    **_all("TopK", _top_k),
    **_all("DFT STFT", _fourier),
}


# Operators that read floats and compute in 8-bit integers all the same.
QUANTIZE_INSIDE = frozenset({"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
INT8_LEVEL = 4  # of MatMulNBits: it rounds activations to int8


def computes_in_int8(node: ir.Node) -> bool:
    """Whether an operator computes in 8-bit integers though what it reads are floats."""
    level = node.attributes.get_int("accuracy_level", 0) if node.op_type == "MatMulNBits" else 0
    return node.domain == "com.microsoft" and (node.op_type in QUANTIZE_INSIDE or level == INT8_LEVEL)


def is_known(node: ir.Node) -> bool:
    """Whether the operator has a cost model."""
    return node.domain in ("", "com.microsoft") and any(node.op_type in t for t in (FORMULAS, PER_OUTPUT, PER_INPUT))


def arithmetic(node: ir.Node, inputs: Shapes, outputs: Shapes) -> Arithmetic | None:
    """Return what a known operator computes on the given shapes; None where a shape it needs is not known.

    Args:
        node: A node for which `is_known` holds.
        inputs: Shapes of its inputs, None for absent or unknown ones.
        outputs: The same of its outputs.
    """
    padded = [*inputs, *[None] * 4]
    if node.op_type in FORMULAS:
        return FORMULAS[node.op_type](node, padded, outputs)
    table, shape = (PER_OUTPUT, outputs[0]) if node.op_type in PER_OUTPUT else (PER_INPUT, padded[0])
    kind, per_element = table[node.op_type]
    if kind == "view":
        return Arithmetic("view")
    return None if shape is None else Arithmetic(kind, 0, per_element * math.prod(shape))
