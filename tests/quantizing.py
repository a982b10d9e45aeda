"""Models to quantize, and what the tests ask about the result."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from optkit.dataset.samples import Samples
from optkit.evaluate.fidelity import compare
from optkit.graph import constant
from optkit.model.loading import infer_shapes, name_nodes, save
from optkit.pipeline import Context, Pass, Remark
from optkit.session import run_samples
from optkit.target import Target
from optkit_passes.quantization.quantize_static import QuantizeStatic

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
INTEGER_KERNELS = {"QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm"}
FLOAT_KERNELS = {"Conv", "FusedConv", "MatMul", "Gemm", "FusedGemm", "FusedMatMul"}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    scale = 1 / np.sqrt(max(np.prod(shape[1:]), 1))
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def build(text: str, header: str = HEADER, **constants: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(
        f"{header} main {text}", initializers=[ir.tensor(a, name=n) for n, a in constants.items()]
    )
    name_nodes(model)
    infer_shapes(model)
    return model


def inputs_of(model: ir.Model, count: int = 64, seed: int = 1) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    shapes = {v.name or "": [d if isinstance(d, int) else 3 for d in v.shape or ()] for v in model.graph.inputs}
    return [
        {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def quantized(
    model: ir.Model,
    samples: Sequence[dict[str, np.ndarray]] | None = None,
    target: Target | None = None,
    pass_class: type[Pass] = QuantizeStatic,
    **options: Any,
) -> tuple[ir.Model, list[Remark]]:
    result = model.clone()
    calibration = Samples(list(samples if samples is not None else inputs_of(model)))
    context = Context(target=target, calibration=calibration, pass_name=pass_class.name())
    pass_class(**options).run(result, context)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    return result, context.remarks


def sqnr(model: ir.Model, other: ir.Model, *, optimize: bool = False) -> float:
    fresh = inputs_of(model, 4, seed=2)
    return compare(run_samples(model, fresh), run_samples(other, fresh, optimize=optimize)).sqnr_db


def deployed(model: ir.Model) -> Counter[str]:
    """Return the operators that onnxruntime runs."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(
            str(save(model, Path(folder) / "model.onnx")[0]), options, providers=["CPUExecutionProvider"]
        )
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def find(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def missed(remarks: Sequence[Remark]) -> dict[str, str]:
    """Return the first reason given for each operator."""
    return {remark.op_type: remark.message for remark in reversed(remarks) if remark.kind == "missed"}


def params(value: ir.Value | None) -> tuple[Any, ...]:
    """Return scale, zero point and integer type that a value is dequantized from, or quantized to."""
    assert value is not None
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        node = next(use.node for use in value.uses() if use.node.op_type == "QuantizeLinear")
    scale, zero = (constant(item) for item in node.inputs[1:])
    assert scale is not None
    assert zero is not None
    return float(scale), int(zero), zero.dtype


LAYERS: dict[str, Callable[[], ir.Model]] = {
    "conv": lambda: build(
        "(float[1,3,9,9] x) => (float[1,8,9,9] y) { y = Conv <pads=[1,1,1,1]> (x, w, b) }",
        w=random(8, 3, 3, 3),
        b=random(8),
    ),
    "conv without bias": lambda: build(
        "(float[N,3,9,9] x) => (float[N,8,4,4] y) { y = Conv <strides=[2,2]> (x, w) }", w=random(8, 3, 3, 3)
    ),
    "conv one axis": lambda: build(
        "(float[1,4,20] x) => (float[1,8,18] y) { y = Conv (x, w, b) }", w=random(8, 4, 3), b=random(8)
    ),
    "depthwise": lambda: build(
        "(float[1,8,9,9] x) => (float[1,8,9,9] y) { y = Conv <group=8, pads=[1,1,1,1]> (x, w, b) }",
        w=random(8, 1, 3, 3) * np.logspace(-2, 2, 8, dtype=np.float32).reshape(8, 1, 1, 1),
        b=random(8),
    ),
    "grouped": lambda: build(
        "(float[1,8,9,9] x) => (float[1,6,9,9] y) { y = Conv <group=2, pads=[1,1,1,1]> (x, w, b) }",
        w=random(6, 4, 3, 3),
        b=random(6),
    ),
    "gemm": lambda: build("(float[4,16] x) => (float[4,5] y) { y = Gemm (x, w, b) }", w=random(16, 5), b=random(5)),
    "gemm transposed": lambda: build(
        "(float[N,16] x) => (float[N,5] y) { y = Gemm <transB=1> (x, w, b) }", w=random(5, 16), b=random(5)
    ),
    "gemm alpha beta": lambda: build(
        "(float[4,16] x) => (float[4,5] y) { y = Gemm <alpha=0.25, beta=3.0, transB=1> (x, w, b) }",
        w=random(5, 16),
        b=random(1, 5),
    ),
    "gemm scalar bias": lambda: build(
        "(float[4,16] x) => (float[4,5] y) { y = Gemm (x, w, b) }", w=random(16, 5), b=np.array([0.3], np.float32)
    ),
    "gemm without bias": lambda: build("(float[4,16] x) => (float[4,5] y) { y = Gemm (x, w) }", w=random(16, 5)),
    "gemm of activations": lambda: build("(float[4,6] x, float[6,3] z) => (float[4,3] y) { y = Gemm (x, z) }"),
    "matmul": lambda: build("(float[2,7,16] x) => (float[2,7,5] y) { y = MatMul (x, w) }", w=random(16, 5)),
    "matmul of a batch of weights": lambda: build(
        "(float[2,7,16] x) => (float[2,7,5] y) { y = MatMul (x, w) }", w=random(2, 16, 5)
    ),
    "matmul of activations": lambda: build(
        "(float[2,7,16] x, float[2,16,5] z) => (float[2,7,5] y) { y = MatMul (x, z) }"
    ),
    "matmul constant on the left": lambda: build(
        "(float[16,5] x) => (float[7,5] y) { y = MatMul (w, x) }", w=random(7, 16)
    ),
    "matmul with bias": lambda: build(
        "(float[7,16] x) => (float[7,5] y) { m = MatMul (x, w)  y = Add (b, m) }", w=random(16, 5), b=random(1, 5)
    ),
    "matmul transposed constant": lambda: build(
        "(float[2,7,16] x) => (float[2,7,5] y) { t = Transpose <perm=[1,0]> (w)  y = MatMul (x, t) }", w=random(5, 16)
    ),
}


CONSTANTS: dict[str, np.ndarray] = {
    "shape": np.array([1, 8, 6, 6]),
    "starts": np.array([0, 0, 1, 1]),
    "ends": np.array([1, 8, 5, 5]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "picks": np.array([0, 2, 3]),
    "repeats": np.array([1, 1, 2, 1]),
    "half": np.array(0.5, np.float32),
}


def residual() -> ir.Model:
    return build(
        "(float[1,3,8,8] x) => (float[1,5] y) { a = Conv <pads=[1,1,1,1]> (x, v, d)  r = Relu (a) "
        "c = Conv <pads=[1,1,1,1]> (r, u, d)  s = Add (c, r)  t = Relu (s)  e = Conv <pads=[1,1,1,1]> (t, u, d) "
        "f = Add (e, t)  h = Relu (f)  p = GlobalAveragePool (h)  l = Flatten (p)  y = Gemm <transB=1> (l, w, b) }",
        v=random(8, 3, 3, 3),
        u=random(8, 8, 3, 3),
        d=random(8),
        w=random(5, 8),
        b=random(5),
    )


def transformer_block() -> ir.Model:
    return build(
        "(float[2,7,16] x) => (float[2,7,16] y) { n = LayerNormalization (x, one, zero)  q = MatMul (n, wq) "
        "k = MatMul (n, wk)  kt = Transpose <perm=[0,2,1]> (k)  s = MatMul (q, kt)  p = Softmax (s) "
        "o = MatMul (p, n)  h = Add (x, o)  f = MatMul (h, w1)  g = Relu (f)  e = MatMul (g, w2)  y = Add (h, e) }",
        one=np.ones(16, np.float32),
        zero=np.zeros(16, np.float32),
        wq=random(16, 16),
        wk=random(16, 16, seed=2),
        w1=random(16, 32),
        w2=random(32, 16),
    )


TOKENS = [{"ids": np.random.default_rng(i).integers(0, 50, (1, 9))} for i in range(8)]
