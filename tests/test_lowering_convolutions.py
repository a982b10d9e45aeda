"""Convolutions and matrix products in Core ML's MIL, beside onnxruntime."""

from __future__ import annotations

import pytest

from lowering_runs import check, executed, integers, numbers, operations, text
from optkit.errors import InputError
from optkit_targets.coreml.program import lower

ENDS = (15, 18)  # the first and the last deployment target that have forms of their own


def conv(settings: str, x: tuple[int, ...], weight: tuple[int, ...], *, op: str = "Conv", bias: int = 0):
    inputs = {"x": numbers(*x)}
    fixed = {"w": numbers(*weight, seed=1)} | ({"b": numbers(bias, seed=2)} if bias else {})
    return text(f"y = {op}<{settings}>({', '.join(['x', *fixed])})", inputs, "float y", fixed), inputs


@pytest.mark.parametrize(
    ("settings", "x", "weight"),
    [
        ("pads = [2, 1]", (1, 3, 9), (4, 3, 3)),
        ("pads = [0, 1, 2, 1], strides = [2, 1]", (2, 3, 9, 8), (4, 3, 3, 2)),
        ("group = 3, dilations = [2, 2]", (1, 6, 9, 8), (9, 2, 3, 2)),
        ('auto_pad = "SAME_UPPER", strides = [2, 2]', (1, 2, 9, 8), (4, 2, 4, 3)),
        ('auto_pad = "SAME_LOWER", strides = [2, 2]', (1, 2, 9, 8), (4, 2, 4, 3)),
        ('auto_pad = "VALID"', (1, 2, 9, 8), (4, 2, 4, 3)),
        ("pads = [1, 0, 1, 0, 1, 1]", (1, 2, 4, 5, 6), (3, 2, 2, 3, 2)),
    ],
)
def test_convolutions(settings, x, weight):
    check(*conv(settings, x, weight, bias=weight[0]), deployments=ENDS)
    assert operations(conv(settings, x, weight)[0]) == ["conv"]


def test_a_convolution_with_computed_weight_and_bias():
    inputs = {"x": numbers(1, 3, 6, 6), "w": numbers(4, 3, 3, 3, seed=1), "b": numbers(4, seed=2)}
    check(text("y = Conv(x, w, b)", inputs, "float y"), inputs, deployments=ENDS)
    with pytest.raises(InputError, match="MIL dilates constant ones alone"):
        executed(text("y = Conv<dilations = [2, 2]>(x, w, b)", inputs, "float y"), inputs)


@pytest.mark.parametrize(
    ("settings", "x", "weight"),
    [
        ("strides = [2]", (1, 3, 5), (3, 4, 3)),
        ("strides = [2, 2], pads = [1, 1, 1, 1]", (2, 3, 4, 5), (3, 2, 3, 3)),
        ("strides = [2, 3], pads = [1, 1, 1, 1], output_padding = [1, 1]", (2, 3, 4, 5), (3, 2, 3, 3)),
        ("strides = [3, 3], output_padding = [2, 1]", (1, 3, 4, 5), (3, 2, 2, 2)),
        ("strides = [2, 2], pads = [0, 1, 2, 0], dilations = [2, 1]", (1, 3, 4, 5), (3, 2, 3, 3)),
        ("strides = [2, 2], group = 2, pads = [1, 0, 0, 1]", (1, 4, 4, 5), (4, 3, 3, 3)),
        ("strides = [3, 2], output_shape = [10, 8]", (1, 1, 3, 3), (1, 2, 3, 3)),
        ('strides = [2, 2], auto_pad = "SAME_UPPER"', (1, 1, 3, 3), (1, 2, 3, 3)),
        ('strides = [2, 2], auto_pad = "SAME_LOWER"', (1, 1, 3, 3), (1, 2, 3, 3)),
        ("strides = [1, 2, 2]", (1, 2, 3, 3, 3), (2, 1, 2, 2, 2)),
    ],
)
def test_transposed_convolutions(settings, x, weight):
    groups = 2 if "group" in settings else 1
    check(*conv(settings, x, weight, op="ConvTranspose", bias=weight[1] * groups), deployments=ENDS, rtol=1e-4)


def test_a_transposed_convolution_with_a_computed_weight_needs_ios_17():
    inputs = {"x": numbers(1, 3, 4, 4), "w": numbers(3, 2, 3, 3, seed=1), "b": numbers(2, seed=2)}
    model = text("y = ConvTranspose(x, w, b)", inputs, "float y")
    check(model, inputs, deployments=(17, 18))
    with pytest.raises(InputError, match="needs the deployment target iOS 17"):
        executed(model, inputs, deployment=16)


MATRICES = [
    ((4,), (4,)),
    ((4,), (4, 3)),
    ((4,), (2, 4, 3)),
    ((2, 4), (4,)),
    ((2, 3, 4), (4,)),
    ((2, 4), (4, 3)),
    ((2, 5, 4), (4, 3)),
    ((1, 2, 5, 4), (4, 3)),
    ((2, 1, 5, 4), (3, 4, 2)),
    ((5, 4), (2, 3, 4, 2)),
]


@pytest.mark.parametrize("fixed", [False, True])
def test_matrix_products(fixed):
    inputs = {f"x{place}": numbers(*x, seed=place) for place, (x, _) in enumerate(MATRICES)}
    weight = {f"y{place}": numbers(*y, seed=place + 50) for place, (_, y) in enumerate(MATRICES)}
    body = "\n".join(f"z{place} = MatMul(x{place}, y{place})" for place in range(len(MATRICES)))
    outputs = ", ".join(f"float z{place}" for place in range(len(MATRICES)))
    inputs, weight = (inputs, weight) if fixed else (inputs | weight, {})
    check(text(body, inputs, outputs, weight), inputs, deployments=ENDS)


def test_integer_products():
    inputs = {"x": integers(3, 4, kind="int32"), "y": integers(4, 2, seed=1, kind="int32")}
    check(text("z = MatMul(x, y)", inputs, "int32 z"), inputs)


def test_a_constant_weight_makes_a_linear():
    inputs, weight = {"x": numbers(2, 5, 4)}, {"w": numbers(4, 3, seed=1)}
    assert operations(text("z = MatMul(x, w)", inputs, "float z", weight)) == ["linear"]
    body = "t = Transpose<perm = [1, 0]>(w)\nz = MatMul(x, t)"
    model = text(body, inputs, "float z", {"w": numbers(3, 4, seed=1)})
    assert "linear" in operations(model)
    check(model, inputs)


def test_a_transpose_that_moves_nothing_is_no_transpose():
    inputs, weight = {"x": numbers(2, 5, 4)}, {"w": numbers(4, 4, seed=1)}
    check(text("t = Transpose<perm = [0, 1]>(w)\nz = MatMul(x, t)", inputs, "float z", weight), inputs)


def test_a_pruned_weight_is_stored_as_what_is_left_of_it():
    weight = numbers(40, 64, seed=1)
    weight[abs(weight) < 2] = 0
    inputs = {"x": numbers(3, 64)}
    model = text("y = Gemm<transB = 1>(x, w)", inputs, "float y", {"w": weight})
    check(model, inputs, deployments=(15, 16, 18), atol=1e-4)
    assert operations(model) == ["constexpr_sparse_to_dense", "linear"]


@pytest.mark.parametrize(("bias", "fused"), [((3,), True), ((1, 1, 3), True), ((3, 3), False), ((1,), False)])
def test_a_vector_added_behind_a_product_is_its_bias(bias, fused):
    inputs, weight = {"x": numbers(2, 3, 4)}, {"w": numbers(4, 3, seed=1), "b": numbers(*bias, seed=2)}
    for body in ("p = MatMul(x, w)\ny = Add(b, p)", "p = MatMul(x, w)\ny = Add(p, b)"):
        model = text(body, inputs, "float y", weight)
        check(model, inputs)
        assert operations(model) == (["linear"] if fused else ["linear", "add"])


def test_a_product_that_something_else_reads_keeps_its_value():
    inputs, weight = {"x": numbers(2, 3, 4)}, {"w": numbers(4, 3, seed=1), "b": numbers(3, seed=2)}
    check(text("p = MatMul(x, w)\ny = Add(p, b)\nz = Relu(p)", inputs, "float y, float z", weight), inputs)
    check(text("p = MatMul(x, w)\ny = Add(p, b)", inputs, "float y, float p", weight), inputs)
    check(text("p = MatMul(x, w)\ny = Add(p, p)", inputs, "float y", weight), inputs)


@pytest.mark.parametrize("settings", ["", "<alpha = 0.5, beta = 2.0>", "<transA = 1>", "<transB = 1>", "<beta = 0.0>"])
def test_products_with_bias(settings):
    left = (4, 5) if "transA" in settings else (5, 4)
    right = (3, 4) if "transB" in settings else (4, 3)
    shapes = [(3,), (1, 3), (5, 1), (5, 3), (1,), ()]
    biases = {f"c{place}": numbers(*shape, seed=2 + place) for place, shape in enumerate(shapes)}
    body = "\n".join(f"y{name} = Gemm{settings}(a, b, {name})" for name in biases)
    inputs, weight = {"a": numbers(*left)}, {"b": numbers(*right, seed=1)} | biases
    outputs = ", ".join(f"float y{name}" for name in biases)
    check(text(body + f"\ny = Gemm{settings}(a, b)", inputs, f"float y, {outputs}", weight), inputs, deployments=ENDS)
    scalar = {"c5": weight.pop("c5")}  # Core ML's inputs have at least one axis
    check(text(body, inputs | weight, outputs, scalar), inputs | weight)


def test_a_negative_pad_is_refused():
    with pytest.raises(InputError, match="a pad is negative: it cuts the input"):
        lower(conv("pads = [-1, 1]", (1, 2, 9), (2, 2, 3))[0], 18)
