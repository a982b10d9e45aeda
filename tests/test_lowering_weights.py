"""Compressed weights and quantized activations in Core ML's own forms, beside onnxruntime."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from lowering_runs import check, executed, integers, numbers, operations, text
from optkit.errors import InputError
from optkit.graph import names
from optkit.quant.palette import Palette, write_palette
from optkit_targets.coreml.lowering.forms import dtype
from optkit_targets.coreml.lowering.weights import pack
from optkit_targets.coreml.program import lower

LINEAR, BLOCKS, LUT = "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"
BODIES = {
    "MatMul": ("y = MatMul(x, w)", (2, 6, 8), (8, 4)),
    "Gemm": ("y = Gemm<transB = 1>(x, w)", (6, 8), (4, 8)),
    "Conv": ("y = Conv(x, w)", (1, 8, 5, 5), (4, 8, 3, 3)),
    "ConvTranspose": ("y = ConvTranspose<strides = [2, 2]>(x, w)", (1, 8, 5, 5), (8, 4, 3, 3)),
}


def scales(*shape: int) -> np.ndarray:
    return numbers(*shape, seed=5, low=0.01, high=0.1)


def quantized(kind: str, axis: int | None, *ops: str, block: int = 0, points: bool = False):
    """Return a model of some operators, all by default, whose weights are expanded from integers."""
    low, high = {"int8": (-128, 128), "uint8": (0, 256), "int4": (-8, 8), "uint4": (0, 16)}[kind]
    stored = getattr(ml_dtypes, kind) if kind.endswith("int4") else kind
    settings = f"<axis = {axis or 0}{f', block_size = {block}' if block else ''}>"
    nodes, inputs, fixed = [], {}, {}
    for op in ops or BODIES:
        body, shape, weight = BODIES[op]
        parts = [-(-size // block) if block and place == axis else size for place, size in enumerate(weight)]
        sizes = () if axis is None else tuple(parts) if block else (weight[axis],)
        own = {f"q{op}": integers(*weight, low=low, high=high, kind=stored), f"s{op}": scales(*sizes)}
        own |= {f"z{op}": integers(*sizes, seed=7, low=max(low, -5), high=6, kind=stored)} if points else {}
        nodes += [f"w{op} = DequantizeLinear{settings}({', '.join(own)})", named(body, op)]
        inputs, fixed = inputs | {f"x{op}": numbers(*shape)}, fixed | own
    return text("\n".join(nodes), inputs, ", ".join(f"float y{op}" for op in ops or BODIES), fixed), inputs


def named(body: str, op: str) -> str:
    """Return a node with its operator in the names of its values."""
    return re.sub(r"\b([xyw])\b", rf"\g<1>{op}", body)


@pytest.mark.parametrize(("axis", "points"), [(None, False), (0, True), (1, False), (1, True)])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_weights_of_8_bits(kind, axis, points):
    model, inputs = quantized(kind, axis, points=points)
    check(model, inputs, deployments=(16, 18), rtol=1e-4, atol=1e-4)
    assert operations(model, 16).count(LINEAR) >= len(BODIES)


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 0), (0, 4), (1, 2), (1, 3)])
@pytest.mark.parametrize("kind", ["int4", "uint4", "int8"])
def test_weights_of_4_bits_and_in_blocks(kind, axis, block):
    model, inputs = quantized(kind, axis, block=block, points=kind != "int8")
    check(model, inputs, rtol=1e-4, atol=1e-4)


def test_4_bits_are_stored_as_4_bits_and_transposed_as_they_are_stored():
    model, _ = quantized("int4", 0, "MatMul", block=4, points=True)
    found = lower(model, 18).functions["main"]
    expanded = next(each for each in found.operations if each.op_type == BLOCKS and each.outputs[0].child_ops)
    assert dtype(expanded.data) == "int4"
    assert expanded.data.shape == (4, 8)
    assert expanded.scale.shape == expanded.offset.shape == (4, 2)
    assert "transpose" not in operations(model)


def test_a_short_last_block_shares_its_scale_with_smaller_blocks():
    inputs = {"x": numbers(3, 40)}
    fixed = {"q": integers(40, 4, low=-8, high=8, kind=ml_dtypes.int4), "s": scales(3, 4)}
    model = text("w = DequantizeLinear<axis = 0, block_size = 16>(q, s)\ny = MatMul(x, w)", inputs, "float y", fixed)
    check(model, inputs, rtol=1e-4, atol=1e-5)
    assert BLOCKS in operations(model)


def test_what_a_deployment_target_lacks_is_refused_by_name():
    with pytest.raises(InputError, match="a weight of 8 bits needs the deployment target iOS 16, this one is iOS 15"):
        lower(quantized("int8", 0, "MatMul")[0], 15)
    with pytest.raises(InputError, match="a weight of 4 bits needs the deployment target iOS 18"):
        lower(quantized("int4", 0, "MatMul")[0], 17)
    with pytest.raises(InputError, match="a weight of 8 bits in blocks needs the deployment target iOS 18"):
        lower(quantized("int8", 0, "MatMul", block=2)[0], 17)


def test_vectors_and_wide_integers_are_expanded():
    inputs = {"x": numbers(2, 3, 4, 4)}
    fixed = {"q": integers(3, kind="int32"), "s": np.float32(0.5), "w": numbers(3, 3, 1, 1)}
    model = text("b = DequantizeLinear(q, s)\ny = Conv(x, w, b)", inputs, "float y", fixed)
    check(model, inputs, deployments=(15, 18))
    assert operations(model) == ["conv"]


def test_a_tied_weight_has_one_copy():
    inputs = {"i": integers(5, low=0, high=12)}
    fixed = {"q": integers(12, 8, low=-128, high=128, kind="int8"), "s": scales(12)}
    body = """
        w = DequantizeLinear<axis = 0>(q, s)
        x = Gather(w, i)
        t = Transpose<perm = [1, 0]>(w)
        y = MatMul(x, t)
    """
    model = text(body, inputs, "float y", fixed)
    check(model, inputs, rtol=1e-4, atol=1e-5)
    assert operations(model).count(LINEAR) == 1


def test_a_tied_table_of_integers_is_transposed_as_it_is_stored():
    fixed = {"w": integers(12, 8, kind="int8"), "s": np.float32(0.05), "i": np.array([3, 1], np.int64)}
    body = """g = Gather(w, i)  e = DequantizeLinear(g, s)  t = Transpose<perm = [1, 0]>(w)
        d = DequantizeLinear(t, s)  m = MatMul(x, d)  h = ReduceSum<keepdims = 0>(e)  y = Add(m, h)"""
    model = text(body, {"x": numbers(2, 8)}, "float[2,12] y", fixed)
    check(model, {"x": numbers(2, 8)})


def test_alpha_stays_outside_of_a_compressed_weight():
    inputs, fixed = {"x": numbers(3, 8)}, {"q": integers(8, 4, kind="int8"), "s": scales(4), "c": numbers(4, seed=3)}
    body = "w = DequantizeLinear<axis = 1>(q, s)\ny = Gemm<alpha = 0.5, beta = 2.0>(x, w, c)"
    check(text(body, inputs, "float y", fixed), inputs, rtol=1e-4, atol=1e-5)


def palettized(bits: int, *ops: str, axis: int = 0, channels: int = 0):
    """Return a model of some operators, all by default, whose weights are expanded from LUTs."""
    chosen = ops or tuple(BODIES)
    inputs = {f"x{op}": numbers(*BODIES[op][1]) for op in chosen}
    weights = {f"w{op}": numbers(*BODIES[op][2]) for op in chosen}
    body = "\n".join(named(BODIES[op][0], op) for op in chosen)
    model = text(body, inputs | weights, ", ".join(f"float y{op}" for op in chosen))
    for name, weight in weights.items():
        blocks = -(-weight.shape[axis] // channels) if channels else 1
        lut = numbers(blocks, 1 << bits, seed=3)
        indices = integers(*weight.shape, low=0, high=1 << bits, kind="uint8")
        palette = Palette(lut, indices, bits, axis if blocks > 1 else 0, channels if blocks > 1 else 0)
        value = next(value for value in model.graph.inputs if value.name == name)
        value.replace_all_uses_with(write_palette(model.graph[0], f"{name}0", palette, 21, names(model)))
        model.graph.inputs.remove(value)
    return model, inputs


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_one_lut(bits):
    model, inputs = palettized(bits)
    check(model, inputs, deployments=(16, 18), rtol=1e-4, atol=1e-4)
    assert set(operations(model)) - {"linear", "conv", "conv_transpose"} == {LUT}


@pytest.mark.parametrize(("axis", "channels"), [(0, 2), (0, 3), (1, 2), (1, 1)])
def test_several_luts(axis, channels):
    model, inputs = palettized(4, axis=axis, channels=channels)
    check(model, inputs, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="a weight with several LUTs needs the deployment target iOS 18"):
        lower(model, 17)


def test_palettes_need_ios_16():
    with pytest.raises(InputError, match="a palettized weight needs the deployment target iOS 16"):
        lower(palettized(4, "MatMul")[0], 15)


def test_compressed_weights_in_half_precision():
    for model, inputs in (quantized("int8", 0), quantized("int4", 1, block=2), palettized(4, channels=2)):
        full, half = executed(model, inputs), executed(model, inputs, half=True)
        for name, array in full.items():
            np.testing.assert_allclose(half[name], array, rtol=1e-2, atol=3e-2)


def test_indices_are_packed_from_the_lowest_bit():
    assert pack(np.array([1, 2, 3, 0, 1], np.uint8), 2).tolist() == [0b00111001, 0b01]
    assert pack(np.array([5, 7, 1], np.uint8), 3).tolist() == [0b01111101, 0b0]


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("axis", [None, 1, -2])
def test_quantized_activations(kind, axis):
    inputs = {"x": numbers(2, 3, 4, 5)}
    size = () if axis is None else (inputs["x"].shape[axis],)
    low = -20 if kind == "int8" else 100
    fixed = {"s": scales(*size), "z": integers(*size, low=low, high=low + 30, kind=kind)}
    settings = "" if axis is None else f"<axis = {axis}>"
    body = f"q = QuantizeLinear{settings}(x, s, z)\ny = DequantizeLinear{settings}(q, s, z)"
    model = text(body, inputs, "float y", fixed)
    check(model, inputs, deployments=(17, 18))
    assert operations(model) == ["quantize", "dequantize"]


def test_quantized_activations_that_something_else_reads():
    inputs, fixed = {"x": numbers(2, 3, 4)}, {"s": np.float32(0.02)}
    body = "q = QuantizeLinear(x, s)\nf = Flatten(q)\ny = DequantizeLinear(f, s)"
    check(text(body, inputs, "float y", fixed), inputs)
    check(text("q = QuantizeLinear<output_dtype = 3>(x, s)", inputs, "int8 q", fixed), inputs)


def test_integers_are_dequantized_on_every_deployment_target():
    inputs = {"q": integers(2, 3, 4, low=0, high=256, kind="uint8")}
    fixed = {"s": scales(3), "z": integers(3, low=0, high=9, kind="uint8")}
    check(text("y = DequantizeLinear(q, s, z)", inputs, "float y", fixed), inputs, deployments=(15, 18))


@pytest.mark.parametrize(
    ("kind", "deployment", "reason"),
    [
        ("uint8", 16, "a quantized activation needs the deployment target iOS 17"),
        ("int16", 18, "MIL quantizes activations to INT8 and UINT8, not to INT16"),
    ],
)
def test_activations_that_cannot_be_quantized(kind, deployment, reason):
    inputs, fixed = {"x": numbers(2, 3)}, {"s": np.float32(0.1), "z": np.zeros((), kind)}
    model = text("q = QuantizeLinear(x, s, z)\ny = DequantizeLinear(q, s, z)", inputs, "float y", fixed)
    with pytest.raises(InputError, match=reason):
        lower(model, deployment)


def test_scales_that_are_computed_or_stand_for_blocks_are_refused():
    inputs, fixed = {"x": numbers(4, 6), "s": scales(1)}, {"s": scales(2, 6)}
    model = text("q = QuantizeLinear(x, s)\ny = DequantizeLinear(q, s)", inputs, "float y")
    with pytest.raises(InputError, match="its scale or zero point is computed at run time"):
        lower(model, 18)
    body = "q = QuantizeLinear<axis = 0, block_size = 2>(x, s)\ny = Cast<to = 1>(q)"
    with pytest.raises(InputError, match="MIL has no activations quantized in blocks"):
        lower(text(body, {"x": inputs["x"]}, "float y", fixed), 18)


def test_marks_without_a_palette_are_refused():
    model, _ = palettized(4, "MatMul")
    gather = next(node for node in model.graph if node.op_type == "Gather")
    gather.replace_input_with(0, next(iter(model.graph.inputs)))
    with pytest.raises(InputError, match="its indices and LUTs are not as a palette has them"):
        lower(model, 18)
    assert isinstance(model, ir.Model)
