"""From graphs to descriptions of work: fused operators, quantized ones, control flow, real models."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.cost.roofline import Work, macs_by_dtype
from optkit.cost.shapes import with_shapes
from optkit.cost.work import bytes_by_dtype, describe
from optkit.model.loading import load, load_text, weight_bytes
from work_models import HEAD, QDQ


def test_an_activation_runs_inside_the_product_before_it() -> None:
    body = "{ a = MatMul(x, w) b = Relu(a) y = Exp(b) }"
    model = load_text(f"{HEAD} g (float[1,2] x) => (float[1,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {body}")
    product, exp = describe(model)
    assert [product.op_type, exp.op_type] == ["MatMul", "Exp"]
    assert product.covers == ("MatMul_0", "Relu_0")
    assert product.note == "Relu runs inside"


def test_an_activation_of_a_value_used_twice_runs_alone() -> None:
    body = "{ a = MatMul(x, w) b = Relu(a) y = Add(a, b) }"
    model = load_text(f"{HEAD} g (float[1,2] x) => (float[1,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {body}")
    assert [work.op_type for work in describe(model)] == ["MatMul", "Relu", "Add"]


def test_tied_weights_are_stored_once_and_read_twice() -> None:
    body = "{ a = MatMul(x, w) y = MatMul(a, w) }"
    model = load_text(f"{HEAD} g (float[1,2] x) => (float[1,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {body}")
    first, second = describe(model)
    assert (first.weight_bytes, second.weight_bytes) == (16, 0)
    assert (first.read_bytes, second.read_bytes) == (16, 16)


def test_operators_between_quantize_and_dequantize_run_in_bytes() -> None:
    works = describe(load_text(QDQ))
    assert [(w.op_type, w.dtype, w.input_bytes, w.output_bytes) for w in works] == [
        ("QuantizeLinear", "float32", 8, 2),
        ("MatMul", "int8", 2, 2),
        ("Add", "int8", 4, 2),
        ("DequantizeLinear", "float32", 2, 8),
    ]
    assert works[1].macs == 4
    assert sum(work.weight_bytes for work in works) == weight_bytes(load_text(QDQ))
    assert macs_by_dtype(works) == {"int8": 4}


def test_a_float_use_of_a_quantized_value_leaves_its_operator_in_float() -> None:
    works = describe(load_text(QDQ.replace("r = Add(bf, xf)", "e = Exp(xf) r = Add(bf, e)")))
    by_type = {work.op_type: work for work in works}
    assert (by_type["MatMul"].dtype, by_type["MatMul"].input_bytes) == ("int8", 2)  # it still reads the bytes
    assert by_type["Add"].dtype == "float32"
    assert [work.op_type for work in works].count("DequantizeLinear") == 3  # of x, of b, and of the result


def test_weights_unpacked_on_the_fly_compute_in_float() -> None:
    text = f"""
{HEAD}
g (float[1,2] x) => (float[1,2] y) <float s = {{0.1}}, int8 z = {{0}}, int8[2,2] wq = {{1, 2, 3, 4}}>
{{ w = DequantizeLinear(wq, s, z) y = MatMul(x, w) }}
"""
    (work,) = describe(load_text(text))
    assert (work.dtype, work.weight_bytes, work.note) == ("float32", 4 + 4 + 1, "weights are unpacked on the fly")


def loop(limit: str, condition: str = "Identity(c)") -> list[Work]:
    text = f"""
{HEAD}
g (float[4] x, int64 trips) => (float[4] y) <int64 five = {{5}}, bool on = {{1}}>
{{
  y = Loop ({limit}, on, x) <body = b (int64 i, bool c, float[4] v) => (bool d, float[4] w) {{
    w = Exp(v) d = {condition} }}>
}}
"""
    return describe(load_text(text))


def test_a_loop_counts_as_often_as_it_runs() -> None:
    own, exp, _ = loop("five")
    assert (own.note, exp.count) == ("the body runs 5 times", 5)


@pytest.mark.parametrize(("limit", "condition"), [("trips", "Identity(c)"), ("five", "Not(c)")])
def test_a_loop_of_unknown_length_counts_once_and_says_so(limit: str, condition: str) -> None:
    own, exp, _ = loop(limit, condition)
    assert (own.note, exp.count) == ("the number of runs is not known: counted once", 1)


def test_a_scan_counts_its_sequence() -> None:
    text = f"""
{HEAD}
g (float[4] s, float[7,4] xs) => (float[4] last, float[7,4] ys)
{{
  last, ys = Scan (s, xs) <num_scan_inputs: int = 1, body = b (float[4] a, float[4] x) => (float[4] n, float[4] y) {{
    n = Add(a, x) y = Identity(n) }}>
}}
"""
    assert [(work.op_type, work.count) for work in describe(load_text(text))] == [
        ("Scan", 1),
        ("Add", 7),
        ("Identity", 7),
    ]


def test_the_branch_with_the_most_work_counts() -> None:
    text = f"""
{HEAD}
g (bool c, float[1,2] x) => (float[1,2] y) <float[2,2] w = {{1, 2, 3, 4}}, float[1,2] v = {{1, 2}}>
{{
  y = If (c) <then_branch = t () => (float[1,2] t0) {{ t0 = Add(x, v) }},
              else_branch = e () => (float[1,2] e0) {{ e0 = MatMul(x, w) }}>
}}
"""
    own, product = describe(load_text(text))
    assert (product.op_type, product.macs) == ("MatMul", 4)
    assert (own.note, own.weight_bytes, own.read_bytes) == ("the branch with the most work is counted", 8, 0)


def test_batch_is_counted() -> None:
    model = load_text(
        f"{HEAD} g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {{ y = MatMul(x, w) }}"
    )
    (one,), (eight,) = describe(model, {"x": (1, 2)}), describe(model, {"x": (8, 2)})
    assert (eight.macs, eight.activation_bytes) == (8 * one.macs, 8 * one.activation_bytes)
    assert eight.weight_bytes == one.weight_bytes


def test_bytes_by_dtype_counts_a_tied_tensor_once() -> None:
    assert bytes_by_dtype(load_text(QDQ)) == {"float32": 4, "int8": 5}


def mobilenet_v1_macs(width: float) -> int:
    """The table of the paper (arXiv:1704.04861, table 1) at 224 x 224 and 1000 classes."""
    channels = [int(width * c) for c in (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)]
    size, total = 112, 112**2 * 27 * channels[0]
    for index, (before, after) in enumerate(pairwise(channels)):
        size //= 2 if index in (1, 3, 5, 11) else 1
        total += size**2 * before * (9 + after)
    return total + channels[-1] * 1000


@pytest.mark.parametrize(
    ("path", "shapes", "macs", "tolerance"),
    [
        ("mobilenet_v1_075/mobilenet_v1_075.onnx", {"input": (1, 3, 224, 224)}, mobilenet_v1_macs(0.75), 0),
        # published: 0.35 G, 40.8 M and 125 M
        ("squeezenet1_1/squeezenet1_1.onnx", {}, 349e6, 0.01),
        ("squeezenet1_1/squeezenet1_1_fp16_original.onnx", {}, 349e6, 0.01),
        ("resnet20_cifar10/resnet20_cifar10.onnx", {"input": (1, 3, 32, 32)}, 40.8e6, 0.01),
        ("resnet56_cifar10/resnet56_cifar10.onnx", {"input": (1, 3, 32, 32)}, 125e6, 0.01),
        ("ad_autoencoder/ad_autoencoder.onnx", {"input": (1, 640)}, 2 * 640 * 128 + 6 * 128**2 + 2 * 128 * 8, 0),
        # 4 layers of d = 144: 12 d^2 of weights each, the attention's two products, and the table of 65 characters
        (
            "relu_lm/relu_lm.onnx",
            {"input_ids": (1, 128)},
            4 * (128 * 12 * 144**2 + 2 * 128 * 128 * 144) + 128 * 144 * 65,
            0,
        ),
        ("stories260k/stories260k.onnx", {"input_ids": (1, 64)}, None, 0),
        ("ultraface_rfb320/ultraface_rfb320.onnx", {}, None, 0),
        ("magika_v3_3/magika_v3_3.onnx", {"bytes": (1, 2048)}, None, 0),
    ],
)
def test_real_models(
    shared: Path, path: str, shapes: dict[str, tuple[int, ...]], macs: float | None, tolerance: float
) -> None:
    model = load(shared / "data" / path)
    works = describe(model, shapes)
    assert not [work for work in works if work.unpriced]
    if macs is not None:
        assert sum(work.macs for work in works) == pytest.approx(macs, rel=tolerance, abs=0)
    used = {id(v.const_value): v.const_value.nbytes for n in model.graph for v in n.inputs if v and v.const_value}
    assert sum(work.weight_bytes for work in works) == sum(used.values())


def test_three_exports_of_one_model_agree_whatever_their_control_flow(shared: Path) -> None:
    sample = {
        "input": np.zeros((1, 576), np.float32),
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000),
    }
    totals = set()
    for name in ("silero_vad", "silero_vad_half", "silero_vad_op18_ifless"):
        model = load(shared / "data" / "silero_vad" / f"{name}.onnx")
        inputs = {value.name: sample[value.name] for value in model.graph.inputs if value.name in sample}
        works = describe(model, sample=inputs)
        assert not [work for work in works if work.unpriced]
        totals.add(sum(work.macs for work in works))
    assert totals == {679_552}


def test_shapes_do_not_change_the_model(shared: Path) -> None:
    model = load(shared / "data" / "silero_vad" / "silero_vad.onnx")
    before = ir.to_onnx_text(model, exclude_initializers=True)
    with_shapes(model, {"input": (1, 576), "state": (2, 1, 128)})
    assert ir.to_onnx_text(model, exclude_initializers=True) == before
