"""What of a model is in the precision asked for: every form in which weights are stored, and why others were left."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from optkit.cost.summary import cost_summary
from optkit.evaluate.assess import Assessment
from optkit.graph import names
from optkit.pipeline import Remark
from optkit.precision import Precision
from optkit.quant.palette import Palette, write_palette
from optkit.report.contents import Coverage, Left
from optkit.report.coverage import coverage, stored_weights
from optkit.report.summary import Gates, check_gates
from optkit.target import load_target
from quantizing import build, random

CONTRIB = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
ONE, ZERO = np.array(0.1, np.float32), np.array(128, np.uint8)
SCALES: dict[str, Any] = {"s": ONE, "z": ZERO, "ws": np.full(8, 0.1, np.float32), "wz": np.zeros(8, np.int8)}


def int8(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)


def held(model: ir.Model) -> dict[str, tuple[int, int]]:
    """Return elements and bits of every weight."""
    return {weight.name: (weight.elements, weight.bits) for weight in stored_weights(model)}


def readers(model: ir.Model) -> dict[str, list[str]]:
    return {weight.name: [node.op_type for node in weight.readers] for weight in stored_weights(model)}


FORMS: list[tuple[str, str, dict[str, Any], dict[str, tuple[int, int]]]] = [
    (
        "float, the bias no weight",
        "(float[1,4,5,5] x) => (y) { y = Conv(x, w, b) }",
        {"w": random(8, 4, 3, 3), "b": random(8)},
        {"w": (288, 32)},
    ),
    (
        "quantize / dequantize pairs",
        """(float[1,4,5,5] x) => (y) {
            q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
            v = DequantizeLinear<axis = 0>(w, ws, wz)  c = DequantizeLinear<axis = 0>(b, ws)  y = Conv(d, v, c) }""",
        {**SCALES, "w": int8(8, 4, 3, 3), "b": np.arange(8, dtype=np.int32)},
        {"w": (288, 8)},
    ),
    (
        "a float that is only rounded at run time",
        """(float[2,4] x) => (y) {
            q = QuantizeLinear(w, s, zz)  d = DequantizeLinear(q, s, zz)  y = MatMul(x, d) }""",
        {"s": ONE, "zz": np.array(0, np.int8), "w": random(4, 8)},
        {"w": (32, 32)},
    ),
    (
        "integer operators",
        "(uint8[1,4,5,5] x) => (y) { y = QLinearConv(x, s, z, w, ws, wz, s, z, b) }",
        {**SCALES, "w": int8(8, 4, 3, 3), "b": np.arange(8, dtype=np.int32)},
        {"w": (288, 8)},
    ),
    (
        "integer products",
        """(uint8[2,4] x) => (y, u) { y = MatMulInteger(x, w, z)  u = QLinearMatMul(x, s, z, v, s, zz, s, z) }""",
        {"s": ONE, "z": ZERO, "zz": np.array(0, np.int8), "w": int8(4, 8), "v": int8(4, 2)},
        {"w": (32, 8), "v": (8, 8)},
    ),
    (
        "activations quantized at run time",
        "(float[2,4] x) => (y) { y = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz, b) }",
        {"ws": SCALES["ws"], "wz": SCALES["wz"], "w": int8(4, 8), "b": random(8)},
        {"w": (32, 8)},
    ),
    (
        "blocks filled up",
        """(float[2,40] x) => (y) {
            y = com.microsoft.MatMulNBits<K = 40, N = 6, bits = 4, block_size = 32>(x, w, sc, zp) }""",
        {"w": np.zeros((6, 2, 16), np.uint8), "sc": random(6, 2), "zp": np.zeros((6, 1), np.uint8)},
        {"w": (240, 4)},
    ),
    (
        "two bits",
        "(float[2,32] x) => (y) { y = com.microsoft.MatMulNBits<K = 32, N = 6, bits = 2, block_size = 32>(x, w, sc) }",
        {"w": np.zeros((6, 1, 8), np.uint8), "sc": random(6, 1)},
        {"w": (192, 2)},
    ),
    (
        "a packed table",
        """(int64[3] i) => (y) {
            y = com.microsoft.GatherBlockQuantized<bits = 4, block_size = 32, quantize_axis = 1>(w, i, sc) }""",
        {"w": np.zeros((10, 32), np.uint8), "sc": random(10, 2)},
        {"w": (640, 4)},
    ),
    (
        "a packed table that a product shares",
        """(int64[3] i, float[2,40] x) => (u, y) {
            y = com.microsoft.MatMulNBits<K = 40, N = 6, bits = 4, block_size = 32>(x, w, sc)
            r = Reshape(w, to)
            u = com.microsoft.GatherBlockQuantized<bits = 4, block_size = 32, quantize_axis = 1>(r, i, sc) }""",
        {"w": np.zeros((6, 2, 16), np.uint8), "sc": random(6, 2), "to": np.array([6, 32])},
        {"w": (240, 4)},
    ),
    (
        "one scale per block",
        "(float[2,40] x) => (y) { v = DequantizeLinear<axis = 0, block_size = 32>(w, sc)  y = MatMul(x, v) }",
        {"w": int8(40, 6).astype(ml_dtypes.int4), "sc": random(2, 6)},
        {"w": (240, 4)},
    ),
    (
        "a table in 8 bits",
        "(int64[3] i) => (y) { g = Gather(w, i)  y = DequantizeLinear(g, s) }",
        {"w": int8(10, 16), "s": ONE},
        {"w": (160, 8)},
    ),
    (
        "stored in half precision",
        "(float[2,4] x) => (y) { v = Cast<to = 1>(w)  t = Transpose(v)  y = MatMul(x, t) }",
        {"w": random(8, 4).astype(np.float16)},
        {"w": (32, 16)},
    ),
    (
        "tied: one table for lookup and product",
        "(int64[3] i, float[2,4] x) => (g, y) { g = Gather(w, i)  t = Transpose(w)  y = MatMul(x, t) }",
        {"w": random(8, 4)},
        {"w": (32, 32)},
    ),
    (
        "tied, in both forms",
        """(int64[3] i, float[2,4] x) => (g, y) {
            g = Gather(w, i)  d = DequantizeLinear(q, s)  t = Transpose(d)  y = MatMul(x, t) }""",
        {"w": random(8, 4), "q": int8(8, 4), "s": ONE},
        {"w": (32, 32), "q": (32, 8)},
    ),
    (
        "a vector counts where it is multiplied, a scalar and a mask of truth values never",
        """(float[2,4] x, float[2,4] u) => (y, v, c) {
            y = MatMul(x, w)  v = Mul(x, g)  k = Mul(x, one)  c = Where(m, k, u) }""",
        {"w": random(4), "g": random(4), "one": np.ones((1, 1), np.float32), "m": np.ones((2, 4), np.bool_)},
        {"w": (4, 32)},
    ),
    (
        "recurrences, their biases no weights",
        "(float[3,1,4] x) => (y) { y = LSTM<hidden_size = 2>(x, w, r, b) }",
        {"w": random(1, 8, 4), "r": random(1, 8, 2), "b": random(1, 16)},
        {"w": (32, 32), "r": (16, 32)},
    ),
    (
        "inside a body",
        """(bool c, float[2,4] x) => (y) {
            y = If (c) <then_branch = t () => (a) { a = MatMul(x, w) },
                else_branch = e () => (b) { b = Identity(x) }> }""",
        {"w": random(4, 4)},
        {"w": (16, 32)},
    ),
]


@pytest.mark.parametrize(("text", "constants", "expected"), [case[1:] for case in FORMS], ids=[c[0] for c in FORMS])
def test_weights_are_found_in_every_form(
    text: str, constants: dict[str, np.ndarray], expected: dict[str, tuple[int, int]]
) -> None:
    assert held(build(text, CONTRIB, **constants)) == expected


@pytest.mark.parametrize("channels", [0, 2])
def test_indices_into_palettes_are_weights_and_the_palettes_are_not(channels: int) -> None:
    model = build("(float[2,4] x) => (y) { y = MatMul(x, w) }", CONTRIB, w=random(4, 8))
    luts = math.ceil(8 / channels) if channels else 1
    palette = Palette(random(luts, 8), np.zeros((4, 8), np.uint8), 3, 1, channels)
    value = write_palette(model.graph[0], "w", palette, 21, names(model))
    product = next(node for node in model.graph if node.op_type == "MatMul")
    product.replace_input_with(1, value)
    model.graph.initializers.pop("w")
    assert list(held(model).values()) == [(32, 3)]
    assert list(readers(model).values()) == [["MatMul"]]


def test_a_tensor_under_two_names_counts_once() -> None:
    model = build(
        "(float[2,4] x) => (y, u) { y = MatMul(x, w)  u = MatMul(x, v) }", CONTRIB, w=random(4, 4), v=random(4, 4)
    )
    model.graph.initializers["v"].const_value = model.graph.initializers["w"].const_value
    assert held(model) == {"w": (16, 32)}
    assert readers(model) == {"w": ["MatMul", "MatMul"]}


def test_a_weight_that_is_an_output_is_one() -> None:
    model = build("(float[2,4] x) => (y, v) { y = Relu(x)  v = MatMul(x, w) }", CONTRIB, w=random(4, 4))
    model.graph.outputs[1] = model.graph.initializers["w"]
    model.graph.remove(next(node for node in model.graph if node.op_type == "MatMul"), safe=True)
    assert held(model) == {"w": (16, 32)}


TWO = """(float[2,40] x, float[6,3] u) => (y) {
    a = com.microsoft.MatMulNBits<K = 40, N = 6, bits = 4, block_size = 32>(x, w, sc)
    b = MatMul(a, v)
    c = MatMul(b, u)
    y = Add(c, p) }"""


def two() -> ir.Model:
    """240 weights in 4 bits, 36 in float, a product of activations, and a position table."""
    return build(TWO, CONTRIB, w=np.zeros((6, 2, 16), np.uint8), sc=random(6, 2), v=random(6, 6), p=random(2, 3))


def covered(model: ir.Model, precision: str, *remarks: Remark) -> Coverage:
    cost = cost_summary(model, load_target("cortex-a53"))
    return coverage(model, cost, Precision.parse(precision), remarks, ["quantize"])


def gates_of(model: ir.Model, found: Coverage) -> list[str]:
    """Return the limits that nobody set and that are held against a model all the same."""
    cost = cost_summary(model, load_target("cortex-a53"))
    return [gate.name for gate in check_gates(Gates(), 1, cost, Assessment((), (), ()), found)]


def test_shares_of_weights_and_products() -> None:
    found = covered(two(), "w4a16")
    assert found.elements_by_bits == {4: 240, 32: 42}
    assert found.weights == 240 / 282
    assert found.macs == pytest.approx(480 / (480 + 72 + 36))
    assert found.left == (
        Left("read by MatMul, left in float32", 144, 72, 1, ("MatMul_0",)),
        Left("read by Add, left in float32", 24, 0, 1, ("Add_1",)),
        Left("a product of two activations: it has no weights", 0, 36, 1, ("MatMul_1",)),
    )


def test_more_bits_than_asked_for_do_not_count_and_fewer_do() -> None:
    assert covered(two(), "w2a16").weights == 0
    assert covered(two(), "w8a16").weights == 240 / 282
    assert covered(two(), "fp32").weights == 1
    assert covered(two(), "fp32").left == ()


def test_products_count_by_their_arithmetic_where_activations_are_narrow() -> None:
    assert covered(two(), "w4a8").macs == 0  # level 0: products in float32
    assert covered(two(), "fp16").macs == 0
    dynamic = build(FORMS[5][1], CONTRIB, **FORMS[5][2])
    assert covered(dynamic, "w8a8") == Coverage(1.0, 1.0, {8: 32}, ())


def test_reasons_are_those_of_the_passes() -> None:
    said = Remark("missed", "quantize", "MatMul_0", "MatMul", "its columns are masked")
    other = Remark("missed", "prune", "Add_1", "Add", "no matter")
    done = Remark("applied", "quantize", "Add_1", "Add", "no refusal")
    reasons = {left.reason: (left.weight_bytes, left.macs) for left in covered(two(), "w4a16", said, other, done).left}
    assert reasons["its columns are masked"] == (144, 72)
    assert reasons["read by Add, left in float32"] == (24, 0)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("2-bit weights need opset 25; stored in 8 bits", "2-bit weights need opset 25; stored in 8 bits"),
        ("rounded to nearest: nothing was observed", "read by MatMulNBits, left in 4 bits"),
    ],
)
def test_why_integers_have_more_bits_than_asked_for(said: str, reason: str) -> None:
    remark = Remark("missed", "quantize", "MatMulNBits_0", "MatMulNBits", said)
    left = covered(two(), "w2a16", remark).left
    assert [entry.weight_bytes for entry in left if entry.reason == reason] == [960]


def test_reasons_that_differ_in_numbers_are_one() -> None:
    remarks = [
        Remark("missed", "quantize", name, op, f"'{name}' has {count} elements")
        for name, op, count in (("MatMul_0", "MatMul", 36), ("Add_1", "Add", 6))
    ]
    first, *_ = covered(two(), "w4a16", *remarks).left
    assert (first.reason, first.weight_bytes, first.count) == ("… has … elements", 168, 2)


def test_a_model_without_weights_is_covered() -> None:
    found = covered(build("(float[2,4] x) => (y) { y = Relu(x) }"), "w8a8")
    assert found == Coverage(1.0, 1.0, {}, ())


def test_tables_of_8_bits_are_told_apart_and_satisfy_the_limit() -> None:
    model = build(
        """(int64[1,3] i, float[6,32] x) => (float[1,3,32] y, float[6,6] z) { y = com.microsoft.GatherBlockQuantized
            <bits = 8, block_size = 32, quantize_axis = 1>(t, i, st)
            z = com.microsoft.MatMulNBits<K = 32, N = 6, bits = 4, block_size = 16>(x, w, sw) }""",
        CONTRIB,
        t=np.zeros((60, 32), np.uint8),
        st=random(60, 1),
        w=np.zeros((6, 2, 8), np.uint8),
        sw=random(6, 2),
    )
    found = covered(model, "w4a16")
    assert (found.weights, found.tables) == (192 / 2112, 1920 / 2112)
    assert found.left[0].weight_bytes == 4 * 1920
    assert gates_of(model, found) == []
    assert covered(model, "w8a16").tables == 0
    other = covered(two(), "w2a16")  # a product's weights in 4 bits are no table
    assert other.tables == 0
    assert gates_of(two(), other) == ["coverage"]
