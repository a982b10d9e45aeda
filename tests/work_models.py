"""A quantized graph for the tests of work and cost."""

from __future__ import annotations

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
QDQ = f"""
{HEAD}
g (float[1,2] x) => (float[1,2] y)
<float s = {{0.1}}, int8 z = {{0}}, int8[2,2] wq = {{1, 2, 3, 4}}>
{{
  xq = QuantizeLinear(x, s, z)
  xf = DequantizeLinear(xq, s, z)
  wf = DequantizeLinear(wq, s, z)
  a = MatMul(xf, wf)
  b = Relu(a)
  bq = QuantizeLinear(b, s, z)
  bf = DequantizeLinear(bq, s, z)
  r = Add(bf, xf)
  rq = QuantizeLinear(r, s, z)
  y = DequantizeLinear(rq, s, z)
}}
"""
