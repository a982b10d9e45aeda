"""Static quantization between layers: everything runs on integers, and activations go where quantizers clamp."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from quantizing import (
    CONSTANTS,
    FLOAT_KERNELS,
    build,
    deployed,
    find,
    missed,
    ops,
    params,
    quantized,
    random,
    residual,
    sqnr,
    transformer_block,
)

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
    assert node.inputs[0].producer().op_type == "DequantizeLinear"
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


def test_residual_stream_of_a_transformer_stays_float() -> None:
    model = transformer_block()
    result, remarks = quantized(model)
    for node in (node for node in result.graph if node.op_type in ("Add", "LayerNormalization", "Softmax")):
        assert all(v is None or v.producer() is None or v.producer().op_type != "DequantizeLinear" for v in node.inputs)
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
