"""Operators of the interpreter of Core ML packages, against NumPy and onnxruntime."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from mil_programs import close, normal, onnx, run

Array = np.ndarray

UNARY: dict[str, Any] = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": np.vectorize(math.erf),
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "round": np.round,
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "logical_not": lambda x: x <= 0,
}


def test_operators_of_one_operand(tmp_path: Path) -> None:
    x = np.linspace(-0.99, 0.99, 24, dtype=np.float32).reshape(2, 3, 4)

    def build(mb: Any, x: Any) -> dict[str, Any]:
        positive = mb.greater(x=x, y=0.0)
        return {
            f"y_{name}": getattr(mb, name)(x=positive if name == "logical_not" else x)
            if name != "logical_not"
            else mb.cast(x=mb.logical_not(x=positive), dtype="fp32")
            for name in UNARY
        }

    found = run(tmp_path, build, {"x": x})
    for name, function in UNARY.items():
        close(found[f"y_{name}"], np.asarray(function(x.astype(np.float64))).astype(np.float32))


def test_operators_with_parameters(tmp_path: Path) -> None:
    x = normal(2, 3, 4, 2)
    alpha = np.array([0.1, 0.2, 0.3], np.float32)
    channel = alpha.reshape(3, 1, 1)
    positive = np.abs(x) + 0.5
    cases: dict[str, tuple[Any, Array]] = {
        "clip": (lambda mb, x, p: mb.clip(x=x, alpha=-0.5, beta=0.5), np.clip(x, -0.5, 0.5)),
        "threshold": (lambda mb, x, p: mb.threshold(x=x, alpha=0.1), np.maximum(x, 0.1)),
        "inverse": (lambda mb, x, p: mb.inverse(x=p, epsilon=0.25), 1 / (positive + 0.25)),
        "log": (lambda mb, x, p: mb.log(x=p, epsilon=0.25), np.log(positive + 0.25)),
        "rsqrt": (lambda mb, x, p: mb.rsqrt(x=p, epsilon=0.25), 1 / np.sqrt(positive + 0.25)),
        "sqrt": (lambda mb, x, p: mb.sqrt(x=p), np.sqrt(positive)),
        "leaky_relu": (lambda mb, x, p: mb.leaky_relu(x=x, alpha=0.1), np.where(x > 0, x, 0.1 * x)),
        "prelu": (lambda mb, x, p: mb.prelu(x=x, alpha=alpha), np.where(x > 0, x, channel * x)),
        "elu": (lambda mb, x, p: mb.elu(x=x, alpha=0.7), np.where(x > 0, x, 0.7 * np.expm1(x))),
        "clamped_relu": (
            lambda mb, x, p: mb.clamped_relu(x=x, alpha=0.1, beta=0.5),
            np.minimum(np.where(x > 0, x, 0.1 * x), 0.5),
        ),
        "thresholded_relu": (lambda mb, x, p: mb.thresholded_relu(x=x, alpha=0.4), np.where(x >= 0.4, x, 0)),
        "linear_activation": (lambda mb, x, p: mb.linear_activation(x=x, alpha=0.4, beta=0.3), 0.4 * x + 0.3),
        "scaled_tanh": (lambda mb, x, p: mb.scaled_tanh(x=x, alpha=0.4, beta=0.3), 0.4 * np.tanh(0.3 * x)),
        "sigmoid_hard": (lambda mb, x, p: mb.sigmoid_hard(x=x, alpha=0.4, beta=0.3), np.clip(0.4 * x + 0.3, 0, 1)),
        "softplus_parametric": (
            lambda mb, x, p: mb.softplus_parametric(x=x, alpha=alpha, beta=alpha),
            channel * np.log1p(np.exp(channel * x)),
        ),
        "softmax": (lambda mb, x, p: mb.softmax(x=x, axis=1), onnx("Softmax", x, axis=1)[0]),
        "gelu": (lambda mb, x, p: mb.gelu(x=x), onnx("Gelu", x)[0]),
        "gelu_tanh": (
            lambda mb, x, p: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
            onnx("Gelu", x, approximate="tanh")[0],
        ),
        "gelu_sigmoid": (lambda mb, x, p: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), x / (1 + np.exp(-1.702 * x))),
    }

    def build(mb: Any, x: Any, p: Any) -> dict[str, Any]:
        return {f"y_{name}": case[0](mb, x, p) for name, case in cases.items()}

    found = run(tmp_path, build, {"x": x, "p": positive})
    for name, (_, expected) in cases.items():
        close(found[f"y_{name}"], expected)


def test_operators_of_two_operands(tmp_path: Path) -> None:
    x, y = normal(2, 3), normal(1, 3, seed=1) + 3
    m, n = np.array([7, -7, 7, -7], np.int32), np.array([2, 2, -2, -2], np.int32)
    floats = {
        "add": x + y,
        "sub": x - y,
        "mul": x * y,
        "real_div": x / y,
        "floor_div": np.floor_divide(x, y),
        "mod": np.mod(x, y),
        "maximum": np.maximum(x, y),
        "minimum": np.minimum(x, y),
    }
    comparisons = ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")
    integers = {
        "floor_div": [3, -4, -4, 3],
        "mod": [1, 1, -1, -1],
        "real_div": [3, -3, -3, 3],  # towards zero
        "mul": [14, -14, -14, 14],
    }

    def build(mb: Any, x: Any, y: Any, m: Any, n: Any) -> dict[str, Any]:
        made = {f"f_{name}": getattr(mb, name)(x=x, y=y) for name in floats}
        made["f_pow"] = mb.pow(x=y, y=x)
        made |= {f"c_{name}": mb.cast(x=getattr(mb, name)(x=m, y=n), dtype="int32") for name in comparisons}
        made |= {f"i_{name}": getattr(mb, name)(x=m, y=n) for name in integers}
        high, low = mb.greater(x=m, y=0), mb.greater(x=n, y=0)
        for name in ("logical_and", "logical_or", "logical_xor"):
            made[f"l_{name}"] = mb.cast(x=getattr(mb, name)(x=high, y=low), dtype="int32")
        made["select"] = mb.select(cond=high, a=m, b=n)
        return made

    found = run(tmp_path, build, {"x": x, "y": y, "m": m, "n": n})
    for name, expected in floats.items():
        close(found[f"f_{name}"], expected)
    close(found["f_pow"], y**x)
    for name in comparisons:
        close(found[f"c_{name}"], getattr(np, name)(m, n).astype(np.int32))
    for name, whole in integers.items():
        assert found[f"i_{name}"].tolist() == whole
    assert found["l_logical_and"].tolist() == [1, 0, 0, 0]
    assert found["l_logical_or"].tolist() == [1, 1, 1, 0]
    assert found["l_logical_xor"].tolist() == [0, 1, 1, 0]
    assert found["select"].tolist() == [7, 2, 7, -2]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("int32", [2, -2, 0, 300]), ("int8", [2, -2, 0, 127]), ("uint8", [2, 0, 0, 255]), ("bool", [1, 1, 0, 1])],
)
def test_casts_cut_towards_zero_and_stay_within_the_type(tmp_path: Path, dtype: str, expected: list[int]) -> None:
    x = np.array([2.7, -2.7, 0.0, 300.2], np.float32)
    found = run(tmp_path, lambda mb, x: {"y": mb.cast(x=mb.cast(x=x, dtype=dtype), dtype="int32")}, {"x": x})
    assert found["y"].tolist() == expected


def test_reductions(tmp_path: Path) -> None:
    x = normal(2, 3, 4)
    expected = {
        "reduce_l1_norm": np.abs(x).sum((0, 2)),
        "reduce_l2_norm": np.sqrt((x**2).sum((0, 2))),
        "reduce_log_sum_exp": np.log(np.exp(x).sum((0, 2))),
        "reduce_max": x.max((0, 2)),
        "reduce_mean": x.mean((0, 2)),
        "reduce_min": x.min((0, 2)),
        "reduce_prod": x.prod((0, 2)),
        "reduce_sum": x.sum((0, 2)),
        "reduce_sum_square": (x**2).sum((0, 2)),
    }

    def build(mb: Any, x: Any) -> dict[str, Any]:
        made = {f"y_{name}": getattr(mb, name)(x=x, axes=[0, -1], keep_dims=False) for name in expected}
        made["kept"] = mb.reduce_sum(x=x, axes=[1], keep_dims=True)
        made["log_sum"] = mb.reduce_log_sum(x=mb.abs(x=x), axes=[1], keep_dims=False)
        made["argmax"] = mb.reduce_argmax(x=x, axis=1, keep_dims=True)
        made["argmin"] = mb.reduce_argmin(x=x, axis=-1, keep_dims=False)
        return made

    found = run(tmp_path, build, {"x": x})
    for name, array in expected.items():
        close(found[f"y_{name}"], array, 1e-4)
    close(found["kept"], x.sum(1, keepdims=True))
    close(found["log_sum"], np.log(np.abs(x).sum(1)))
    assert (found["argmax"] == x.argmax(1, keepdims=True)).all()
    assert (found["argmin"] == x.argmin(-1)).all()


def test_quantization_of_activations(tmp_path: Path) -> None:
    x = np.array([[-3.0, -0.05, 0.05, 0.15], [0.25, 1.0, 12.0, 30.0]], np.float32)
    scale, zero = np.array([0.1, 0.2], np.float32), np.array([10, -20], np.int8)

    def build(mb: Any, x: Any) -> dict[str, Any]:
        levels = mb.quantize(input=x, scale=scale, zero_point=zero, axis=0, output_dtype="int8")
        return {
            "levels": mb.cast(x=levels, dtype="int32"),
            "y": mb.dequantize(input=levels, scale=scale, zero_point=zero, axis=0),
        }

    found = run(tmp_path, build, {"x": x})
    levels, zeros = onnx("QuantizeLinear", x, scale, zero, axis=0)[0], zero[:, None].astype(np.float32)
    assert (found["levels"] == levels).all()
    close(found["y"], (levels - zeros) * scale[:, None])
