"""From graphs to descriptions of work, against counts worked out by hand and against published ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.cost.arithmetic import TRANSCENDENTAL
from optkit.cost.roofline import Work, macs_by_dtype
from optkit.cost.shapes import with_shapes
from optkit.cost.work import bytes_by_dtype, describe
from optkit.errors import InputError
from optkit.model.loading import load, load_text, weight_bytes

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def describe_node(
    op_type: str,
    inputs: Sequence[tuple[int, ...] | np.ndarray | None],
    output: tuple[int, ...] | Sequence[tuple[int, ...]],
    *,
    domain: str = "",
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: ir.TypingInt | object,
) -> Work:
    """Describe a graph of one node: arrays are constants, shapes are activations."""
    values: list[ir.Value | None] = []
    for index, item in enumerate(inputs):
        if item is None:
            values.append(None)
        elif isinstance(item, np.ndarray):
            tensor = ir.tensor(item, name=f"w{index}")
            values.append(ir.Value(name=f"w{index}", const_value=tensor, shape=ir.Shape(item.shape)))
            values[-1].type = ir.TensorType(tensor.dtype)  # type: ignore[union-attr]
        else:
            values.append(ir.Value(name=f"x{index}", shape=ir.Shape(item), type=ir.TensorType(dtype)))
    shapes = [output] if not output or isinstance(output[0], int) else list(output)
    node = ir.node(op_type, values, attributes, domain=domain, num_outputs=len(shapes), name="node")  # type: ignore[arg-type]
    for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
        value.name, value.shape, value.type = f"y{index}", ir.Shape(shape), ir.TensorType(dtype)  # type: ignore[arg-type]
    graph = ir.Graph(
        [value for value in values if value is not None and value.const_value is None],
        node.outputs,
        nodes=[node],
        initializers=[value for value in values if value is not None and value.const_value is not None],
        opset_imports={"": 21, "com.microsoft": 1},
        name="g",
    )
    (work,) = describe(ir.Model(graph, ir_version=10))
    return work


def weights(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("x", "w", "y", "attributes", "kind", "macs", "mnk"),
    [
        ((2, 3, 8, 8), (4, 3, 3, 3), (2, 4, 8, 8), {"pads": [1] * 4}, "conv3x3", 2 * 4 * 64 * 27, (128, 4, 27)),
        ((1, 3, 8, 8), (4, 3, 3, 3), (1, 4, 3, 3), {"strides": [2, 2]}, "conv", 4 * 9 * 27, (9, 4, 27)),
        ((1, 3, 8, 8), (4, 3, 1, 1), (1, 4, 8, 8), {}, "conv1x1", 4 * 64 * 3, (64, 4, 3)),
        ((1, 4, 8, 8), (8, 1, 3, 3), (1, 8, 6, 6), {"group": 4}, "depthwise", 8 * 36 * 9, (36, 2, 9)),
        ((1, 4, 8, 8), (6, 2, 3, 3), (1, 6, 6, 6), {"group": 2}, "grouped", 6 * 36 * 18, (36, 3, 18)),
        ((1, 3, 9), (5, 3, 4), (1, 5, 6), {}, "conv", 5 * 6 * 12, (6, 5, 12)),
        ((1, 2, 3, 4, 5), (2, 2, 2, 2, 2), (1, 2, 2, 3, 4), {}, "conv", 2 * 24 * 16, (24, 2, 16)),
    ],
)  # fmt: skip
def test_convolutions(
    x: tuple[int, ...],
    w: tuple[int, ...],
    y: tuple[int, ...],
    attributes: dict[str, object],
    kind: str,
    macs: int,
    mnk: tuple[int, int, int],
) -> None:
    work = describe_node("Conv", [x, weights(*w), weights(w[0])], y, **attributes)
    assert (work.kind, work.macs, (work.m, work.n, work.k)) == (kind, macs, mnk)
    assert work.weight_bytes == 4 * (int(np.prod(w)) + w[0])
    assert (work.input_bytes, work.output_bytes) == (4 * int(np.prod(x)), 4 * int(np.prod(y)))


def test_transposed_convolution_counts_its_inputs() -> None:
    work = describe_node("ConvTranspose", [(1, 4, 5, 5), weights(4, 3, 2, 2)], (1, 6, 10, 10), group=2, strides=[2, 2])
    assert work.macs == 4 * 25 * 3 * 4


@pytest.mark.parametrize(
    ("op_type", "inputs", "output", "attributes", "macs", "mnk"),
    [
        ("MatMul", [(5, 7), (7, 3)], (5, 3), {}, 105, (5, 3, 7)),
        ("MatMul", [(2, 4, 5, 7), (2, 4, 7, 3)], (2, 4, 5, 3), {}, 8 * 105, (5, 3, 7)),
        ("MatMul", [(2, 5, 7), (7, 3)], (2, 5, 3), {}, 210, (10, 3, 7)),
        ("MatMul", [(7,), (7, 3)], (3,), {}, 21, (1, 3, 7)),
        ("MatMul", [(5, 7), (7,)], (5,), {}, 35, (5, 1, 7)),
        ("Gemm", [(7, 5), (7, 3)], (5, 3), {"transA": 1}, 105, (5, 3, 7)),
        ("Gemm", [(5, 7), (3, 7), (3,)], (5, 3), {"transB": 1}, 105, (5, 3, 7)),
        ("Einsum", [(2, 3, 4), (2, 4, 5)], (2, 3, 5), {"equation": "bij,bjk->bik"}, 120, (None, None, None)),
        ("Einsum", [(6, 2, 3, 4), (4, 5)], (6, 2, 3, 5), {"equation": "...j, jk -> ...k"}, 720, (None, None, None)),
        ("Einsum", [(2, 3), (3, 4), (4, 5)], (2, 5), {"equation": "ij,jk,kl->il"}, 2 * 120, (None, None, None)),
    ],
)
def test_products(
    op_type: str,
    inputs: list[tuple[int, ...]],
    output: tuple[int, ...],
    attributes: dict[str, object],
    macs: int,
    mnk: tuple[int | None, ...],
) -> None:
    work = describe_node(op_type, inputs, output, **attributes)
    assert (work.kind, work.macs, (work.m, work.n, work.k)) == ("gemm", macs, mnk)


def test_products_of_integers_run_in_integers() -> None:
    x, w = np.zeros((1, 3, 8, 8), np.uint8), weights(4, 3, 3, 3, dtype=np.int8)
    scale, zero = np.float32(1), np.uint8(0)
    work = describe_node(
        "QLinearConv",
        [x.shape, np.array(scale), np.array(zero), w, np.array(scale), np.array(np.int8(0)), np.array(scale)],
        (1, 4, 6, 6),
        dtype=ir.DataType.UINT8,
    )
    assert (work.dtype, work.macs, work.input_bytes) == ("int8", 4 * 36 * 27, 192)
    integer = describe_node("MatMulInteger", [(5, 7), weights(7, 3, dtype=np.int8)], (5, 3), dtype=ir.DataType.INT8)
    assert (integer.dtype, integer.macs) == ("int8", 105)


def test_block_quantized_weights_count_as_they_are_stored() -> None:
    packed = np.zeros((16, 2, 16), np.uint8)
    work = describe_node(
        "MatMulNBits", [(1, 3, 64), packed, weights(32)], (1, 3, 16), domain="com.microsoft", K=64, N=16, bits=4
    )
    assert (work.macs, work.dtype, work.weight_bytes) == (3 * 16 * 64, "float32", 512 + 128)


def test_recurrent_cells_run_once_per_step() -> None:
    x, w, r = (6, 2, 3), weights(1, 20, 3), weights(1, 20, 5)
    work = describe_node("LSTM", [x, w, r], [(6, 1, 2, 5), (1, 2, 5)], hidden_size=5)
    assert (work.macs, work.operations) == (12 * (60 + 100), 12 * 20 * TRANSCENDENTAL)


def test_attention() -> None:
    heads = describe_node("Attention", [(2, 4, 6, 8), (2, 4, 9, 8), (2, 4, 9, 10)], (2, 4, 6, 10))
    assert heads.macs == 2 * 4 * 6 * 9 * (8 + 10)
    flat = describe_node(
        "MultiHeadAttention", [(1, 6, 32), (1, 9, 32), (1, 9, 32)], (1, 6, 32), domain="com.microsoft", num_heads=4
    )
    assert flat.macs == 6 * 9 * 64
    packed = describe_node(
        "Attention", [(1, 6, 32), weights(32, 96), weights(96)], (1, 6, 32), domain="com.microsoft", num_heads=4
    )
    assert packed.macs == 6 * 32 * 96 + 6 * 6 * 64


@pytest.mark.parametrize(
    ("op_type", "inputs", "output", "attributes", "kind", "operations"),
    [
        ("Relu", [(2, 3)], (2, 3), {}, "elementwise", 6),
        ("Sum", [(2, 3), (2, 3), (2, 3)], (2, 3), {}, "elementwise", 12),
        ("Tanh", [(2, 3)], (2, 3), {}, "elementwise", 6 * TRANSCENDENTAL),
        ("Transpose", [(2, 3)], (3, 2), {}, "movement", 0),
        ("Reshape", [(2, 3), np.array([6])], (6,), {}, "view", 0),
        ("ReduceSum", [(2, 3), np.array([1])], (2, 1), {}, "reduction", 6),
        ("ArgMax", [(2, 3)], (2, 1), {}, "reduction", 6),
        ("CumSum", [(2, 3), np.array(1)], (2, 3), {}, "reduction", 6),
        ("TopK", [(2, 30), np.array([3])], [(2, 3), (2, 3)], {}, "reduction", 60 * 2),
        ("MaxPool", [(1, 2, 4, 4)], (1, 2, 2, 2), {"kernel_shape": [3, 3]}, "pooling", 72),
        ("GlobalAveragePool", [(1, 2, 4, 4)], (1, 2, 1, 1), {}, "pooling", 32),
        ("Resize", [(1, 2, 4, 4)], (1, 2, 8, 8), {"mode": "linear"}, "elementwise", 128 * 4),
        ("Resize", [(1, 2, 4, 4)], (1, 2, 8, 8), {}, "movement", 0),
        ("LRN", [(1, 2, 4, 4)], (1, 2, 4, 4), {"size": 5}, "normalization", 32 * (5 + 2 * TRANSCENDENTAL)),
        ("LayerNormalization", [(2, 8), weights(8)], (2, 8), {}, "normalization", 96),
        ("DFT", [(1, 8, 1)], (1, 8, 2), {"axis": 1}, "reduction", 5 * 8 * 3),
    ],
)
def test_everything_else(
    op_type: str,
    inputs: list[tuple[int, ...] | np.ndarray],
    output: tuple[int, ...],
    attributes: dict[str, object],
    kind: str,
    operations: int,
) -> None:
    work = describe_node(op_type, inputs, output, **attributes)
    assert (work.kind, work.operations, work.macs, work.unpriced) == (kind, operations, 0, "")


def test_an_embedding_reads_its_rows_not_its_table() -> None:
    work = describe_node("Gather", [weights(1000, 8), np.array([1, 2])], (2, 8))
    assert work.weight_bytes == 32_000 + 16
    assert work.read_bytes == 2 * 64


@pytest.mark.parametrize("domain", ["", "my.domain"])
def test_an_unknown_operator_is_unpriced(domain: str) -> None:
    work = describe_node("NonMaxSuppression", [(1, 6, 4), (1, 1, 6)], (1, 3), domain=domain)
    assert work.unpriced == "no cost model for " + ("my.domain::" if domain else "") + "NonMaxSuppression"


def test_an_unknown_shape_is_unpriced_until_it_is_given() -> None:
    model = load_text(f"{HEAD} g (float[N, 4] x) => (float[N, 4] y) {{ y = Exp(x) }}")
    (open_,) = describe(model)
    assert open_.unpriced == "the shape or type of 'x' and 'y' is not known"
    (bound,) = describe(model, {"x": (3, 4)})
    assert (bound.operations, bound.unpriced) == (12 * TRANSCENDENTAL, "")
    assert model.graph.inputs[0].shape[0] != 3  # the model itself stays as it was


def test_a_shape_that_contradicts_the_model_is_refused() -> None:
    model = load_text(f"{HEAD} g (float[N, 4] x) => (float[N, 4] y) {{ y = Exp(x) }}")
    with pytest.raises(InputError, match=r"the input 'x' takes \[N, 4\], not \[3, 5\]"):
        describe(model, {"x": (3, 5)})
    with pytest.raises(InputError, match=r"the input 'x' takes \[N, 4\], not \[3\]"):
        describe(model, {"x": (3,)})


def test_a_shape_that_depends_on_values_is_learned_by_running_once() -> None:
    model = load_text(
        f"{HEAD} g (float[6] x) => (float[N] y) {{ m = Relu(x) i = NonZero(m) s = Squeeze(i) y = Gather(x, s) }}"
    )
    sample = {"x": np.array([1, -1, 2, -2, 3, -3], np.float32)}
    gather = describe(model, sample=sample)[-1]
    assert (gather.unpriced, gather.output_bytes) == ("", 12)


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


QDQ = f"""
{HEAD}
g (float[1,2] x) => (float[1,2] y)
<float s = {{0.1}}, int8 z = {{0}}, int8[2,2] wq = {{1, 2, 3, 4}}>
{{
  xq = QuantizeLinear(x, s, z)
  xf = DequantizeLinear(xq, s, z)
  wf = DequantizeLinear(wq, s, z)
  a = MatMul(xf, wf)
  b = Relu(a)
  bq = QuantizeLinear(b, s, z)
  bf = DequantizeLinear(bq, s, z)
  r = Add(bf, xf)
  rq = QuantizeLinear(r, s, z)
  y = DequantizeLinear(rq, s, z)
}}
"""


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
