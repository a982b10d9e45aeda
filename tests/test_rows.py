"""A layer's weight as one matrix, and the rows of its input that the matrix multiplies: products are its outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.session import Session
from optkit_passes.quantization._layers import Layer, describe
from optkit_passes.quantization._rows import MatrixLayer, matrix_layer
from quantizing import build, find, random

ALL = 1 << 20


def layer_of(model: ir.Model, op_type: str) -> Layer:
    layer = describe(find(model, op_type))
    assert isinstance(layer, Layer)
    return layer


def form_of(model: ir.Model, op_type: str) -> MatrixLayer:
    layer = layer_of(model, op_type)
    assert layer.stored is not None
    form = matrix_layer(layer, tuple(layer.stored.shape.numpy()))
    assert isinstance(form, MatrixLayer)
    return form


def attributes(**values: Any) -> str:
    """Return attributes in ONNX text."""
    given = {k: f'"{v}"' if isinstance(v, str) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return "<" + ", ".join(f"{key} = {value}" for key, value in given.items()) + ">" if given else ""


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[ir.Model, np.ndarray]:
    """A convolution over 1 to 3 spatial axes, and an input that it fits on."""
    axes = draw(st.integers(1, 3))
    kernel, strides, dilations = (
        tuple(draw(st.lists(st.integers(1, most), min_size=axes, max_size=axes))) for most in (3, 3, 2)
    )
    auto_pad = draw(st.sampled_from(["", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto_pad.startswith("SAME"):  # onnxruntime refuses SAME with dilations
        dilations = (1,) * axes
    options: dict[str, Any] = {"strides": strides, "dilations": dilations} if draw(st.booleans()) else {}
    if not options:
        strides = dilations = (1,) * axes
    pads = tuple(draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes)))
    if auto_pad:
        options["auto_pad"] = auto_pad
    if auto_pad in ("", "NOTSET") and draw(st.booleans()):
        options["pads"] = pads
    if draw(st.booleans()):
        options["kernel_shape"] = kernel
    sizes = [(k - 1) * d + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilations, strict=True)]
    batch, channels, outputs, groups = (draw(st.integers(1, 3)) for _ in range(4))
    if groups > 1:
        options["group"] = groups
    shape = ",".join(map(str, (batch, groups * channels, *sizes)))
    dims = ",".join(["n", "m", "d", "h", "w"][: 2 + axes])
    model = build(
        f"(float[{shape}] x) => (float[{dims}] y) {{ y = Conv {attributes(**options)} (x, w) }}",
        w=random(groups * outputs, channels, *kernel),
    )
    return model, random(batch, groups * channels, *sizes, seed=5)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_rows_times_matrix_are_the_outputs_of_a_convolution(case: tuple[ir.Model, np.ndarray]) -> None:
    model, x = case
    form, weight = form_of(model, "Conv"), model.graph.initializers["w"].const_value.numpy()
    output = Session(model).run({"x": x})["y"]
    rows = form.rows(x, ALL)
    expected = np.moveaxis(output, 1, -1).reshape(-1, output.shape[1])
    own = rows.reshape(len(rows), form.groups, form.columns).swapaxes(0, 1)  # [G, T, K]
    matrix = form.matrix(weight).reshape(form.groups, -1, form.columns)
    products = (own @ matrix.swapaxes(1, 2)).swapaxes(0, 1).reshape(expected.shape)
    np.testing.assert_allclose(products, expected, rtol=1e-4, atol=1e-5)
    assert rows.dtype == np.float32


PRODUCTS = {
    "gemm": ("(float[4,6] x) => (float[4,5] y) { y = Gemm (x, w) }", (6, 5)),
    "gemm transA": ("(float[6,4] x) => (float[4,5] y) { y = Gemm <transA=1> (x, w) }", (6, 5)),
    "gemm transB": ("(float[4,6] x) => (float[4,5] y) { y = Gemm <transB=1> (x, w) }", (5, 6)),
    "gemm transA transB": ("(float[6,4] x) => (float[4,5] y) { y = Gemm <transA=1, transB=1> (x, w) }", (5, 6)),
    "matmul": ("(float[4,6] x) => (float[4,5] y) { y = MatMul (x, w) }", (6, 5)),
    "matmul of a vector": ("(float[6] x) => (float[5] y) { y = MatMul (x, w) }", (6, 5)),
    "matmul of three axes": ("(float[2,3,6] x) => (float[2,3,5] y) { y = MatMul (x, w) }", (6, 5)),
    "matmul of a tied table": (
        "(float[2,3,6] x) => (float[2,3,5] y) { t = Transpose <perm=[1,0]> (w) y = MatMul (x, t) }",
        (5, 6),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_times_matrix_are_the_outputs_of_a_product(name: str) -> None:
    text, shape = PRODUCTS[name]
    model = build(text, w=random(*shape))
    form = form_of(model, "Gemm" if "gemm" in name else "MatMul")
    x = random(*model.graph.inputs[0].shape.numpy(), seed=5)
    weight = model.graph.initializers["w"].const_value.numpy()
    output = Session(model).run({"x": x})["y"]
    np.testing.assert_allclose(form.rows(x, ALL) @ form.matrix(weight).T, output.reshape(-1, 5), rtol=1e-4, atol=1e-5)
    assert form.columns == 6
    assert form.matrix(weight).shape == (5, 6)
    np.testing.assert_array_equal(form.restore(form.matrix(weight)), weight)


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 2, 3)])
def test_a_convolutions_matrix_is_restored(kernel: tuple[int, ...]) -> None:
    weight = random(5, 4, *kernel)
    dims = ",".join(["9"] * len(kernel))
    model = build(f"(float[1,4,{dims}] x) => (float[n,m,{dims.replace('9', 'a')}] y) {{ y = Conv (x, w) }}", w=weight)
    form = form_of(model, "Conv")
    assert form.matrix(weight).shape == (5, form.columns)
    np.testing.assert_array_equal(form.restore(form.matrix(weight)), weight)


@given(st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_most_bounds_the_rows_and_spreads_them(most: int) -> None:
    conv = form_of(build("(float[2,3,9,9] x) => (float[2,8,7,7] y) { y = Conv (x, w) }", w=random(8, 3, 3, 3)), "Conv")
    gemm = form_of(build("(float[N,6] x) => (float[N,5] y) { y = Gemm (x, w) }", w=random(6, 5)), "Gemm")
    for form, x in ((conv, random(2, 3, 9, 9)), (gemm, random(98, 6))):
        every, rows = form.rows(x, ALL), form.rows(x, most)
        assert len(every) == 98
        assert min(most, 98) / 2 <= len(rows) <= most
        found = [int(np.flatnonzero((every == row).all(axis=1))[0]) for row in rows]
        assert found == sorted(set(found))  # in their order, none twice
        assert found[0] <= 98 / most
        assert found[-1] >= 97 - 98 / most
        assert len(form.rows(x, most, turn=1)) <= most


@pytest.mark.parametrize("shape", [(0, 3, 9, 9), (1, 3, 2, 9), (2, 3, 2, 2)])
def test_an_input_without_positions_has_no_rows(shape: tuple[int, ...]) -> None:
    conv = form_of(build("(float[N,3,H,W] x) => (float[N,8,h,w] y) { y = Conv (x, w) }", w=random(8, 3, 3, 3)), "Conv")
    assert conv.rows(np.ones(shape, np.float32), 10).shape == (0, 27)


def test_a_product_without_tokens_has_no_rows() -> None:
    gemm = form_of(build("(float[N,6] x) => (float[N,5] y) { y = Gemm (x, w) }", w=random(6, 5)), "Gemm")
    assert gemm.rows(np.empty((0, 6), np.float32), 10).shape == (0, 6)


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("y = ConvTranspose (x, w)", (4, 6, 1, 1), "an input of a transposed convolution adds to many outputs"),
        (
            "y = ConvTranspose <group=2> (x, w)",
            (4, 3, 1, 1),
            "an input of a transposed convolution adds to many outputs",
        ),
        ("y = MatMul (x, w)", (4, 7, 5), "its weights are no matrix"),
    ],
)
def test_layers_that_are_no_matrix_say_why(text: str, shape: tuple[int, ...], reason: str) -> None:
    model = build(f"(float[2,4,7,7] x) => (float[a,b,c,d] y) {{ {text} }}", w=random(*shape))
    node = next(iter(model.graph))
    assert matrix_layer(layer_of(model, node.op_type), shape) == reason
