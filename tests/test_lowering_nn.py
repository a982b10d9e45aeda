"""Activations, poolings and normalizations in Core ML's MIL, beside onnxruntime."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowering_runs import check, executed, integers, numbers, operations, text
from optkit.errors import InputError

ENDS = (15, 18)  # the first and the last deployment target that have forms of their own


# Their settings other than the defaults.
ACTIVATIONS = {
    **dict.fromkeys(("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish", "Selu", "Mish", "Gelu"), ""),
    "Elu": "alpha = 0.7",
    "LeakyRelu": "alpha = 0.3",
    "HardSigmoid": "alpha = 0.3, beta = 0.4",
    "Celu": "alpha = 0.6",
    "ThresholdedRelu": "alpha = 0.4",
}


def test_activations():
    inputs = {"x": numbers(3, 40)}
    nodes = [f"{op}<{given}>" if given else op for op, settings in ACTIVATIONS.items() for given in {"", settings}]
    body = "\n".join(f"y{place} = {node}(x)" for place, node in enumerate(nodes))
    check(text(body, inputs, ", ".join(f"float y{place}" for place in range(len(nodes))), opset=20), inputs)


def test_gelu_by_tanh():
    inputs = {"x": numbers(3, 40)}
    check(text('y = Gelu<approximate = "tanh">(x)', inputs, "float y", opset=20), inputs)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_swish(alpha):
    x = numbers(3, 40)
    found = executed(text(f"y = Swish<alpha = {alpha}>(x)", {"x": x}, "float y", opset=24), {"x": x})
    np.testing.assert_allclose(found["y"], x / (1 + np.exp(-alpha * x)), rtol=1e-5, atol=1e-6)


def test_a_threshold_itself_is_cut():
    x = np.array([1, 2, 3], np.float32)
    found = executed(text("y = ThresholdedRelu<alpha = 2.0>(x)", {"x": x}, "float y"), {"x": x})
    assert found["y"].tolist() == [0, 0, 3]


def test_activations_of_integers():
    inputs = {"x": integers(3, 4, kind="int32")}
    check(text("y = Relu(x)", inputs, "int32 y"), inputs)
    found = executed(text("y = PRelu(x, s)", inputs, "int32 y", {"s": integers(4, seed=1, kind="int32")}), inputs)
    slope = integers(4, seed=1, kind="int32")
    assert found["y"].tolist() == np.where(inputs["x"] < 0, inputs["x"] * slope, inputs["x"]).tolist()


@pytest.mark.parametrize("slope", [(1,), (4,), (3, 1), (3, 1, 1), (2, 3, 5, 4), (5, 1), ()])
def test_slopes_of_any_shape(slope):
    inputs, weight = {"x": numbers(2, 3, 5, 4) if slope != (3, 1) else numbers(2, 3, 4)}, {"s": numbers(*slope, seed=1)}
    check(text("y = PRelu(x, s)", inputs, "float y", weight), inputs, deployments=ENDS)
    if slope:
        check(text("y = PRelu(x, s)", inputs | weight, "float y"), inputs | weight)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [((0, 6), ["relu6"]), ((-1, 2), ["clip"]), ((None, 1), ["minimum"]), ((1, None), ["maximum"]), ((2, 1), None)],
)
def test_bounds(bounds, expected):
    inputs = {"x": numbers(4, 20, low=-9, high=9)}
    low, high = (None if bound is None else np.array(bound, np.float32) for bound in bounds)
    fixed = {name: array for name, array in {"l": low, "h": high}.items() if array is not None}
    names = ("l" if low is not None else "") + (", h" if high is not None else "")
    model = text(f"y = Clip(x, {names})", inputs, "float y", fixed)
    check(model, inputs, deployments=ENDS)
    assert expected is None or operations(model) == expected


def test_bounds_of_opset_6_and_of_integers():
    inputs = {"x": numbers(4, 20)}
    check(text("y = Clip<min = -1.0, max = 1.0>(x)", inputs, "float y", opset=10), inputs)
    check(text("y = Clip<max = 1.0>(x)", inputs, "float y", opset=10), inputs)
    inputs = {"x": integers(4, 20)}
    check(text("y = Clip(x, l, h)", inputs, "int64 y", {"l": np.array(-2), "h": np.array(2**63 - 1)}), inputs)


@pytest.mark.parametrize("opset", [11, 13])
def test_softmax_flattens_before_opset_13(opset):
    inputs = {"x": numbers(2, 3, 4, low=-30, high=30)}
    settings = ["", *(f"<axis = {axis}>" for axis in (0, 1, 2, -2))]
    nodes = [f"{op}{setting}" for op in ("Softmax", "LogSoftmax") for setting in settings]
    body = "\n".join(f"y{place} = {node}(x)" for place, node in enumerate(nodes))
    model = text(body, inputs, ", ".join(f"float y{place}" for place in range(len(nodes))), opset=opset)
    check(model, inputs, deployments=ENDS)


POOLS = [
    ("kernel_shape = [3]", (1, 2, 9)),
    ("kernel_shape = [3, 2], strides = [2, 2]", (2, 3, 9, 8)),
    ("kernel_shape = [3, 3], strides = [2, 2], pads = [0, 1, 2, 1]", (1, 2, 9, 8)),
    ("kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], ceil_mode = 1", (1, 2, 8, 7)),
    ("kernel_shape = [2, 2], strides = [3, 3], pads = [0, 0, 1, 1], ceil_mode = 1", (1, 2, 8, 7)),
    ('kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_UPPER"', (1, 2, 9, 8)),
    ('kernel_shape = [4, 3], strides = [2, 3], auto_pad = "SAME_LOWER"', (1, 2, 9, 8)),
    ("kernel_shape = [2, 2, 3], strides = [2, 1, 2], pads = [1, 0, 1, 0, 1, 1]", (1, 2, 6, 5, 7)),
    ("kernel_shape = [3, 2], dilations = [2, 2], pads = [1, 0, 1, 1], strides = [2, 1]", (1, 2, 9, 8)),
    ("kernel_shape = [3, 2], dilations = [2, 3], strides = [2, 2], ceil_mode = 1", (1, 2, 9, 8)),
]


@pytest.mark.parametrize(("settings", "shape"), POOLS)
def test_pools(settings, shape):
    inputs = {"x": numbers(*shape)}
    body = f"""
        a = MaxPool<{settings}>(x)
        b = AveragePool<{settings}>(x)
        c = AveragePool<count_include_pad = 1, {settings}>(x)
        d = LpPool<{settings}>(x)
    """
    check(text(body, inputs, "float a, float b, float c, float d"), inputs, deployments=ENDS)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_pools_of_other_powers(p):
    inputs = {"x": numbers(1, 2, 8, 7)}
    body = f"y = LpPool<p = {p}, kernel_shape = [3, 2], strides = [2, 2]>(x)\nz = GlobalLpPool<p = {p}>(x)"
    check(text(body, inputs, "float y, float z"), inputs)


def test_pools_of_narrow_integers():
    inputs = {"x": integers(1, 2, 6, 6, low=-128, high=128, kind="int8")}
    check(text("y = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x)", inputs, "int8 y"), inputs)


def test_a_pool_that_says_where_its_elements_lie_is_refused():
    inputs = {"x": numbers(1, 2, 6, 6)}
    with pytest.raises(InputError, match="its output of indices is read"):
        executed(text("y, i = MaxPool<kernel_shape = [2, 2]>(x)", inputs, "float y, int64 i"), inputs)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 5, 4), (1, 2, 3, 4, 5)])
def test_global_pools(op, shape):
    inputs = {"x": numbers(*shape)}
    check(text(f"y = {op}(x)", inputs, "float y"), inputs)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 7), (2, 3, 5, 4), (1, 3, 3, 4, 5)])
@pytest.mark.parametrize("fixed", [True, False])
def test_batch_normalization(shape, fixed):
    inputs = {"x": numbers(*shape)}
    weight = {name: numbers(3, seed=seed, low=0.5) for seed, name in enumerate("sbmv", 1)}
    names, inputs, weight = list(weight), inputs if fixed else inputs | weight, weight if fixed else {}
    body = f"y = BatchNormalization<epsilon = 0.01>(x, {', '.join(names)})"
    check(text(body, inputs, "float y", weight), inputs, deployments=ENDS)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 5, 4), (1, 3, 3, 4, 5)])
@pytest.mark.parametrize("fixed", [True, False])
def test_instance_normalization(shape, fixed):
    inputs, weight = {"x": numbers(*shape)}, {"s": numbers(3, seed=1), "b": numbers(3, seed=2)}
    inputs, weight = (inputs, weight) if fixed else (inputs | weight, {})
    check(text("y = InstanceNormalization(x, s, b)", inputs, "float y", weight), inputs, deployments=ENDS, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1, 0])
@pytest.mark.parametrize("fixed", [True, False])
def test_layer_normalization(axis, fixed):
    inputs, shape = {"x": numbers(2, 3, 4)}, (2, 3, 4)[axis:]
    weight = {"s": numbers(*shape, seed=1), "b": numbers(*shape[-1:], seed=2)}
    inputs, weight = (inputs, weight) if fixed else (inputs | weight, {})
    body = f"y = LayerNormalization<axis = {axis}, epsilon = 0.01>(x, s, b)"
    check(text(body, inputs, "float y", weight), inputs, deployments=ENDS, atol=1e-5)
    body = f"y, m, d = LayerNormalization<axis = {axis}>(x, s)"
    check(text(body, inputs, "float y, float m, float d", weight), inputs, atol=1e-5)


@pytest.mark.parametrize("fixed", [True, False])
def test_group_normalization(fixed):
    x, scale, bias = numbers(2, 6, 4, 3), numbers(6, seed=1), numbers(6, seed=2)
    inputs, weight = {"x": x}, {"s": scale, "b": bias}
    inputs, weight = (inputs, weight) if fixed else (inputs | weight, {})
    model = text("y = GroupNormalization<num_groups = 2>(x, s, b)", inputs, "float y", weight)
    blocks = x.reshape(2, 2, -1).astype(np.float64)
    normal = (blocks - blocks.mean(2, keepdims=True)) / np.sqrt(blocks.var(2, keepdims=True) + 1e-5)
    expected = normal.reshape(x.shape) * scale.reshape(6, 1, 1) + bias.reshape(6, 1, 1)
    # coremltools makes a constant scale and bias a batch_norm with a variance of 1 + 1e-5
    np.testing.assert_allclose(executed(model, inputs)["y"], expected, rtol=1e-5, atol=3e-5)


def test_rms_normalization():
    x, scale = numbers(2, 3, 4), numbers(3, 4, seed=1)
    inputs = {"x": x}
    model = text("y = RMSNormalization<axis = 1>(x, s)", inputs, "float y", {"s": scale}, opset=23)
    expected = x / np.sqrt((x**2).mean((1, 2), keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(executed(model, inputs)["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_a_vector_without_length_stays_zero(p):
    inputs = {"x": numbers(3, 4)}
    inputs["x"][1] = 0
    found = executed(text(f"y = LpNormalization<p = {p}>(x)", inputs, "float y"), inputs)["y"]
    norm = np.abs(inputs["x"]).sum(1) if p == 1 else np.sqrt((inputs["x"] ** 2).sum(1))
    np.testing.assert_allclose(found, inputs["x"] / np.where(norm == 0, 1, norm)[:, None], rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(1, 6, 5), (2, 6, 3, 4)])
def test_local_response_normalization(size, shape):
    inputs = {"x": numbers(*shape)}
    settings = f"size = {size}, alpha = 0.2, beta = 0.6, bias = 1.5"
    if len(shape) == 4:  # onnxruntime has it for images alone
        check(text(f"y = LRN<{settings}>(x)", inputs, "float y"), inputs, deployments=ENDS)
    even = text(f"y = LRN<{settings.replace(f'size = {size}', f'size = {size + 1}')}>(x)", inputs, "float y")
    padded = np.pad(inputs["x"] ** 2, [(0, 0), (size // 2, size - size // 2), *[(0, 0)] * (len(shape) - 2)])
    total = sum(padded[:, place : place + 6] for place in range(size + 1))
    expected = inputs["x"] / (1.5 + 0.2 / (size + 1) * total) ** 0.6
    np.testing.assert_allclose(executed(even, inputs)["y"], expected, rtol=1e-5)


def test_mean_and_variance_normalization():
    inputs = {"x": numbers(2, 3, 4, 5)}
    check(text("y = MeanVarianceNormalization(x)", inputs, "float y"), inputs)
    check(text("y = MeanVarianceNormalization<axes = [1]>(x)", inputs, "float y"), inputs)
    flat = {"x": np.full((1, 2, 3, 4), 5, np.float32)}
    assert not executed(text("y = MeanVarianceNormalization(x)", flat, "float y"), flat, half=True)["y"].any()


def test_training_is_refused():
    inputs = {"x": numbers(2, 3, 4)}
    weight = {name: numbers(3, seed=seed, low=0.5) for seed, name in enumerate("sbmv")}
    body = "y, n, w = BatchNormalization<training_mode = 1>(x, s, b, m, v)"
    with pytest.raises(InputError, match="training_mode is set"):
        executed(text(body, inputs, "float y", weight), inputs)


def test_statistics_that_nothing_computes_are_refused():
    inputs = {"x": numbers(2, 3, 4)}
    weight = {name: numbers(3, seed=seed, low=0.5) for seed, name in enumerate("sbmv")}
    body = "y, n, w, k, l = BatchNormalization(x, s, b, m, v)"
    with pytest.raises(InputError, match="its output of statistics is read"):
        executed(text(body, inputs, "float y, float n", weight, opset=13), inputs)


def test_a_half_model_stays_in_half_precision():
    inputs = {"x": numbers(1, 4, 6, 6).astype(np.float16)}
    weight = {"w": numbers(4, 4, 3, 3, seed=1).astype(np.float16), "b": numbers(4, seed=2).astype(np.float16)}
    body = "c = Conv(x, w, b)\nh = HardSwish(c)\np = AveragePool<kernel_shape = [2, 2], pads = [0, 0, 1, 1]>(h)\n"
    body += "l = Clip(p, q)\ny = LogSoftmax(l)"
    weight["q"] = np.array(0, np.float16)
    check(text(body, inputs, "float16 y", weight), inputs, rtol=2e-2, atol=2e-2)


def test_a_float_model_runs_in_half_precision():
    inputs = {"x": numbers(1, 4, 6, 6)}
    weight = {"w": numbers(4, 4, 3, 3, seed=1), "b": numbers(4, seed=2)}
    model = text("c = Conv(x, w, b)\ns = Asinh(c)\ny = LpNormalization(s)", inputs, "float y", weight)
    full, half = executed(model, inputs)["y"], executed(model, inputs, half=True)["y"]
    np.testing.assert_allclose(half, full, rtol=2e-2, atol=2e-3)
    assert not math.isclose(float(np.abs(half - full).max()), 0)
