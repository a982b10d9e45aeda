from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from optkit.dataset.samples import Samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.graph import constant
from optkit.model.loading import infer_shapes, load, name_nodes, save
from optkit.pipeline import Context, Pipeline, Remark
from optkit.session import run_samples
from optkit.target import Target, load_target
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
    **options: Any,
) -> tuple[ir.Model, list[Remark]]:
    result = model.clone()
    calibration = Samples(list(samples if samples is not None else inputs_of(model)))
    context = Context(target=target, calibration=calibration, pass_name="quantize-static")
    QuantizeStatic(**options).run(result, context)
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


# every layer: compared with float, and run by an integer kernel of onnxruntime

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


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["uint8", "int8"])
def test_layer(name: str, symmetric: bool) -> None:
    model = LAYERS[name]()
    target = None
    if symmetric:  # the kind of integers that the ARM targets ask for
        target = load_target("cortex-a53")
    result, remarks = quantized(model, target=target)
    assert not missed(remarks)
    assert sqnr(model, result) > 33
    found = deployed(result)
    if not symmetric:
        assert sqnr(model, result, optimize=True) > 33
        assert set(found) & INTEGER_KERNELS
        assert not set(found) & FLOAT_KERNELS


@pytest.mark.parametrize("group", [1, 2])
def test_conv_transpose(group: int) -> None:
    model = build(
        f"(float[1,4,5,5] x) => (float[1,6,11,11] y) {{ y = ConvTranspose <group={group}, strides=[2,2]> (x, w, b) }}",
        w=random(4, 6 // group, 3, 3),
        b=random(6),
    )
    result, remarks = quantized(model)
    assert not missed(remarks)
    assert sqnr(model, result) > 33
    node = find(result, "ConvTranspose")
    weight, bias = (value.producer() for value in node.inputs[1:] if value is not None)
    assert weight is not None
    assert bias is not None
    if group == 1:
        assert weight.attributes["axis"].as_int() == 1
        assert constant(weight.inputs[1]).shape == (6,)  # type: ignore[union-attr]
    else:  # axis 1 names a channel of each group
        assert "axis" not in weight.attributes
        assert constant(weight.inputs[1]).shape == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("conv", 0),
        ("depthwise", 0),
        ("gemm", 1),
        ("gemm transposed", 0),
        ("matmul", 1),
        ("matmul transposed constant", 1),
    ],
)
def test_weights_are_symmetric_per_channel_on_the_right_axis(name: str, axis: int) -> None:
    result, _ = quantized(LAYERS[name]())
    layer = next(node for node in result.graph if node.op_type in FLOAT_KERNELS)
    dequantize = layer.inputs[1].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    assert dequantize.attributes["axis"].as_int() == axis
    integers = next(value for key, value in result.graph.initializers.items() if key == "w_quantized")
    array = constant(integers)
    assert array is not None
    assert array.dtype == np.int8
    others = tuple(i for i in range(array.ndim) if i != (0 if "transposed constant" in name else axis))
    assert (np.abs(array.astype(int)).max(axis=others) == 127).all()
    assert "w" not in result.graph.initializers


def test_names_are_those_of_onnxruntime() -> None:
    result, _ = quantized(LAYERS["conv"]())
    assert set(result.graph.initializers) == {
        *("x_scale", "x_zero_point", "y_scale", "y_zero_point"),
        *("w_quantized", "w_scale", "b_quantized", "b_quantized_scale"),
    }
    assert [node.name for node in result.graph if node.op_type == "QuantizeLinear"] == [
        "x_QuantizeLinear",
        "y_QuantizeLinear",
    ]
    assert [value.name for node in result.graph for value in node.outputs] == [
        "x_QuantizeLinear_Output",
        "x_DequantizeLinear_Output",
        "w_DequantizeLinear_Output",
        "b_DequantizeLinear_Output",
        "y_float",
        "y_QuantizeLinear_Output",
        "y",
    ]
    assert result.metadata_props["onnx.infer"] == "onnxruntime.quant"


def test_bias_is_int32_at_the_scale_of_the_accumulator() -> None:
    model = LAYERS["conv"]()
    result, _ = quantized(model)
    initializers = {name: constant(value) for name, value in result.graph.initializers.items()}
    assert initializers["b_quantized"].dtype == np.int32  # type: ignore[union-attr]
    expected = initializers["x_scale"] * initializers["w_scale"]  # type: ignore[operator]
    assert np.array_equal(initializers["b_quantized_scale"], expected)  # type: ignore[arg-type]
    restored = initializers["b_quantized"] * initializers["b_quantized_scale"]  # type: ignore[operator]
    assert np.abs(restored - random(8)).max() <= expected.max() * 0.51


def test_bias_that_would_overflow_widens_the_scale_of_its_channel() -> None:
    weight = random(4, 3, 3, 3)
    weight[2] *= np.float32(1e-9)
    model = build("(float[1,3,5,5] x) => (float[1,4,3,3] y) { y = Conv (x, w, b) }", w=weight, b=np.ones(4, np.float32))
    result, remarks = quantized(model)
    bias = constant(result.graph.initializers["b_quantized"])
    assert bias is not None
    assert abs(int(bias[2])) <= 2**30 + 1
    assert sqnr(model, result) > 30
    assert sqnr(model, result, optimize=True) > 30
    assert [r.message for r in remarks if r.op_type == "Conv"] == [
        "108 weights in 8 bits with 4 scales, 1 of them widened so that the bias fits"
    ]


def test_final_logits_stay_float() -> None:
    result, _ = quantized(LAYERS["matmul"]())
    assert ops(result).count("QuantizeLinear") == 1
    assert deployed(result)["MatMulIntegerToFloat"] == 1
    result, _ = quantized(LAYERS["gemm"]())
    assert ops(result)[-1] == "Gemm"


# glue: between two convolutions everything runs on integers

MOVEMENT = {
    "maxpool": ("MaxPool", "MaxPool <kernel_shape=[2,2], strides=[2,2]> (a)"),
    "transpose": ("Transpose", "Transpose <perm=[0,1,3,2]> (a)"),
    "reshape": ("Reshape", "Reshape (a, shape)"),
    "slice": ("Slice", "Slice (a, starts, ends)"),
    "pad": ("Pad", "Pad (a, pads)"),
    "pad reflect": ("Pad", 'Pad <mode="reflect"> (a, pads)'),
    "resize nearest": ("Resize", "Resize (a, , scales)"),
    "resize linear": ("Resize", 'Resize <mode="linear"> (a, , scales)'),
    "depth to space": ("DepthToSpace", "DepthToSpace <blocksize=2> (a)"),
    "gather": ("Gather", "Gather <axis=2> (a, picks)"),
    "tile": ("Tile", "Tile (a, repeats)"),
    "expand": ("Expand", "Expand (a, shape)"),
}
ARITHMETIC = {
    "add": ("Add", "Add (a, c)"),
    "mul": ("Mul", "Mul (a, c)"),
    "add constant": ("Add", "Add (a, half)"),
    "average pool": ("AveragePool", "AveragePool <kernel_shape=[2,2]> (a)"),
    "leaky relu": ("LeakyRelu", "LeakyRelu <alpha=0.1> (a)"),
    "sigmoid": ("Sigmoid", "Sigmoid (a)"),
    "global average pool": ("GlobalAveragePool", "GlobalAveragePool (a)"),
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


def between_convolutions(call: str) -> ir.Model:
    used = {name: array for name, array in CONSTANTS.items() if re.search(rf"\b{name}\b", call)}
    channels = 2 if "DepthToSpace" in call else 8
    if "(a, c)" in call:
        used["u"] = random(8, 3, 3, 3, seed=5)
    return build(
        "(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv <pads=[1,1,1,1]> (x, v, d) "
        f"{'c = Conv <pads=[1,1,1,1]> (x, u)' if 'u' in used else ''} g = {call}  y = Conv (g, w) }}",
        v=random(8, 3, 3, 3),
        d=random(8),
        w=random(4, channels, 1, 1),
        **used,
    )


@pytest.mark.parametrize("name", [*MOVEMENT, *ARITHMETIC])
def test_glue_is_quantized_between_convolutions(name: str) -> None:
    op_type, call = (MOVEMENT | ARITHMETIC)[name]
    model = between_convolutions(call)
    result, remarks = quantized(model)
    assert not missed(remarks)
    node = find(result, op_type)
    assert node.inputs[0].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
    assert [use.node.op_type for use in node.outputs[0].uses()] == ["QuantizeLinear"]
    if name in MOVEMENT:
        assert params(node.inputs[0]) == params(node.outputs[0])
    assert sqnr(model, result) > 25
    assert sqnr(model, result, optimize=True) > 25
    found = deployed(result)
    assert not set(found) & FLOAT_KERNELS
    if op_type in ("Add", "Mul", "LeakyRelu", "Sigmoid", "AveragePool", "GlobalAveragePool"):
        assert found[f"QLinear{op_type}"] == 1


def test_concat_inputs_share_one_range() -> None:
    model = build(
        "(float[1,3,6,6] x) => (float[1,4,6,6] y) { a = Conv (x, v)  c = Conv (x, u)  g = Concat <axis=1> (a, c, k) "
        "y = Conv (g, w) }",
        v=random(8, 3, 1, 1) * 10,
        u=random(8, 3, 1, 1, seed=5),
        k=np.full((1, 1, 6, 6), 0.5, np.float32),
        w=random(4, 17, 1, 1),
    )
    result, remarks = quantized(model)
    assert not missed(remarks)
    concat = find(result, "Concat")
    assert len({params(value) for value in [*concat.inputs, *concat.outputs]}) == 1
    assert sqnr(model, result) > 25
    assert deployed(result)["QLinearConcat"] == 1


def test_split_outputs_share_the_input_scale() -> None:
    model = build(
        "(float[1,3,6,6] x) => (float[1,4,6,6] y) { a = Conv (x, v)  p, q = Split <axis=1> (a)  e = Conv (p, w) "
        "f = Conv (q, w)  y = Add (e, f) }",
        v=random(8, 3, 1, 1),
        w=random(4, 4, 1, 1),
    )
    result, _ = quantized(model)
    split = find(result, "Split")
    assert len({params(value) for value in [*split.inputs, *split.outputs]}) == 1
    assert sqnr(model, result) > 25
    assert ops(result).count("Conv") == 3
    assert deployed(result)["QLinearConv"] == 3


def test_chain_of_reshaping_operators_has_one_scale() -> None:
    model = build(
        "(float[1,3,6,6] x) => (float[1,5] y) { a = Conv (x, v)  g = GlobalAveragePool (a)  s = Squeeze (g, axes) "
        "f = Flatten (s)  u = Unsqueeze (f, last)  r = Squeeze (u, last)  y = Gemm <transB=1> (r, w, b) }",
        v=random(8, 3, 1, 1),
        axes=np.array([2, 3]),
        last=np.array([2]),
        w=random(5, 8),
        b=random(5),
    )
    result, _ = quantized(model)
    values = [v for n in result.graph if n.op_type in ("Squeeze", "Flatten", "Unsqueeze") for v in n.outputs]
    assert len({params(value) for value in values}) == 1
    assert sqnr(model, result) > 25
    assert deployed(result)["QGemm"] == 1


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


def test_residual_network_is_integer_throughout() -> None:
    model = residual()
    result, remarks = quantized(model)
    assert not missed(remarks)
    assert "Relu" not in ops(result)
    removed = [r.message for r in remarks if r.op_type == "Relu"]
    assert removed == [f"removed: the quantizer of '{name}' clamps at the same bounds" for name in ("r", "t", "h")]
    assert sqnr(model, result) > 25
    found = deployed(result)
    assert found["QLinearConv"] == 3
    assert found["QLinearAdd"] == 2
    assert found["QuantizeLinear"] == 1
    assert not found["DequantizeLinear"]


def test_weight_used_twice_is_stored_once() -> None:
    result, _ = quantized(residual())
    assert sum(name.startswith("u") and name.endswith("quantized") for name in result.graph.initializers) == 1
    assert "u" not in result.graph.initializers


@pytest.mark.parametrize("high", [6.0, 1000.0])  # reached, and out of reach
def test_clip_is_removed_when_the_quantizer_clamps_the_same(high: float) -> None:
    model = build(
        "(float[1,3,6,6] x) => (float[1,4,6,6] y) { a = Conv (x, v)  r = Clip (a, low, high)  y = Conv (r, w) }",
        v=random(8, 3, 1, 1) * 8,
        low=np.array(0, np.float32),
        high=np.array(high, np.float32),
        w=random(4, 8, 1, 1),
    )
    result, _ = quantized(model)
    assert "Clip" not in ops(result)
    assert sqnr(model, result) > 25


def test_clip_that_the_quantizer_does_not_replace_stays() -> None:
    model = build(
        "(float[1,3,6,6] x) => (float[1,4,6,6] y) { a = Conv (x, v)  r = Clip (a, low)  y = Conv (r, w) }",
        v=random(8, 3, 1, 1),
        low=np.array(0.1, np.float32),
        w=random(4, 8, 1, 1),
    )
    result, remarks = quantized(model)
    assert "Clip" in ops(result)
    assert [r.message for r in remarks if r.op_type == "Clip"] == ["computed on integers"]
    assert ops(result).count("QuantizeLinear") == 3  # none between Conv and Clip


def test_relu_with_another_reader_before_it_keeps_its_input() -> None:
    model = build(
        "(float[1,3,6,6] x) => (float[1,8,6,6] y) { a = Conv (x, v)  r = Relu (a)  e = Conv (r, w)  f = Conv (a, w) "
        "y = Add (e, f) }",
        v=random(8, 3, 1, 1),
        w=random(8, 8, 1, 1),
    )
    result, _ = quantized(model)
    assert sqnr(model, result) > 25


def test_float_relu_before_a_quantizer_is_removed() -> None:
    model = build(
        "(float[2,7,16] x) => (float[2,7,4] y) { m = MatMul (x, v)  a = Add (m, b)  r = Relu (a)  y = MatMul (r, w) }",
        v=random(16, 8),
        b=random(8),
        w=random(8, 4),
    )
    result, remarks = quantized(model)
    assert ops(result).count("QuantizeLinear") == 2
    assert "Relu" not in ops(result)
    assert missed(remarks)["Add"] == "input 'm' is available in float at no cost"
    assert sqnr(model, result) > 33


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


def test_residual_stream_of_a_transformer_stays_float() -> None:
    model = transformer_block()
    result, remarks = quantized(model)
    for node in (node for node in result.graph if node.op_type in ("Add", "LayerNormalization", "Softmax")):
        assert all(v is None or v.producer() is None or v.producer().op_type != "DequantizeLinear" for v in node.inputs)  # type: ignore[union-attr]
    reasons = {remark.node: remark.message for remark in remarks if remark.kind == "missed"}
    assert set(reasons.values()) == {
        "input 'x' is available in float at no cost",
        "input 'h' is computed in float",
    }
    assert sqnr(model, result) > 30
    found = deployed(result)
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] == 6


def test_graph_outputs_keep_name_type_and_order() -> None:
    model = build(
        "(float[1,3,6,6] x) => (float[1,8,6,6] a, float[1,8,6,6] r, float[1,4,6,6] y) "
        "{ a = Conv (x, v)  r = Relu (a)  y = Conv (r, w) }",
        v=random(8, 3, 1, 1),
        w=random(4, 8, 1, 1),
    )
    result, _ = quantized(model)
    assert [(value.name, value.dtype) for value in result.graph.outputs] == [
        (name, ir.DataType.FLOAT) for name in ("a", "r", "y")
    ]
    assert sqnr(model, result) > 25


def test_movement_from_the_input_starts_on_integers() -> None:
    model = build(
        "(float[1,6,6,3] x) => (float[1,4,4,4] y) { t = Transpose <perm=[0,3,1,2]> (x)  y = Conv (t, w) }",
        w=random(4, 3, 3, 3),
    )
    result, remarks = quantized(model)
    assert not missed(remarks)
    assert ops(result)[0] == "QuantizeLinear"
    assert sqnr(model, result) > 30


# embeddings and ties

TOKENS = [{"ids": np.random.default_rng(i).integers(0, 50, (1, 9))} for i in range(8)]


def test_embedding_is_stored_in_8_bits_and_dequantized_after_the_rows_are_picked() -> None:
    model = build(
        "(int64[N,T] ids) => (float[N,T,4] y) { e = Gather (table, ids)  y = MatMul (e, w) }",
        table=random(50, 16),
        w=random(16, 4),
    )
    result, remarks = quantized(model, TOKENS)
    gather = find(result, "Gather")
    assert gather.inputs[0].name == "table_quantized"  # type: ignore[union-attr]
    assert [use.node.op_type for use in gather.outputs[0].uses()] == ["DequantizeLinear"]
    assert "table" not in result.graph.initializers
    assert [r.message for r in remarks if r.op_type == "Gather"] == ["table stored in 8 bits"]
    assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS)).sqnr_db > 33
    kept, _ = quantized(model, TOKENS, embeddings=False)
    assert "table" in kept.graph.initializers


def test_embedding_that_is_a_graph_output_keeps_its_name() -> None:
    model = build("(int64[N,T] ids) => (float[N,T,16] e) { e = Gather (table, ids) }", table=random(50, 16))
    result, _ = quantized(model, TOKENS)
    assert [value.name for value in result.graph.outputs] == ["e"]
    assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS)).sqnr_db > 33


@pytest.mark.parametrize(
    "form", ["t = Transpose <perm=[1,0]> (table)  y = MatMul (h, t)", "y = Gemm <transB=1> (h, table)"]
)
def test_table_tied_to_the_output_layer_is_stored_once(form: str) -> None:
    rows = "h = Reshape (e, flat)"
    model = build(
        f"(int64[1,9] ids) => (float[9,50] y) {{ e = Gather (table, ids)  {rows}  {form} }}",
        table=random(50, 16),
        flat=np.array([9, 16]),
    )
    result, _ = quantized(model, TOKENS)
    stored = [name for name, value in result.graph.initializers.items() if value.const_value.size == 800]  # type: ignore[union-attr]
    assert stored == ["table_quantized"]
    assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS)).sqnr_db > 30
    assert set(deployed(result)) & INTEGER_KERNELS


def test_weight_that_is_also_read_in_float_says_that_it_is_stored_twice() -> None:
    model = build(
        "(float[4,16] x) => (float[4,16] y, float[16,16] z) { y = MatMul (x, w)  z = Exp (w) }", w=random(16, 16)
    )
    result, remarks = quantized(model)
    assert {"w", "w_quantized"} <= set(result.graph.initializers)
    assert missed(remarks)["Exp"] == "reads 'w' in float, so that it is stored in both forms"


def test_equal_scales_and_zero_points_are_stored_once() -> None:
    result, _ = quantized(residual())
    scalars = [
        v.const_value.tobytes() + str(v.dtype).encode() for v in result.graph.initializers.values() if v.const_value
    ]
    assert len(scalars) == len(set(scalars))


# what stays float says why

REFUSALS: dict[str, tuple[str, dict[str, np.ndarray], str, str]] = {
    "weights computed": (
        "(float[1,3,6,6] x, float[4,3,1,1] w) => (float[1,4,6,6] y) { y = Conv (x, w) }",
        {},
        "Conv",
        "its weights are not constant",
    ),
    "bias computed": (
        "(float[1,3,6,6] x, float[4] b) => (float[1,4,6,6] y) { y = Conv (x, w, b) }",
        {"w": random(4, 3, 1, 1)},
        "Conv",
        "its bias is not constant",
    ),
    "gemm bias matrix": (
        "(float[4,16] x) => (float[4,5] y) { y = Gemm (x, w, b) }",
        {"w": random(16, 5), "b": random(4, 5)},
        "Gemm",
        "its bias has shape [4, 5], not one value per output column",
    ),
    "gemm of activations with bias": (
        "(float[4,16] x, float[16,5] w) => (float[4,5] y) { y = Gemm (x, w, b) }",
        {"b": random(5)},
        "Gemm",
        "its weights are not constant and it has a bias",
    ),
    "vector": (
        "(float[4,16] x) => (float[4] y) { y = MatMul (x, w) }",
        {"w": random(16)},
        "MatMul",
        "its constant input is a vector",
    ),
    "double": (
        "(double[4,16] x) => (double[4,5] y) { y = MatMul (x, w) }",
        {"w": random(16, 5).astype(np.float64)},
        "MatMul",
        "input 'x' is double, not float32",
    ),
    "pad value": (
        "(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  p = Pad (a, pads, one)  y = Conv (p, v) }",
        {"v": random(3, 3, 1, 1), "pads": CONSTANTS["pads"], "one": np.array(1, np.float32)},
        "Pad",
        "it pads with a value other than 0",
    ),
    "cubic": (
        '(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  p = Resize <mode="cubic"> (a, , scales) '
        "y = Conv (p, v) }",
        {"v": random(3, 3, 1, 1), "scales": CONSTANTS["scales"]},
        "Resize",
        "its result may leave the range of its input",
    ),
    "read in float": (
        "(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  p = GlobalAveragePool (a)  y = Softmax (p) }",
        {"v": random(3, 3, 1, 1)},
        "GlobalAveragePool",
        "its output is only read in float",
    ),
    "float neighbour": (
        "(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  e = Exp (x)  p = Add (a, e)  y = Conv (p, v) }",
        {"v": random(3, 3, 1, 1)},
        "Add",
        "input 'e' is computed in float",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    text, constants, op_type, reason = REFUSALS[name]
    model = build(text, **constants)
    samples = [{k: v.astype(np.float64) for k, v in s.items()} for s in inputs_of(model)] if name == "double" else None
    result, remarks = quantized(model, samples)
    assert missed(remarks)[op_type] == reason
    if op_type != "GlobalAveragePool" and name != "double":
        assert sqnr(model, result) > 25


def test_rule_keeps_a_node_in_float() -> None:
    model = residual()
    kept = [node for node in model.graph if node.op_type == "Conv"][1]
    kept.metadata_props["optkit.precision"] = "fp32"
    result, remarks = quantized(model)
    assert missed(remarks)["Conv"] == "kept in float by a rule (fp32)"
    assert deployed(result)["QLinearConv"] == 2
    assert "u" in result.graph.initializers
    allowed = residual()
    find(allowed, "Conv").metadata_props["optkit.precision"] = "w8a8"
    assert not missed(quantized(allowed)[1])


def test_every_node_ruled_float_leaves_the_model_as_it_was() -> None:
    model = residual()
    for node in model.graph:
        node.metadata_props["optkit.precision"] = "fp32"
    result = model.clone()
    context = Context(pass_name="quantize-static")  # no calibration data needed either
    QuantizeStatic().run(result, context)
    assert ir.to_onnx_text(result) == ir.to_onnx_text(model)
    assert {remark.kind for remark in context.remarks} == {"missed"}


def test_node_in_a_body_says_why_it_stays_float() -> None:
    model = build(
        "(float[1,3,6,6] x, bool c) => (float[1,4,6,6] y) { a = Conv (x, v)  y = If (c) <"
        "then_branch = t () => (float[1,4,6,6] p) { p = Conv (a, w) },"
        "else_branch = e () => (float[1,4,6,6] q) { q = Exp (a) }> }",
        v=random(4, 3, 1, 1),
        w=random(4, 4, 1, 1),
    )
    samples = [{**s, "c": np.array(i % 2 == 0)} for i, s in enumerate(inputs_of_float(model))]
    result, remarks = quantized(model, samples)
    assert missed(remarks) == {"Conv": "inside the body of a control-flow node, where activations cannot be observed"}
    assert "w" in result.graph.initializers
    assert "v_quantized" in result.graph.initializers
    assert compare(run_samples(model, samples), run_samples(result, samples)).sqnr_db > 25


def inputs_of_float(model: ir.Model) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    return [{"x": generator.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(8)]


@pytest.mark.parametrize("opset", [10, 12])
def test_old_opset_is_refused_with_a_remark(opset: int) -> None:
    model = build(
        "(float[1,3,6,6] x) => (float[1,4,6,6] y) { y = Conv (x, w) }",
        header=f'<ir_version: 6, opset_import: ["" : {opset}]>',
        w=random(4, 3, 1, 1),
    )
    result, remarks = quantized(model)
    assert ops(result) == ["Conv"]
    assert missed(remarks) == {"Conv": f"opset {opset}: one scale per channel needs opset 13"}


def test_quantized_model_is_left_alone() -> None:
    once, _ = quantized(residual())
    twice, remarks = quantized(once)
    assert ops(twice) == ops(once)
    assert {r.kind for r in remarks} == {"missed"}
    assert any(r.op_type == "Conv" and r.message.endswith("is already quantized") for r in remarks)


# calibration


def test_tensor_that_is_always_zero_keeps_its_readers_in_float() -> None:
    model = build(
        "(float[4,16] x, float[4,16] s) => (float[4,5] y) { a = Gemm (x, w)  c = Gemm (s, w)  y = Add (a, c) }",
        w=random(16, 5),
    )
    samples = [{**sample, "s": np.zeros((4, 16), np.float32)} for sample in inputs_of(model)]
    result, remarks = quantized(model, samples)
    assert missed(remarks)["Gemm"] == "tensor 's' is 0 in every calibration sample"
    assert sqnr(model, result) > 30  # on inputs where it is not 0


def test_tensor_without_elements_keeps_its_readers_in_float() -> None:
    model = build(
        "(float[N,16] x, float[M,16] s) => (float[N,5] y, float[M,5] z) { y = Gemm (x, w)  z = Gemm (s, w) }",
        w=random(16, 5),
    )
    samples = [{**sample, "s": np.zeros((0, 16), np.float32)} for sample in inputs_of(model)]
    _, remarks = quantized(model, samples)
    assert missed(remarks)["Gemm"] == "tensor 's' has no elements in every calibration sample"


def test_one_sample_is_remarked() -> None:
    model = LAYERS["conv"]()
    _, remarks = quantized(model, inputs_of(model, 1))
    assert [r.message for r in remarks if r.node == "calibration"] == [
        "one sample only: ranges seen in it may be too narrow for others"
    ]


@pytest.mark.parametrize("calibration", [None, Samples([])])
def test_no_calibration_data_is_an_error_that_says_what_to_pass(calibration: Samples | None) -> None:
    with pytest.raises(InputError, match=r"needs calibration data and .*; pass --calibration DATA"):
        QuantizeStatic().run(LAYERS["conv"](), Context(calibration=calibration))


def test_weight_that_is_not_finite_is_named() -> None:
    weight = random(8, 3, 3, 3)
    weight[3, 1, 0, 0] = np.nan
    model = build("(float[1,3,9,9] x) => (float[1,8,7,7] y) { y = Conv (x, w) }", w=weight)
    with pytest.raises(InputError, match=r"tensor '[xyw]'.* (NaN|not finite)"):
        quantized(model)
    model = build("(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  p = Mul (a, k)  y = Conv (p, v) }",
                  v=random(3, 3, 1, 1), k=np.array([1, np.inf, 1], np.float32).reshape(3, 1, 1))  # fmt: skip
    with pytest.raises(InputError, match=r"tensor '(k|p)'"):
        quantized(model)


def test_activation_that_is_not_finite_names_tensor_and_sample() -> None:
    model = LAYERS["conv"]()
    samples = inputs_of(model)
    samples[5]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"^calibration sample 5: tensor 'x' has NaN values; "):
        quantized(model, samples)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_every_range_method_quantizes_well(method: str) -> None:
    model = residual()
    result, _ = quantized(model, inputs_of(model, 64), range_method=method)
    assert sqnr(model, result) > 22


def test_same_inputs_give_the_same_bytes() -> None:
    first, second = (quantized(transformer_block())[0] for _ in range(2))
    assert ir.to_proto(first).SerializeToString(deterministic=True) == ir.to_proto(second).SerializeToString(
        deterministic=True
    )


# targets


def test_target_decides_the_integers() -> None:
    model = residual()
    result, _ = quantized(model, target=load_target("cortex-a53"))
    types = {node.outputs[0].dtype for node in result.graph if node.op_type == "QuantizeLinear"}
    assert types == {ir.DataType.INT8}
    assert sqnr(model, result) > 25
    assert "Relu" not in ops(result)  # int8 with zero point -128 clamps at 0 as well


def test_symmetric_activations_have_zero_point_0_and_keep_relu() -> None:
    target = load_target("cortex-a53")
    symmetric = target.activations["int8"].model_copy(update={"symmetric": True})
    target = target.model_copy(update={"activations": {"int8": symmetric}})
    model = residual()
    result, _ = quantized(model, target=target)
    zeros = [constant(n.inputs[2]) for n in result.graph if n.op_type == "QuantizeLinear"]
    assert all(zero is not None and zero.dtype == np.int8 and int(zero) == 0 for zero in zeros)
    assert ops(result).count("Relu") == 3
    assert sqnr(model, result) > 24


def avx2() -> Target:
    """The host target as on a machine whose kernels add two products in int16."""
    return load_target("host").model_copy(update={"isa": ("x86_64", "avx2")})


@pytest.mark.parametrize("name", ["conv", "grouped", "gemm", "gemm transposed", "matmul", "matmul transposed constant"])
def test_pairs_of_weights_do_not_saturate_where_the_target_adds_them_in_int16(name: str) -> None:
    model = LAYERS[name]()
    result, _ = quantized(model, target=avx2())
    integers = constant(result.graph.initializers["w_quantized"])
    assert integers is not None
    rows = integers.astype(int)
    if integers.ndim == 4:
        rows = rows.transpose(0, 2, 3, 1).reshape(len(rows), -1)
    elif name in ("gemm", "matmul"):
        rows = rows.T
    rows = np.abs(np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))))
    assert 100 < (rows[:, 0::2] + rows[:, 1::2]).max() <= 128
    assert rows.max() > 64  # less is lost than a whole bit
    assert sqnr(model, result) > 30


def test_depthwise_weights_keep_the_full_range_everywhere() -> None:
    full, limited = (quantized(LAYERS["depthwise"](), target=target)[0] for target in (None, avx2()))
    assert full.graph.initializers["w_scale"].const_value.tobytes() == (  # type: ignore[union-attr]
        limited.graph.initializers["w_scale"].const_value.tobytes()  # type: ignore[union-attr]
    )


def test_tied_table_is_stored_once_where_pairs_saturate() -> None:
    model = build(
        "(int64[1,9] ids) => (float[9,50] y) { e = Gather (table, ids)  h = Reshape (e, flat) "
        "y = Gemm <transB=1> (h, table) }",
        table=random(50, 16),
        flat=np.array([9, 16]),
    )
    result, _ = quantized(model, TOKENS, target=avx2())
    assert [n for n, v in result.graph.initializers.items() if v.const_value.size == 800] == ["table_quantized"]  # type: ignore[union-attr]
    assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS)).sqnr_db > 28


def test_target_without_channel_scales_gets_one_scale_per_tensor() -> None:
    target = load_target("cortex-a53")
    weights = target.weights["int8"].model_copy(update={"granularity": ("tensor",)})
    model = residual()
    result, _ = quantized(model, target=target.model_copy(update={"weights": {"int8": weights}}))
    assert all("axis" not in node.attributes for node in result.graph if node.op_type == "DequantizeLinear")
    assert sqnr(model, result) > 24


def test_target_without_8_bit_weights_is_an_error() -> None:
    target = load_target("cortex-a53").model_copy(update={"weights": {}})
    with pytest.raises(InputError) as error:
        quantized(LAYERS["conv"](), target=target)
    assert str(error.value) == "target 'cortex-a53' takes no 8-bit weights; choose another precision"


# real models


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "channels", "least"),
    [("resnet20_cifar10/resnet20_cifar10.onnx", 3, 25), ("mnist/mnist_burn_cnn.onnx", 1, 25)],
)
def test_real_model_keeps_its_answers(shared: Path, file: str, channels: int, least: float) -> None:
    from optkit.plugins import pass_class

    model = load(shared / "data" / file)
    folder = "cifar10_jpeg" if channels == 3 else "mnist"
    images = np.load(shared / "data" / folder / "calibration.npz")["images"][:192].reshape(
        192, -1, 32 if channels == 3 else 28, channels
    )
    name = model.graph.inputs[0].name or ""
    samples = [
        {name: ((image / np.float32(127.5) - 1).transpose(2, 0, 1)[None]).astype(np.float32)} for image in images
    ]
    context = Context(calibration=Samples(samples[:64]))
    Pipeline([pass_class("fold-batch-norm")()]).run(model, context)
    reference = model.clone()
    Pipeline([QuantizeStatic()], strict=True).run(model, context, samples[:1])
    fidelity = compare(run_samples(reference, samples[64:]), run_samples(model, samples[64:], optimize=True))
    assert fidelity.sqnr_db > least
    assert fidelity.top1_agreement is not None
    assert fidelity.top1_agreement > 0.95
    assert not set(deployed(model)) & FLOAT_KERNELS
