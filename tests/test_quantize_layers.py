"""Static quantization of single layers: close to float, and run by an integer kernel of onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.graph import constant
from optkit.target import load_target
from quantizing import (
    FLOAT_KERNELS,
    INTEGER_KERNELS,
    LAYERS,
    build,
    deployed,
    find,
    missed,
    ops,
    quantized,
    random,
    sqnr,
)


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
        assert constant(weight.inputs[1]).shape == (6,)
    else:  # axis 1 names a channel of each group
        assert "axis" not in weight.attributes
        assert constant(weight.inputs[1]).shape == ()


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
    dequantize = layer.inputs[1].producer()
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
    result, _ = quantized(model, bias_correction=False)
    initializers = {name: constant(value) for name, value in result.graph.initializers.items()}
    assert initializers["b_quantized"].dtype == np.int32
    expected = initializers["x_scale"] * initializers["w_scale"]
    assert np.array_equal(initializers["b_quantized_scale"], expected)
    restored = initializers["b_quantized"] * initializers["b_quantized_scale"]
    assert np.abs(restored - random(8)).max() <= expected.max() * 0.51


def test_bias_that_would_overflow_widens_the_scale_of_its_channel() -> None:
    weight = random(4, 3, 3, 3)
    weight[2] *= np.float32(1e-9)
    model = build("(float[1,3,5,5] x) => (float[1,4,3,3] y) { y = Conv (x, w, b) }", w=weight, b=np.ones(4, np.float32))
    result, remarks = quantized(model, bias_correction=False)
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
