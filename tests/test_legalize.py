"""Properties of the legalization passes: random forms keep their outputs, transposes never grow."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.dataset.samples import random_samples
from optkit.model.loading import load_text
from optkit.session import Session
from optkit_targets.legalize.reduce_rank import merged
from pass_runs import create, messages, run
from transformer_models import Builder

FLOAT = ir.DataType.FLOAT


@given(st.permutations(range(6)), st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_a_transpose_of_fewer_axes_moves_the_same_elements(perm: list[int], shape: list[int]) -> None:
    fewer, order = merged(shape, perm)
    x = np.arange(prod(shape)).reshape(shape)
    assert len(fewer) <= sum(size != 1 for size in shape)
    assert np.array_equal(x.reshape(fewer).transpose(order).ravel(), x.transpose(perm).ravel())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["AveragePool", "MaxPool"]),
    st.integers(5, 12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 1),
    st.integers(0, 1),
)
def test_pools_in_ceil_mode_keep_their_outputs(
    op_type: str, size: int, kernel: int, stride: int, pad: int, counted: int
) -> None:
    if pad >= kernel:
        return
    b = Builder(17)
    x = b.input("x", FLOAT, (1, 2, size, size))
    settings_ = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "ceil_mode": 1}
    y = b.add(op_type, x, **settings_, **({"count_include_pad": counted} if op_type == "AveragePool" else {}))
    b.output(y, "y")
    model = b.model()
    context = run(model, create("lower-pools"))
    assert len(context.remarks) == 1
    left = any("ceil_mode" in node.attributes for node in model.graph)
    assert left == (context.remarks[0].kind == "missed")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"]),
    st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_nearest_resizes_keep_their_outputs(coordinates: str, rounding: str, height: int, h: int, w: int) -> None:
    b = Builder(17)
    x = b.input("x", FLOAT, (1, 2, height, 4))
    node = ir.node(
        "Resize",
        [x, None, None, b.constant([1, 2, h, w])],
        {"mode": "nearest", "coordinate_transformation_mode": coordinates, "nearest_mode": rounding},
        name="resize",
    )
    b.graph.append(node)
    b.output(node.outputs[0], "y")
    run(b.model(), create("lower-resizes"))


def transposed_bytes(model: ir.Model) -> int:
    nodes = [node for node in model.graph if node.op_type == "Transpose"]
    return sum(prod(int(dim) for dim in node.outputs[0].shape or ()) for node in nodes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sinking_transposes_keeps_the_outputs_and_never_transposes_more(data: st.DataObject) -> None:
    b = Builder(17)
    values = [b.input(name, FLOAT, (2, 3, 4)) for name in ("p", "q")]
    shapes = dict.fromkeys(values, (2, 3, 4))
    for _ in range(data.draw(st.integers(2, 9))):
        x = data.draw(st.sampled_from(values))
        shape = shapes[x]
        kind = data.draw(
            st.sampled_from(["transpose", "transpose", "unary", "binary", "bias", "reduce", "concat", "split"])
        )
        axis = data.draw(st.integers(0, 2))
        if kind == "transpose":
            perm = list(data.draw(st.permutations(range(3))))
            new, shape = b.add("Transpose", x, perm=perm), tuple(shape[i] for i in perm)
        elif kind == "binary":
            same = [value for value in values if shapes[value] == shape]
            new = b.add("Add", x, data.draw(st.sampled_from(same)))
        elif kind == "bias":
            new = b.add("Mul", x, b.weight(shape[-1]))
        elif kind == "reduce":
            new = b.add("ReduceMax", x, axes=[axis])
            shape = tuple(1 if i == axis else dim for i, dim in enumerate(shape))
        elif kind == "concat":
            same = [value for value in values if shapes[value] == shape]
            new = b.add("Concat", x, data.draw(st.sampled_from(same)), axis=axis - 3)
            shape = tuple(2 * dim if i == axis else dim for i, dim in enumerate(shape))
        else:
            new = b.add("Relu" if kind == "unary" else "Identity", x)
        values.append(new)
        shapes[new] = shape
    b.output(values[-1], "y")
    if data.draw(st.booleans()) and len(values) > 4 and values[-2].producer() is not None:
        b.output(values[-2], "z")
    model = b.model()
    before = transposed_bytes(model)
    names = [value.name for value in model.graph.outputs]
    run(model, create("sink-transposes"))
    assert transposed_bytes(model) <= before
    assert [value.name for value in model.graph.outputs] == names


def test_a_pass_of_this_folder_leaves_custom_operators_and_overridable_constants_alone() -> None:
    model = load_text(
        '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>\n'
        "main (float[2] x, float[2] s) => (float[2] y) <float[2] s = {1,2}> { a = mine.Softsign (x) y = Mul (s, a) }"
    )
    for name in ("lower-operators", "order-operands", "sink-transposes", "reduce-rank"):
        assert messages(model, create(name), "applied") == []


@pytest.mark.parametrize("opset", [7, 11, 13, 18, 21, 23])
def test_reductions_are_lowered_in_every_opset(opset: int) -> None:
    b = Builder(opset)
    x = b.input("x", FLOAT, (2, 3, 4))
    y = b.add("ReduceL1", x, b.constant([-1])) if opset >= 18 else b.add("ReduceL1", x, axes=[2])
    b.output(y, "y")
    model = b.model()
    run(model, create("lower-operators"))
    sample = random_samples(model, 1)[0]
    assert np.allclose(Session(model).run(sample)["y"], np.abs(sample["x"]).sum(-1, keepdims=True))
