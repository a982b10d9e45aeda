"""Which operators HTP takes, as a table: element types and ranks, outside QDQ units and inside them.

Measured by compiling one-operator models with onnxruntime-qnn 2.7 (QNN 2.51, soc_model 57): an entry is there because
the execution provider took such a node and the compiler finished. What depends on attributes or on inputs being
constant is in `constraints`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

_NAMES = {
    "f32": ir.DataType.FLOAT,
    "f16": ir.DataType.FLOAT16,
    "i32": ir.DataType.INT32,
    "i64": ir.DataType.INT64,
    "u32": ir.DataType.UINT32,
    "b": ir.DataType.BOOL,
    "u8": ir.DataType.UINT8,
    "i8": ir.DataType.INT8,
    "u16": ir.DataType.UINT16,
    "i16": ir.DataType.INT16,
    "u4": ir.DataType.UINT4,
    "i4": ir.DataType.INT4,
}

# operator | element types | ranks | element types in a QDQ unit | ranks | rule of its unit
# Types are those of the data input: the first, but Where's second. int64 is computed in 32 bits. An operator without
# a rule has no integer form: between Q and DQ it computes in float. ``-``: never taken.
_TABLE = """
Abs                  | f32 f16 i32 i64          | 0-5 | u8 i8 u16     | 0-5 | unary
Add                  | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | binary
And                  | b                        | 0-4 |               |     |
ArgMax               | f32 f16 i32 i64 u32      | 1-4 | u8 i8 u16     | 1-4 | input
ArgMin               | f32 f16                  | 1-4 | u8 i8 u16     | 1-4 | input
ArrayFeatureExtractor | f32                      | 1-5 |               |     |
Asin                 | -                        | 0-4 | u8 i8 u16     | 0-4 | unary
Atan                 | f32 f16                  | 0-4 | u8 i8 u16     | 0-4 | unary
Attention            | f32 f16                  | 3-4 |               |     |
AveragePool          | f32 f16                  | 3-5 | u8 i8 u16     | 3-5 | unary
BatchNormalization   | f32 f16                  | 2-4 | u8 u16        | 2-4 | batch normalization
Bernoulli            | f32 f16                  | 0-4 |               |     |
Cast                 | f32 f16 i16 i32 i64 u8 u32 b | 0-5 |           |     |
CastLike             | f32 f16 i32 i64 u8 u32 b | 0-5 |               |     |
Ceil                 | f32 f16                  | 0-4 | u8 i8 u16     | 0-4 | unary
Clip                 | f32 f16 i32 i64          | 0-5 | u8 i8 u16     | 0-5 | clip
Concat               | f32 f16 i32 i64 u32 b    | 1-5 | u8 i8 u16 i16 | 1-5 | variadic
Conv                 | f32 f16                  | 3-5 | u8 i8 u16 i16 | 3-5 | conv
ConvTranspose        | f32 f16                  | 3-5 | u8 i8 u16 i16 | 3-5 | conv
Cos                  | f32 f16                  | 0-4 | u8 i8 u16     | 0-4 | unary
CumSum               | f32 f16 i32 i64          | 1-4 | u8 u16        | 1-4 | unary
DepthToSpace         | f32 f16                  | 4-4 | u8 i8 u16     | 4-4 | unary
DequantizeLinear     | u8 i8 u16 i16 u4 i4      | 0-5 |               |     |
Div                  | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | binary
Einsum               | f32 f16                  | 0-5 | u8 i8 u16     | 0-5 | optional output
Elu                  | f32 f16                  | 0-4 | u8 i8 u16 i16 | 0-4 | unary
Equal                | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | compare
Erf                  | -                        | 0-5 | -             | 0-5 | unary
Exp                  | f32 f16                  | 0-5 | u8 i8 u16     | 0-5 | unary
Expand               | f32 f16 i32 i64 u32 b    | 0-5 | u8 i8 u16     | 0-5 | moves
Flatten              | f32 f16 i32 i64 u32 u8 b | 1-5 | u8 i8 u16 i16 | 1-5 | moves
Floor                | f32 f16                  | 0-4 | u8 i8 u16     | 0-4 | unary
FusedMatMul          | f32 f16                  | 1-5 |               |     |
GRU                  | f32 f16                  | 3-4 | u8 i8 u16     | 3-4 | recurrent
Gather               | f32 f16 i32 i64 u32 b    | 1-5 | u8 i8 u16 i16 | 1-5 | moves
GatherElements       | f32 f16 i32 i64 b        | 1-5 | u8 u16        | 1-5 | moves
GatherND             | f32 f16 i32              | 1-5 |               |     |
Gelu                 | f32 f16                  | 0-5 | u8 i8 u16 i16 | 0-4 | unary
Gemm                 | f32 f16                  | 2-2 | u8 i8 u16 i16 | 2-2 | gemm
GlobalAveragePool    | f32 f16                  | 3-5 | u8 i8 u16     | 3-5 | unary
GlobalMaxPool        | f32 f16                  | 3-4 | u8 i8 u16 i16 | 3-4 | unary
Greater              | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | compare
GreaterOrEqual       | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | compare
GridSample           | f32 f16                  | 4-5 | u8 i8 u16     | 4-5 | binary
HardSigmoid          | f32 f16                  | 0-4 | u8 u16        | 0-5 | unary
HardSwish            | f32 f16                  | 0-4 | u8 i8 u16     | 0-4 | unary
Identity             | f32 f16 i32 i64 u32 b    | 0-5 |               |     |
InstanceNormalization | f32 f16                 | 3-4 | u8 u16        | 3-4 | normalization
IsNaN                | f32 f16                  | 0-5 |               |     |
LRN                  | f32 f16                  | 3-4 | u8 i8 u16     | 3-4 | unary
LSTM                 | f32 f16                  | 3-4 |               |     |
LayerNormalization   | f32 f16                  | 1-4 | u8 i8 u16     | 1-4 | normalization
LeakyRelu            | f32 f16                  | 0-5 | u8 u16        | 0-5 | unary
Less                 | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | compare
LessOrEqual          | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | compare
Log                  | f32 f16                  | 0-4 | u8 i8 u16     | 0-4 | unary
LogSoftmax           | f32 f16                  | 1-4 | u8 u16        | 1-4 | unary
LpNormalization      | f32 f16                  | 0-4 | u8 i8 u16 i16 | 0-4 | unary
LpPool               | f32 f16                  | 3-4 |               |     |
MatMul               | f32 f16                  | 1-5 | u8 i8 u16 i16 | 1-5 | matmul
MatMulNBits          | f32 f16                  | 1-5 | u8 u16        | 1-5 | unary
Max                  | f32 f16 i32 i64 u32      | 0-4 | u8 i8 u16 i16 | 0-5 | variadic
MaxPool              | f32 f16                  | 3-4 | u8 i8 u16 i16 | 3-4 | moves
Mean                 | f32                      | 0-5 |               |     |
Min                  | f32 f16 i32 i64 u32      | 0-4 | u8 i8 u16     | 0-5 | variadic
Mod                  | f32 f16 i8 i16 i32 i64 u8 u16 u32 | 0-4 |      |     |
Mul                  | f32 f16 i32 i64 u32      | 0-5 | u8 i8 u16 i16 | 0-5 | binary
Neg                  | f32 f16                  | 0-4 | u8 u16        | 0-4 | unary
NonZero              | -                        | 0-5 | -             | 0-5 | input
Not                  | b                        | 0-4 |               |     |
OneHot               | i32 i64                  | 1-4 |               |     |
Or                   | b                        | 0-4 |               |     |
PRelu                | f32 f16                  | 0-5 | u8 i8 u16 i16 | 0-5 | binary
Pad                  | f32 f16                  | 1-5 | u8 i8 u16 i16 | 1-5 | pad
Pow                  | f32 f16                  | 0-5 | u8 i8 u16     | 0-5 | binary
QLinearConv          | u8 i8                    | 3-5 |               |     |
QLinearMatMul        | u8 i8                    | 1-5 |               |     |
QuantizeLinear       | f32 f16                  | 0-5 |               |     |
QuickGelu            | f32 f16                  | 0-5 |               |     |
RMSNormalization     | f32 f16                  | 1-4 | u8 u16        | 1-4 | rms
RandomNormalLike     | f32 f16                  | 0-4 |               |     |
RandomUniformLike    | f32 f16                  | 0-4 |               |     |
Range                | f32 i32 i64              | 0-1 |               |     |
Reciprocal           | f32 f16                  | 0-5 | u8 i8 u16 i16 | 0-5 | optional output
ReduceL2             | f32 f16                  | 0-4 | u8 i8 u16 i16 | 0-4 | unary
ReduceLogSumExp      | f32 f16                  | 0-4 | -             | 0-4 | unary
ReduceMax            | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | unary
ReduceMean           | f32 f16                  | 0-5 | u8 i8 u16 i16 | 0-5 | unary
ReduceMin            | f32 f16 i32 i64          | 0-5 | u8 i8 u16     | 0-5 | unary
ReduceProd           | -                        | 0-5 | -             | 0-5 | unary
ReduceSum            | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | unary
Relu                 | f32 f16                  | 0-5 | u8 i8 u16 i16 | 0-5 | unary
Reshape              | f32 f16 i32 i64 u32 u8 b | 0-5 | u8 i8 u16 i16 | 0-5 | moves
Resize               | f32 f16                  | 3-5 | u8 i8 u16     | 3-5 | moves
RoiAlign             | f32 f16                  | 1-4 |               |     |
RotaryEmbedding      | f32 f16                  | 3-4 |               |     |
Round                | f32 f16                  | 0-4 | u8 i8 u16     | 0-4 | unary
STFT                 | f32 f16                  | 2-4 |               |     |
ScatterElements      | f32 f16 i32 i64 u8 u16   | 1-4 | u8 u16        | 1-4 | binary
ScatterND            | f32 f16 i32 i64 u32 b    | 1-5 |               |     |
Selu                 | f32 f16                  | 0-4 |               |     |
Sigmoid              | f32 f16                  | 0-5 | u8 i8 u16 i16 | 0-5 | unary
Sign                 | f32 f16                  | 0-4 | u8 i8 u16     | 0-4 | unary
SimplifiedLayerNormalization | f32 f16          | 1-4 | u8            | 1-4 | rms
Sin                  | f32 f16                  | 0-4 | u8 i8 u16     | 0-4 | unary
Slice                | f32 f16 i32 i64 u8 b     | 1-5 | u8 i8 u16 i16 | 1-5 | unary
Softmax              | f32 f16                  | 1-5 | u8 i8 u16 i16 | 1-5 | unary
Softplus             | f32 f16                  | 0-4 | u8 i8 u16 i16 | 0-4 | unary
SpaceToDepth         | f32 f16                  | 4-4 | u8 i8 u16     | 4-4 | unary
Split                | f32 f16 i32 i64 b        | 1-5 | u8 i8 u16 i16 | 1-5 | split
Sqrt                 | f32 f16                  | 0-4 | u8 i8 u16 i16 | 0-4 | unary
Squeeze              | f32 f16 i32 i64 u32 u8 b | 0-5 | u8 i8 u16 i16 | 0-5 | moves
Sub                  | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | binary
Sum                  | f32 f16                  | 0-5 |               |     |
Swish                | f32 f16                  | 0-5 | u8 i8 u16 i16 | 0-5 | unary
Tan                  | f32 f16                  | 0-4 |               |     |
Tanh                 | f32 f16                  | 0-4 | u8 i8 u16 i16 | 0-4 | unary
ThresholdedRelu      | f32 f16                  | 0-5 |               |     |
Tile                 | f32 f16 i32 i64 b        | 1-5 | u8 i8 u16     | 1-5 | moves
TopK                 | f32 f16 i32 i64          | 1-4 | u8 i8 u16     | 1-4 | top-k
Transpose            | f32 f16 i32 u32 b        | 0-5 | u8 i8 u16 i16 | 0-5 | moves
Unsqueeze            | f32 f16 i32 i64 u32 u8 b | 0-5 | u8 i8 u16 i16 | 0-5 | moves
Upsample             | f32 f16                  | 3-5 |               |     |
Where                | f32 f16 i32 i64          | 0-5 | u8 i8 u16 i16 | 0-5 | binary
Xor                  | b                        | 0-4 |               |     |
"""


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        name: The operator.
        types: Element types that it takes outside a QDQ unit.
        ranks: Its lowest and highest rank there.
        unit_types: Element types of the integers that it takes in a QDQ unit.
        unit_ranks: Its lowest and highest rank there.
        rule: The name of the rule by which it forms a unit, or empty (see `units`).
    """

    name: str
    types: frozenset[ir.DataType]
    ranks: tuple[int, int]
    unit_types: frozenset[ir.DataType]
    unit_ranks: tuple[int, int]
    rule: str


def _types(text: str) -> frozenset[ir.DataType]:
    return frozenset(_NAMES[name] for name in text.split() if name != "-")


def _ranks(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return (int(low), int(high)) if text else (0, 0)


def _parse(table: str) -> dict[str, Operator]:
    rows = ([cell.strip() for cell in line.split("|")] for line in table.strip().splitlines())
    return {
        name: Operator(name, _types(types), _ranks(ranks), _types(unit), _ranks(unit_ranks), rule)
        for name, types, ranks, unit, unit_ranks, rule in rows
    }


OPERATORS = _parse(_TABLE)
UNIT_RULES = {name: row.rule for name, row in OPERATORS.items() if row.rule}
# Operators of other domains than ONNX's own, by domain; a row without one stands for both.
DOMAINS = {
    "com.microsoft": frozenset(
        {"DequantizeLinear", "FusedMatMul", "Gelu", "MatMulNBits", "QuantizeLinear", "QuickGelu"}
    ),
    "ai.onnx.ml": frozenset({"ArrayFeatureExtractor"}),
}

# Integers that an operator takes in four dimensions only, though its floats have five.
FOUR_D = {
    "Cast": frozenset({ir.DataType.BOOL}),
    "Expand": frozenset({ir.DataType.BOOL}),
    **dict.fromkeys(
        ("Identity", "ReduceMax", "Tile"), frozenset({ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.UINT32})
    ),
    "Transpose": frozenset({ir.DataType.INT16, ir.DataType.INT32, ir.DataType.UINT32}),
}

# What an HTP before architecture 69, which has no fp16, takes nevertheless: operators that only move float32, and some
# that the provider composes itself. What it lacks beyond floats: whole operators, and one of them in 16 bits.
OLD_MOVES = frozenset(
    {"Cast", "CastLike", "Flatten", "Identity", "OneHot", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
OLD_FLOATS = frozenset(
    {"IsNaN", "QLinearConv", "QLinearMatMul", "RandomNormalLike", "RandomUniformLike", "Reciprocal", "Tan"}
)
OLD_WITHOUT = frozenset({"GRU", "Mod", "ReduceL2"})
OLD_WITHOUT_16 = frozenset({"LayerNormalization"})
