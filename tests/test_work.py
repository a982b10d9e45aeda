"""From single nodes to descriptions of work, against counts worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from optkit.cost.arithmetic import TRANSCENDENTAL
from optkit.cost.roofline import Work
from optkit.cost.work import describe
from optkit.errors import InputError
from optkit.model.loading import load_text
from work_models import HEAD


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
            values[-1].type = ir.TensorType(tensor.dtype)
        else:
            values.append(ir.Value(name=f"x{index}", shape=ir.Shape(item), type=ir.TensorType(dtype)))
    shapes = [output] if not output or isinstance(output[0], int) else list(output)
    node = ir.node(op_type, values, attributes, domain=domain, num_outputs=len(shapes), name="node")
    for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
        value.name, value.shape, value.type = f"y{index}", ir.Shape(shape), ir.TensorType(dtype)
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
