"""Models of one operator, as a table: what HTP takes, what it refuses, and what lies just beside either.

A row is ``operator | inputs | attributes | forms``. An input is ``type:shape`` (fed), ``type!shape`` (constant),
``type=values`` (a constant vector), ``type==value`` (a scalar) or empty (omitted). ``T`` stands for the form's element
type; in the forms ``q8`` and ``q16`` it is float between Q and DQ nodes of uint8 and uint16, as are ``W`` with weights
of int8, ``C`` with int8 per channel, and ``B`` with a bias of int32. ``qf`` is ``q8`` without a Q node at the end.
``@`` is the attribute ``coordinate_transformation_mode``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.model.loading import infer_shapes

TYPES = {
    "f32": np.float32, "f16": np.float16, "f64": np.float64, "i8": np.int8, "u8": np.uint8, "u16": np.uint16,
    "i32": np.int32, "i64": np.int64, "b": np.bool_,
}  # fmt: skip
UNITS = {"q8": ("u8", 128), "q16": ("u16", 32768), "qf": ("u8", 128)}
OUTPUTS = {"TopK": 2, "LSTM": 3, "GRU": 2}
OPSET = 21

TABLE = """
Abs                 | T:1,4,8,8                              |                          | f32 f16 f64 i32 i8 q8 q16
Acos                | T:4,8                                  |                          | f32 q8
Add                 | T:1,4,8,8 ; T!4,1,1                    |                          | f32 i64 f64 q8 q16 qf
Add                 | T:1,2,2,2,4,4 ; T:4                    |                          | f32 q8
And                 | b:4,8 ; b:4,8                          |                          | f32
ArgMax              | T:4,8                                  | axis=1                   | f32 i32 qf
ArgMax              | T:4,8                                  | axis=1,select_last_index=1 | f32
Asin                | T:4,8                                  |                          | f32 q8
AveragePool         | T:1,4,8,8                              | kernel_shape=[3,3],pads=[1,1,1,1] | f32 q8 q16
AveragePool         | T:1,4,8,8                              | kernel_shape=[2,2],dilations=[2,2] | f32
BatchNormalization  | T:1,4,8,8 ; f32!4 ; f32!4 ; f32!4 ; f32!4 |                       | f32
BatchNormalization  | T:1,4,8,8 ; f32:4 ; f32:4 ; f32:4 ; f32:4 |                       | f32
BatchNormalization  | T:1,4,4,4,4 ; f32!4 ; f32!4 ; f32!4 ; f32!4 |                     | f32
Cast                | f32:4,8                                | to=10                    | f32
Cast                | f32:4,8                                | to=7                     | f32
Cast                | i32:4,8                                | to=1                     | f32
Cast                | f64:4,8                                | to=1                     | f32
Celu                | T:4,8                                  |                          | f32
Clip                | T:4,8 ; T==0 ; T==6                    |                          | f32 i32 i8
Clip                | T:4,8 ; T: ; T==6                      |                          | f32
Compress            | T:4,8 ; b!4                            | axis=0                   | f32
Concat              | T:4,8 ; T:4,8                          | axis=0                   | f32 i32 f64 q8
Conv                | T:1,4,8,8 ; W!4,4,3,3 ; B!4            |                          | f32 f16 q8 q16 qf
Conv                | T:1,4,8,8 ; C!4,4,3,3 ; B!4            | strides=[2,2]            | q8 q16
Conv                | T:1,4,8,8 ; W!4,1,3,3                  | group=4                  | f32 q8
Conv                | T:1,4,8 ; W!4,4,3                      | dilations=[2]            | f32 q8
Conv                | T:1,4,6,6,6 ; W!4,4,3,3,3              |                          | f32 q8
ConvTranspose       | T:1,4,8,8 ; W!4,4,3,3                  | strides=[2,2]            | f32 q8
ConvTranspose       | T:1,4,8,8 ; W!4,4,3,3                  | dilations=[2,2]          | f32 q8
CumSum              | T:4,8 ; i64==1                         |                          | f32 i32 q8
CumSum              | T:4,8 ; i64==1                         | reverse=1                | f32
DepthToSpace        | T:1,16,8,8                             | blocksize=2              | f32 q8
Div                 | T:4,8 ; T:4,8                          |                          | f32 i32 q8
Einsum              | T:2,4,8 ; T:2,8,4                      | equation='bij,bjk->bik'  | f32 q8 qf
Einsum              | T:4,8                                  | equation='ij->ji'        | f32 q8
Elu                 | T:1,2,4,4,4                            |                          | f32 q8
Equal               | T:4,8 ; T:4,8                          |                          | f32 i64 qf
Erf                 | T:4,8                                  |                          | f32 q8
Expand              | T:1,8 ; i64=4,8                        |                          | f32 i32 u8 q8
Flatten             | T:1,4,8,8                              |                          | f32 u8 q8
GRU                 | T:5,1,8 ; f32!1,12,8 ; f32!1,12,4      | hidden_size=4            | f32
GRU                 | T:5,1,8 ; f32!1,12,8 ; f32!1,12,4      | hidden_size=4,clip=3.0   | f32
Gather              | T:4,8 ; i64=0,2                        | axis=0                   | f32 i32 u8 q8
Gather              | T:4,8 ; i64:3                          | axis=1                   | f32 q8
GatherElements      | T:4,8 ; i64:4,8                        | axis=0                   | f32 q8
GatherND            | T:4,8 ; i64:3,1                        |                          | f32 i64
GatherND            | T:4,8,8 ; i64:4,1                      | batch_dims=1             | f32
Gelu                | T:4,8                                  |                          | f32 q8
Gemm                | T:4,8 ; W!8,4 ; B!4                    |                          | f32 q8 q16 qf
Gemm                | T:4,8 ; W!8,4 ; B!4                    | alpha=0.5                | f32
GlobalAveragePool   | T:1,4,8,8                              |                          | f32 q8
GridSample          | T:1,4,8,8 ; T:1,6,6,2                  | mode='linear'            | f32 q8
GridSample          | T:1,4,8,8 ; T:1,6,6,2                  | mode='cubic'             | f32
HardSigmoid         | T:4,8                                  |                          | f32 q8
Hardmax             | T:4,8                                  |                          | f32
Identity            | T:4,8                                  |                          | f32 u8
InstanceNormalization | T:1,4,8,8 ; W!4 ; B!4                |                          | f32 q8
LSTM                | T:5,1,8 ; f32!1,16,8 ; f32!1,16,4      | hidden_size=4            | f32
LayerNormalization  | T:2,4,8 ; T!8                          |                          | f32 q8 q16
LayerNormalization  | T:2,4,8 ; W!8 ; B!8                    |                          | q8
LayerNormalization  | T:2,4,8 ; f32!4,8                      | axis=1                   | f32
LeakyRelu           | T:4,8                                  |                          | f32 q8
LogSoftmax          | T:4,8                                  |                          | f32 q8
LpNormalization     | T:4,8                                  | p=1                      | f32
MatMul              | T:4,8 ; W!8,4                          |                          | f32 i32 q8 q16 qf
MatMul              | T:4,8 ; C!8,4                          |                          | q8 qf
MatMul              | T:1,2,2,4,8 ; W!8,4                    |                          | f32 q8
Max                 | T:4,8 ; T:4,8                          |                          | f32 i32 q8
Max                 | T:4,8                                  |                          | f32
MaxPool             | T:1,4,8,8                              | kernel_shape=[2,2],ceil_mode=1 | f32 q8 q16
MaxPool             | T:1,4,8,8                              | kernel_shape=[2,2],dilations=[2,2] | f32 q8
Mod                 | T:4,8 ; T:4,8                          | fmod=1                   | f32 i32
Mul                 | T:4,8 ; T:4,8                          |                          | f32 i8 q8
Neg                 | T:4,8                                  |                          | f32 i32 q8
NonZero             | T:8                                    |                          | f32
Not                 | b:4,8                                  |                          | f32
OneHot              | i64:4 ; i64==8 ; f32=0,1               |                          | f32
PRelu               | T:1,4,8,8 ; T!4,1,1                    |                          | f32 q8
Pad                 | T:4,8 ; i64=0,1,0,1                    |                          | f32 i32 q8
Pad                 | T:4,8 ; i64=0,1,0,1                    | mode='wrap'              | f32
Pad                 | T:1,2,4,4,4 ; i64=0,0,1,1,1,0,0,1,1,1  | mode='reflect'           | f32
Pow                 | T:4,8 ; f32==2                         |                          | f32
Reciprocal          | T:4,8                                  |                          | f32 q8
ReduceL1            | T:4,8 ; i64=1                          |                          | f32 q8
ReduceMax           | T:4,8 ; i64=1                          | keepdims=0               | f32 i32 q8
ReduceMean          | T:4,8 ; i64=1                          |                          | f32 i32 q8
ReduceMean          | T:4,8                                  | noop_with_empty_axes=1   | f32
ReduceProd          | T:4,8 ; i64=1                          |                          | f32
ReduceSum           | T:4,8 ; i64:1                          |                          | f32
Relu                | T:N,8                                  |                          | f32
Relu                | T:4,8                                  |                          | f32 f16 i32 q8 q16 qf
Reshape             | T:4,8 ; i64=8,4                        |                          | f32 i64 f64 q8
Reshape             | T:4,8 ; i64=1,2,2,2,2,2                |                          | f32
Resize              | T:1,4,8,8 ; ; f32=1,1,2,2              | mode='linear'            | f32 q8
Resize              | T:1,4,8,8 ; ; f32=1,1,2,2              | mode='nearest',@='asymmetric',nearest_mode='ceil' | f32
Resize              | T:1,4,8,8 ; ; f32=1,1,2,2              | mode='linear',@='half_pixel_symmetric' | f32
Round               | T:4,8                                  |                          | f32 q8
ScatterElements     | T:4,8 ; i64!2,8 ; T:2,8                | axis=0                   | f32 q8
ScatterND           | T:4,8 ; i64!2,1 ; T:2,8                | reduction='add'          | f32
ScatterND           | T:4,8 ; i64!2,1 ; T:2,8                | reduction='max'          | f32
Selu                | T:4,8                                  |                          | f32 q8
Shape               | T:4,8                                  |                          | f32
Shrink              | T:4,8                                  |                          | f32
Sigmoid             | T:4,8                                  |                          | f32 f64 q8
Slice               | T:4,8 ; i64=7 ; i64=-9 ; i64=1 ; i64=-1 |                         | f32 q8
Slice               | T:4,8 ; i64:1 ; i64=3 ; i64=1          |                          | f32
Softmax             | T:4,8                                  | axis=0                   | f32 q8 q16
Softsign            | T:4,8                                  |                          | f32
SpaceToDepth        | T:1,4,8,8                              | blocksize=2              | f32 q8
Sqrt                | T:4,8                                  |                          | f32 q8
Sum                 | T:4,8 ; T:4,8 ; T:4,8                  |                          | f32
Tanh                | T:1,2,4,4,4                            |                          | f32 q8
Tile                | T:4,8 ; i64=2,2                        |                          | f32 i8 q8
TopK                | T:4,8 ; i64=3                          | largest=0                | f32 i32
Transpose           | T:4,8                                  | perm=[1,0]               | f32 i32 i64 q8
Trilu               | T:8,8                                  |                          | f32
Unsqueeze           | T:4,8 ; i64=0                          |                          | f32 u16 q8
Where               | b:4,8 ; T:4,8 ; T:4,8                  |                          | f32 i32 q8
"""


@dataclass(frozen=True)
class Probe:
    """One model; its operator's node is named ``n``."""

    op_type: str
    inputs: tuple[str, ...]
    attributes: str
    form: str

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.op_type, ";".join(self.inputs), self.attributes, self.form)))

    def model(self) -> ir.Model:
        return _Builder(self).model()


def probes() -> Iterator[Probe]:
    for line in TABLE.strip().splitlines():
        op_type, inputs, attributes, forms = (cell.strip() for cell in line.split("|"))
        for form in forms.split():
            yield Probe(op_type, tuple(cell.strip() for cell in inputs.split(";")), attributes, form)


class _Builder:
    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.nodes: list[ir.Node] = []
        self.fed: list[ir.Value] = []
        self.constants: list[ir.Value] = []
        self.unit = UNITS.get(probe.form)

    def model(self) -> ir.Model:
        probe = self.probe
        inputs = [self._input(f"x{index}", spec) if spec else None for index, spec in enumerate(probe.inputs)]
        written = probe.attributes.replace("@", "coordinate_transformation_mode")
        call = ast.parse(f"f({written})", mode="eval").body
        assert isinstance(call, ast.Call)
        attributes = {word.arg or "": ast.literal_eval(word.value) for word in call.keywords}
        outputs = self._add(probe.op_type, inputs, "n", attributes, OUTPUTS.get(probe.op_type, 1))
        if self.unit is not None and probe.form != "qf":
            outputs[0] = self._pair(outputs[0], *self.unit)
        graph = ir.Graph(
            self.fed, outputs, nodes=self.nodes, initializers=self.constants, name="g", opset_imports={"": OPSET}
        )
        model = ir.Model(graph, ir_version=10)
        infer_shapes(model)
        return model

    def _add(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, attributes: Mapping[str, Any], count: int = 1
    ) -> list[ir.Value]:
        node = ir.node(op_type, inputs, attributes, num_outputs=count, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.y{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.constants.append(value)
        return value

    def _input(self, name: str, spec: str) -> ir.Value:
        parts = re.fullmatch(r"([A-Z]|[a-z]+\d*)(==|=|!|:)(.*)", spec)
        assert parts is not None, spec
        kind, sign, rest = parts.groups()
        formed = kind in ("T", "W", "C", "B")
        dtype = TYPES[("f32" if self.unit else self.probe.form) if formed else kind]
        if sign == ":":
            shape = ir.Shape([int(size) if size.isdigit() else size for size in rest.split(",") if size])
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))), shape=shape)
            self.fed.append(value)
            return self._pair(value, *self.unit) if formed and self.unit else value
        if sign == "!":
            sizes = [int(size) for size in rest.split(",") if size]
            ramp = np.linspace(0.1, 0.6, int(np.prod(sizes))).reshape(sizes)
            array = np.zeros(sizes) if kind.startswith("i") else ramp
        else:
            numbers = [float(number) for number in rest.split(",") if number]
            array = np.array(numbers[0] if sign == "==" else numbers)
        if formed and self.unit:
            return self._weight(name, kind, array)
        return self._constant(name, array.astype(dtype))

    def _pair(self, value: ir.Value, integer: str, zero: int) -> ir.Value:
        grid = self._grid(f"{value.name}", np.array(0.05, np.float32), np.array(zero, TYPES[integer]))
        (stored,) = self._add("QuantizeLinear", [value, *grid], f"{value.name}.q", {})
        return self._add("DequantizeLinear", [stored, *grid], f"{value.name}.d", {})[0]

    def _weight(self, name: str, kind: str, array: np.ndarray) -> ir.Value:
        """Store a constant as integers; per channel along the last axis of a matrix, the first of a kernel."""
        axis = 1 if array.ndim == 2 else 0
        scale = np.full(array.shape[axis], 0.05, np.float32) if kind == "C" else np.array(0.05, np.float32)
        integer, zero = {"T": self.unit or ("u8", 0), "B": ("i32", 0)}.get(kind, ("i8", 0))
        stored = self._constant(f"{name}.stored", (np.round(array / 0.05) + zero).astype(TYPES[integer]))
        grid = self._grid(name, scale, np.full(scale.shape, zero, TYPES[integer]))
        return self._add("DequantizeLinear", [stored, *grid], f"{name}.d", {"axis": axis} if kind == "C" else {})[0]

    def _grid(self, name: str, scale: np.ndarray, zero: np.ndarray) -> tuple[ir.Value, ir.Value]:
        return self._constant(f"{name}.scale", scale), self._constant(f"{name}.zero", zero)
