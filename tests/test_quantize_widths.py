"""Static quantization to other widths than 8 bits: 4-bit weights, 16-bit activations, scales per block."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.graph import constant
from optkit.session import run_samples
from optkit.target import IntegerFormat, Target, load_target
from quantizing import (
    FLOAT_KERNELS,
    INTEGER_KERNELS,
    LAYERS,
    TOKENS,
    build,
    deployed,
    find,
    missed,
    ops,
    quantized,
    random,
    residual,
    sqnr,
    transformer_block,
)

NEW, OLD = ('<ir_version: 10, opset_import: ["" : 21]>', '<ir_version: 8, opset_import: ["" : 17]>')
WIDTHS = [(8, 16), (4, 8), (4, 16)]


def raised(model: ir.Model, version: int = 21) -> ir.Model:
    from optkit.pipeline import Context
    from optkit.plugins import pass_class

    pass_class("raise-opset").model_validate({"opset": version}).run(model, Context())
    return model


def npu(**updates: Any) -> Target:
    """A target that takes every width and loads no opset that has them, as runtimes of NPUs do."""
    base = load_target("cortex-a53")
    formats = {
        "weights": {
            **base.weights,
            "int4": IntegerFormat(dtype="int4", symmetric=True, granularity=("channel",)),
        },
        "activations": {**base.activations, "int16": IntegerFormat(dtype="uint16", symmetric=False)},
        "opset": base.opset.model_copy(update={"max": 17}),
    }
    return base.model_copy(update={**formats, **updates})


def blocks(size: int, *, operators: tuple[Any, ...] = ("DequantizeLinear", "QDQ")) -> Target:
    form = IntegerFormat(
        dtype="int4", symmetric=True, granularity=("block", "channel"), block_size=(size,), operators=operators
    )
    return npu(weights={"int4": form}, opset=load_target("cortex-a53").opset)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("weight_bits", "activation_bits"), WIDTHS)
def test_every_layer_takes_every_width(name: str, weight_bits: int, activation_bits: int) -> None:
    model = raised(LAYERS[name]())
    result, _ = quantized(model, weight_bits=weight_bits, activation_bits=activation_bits)
    weighs = "of activations" not in name and "on the left" not in name
    least = 16 if weight_bits == 4 and weighs else 34 if weight_bits == 8 else 30
    for optimize in (False, True):
        assert sqnr(model, result, optimize=optimize) > least
    assert {node.domain for node in result.graph} == {""}


@pytest.mark.parametrize(("weight_bits", "activation_bits"), WIDTHS)
@pytest.mark.parametrize("model", [residual, transformer_block])
def test_whole_networks_run_optimized_and_not(model: Any, weight_bits: int, activation_bits: int) -> None:
    reference = raised(model())
    result, remarks = quantized(reference, weight_bits=weight_bits, activation_bits=activation_bits)
    least = 13 if weight_bits == 4 else 35
    for optimize in (False, True):
        assert sqnr(reference, result, optimize=optimize) > least
    said = [r.message for r in remarks if r.kind == "applied" and "weights in" in r.message]
    assert said
    assert all(f"weights in {weight_bits} bits" in message for message in said)


def test_types_and_sizes_are_the_ones_asked_for() -> None:
    model = raised(residual())
    result, _ = quantized(model, weight_bits=4, activation_bits=16)
    assert result.graph.initializers["u_quantized"].dtype == ir.DataType.INT4
    assert result.graph.initializers["u_quantized"].const_value.nbytes == 8 * 8 * 9 // 2
    assert {n.outputs[0].dtype for n in result.graph if n.op_type == "QuantizeLinear"} == {ir.DataType.UINT16}
    assert result.ir_version == 10


def test_4_bit_weights_stay_out_of_the_lowest_integer() -> None:
    result, _ = quantized(raised(LAYERS["conv"]()), weight_bits=4)
    integers = constant(result.graph.initializers["w_quantized"])
    assert integers is not None
    assert integers.astype(int).min() >= -7
    assert integers.astype(int).max() <= 7


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation_bits": 16}, "opset 17: 16-bit activations need opset 21"),
        ({"weight_bits": 4}, "opset 17: 4-bit weights need opset 21"),
    ],
)
def test_opset_without_the_width_is_said_at_every_layer(options: dict[str, int], reason: str) -> None:
    model = residual()
    result, remarks = quantized(model, **options)
    assert [r.message for r in remarks if r.kind == "missed"] == [reason] * 4
    assert ops(result) == ops(model)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), WIDTHS)
def test_target_without_the_opset_gets_operators_of_onnxruntime(weight_bits: int, activation_bits: int) -> None:
    model = residual()
    result, _ = quantized(model, target=npu(), weight_bits=weight_bits, activation_bits=activation_bits)
    assert result.opset_imports[""] == 17
    assert result.opset_imports["com.microsoft"] == 1
    domains = {
        (constant(n.inputs[0]).dtype.name if n.inputs[0].is_initializer() else "computed", n.domain)
        for n in result.graph
        if n.op_type == "DequantizeLinear"
    }
    wide = "com.microsoft" if activation_bits == 16 else ""
    narrow = ("int4", "com.microsoft") if weight_bits == 4 else ("int8", "")
    assert domains == {("computed", wide), narrow, ("int32", "")}
    for optimize in (False, True):
        assert sqnr(model, result, optimize=optimize) > (13 if weight_bits == 4 else 35)


def test_target_without_the_width_is_an_error() -> None:
    base = load_target("cortex-a53")
    target = npu(weights={"int8": base.weights["int8"]}, activations={"int8": base.activations["int8"]})
    for options, what in ({"weight_bits": 4}, "4-bit weights"), ({"activation_bits": 16}, "16-bit activations"):
        with pytest.raises(InputError) as error:
            quantized(LAYERS["conv"](), target=target, **options)
        assert str(error.value) == f"target 'cortex-a53' takes no {what}; choose another precision"


# blocks


@pytest.mark.parametrize("name", ["gemm", "gemm transposed", "gemm alpha beta", "matmul", "matmul with bias"])
@pytest.mark.parametrize("size", [4, 6, 64])
def test_blocks_share_a_scale_along_the_summed_axis(name: str, size: int) -> None:
    model = raised(LAYERS[name]())
    result, _ = quantized(model, target=blocks(size), weight_bits=4, activation_bits=16)
    node = find(result, "Gemm" if "gemm" in name or "bias" in name else "MatMul")
    dq = node.inputs[1].producer()
    axis = dq.attributes["axis"].as_int()
    assert dq.attributes["block_size"].as_int() == size
    stored, scales = (constant(value) for value in dq.inputs[:2])
    assert stored is not None
    assert scales is not None
    assert stored.shape[axis] == 16
    assert scales.shape[axis] == -(-16 // size)
    assert scales.shape[1 - axis] == 5
    for optimize in (False, True):
        assert sqnr(model, result, optimize=optimize) > 16


def test_bias_of_a_layer_with_blocks_stays_float() -> None:
    result, remarks = quantized(raised(LAYERS["gemm alpha beta"]()), target=blocks(4), weight_bits=4)
    bias = find(result, "Gemm").inputs[2]
    assert bias.dtype == ir.DataType.FLOAT
    assert constant(bias).shape == (5,)
    assert not [r for r in remarks if "both forms" in r.message]


def test_convolutions_keep_one_scale_per_channel_where_the_format_says_block() -> None:
    result, _ = quantized(raised(LAYERS["conv"]()), target=blocks(4), weight_bits=4)
    assert constant(result.graph.initializers["w_scale"]).shape == (8,)


def test_runtime_without_dequantized_blocks_gets_one_scale_per_channel() -> None:
    result, _ = quantized(raised(LAYERS["gemm"]()), target=blocks(4, operators=("QDQ",)), weight_bits=4)
    assert constant(result.graph.initializers["w_scale"]).shape == (5,)


def test_block_size_is_an_option() -> None:
    model = raised(LAYERS["gemm"]())
    for target, size, shape in (
        (None, 4, (4, 5)),
        (None, None, (5,)),
        (blocks(8), 8, (2, 5)),
        (blocks(8), None, (2, 5)),
        (blocks(8), 0, (5,)),
    ):
        result, _ = quantized(model, target=target, weight_bits=4, block_size=size)
        assert constant(result.graph.initializers["w_scale"]).shape == shape
    with pytest.raises(InputError) as error:
        quantized(model, target=blocks(8), weight_bits=4, block_size=5)
    assert str(error.value) == "target 'cortex-a53' takes no blocks of 5 weights; it takes 8"
    result, remarks = quantized(LAYERS["gemm"](), block_size=4)
    assert missed(remarks) == {"Gemm": "opset 17: one scale per block needs opset 21"}


def test_smaller_blocks_are_closer() -> None:
    model = build(
        "(float[4,128] x) => (float[4,16] y) { y = MatMul (x, w) }",
        NEW,
        w=random(128, 16) * np.logspace(-1, 1, 128, dtype=np.float32).reshape(128, 1),
    )
    coarse, fine = (
        sqnr(model, quantized(model, target=blocks(size), weight_bits=4, activation_bits=16)[0]) for size in (64, 8)
    )
    assert fine > coarse + 1


# embeddings


@pytest.mark.parametrize("form", ["y = Gemm <transB=1> (h, table)", "y = Gemm <transB=1> (h, w)"])
def test_embeddings_keep_8_bits(form: str) -> None:
    model = build(
        f"(int64[1,9] ids) => (float[9,50] y) {{ e = Gather (table, ids)  h = Reshape (e, flat)  {form} }}",
        NEW,
        table=random(50, 16),
        flat=np.array([9, 16]),
        **({} if "table" in form else {"w": random(50, 16, seed=4)}),
    )
    result, _ = quantized(model, TOKENS, weight_bits=4)
    kinds = {name: v.dtype for name, v in result.graph.initializers.items() if v.const_value.size == 800}
    tied = {"table_quantized": ir.DataType.INT8}
    assert kinds == (tied if "table" in form else {**tied, "w_quantized": ir.DataType.INT4})
    assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS)).sqnr_db > (30 if "table" in form else 14)


# kernels


def test_deployed_kernels_are_float_where_onnxruntime_has_no_integer_ones() -> None:
    for weight_bits, activation_bits in WIDTHS:
        kernels = set(
            deployed(quantized(raised(residual()), weight_bits=weight_bits, activation_bits=activation_bits)[0])
        )
        assert not kernels & INTEGER_KERNELS
        assert kernels & FLOAT_KERNELS


def test_bias_that_would_overflow_at_16_bits_widens_the_scale() -> None:
    model = build(
        "(float[1,3,9,9] x) => (float[1,8,9,9] y) { y = Conv <pads=[1,1,1,1]> (x, w, b) }",
        NEW,
        w=random(8, 3, 3, 3) * np.float32(1e-6),
        b=np.full(8, 30, np.float32),
    )
    result, remarks = quantized(model, activation_bits=16)
    said = next(r.message for r in remarks if r.kind == "applied")
    assert said == "216 weights in 8 bits with 8 scales, 8 of them widened so that the bias fits"
    assert abs(constant(result.graph.initializers["b_quantized"]).astype(np.int64)).max() <= 2**30
    assert missed(remarks) == {}
