"""Small models in float and in QDQ form for the tests of the ONNX Runtime packager."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.model.loading import load_text

FLOAT = """<ir_version: 8, opset_import: ["" : 17]> net (float[N,3,8,8] x) => (float[N,5] y)
<float[4,3,3,3] w, float[5,144] v> {
  a = Conv (x, w)
  r = Relu (a)
  f = Flatten (r)
  y = Gemm <transB = 1> (f, v)
}"""


QDQ = """<ir_version: 8, opset_import: ["" : 17]> net (float[N,3,8,8] x) => (float[N,4,6,6] y)
<float s = {0.02}, TYPE z = {ZERO}, TYPE low = {LEAST}, float[4] ws = {0.01, 0.01, 0.01, 0.01},
 int8[4] wz = {0, 0, 0, 0}, int8[4,3,3,3] w, float t = {0.05}> {
  xq = QuantizeLinear (x, s, z)
  xd = DequantizeLinear (xq, s, z)
  wd = DequantizeLinear <axis = 0> (w, ws, wz)
  [conv] a = Conv (xd, wd)
  [relu] r = Relu (a)
  rq = QuantizeLinear (r, t, low)
  rd = DequantizeLinear (rq, t, low)
  [exp] y = Exp (rd)
}"""


def with_weights(text: str) -> ir.Model:
    """Return the model with random values for the initializers that its text only declares."""
    lines = text.split("{\n", 1)
    random = np.random.default_rng(0)
    declared, values = lines[0], {}
    for name, shape in (("w", (4, 3, 3, 3)), ("v", (5, 144))):
        for kind in ("float", "int8"):
            entry = f"{kind}[{','.join(map(str, shape))}] {name}"
            if entry in declared:
                integers = random.integers(-127, 128, int(np.prod(shape)))
                numbers = integers if kind == "int8" else integers / 500
                values[entry] = f"{entry} = {{{', '.join(str(number) for number in numbers)}}}"
    for entry, full in values.items():
        declared = declared.replace(entry, full)
    return load_text(declared + "{\n" + lines[1])


def qdq(kind: str) -> ir.Model:
    zero, least = {"int8": ("-3", "-128"), "uint8": ("120", "0")}[kind]
    return with_weights(QDQ.replace("TYPE", kind).replace("ZERO", zero).replace("LEAST", least))
