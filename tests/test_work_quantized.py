"""The work of quantized forms: what is stored, what is read, in which arithmetic; constants expanded at load."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.cost.memory import plan_memory
from optkit.cost.roofline import Work
from optkit.cost.summary import cost_summary
from optkit.cost.work import describe
from optkit.graph import names
from optkit.quant.palette import Palette, write_palette
from optkit.target import load_target
from quantizing import build, random

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
SCALES = {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8), "n": np.array(0, np.int8)}
NBITS = "K = 40, N = 6, bits = 4, block_size = 32"


def int8(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int8)


def only(model: ir.Model) -> Work:
    (work,) = describe(model)
    assert not work.unpriced
    return work


@pytest.mark.parametrize(("level", "dtype"), [(0, "float32"), (4, "int8")])
def test_products_of_packed_blocks(level: int, dtype: str) -> None:
    text = f"(float[2,40] x) => (y) {{ y = com.microsoft.MatMulNBits<{NBITS}, accuracy_level = {level}>(x, w, s, z) }}"
    constants = {"w": np.zeros((6, 2, 16), np.uint8), "s": random(6, 2), "z": np.zeros((6, 1), np.uint8)}
    work = only(build(text, HEAD, **constants))
    assert (work.kind, work.macs, work.dtype) == ("gemm", 2 * 40 * 6, dtype)
    assert work.weight_bytes == work.read_bytes == 192 + 48 + 6
    assert (work.input_bytes, work.output_bytes) == (320, 48)


def test_products_whose_activations_are_quantized_at_run_time() -> None:
    text = "(float[2,4] x) => (y) { y = com.microsoft.DynamicQuantizeMatMul(x, w, s) }"
    work = only(build(text, HEAD, w=int8(4, 8), s=random(8)))
    assert (work.macs, work.dtype, work.weight_bytes) == (64, "int8", 32 + 32)


def test_a_packed_table_costs_its_rows() -> None:
    text = """(int64[3] i) => (y) {
        y = com.microsoft.GatherBlockQuantized<bits = 4, block_size = 32, quantize_axis = 1>(w, i, s) }"""
    work = only(build(text, HEAD, w=np.zeros((1000, 32), np.uint8), s=random(1000, 2)))
    assert (work.weight_bytes, work.output_bytes) == (32_000 + 8000, 3 * 64 * 4)
    assert work.read_bytes == 2 * work.output_bytes


DYNAMIC = """(float[2,4] x) => (y) {
    q, s, z = DynamicQuantizeLinear(x)
    p = MatMulInteger(q, w, z)
    f = Cast<to = 1>(p)
    y = Mul(f, s) }"""


@pytest.mark.parametrize(
    ("text", "constants", "integers"),
    [
        (DYNAMIC, {"w": int8(4, 8)}, 64),
        (
            "(uint8[1,4,5,5] x) => (y) { y = QLinearConv(x, s, z, w, s, n, s, z) }",
            {
                "s": np.array(0.1, np.float32),
                "z": np.array(0, np.uint8),
                "n": np.array(0, np.int8),
                "w": int8(8, 4, 3, 3),
            },
            8 * 9 * 36,
        ),
        (
            "(uint8[2,4] x) => (y) { y = com.microsoft.QGemm(x, s, z, w, s, n) }",
            {**SCALES, "w": int8(4, 8)},
            64,
        ),
        (
            "(uint8[2,4] x) => (y) { y = com.microsoft.MatMulIntegerToFloat(x, w, s, s, z, n) }",
            {**SCALES, "w": int8(4, 8)},
            64,
        ),
    ],
)
def test_integer_operators_are_priced_as_integers(text: str, constants: dict[str, np.ndarray], integers: int) -> None:
    summary = cost_summary(build(text, HEAD, **constants), load_target("cortex-a53"))
    assert not summary.unpriced
    assert summary.int8_macs == summary.macs == integers
    assert summary.seconds > 0


def test_half_precision_storage_is_expanded_when_the_model_is_loaded() -> None:
    model = build(
        "(float[2,4] x) => (y) { v = Cast<to = 1>(w)  t = Transpose(v)  y = MatMul(x, t) }",
        HEAD,
        w=random(8, 4).astype(np.float16),
    )
    work = only(model)
    assert (work.op_type, work.macs, work.dtype) == ("MatMul", 64, "float32")
    assert (work.weight_bytes, work.read_bytes, work.input_bytes) == (64, 128, 32)
    assert work.note == "constants are expanded when the model is loaded"
    assert {tensor.name for tensor in plan_memory(model).tensors} == {"x", "y", "t"}


def test_palettes_are_expanded_when_the_model_is_loaded() -> None:
    model = build("(float[2,4] x) => (y) { y = MatMul(x, w) }", HEAD, w=random(4, 8))
    value = write_palette(model.graph[0], "w", Palette(random(1, 16), np.zeros((4, 8), np.uint8), 4), 21, names(model))
    next(node for node in model.graph if node.op_type == "MatMul").replace_input_with(1, value)
    model.graph.initializers.pop("w")
    work = only(model)
    assert (work.weight_bytes, work.read_bytes) == (16 + 64, 128)  # indices of 4 bits and the palette; floats


def test_what_is_expanded_for_a_body_or_a_caller_is_priced_where_it_stands() -> None:
    seen = build(
        "(float[2,4] x) => (y, v) { v = Cast<to = 1>(w)  y = MatMul(x, v) }", HEAD, w=np.ones((4, 4), np.float16)
    )
    assert [work.op_type for work in describe(seen)] == ["Cast", "MatMul"]


def test_expanded_constants_that_two_nodes_share_are_stored_once() -> None:
    model = build(
        "(float[2,4] x) => (y, u) { v = Cast<to = 1>(w)  y = MatMul(x, v)  u = MatMul(x, v) }",
        HEAD,
        w=np.ones((4, 4), np.float16),
    )
    first, second = describe(model)
    assert (first.weight_bytes, second.weight_bytes) == (32, 0)
    assert first.read_bytes == second.read_bytes == 64


def test_what_is_random_is_drawn_in_every_run() -> None:
    model = build(
        "(float[2,4] x) => (y) { r = RandomNormalLike(w)  y = Add(x, r) }", HEAD, w=np.ones((2, 4), np.float32)
    )
    assert [work.op_type for work in describe(model)] == ["RandomNormalLike", "Add"]
