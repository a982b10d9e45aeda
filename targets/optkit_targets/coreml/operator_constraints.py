"""What the Neural Engine asks of single operators; see `optkit_targets.coreml.constraints`.

The table of ane-guide A is of MIL's operators: what stands for an ONNX operator here is what lowering/ writes for it.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from optkit.graph import argument, ints, is_constant, static_shape
from optkit_targets.coreml.constraints import GENERAL, Constraint, Engine, says

SECOND, THIRD = 14, 15  # generations: M2 and A15, M3 and A16
FACTORS = (2, 3, 4, 8)  # by which the engine repeats and rearranges
IMAGE = 4  # axes of what a convolution reads

# Operators that ane-guide A has on every generation, or that lowering/ writes in such: no constraint of their own.
PLAIN_NAMES = """
Abs Add Atan AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat Conv ConvTranspose DepthToSpace
DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid
HardSwish Identity InstanceNormalization LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mul Neg Not Pad Pow PRelu
QuantizeLinear RMSNormalization Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
ReduceMin ReduceSum ReduceSumSquare Relu Reshape Resize RoiAlign Round Selu Sigmoid Sign Sin Cos Slice Softmax
Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tanh ThresholdedRelu Tile TopK ArgMax ArgMin
Transpose Unsqueeze Upsample Where Attention
"""
PLAIN = frozenset(PLAIN_NAMES.split())


def only(*operators: str) -> Callable[[Callable[[ir.Node, Engine], str]], Callable[[ir.Node, Engine], str]]:
    """Hold a constraint against some operators only."""

    def narrow(check: Callable[[ir.Node, Engine], str]) -> Callable[[ir.Node, Engine], str]:
        def held(node: ir.Node, engine: Engine) -> str:
            return check(node, engine) if node.op_type in operators else ""

        held.__doc__, held.__name__ = check.__doc__, check.__name__
        return held

    return narrow


@says("ane-guide A")
def domain(node: ir.Node, engine: Engine) -> str:
    """The operator must be ONNX's own: for others nobody says what the engine does with them."""
    return "" if node.domain in ("", "ai.onnx") else f"domain '{node.domain}'"


@says("coremltools#1780", "ane-guide A", "hollance")
@only("LSTM", "GRU", "RNN")
def recurrent(node: ir.Node, engine: Engine) -> str:
    """Recurrent cells have no form on the engine."""
    return node.op_type


@says("ane-guide A")
@only("Scatter", "ScatterElements", "ScatterND", "TensorScatter")
def scatter(node: ir.Node, engine: Engine) -> str:
    """Scattering has no form on the engine."""
    return node.op_type


@says("ane-guide A")
@only("NonZero", "Unique", "Compress", "NonMaxSuppression")
def counting(node: ir.Node, engine: Engine) -> str:
    """Operators whose result has as many elements as values demand have no form on the engine."""
    return node.op_type


@says("ane-guide A")
@only("And", "Or", "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift")
def logic(node: ir.Node, engine: Engine) -> str:
    """Flags and bits are combined elsewhere: of logic the engine has the negation alone."""
    return node.op_type


@says("ane-guide A")
@only("ReduceProd", "CumProd", "Mod")
def product(node: ir.Node, engine: Engine) -> str:
    """Products over an axis and remainders have no form on the engine."""
    return node.op_type


@says("ane-guide A")
@only("OneHot", "Hardmax", "Trilu", "ReverseSequence", "Shape", "Size", "EyeLike", "Range")
def table(node: ir.Node, engine: Engine) -> str:
    """Masks, one-hot vectors and ranges are computed elsewhere."""
    return node.op_type


@says("ane-guide A")
@only("Tan", "Asin", "Acos", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh")
def trigonometry(node: ir.Node, engine: Engine) -> str:
    """Of the trigonometric and hyperbolic functions the engine has sine, cosine, arc tangent and tanh alone."""
    return node.op_type


@says("ane-guide A")
@only("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
def random(node: ir.Node, engine: Engine) -> str:
    """Random numbers are drawn elsewhere; uniform ones the engine draws from generation 15 on."""
    uniform = node.op_type.startswith("RandomUniform") and engine.generation >= THIRD
    return "" if uniform else node.op_type


@says("ane-guide A")
@only("CumSum")
def running_sum(node: ir.Node, engine: Engine) -> str:
    """Running sums are reached by a route of the engine's runtime that Core ML does not take."""
    return node.op_type


@says("ane-guide A", "ane-guide 12")
@only("Sin", "Cos")
def sine(node: ir.Node, engine: Engine) -> str:
    """Sine and cosine need generation 15 (M3, A16)."""
    return _older(engine, THIRD)


@says("ane-guide A")
@only("ArgMin")
def smallest(node: ir.Node, engine: Engine) -> str:
    """The place of the smallest element needs generation 15 (M3, A16)."""
    return _older(engine, THIRD)


@says("ane-guide A")
@only("TopK")
def sort(node: ir.Node, engine: Engine) -> str:
    """Sorting needs generation 14 (M2, A15)."""
    return _older(engine, SECOND)


@says("ane-guide A", "ane-guide 12")
@only("GridSample", "RoiAlign")
def sampling(node: ir.Node, engine: Engine) -> str:
    """Sampling at computed places needs the texture engine of generation 14 (M2, A15)."""
    return _older(engine, SECOND)


@says("ane-guide A")
@only("Pad")
def padding(node: ir.Node, engine: Engine) -> str:
    """Padding with anything but a constant needs the texture engine of generation 14 (M2, A15)."""
    mode = node.attributes.get_string("mode", "constant")
    older = _older(engine, SECOND)
    return f"mode '{mode}', {older}" if mode != "constant" and older else ""


@says("ane-transformers", "coremltools#1103", "hollance")
@only("Gather", "GatherElements", "GatherND")
def lookup(node: ir.Node, engine: Engine) -> str:
    """Elements are picked by constant indices alone: lookups by others Core ML was seen to leave to the CPU."""
    indices = argument(node, 1)
    return "" if is_constant(indices) else f"the indices '{indices.name if indices else ''}' are computed or fed"


@says("ane-guide A", "ane-guide 4")
@only("Gather", "GatherElements", "GatherND")
def gather(node: ir.Node, engine: Engine) -> str:
    """Picking elements by constant indices needs generation 14 (M2, A15)."""
    return _older(engine, SECOND)


@says("ane-guide 4", "ane-guide A")
@only("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")
def volume(node: ir.Node, engine: Engine) -> str:
    """Convolution and pooling have two spatial axes at most: three are advertised, and compile nowhere."""
    shape = static_shape(argument(node, 0))
    return f"{len(shape) - 2} spatial axes" if shape is not None and len(shape) > IMAGE else ""


@says("ane-guide 4", "ane-guide 12", "ane-guide A")
@only("Conv", "ConvTranspose")
def kernel(node: ir.Node, engine: Engine) -> str:
    """A kernel may not be larger than the engine's."""
    shape = static_shape(argument(node, 1)) or []
    limits = (engine.limits.max_kernel_width, engine.limits.max_kernel_height)
    for name, taps, most in zip(("wide", "high"), reversed(shape[2:]), limits, strict=False):
        if taps > most.value:
            return f"{taps} {name}, at most {most.value:g}"
    return ""


@says("ane-guide 19")
@only("Conv", "ConvTranspose")
def computed_kernel(node: ir.Node, engine: Engine) -> str:
    """A kernel that a run computes serves a batch of one alone."""
    weight, shape = argument(node, 1), static_shape(argument(node, 0))
    return f"batch of {shape[0]}" if not _stored(weight) and shape and shape[0] > 1 else ""


@says("ane-guide A")
@only("MaxPool", "AveragePool", "LpPool")
def window(node: ir.Node, engine: Engine) -> str:
    """A pooling window may not be larger than the engine's."""
    most = engine.limits.max_pool_window.value
    largest = max(node.attributes.get_ints("kernel_shape", ()), default=0)
    return f"{largest} elements, at most {most:g}" if largest > most else ""


@says("ane-guide 4")
@only("MatMul", "Gemm", "Einsum")
def matmul(node: ir.Node, engine: Engine) -> str:
    """Operands of a matrix product have fewer dimensions than other tensors."""
    most = engine.limits.max_matmul_rank.value
    ranks = [len(shape) for value in node.inputs if (shape := static_shape(value)) is not None]
    return f"{max(ranks)} dimensions, at most {most:g}" if ranks and max(ranks) > most else ""


@says("ane-guide A")
@only("PRelu")
def slopes(node: ir.Node, engine: Engine) -> str:
    """PRelu needs an axis of channels: three dimensions or more."""
    shape = static_shape(argument(node, 0))
    return f"{len(shape)} dimensions" if shape is not None and len(shape) < IMAGE - 1 else ""


@says("ane-guide A")
@only("Tile", "DepthToSpace", "SpaceToDepth")
def factors(node: ir.Node, engine: Engine) -> str:
    """Tensors are repeated, and blocks of pixels rearranged, by 2, 3, 4 and 8, one after the other."""
    found = ints(node, "repeats", 1) if node.op_type == "Tile" else [node.attributes.get_int("blocksize", 1)]
    if found is None:
        return "its factors are computed"
    wrong = next((factor for factor in found if not _composed(factor, chained=node.op_type == "Tile")), None)
    return "" if wrong is None else f"by {wrong}"


@says("ane-guide A")
def documented(node: ir.Node, engine: Engine) -> str:
    """The operator must be one that somebody saw on the engine."""
    uniform = node.op_type.startswith("RandomUniform") and engine.generation >= THIRD
    return "" if node.op_type in PLAIN or uniform else node.op_type


SPECIFIC: tuple[Constraint, ...] = (
    domain,
    recurrent,
    scatter,
    counting,
    logic,
    product,
    table,
    trigonometry,
    random,
    running_sum,
    sine,
    smallest,
    sort,
    sampling,
    padding,
    lookup,
    gather,
    volume,
    kernel,
    computed_kernel,
    window,
    matmul,
    slopes,
    factors,
    documented,
)
# An operator without a form is said to have none before its types and shapes are looked at.
ALL: tuple[Constraint, ...] = (*GENERAL[:2], *SPECIFIC, *GENERAL[2:])


def _older(engine: Engine, needed: int) -> str:
    return f"generation {engine.generation}" if engine.generation < needed else ""


def _stored(value: ir.Value | None) -> bool:
    """Whether a value is constant, or made of constants alone."""
    if is_constant(value):
        return True
    source = None if value is None else value.producer()
    return source is not None and all(given is None or _stored(given) for given in source.inputs)


def _composed(factor: int, *, chained: bool) -> bool:
    """Whether a factor is one of the engine's, or, where several may follow each other, a product of such."""
    if factor == 1 or factor in FACTORS:
        return True
    return chained and any(factor % part == 0 and _composed(factor // part, chained=True) for part in FACTORS)
