"""Lifetimes and the arena plan."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.cost.memory import ALIGNMENT, Arena, Lifetime, plan, plan_memory
from optkit.model.loading import load, load_text

tensors = st.builds(
    lambda size, first, length: Lifetime("t", size * ALIGNMENT, first, first + length),
    st.integers(1, 40),
    st.integers(0, 12),
    st.integers(0, 8),
)


@given(st.lists(tensors, max_size=25))
def test_no_two_live_tensors_overlap(items: list[Lifetime]) -> None:
    offsets = plan(items)
    assert all(offset % ALIGNMENT == 0 and offset >= 0 for offset in offsets)
    for (a, at), (b, other) in combinations(zip(items, offsets, strict=True), 2):
        if a.overlaps(b):
            assert at + a.size_bytes <= other or other + b.size_bytes <= at


@given(st.lists(tensors, min_size=1, max_size=25))
def test_the_plan_needs_no_less_than_what_lives_at_once_and_no_more_than_everything(items: list[Lifetime]) -> None:
    peak = max(offset + t.size_bytes for offset, t in zip(plan(items), items, strict=True))
    most = max(sum(t.size_bytes for t in items if t.first <= step <= t.last) for step in range(21))
    assert most <= peak <= sum(t.size_bytes for t in items)


def test_the_smallest_gap_that_fits_is_taken() -> None:
    items = [
        Lifetime("wall0", 640, 0, 9), Lifetime("wide", 512, 0, 3), Lifetime("wall1", 448, 0, 9),
        Lifetime("narrow", 192, 0, 3), Lifetime("wall2", 192, 0, 9), Lifetime("late", 128, 5, 9),
    ]  # fmt: skip
    offsets = dict(zip((item.name for item in items), plan(items), strict=True))
    assert offsets["late"] == offsets["narrow"]


HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def sizes(arena: Arena) -> dict[str, tuple[int, int, int]]:
    return {t.name: (t.size_bytes, t.first, t.last) for t in arena.tensors}


def test_a_chain_holds_two_tensors_at_a_time() -> None:
    model = load_text(f"{HEAD} g (float[64] x) => (float[64] d) {{ a = Exp(x) b = Exp(a) c = Exp(b) d = Exp(c) }}")
    arena = plan_memory(model)
    assert arena.peak_bytes == arena.bound_bytes == 2 * 256
    assert sizes(arena) == {
        "x": (256, -1, 0), "a": (256, 0, 1), "b": (256, 1, 2), "c": (256, 2, 3), "d": (256, 3, 4),
    }  # fmt: skip


def test_a_residual_keeps_its_input_alive() -> None:
    model = load_text(f"{HEAD} g (float[64] x) => (float[64] d) {{ a = Exp(x) b = Exp(a) d = Add(b, x) }}")
    assert plan_memory(model).peak_bytes == 3 * 256


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    model = load_text(f"{HEAD} g (float[1] x) => (float[1] y) {{ y = Exp(x) }}")
    assert plan_memory(model).peak_bytes == 2 * ALIGNMENT


def test_a_reshape_shares_its_input() -> None:
    signature = "g (float[64] x) => (float[8,8] y) <int64[2] s = {8, 8}>"
    arena = plan_memory(load_text(HEAD + signature + "{ a = Exp(x) b = Reshape(a, s) y = Exp(b) }"))
    assert "b" not in sizes(arena)
    assert sizes(arena)["a"] == (256, 0, 2)


def test_an_activation_behind_a_product_shares_its_output() -> None:
    signature = "g (float[1,2] x) => (float[1,2] y) <float[2,2] w = {1, 2, 3, 4}>"
    arena = plan_memory(load_text(HEAD + signature + "{ a = MatMul(x, w) y = Relu(a) }"))
    assert set(sizes(arena)) == {"x", "y"}


QDQ = f"""
{HEAD}
g (float[1,64] x) => (float[1,64] y)
<float s = {{0.1}}, int8 z = {{0}}>
{{
  xq = QuantizeLinear(x, s, z)
  xf = DequantizeLinear(xq, s, z)
  a = Exp(xf)
  aq = QuantizeLinear(a, s, z)
  af = DequantizeLinear(aq, s, z)
  b = Add(af, xf)
  bq = QuantizeLinear(b, s, z)
  y = DequantizeLinear(bq, s, z)
}}
"""


def test_between_quantized_operators_tensors_are_bytes() -> None:
    assert sizes(plan_memory(load_text(QDQ))) == {
        "x": (256, -1, 0), "xq": (64, 0, 5), "aq": (64, 2, 5), "bq": (64, 5, 7), "y": (256, 7, 8),
    }  # fmt: skip


IF = f"""
{HEAD}
g (bool c, float[64] x) => (float[64] y)
{{
  y = If (c) <
    then_branch = t () => (float[64] t2) {{ t0 = Exp(x) t1 = Exp(t0) t2 = Add(t0, t1) }},
    else_branch = e () => (float[64] e0) {{ e0 = Exp(x) }}
  >
}}
"""


def test_a_body_is_one_block_as_large_as_its_larger_branch() -> None:
    arena = plan_memory(load_text(IF))
    (body,) = [tensor for tensor in arena.tensors if tensor.name.endswith("(body)")]
    assert body.size_bytes == 3 * 256
    assert sizes(arena)["x"][2] == 0  # the body reads it
    assert arena.peak_bytes == 5 * 256 + 64  # x, y and the condition besides


def test_a_tensor_of_unknown_size_is_named() -> None:
    model = load_text(f"{HEAD} g (float[N] x) => (float[N] y) {{ y = Exp(x) }}")
    assert plan_memory(model).unknown == ("x", "y")
    assert plan_memory(model, shapes={"x": (16,)}).unknown == ()


@pytest.mark.parametrize(
    ("path", "shape", "tensors_at_peak"),
    [("resnet20_cifar10/resnet20_cifar10.onnx", (1, 3, 32, 32), 3 * 16 * 32 * 32)],
)
def test_real_models(shared: Path, path: str, shape: tuple[int, ...], tensors_at_peak: int) -> None:
    arena = plan_memory(load(shared / "data" / path), shapes={"input": shape})
    assert arena.peak_bytes == arena.bound_bytes == 4 * tensors_at_peak  # a block's input, and two tensors in it
