"""Layers of networks in the interpreter of Core ML packages: convolutions, pooling, norms, attention, recurrence."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from mil_programs import close, normal, onnx, run

Array = np.ndarray


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("pad_type", ["valid", "same", "same_lower", "custom"])
def test_convolutions(tmp_path: Path, dims: int, pad_type: str) -> None:
    x, weight = normal(2, 4, *[9, 8, 7][:dims]), normal(6, 2, *[3] * dims, seed=1)
    bias = normal(6, seed=2)
    # onnxruntime pads by itself only where nothing is dilated.
    strides, dilations = [2, 1, 2][:dims], [1, 1 if pad_type.startswith("same") else 2, 1][:dims]
    pad = [1, 2, 0, 1, 1, 1][: 2 * dims]

    def build(mb: Any, x: Any) -> dict[str, Any]:
        extra = {"pad": pad} if pad_type == "custom" else {}
        options = dict(strides=strides, dilations=dilations, groups=2, pad_type=pad_type, **extra)
        return {"y": mb.conv(x=x, weight=weight, bias=bias, **options)}

    auto = {"valid": "VALID", "same": "SAME_UPPER", "same_lower": "SAME_LOWER"}
    pads = {"pads": pad[::2] + pad[1::2]} if pad_type == "custom" else {"auto_pad": auto[pad_type]}
    expected = onnx("Conv", x, weight, bias, strides=strides, dilations=dilations, group=2, **pads)
    close(run(tmp_path, build, {"x": x})["y"], expected[0], 1e-4)


def test_transposed_convolutions(tmp_path: Path) -> None:
    x, weight, bias = normal(2, 4, 5, 6), normal(4, 3, 3, 3, seed=1), normal(6, seed=2)
    common: dict[str, Any] = {"strides": [2, 3], "groups": 2}

    def build(mb: Any, x: Any) -> dict[str, Any]:
        return {
            "valid": mb.conv_transpose(x=x, weight=weight, bias=bias, **common),
            "custom": mb.conv_transpose(x=x, weight=weight, bias=bias, pad_type="custom", pad=[1, 0, 0, 1], **common),
            "same": mb.conv_transpose(x=x, weight=weight, pad_type="same", **common),
            "shape": mb.conv_transpose(
                x=x,
                weight=weight,
                bias=bias,
                pad_type="custom",
                pad=[1, 1, 1, 1],
                output_shape=[2, 6, 10, 18],
                **common,
            ),
        }

    found = run(tmp_path, build, {"x": x})
    whole = onnx("ConvTranspose", x, weight, bias, strides=[2, 3], group=2)[0]
    close(found["valid"], whole, 1e-4)
    close(found["custom"], whole[:, :, 1:, :-1], 1e-4)
    same = onnx("ConvTranspose", x, weight, strides=[2, 3], group=2, auto_pad="SAME_UPPER")[0]
    close(found["same"], same, 1e-4)
    padded = onnx("ConvTranspose", x, weight, bias, strides=[2, 3], group=2, pads=[1] * 4, output_padding=[1, 2])[0]
    close(found["shape"], padded, 1e-4)


def test_products(tmp_path: Path) -> None:
    x, y, weight, bias = normal(2, 3, 4), normal(2, 5, 4, seed=1), normal(6, 4, seed=2), normal(6, seed=3)
    images, others = normal(2, 3, 4, 5), normal(1, 5, 4, 6, seed=4)

    def build(mb: Any, x: Any, y: Any, a: Any, b: Any) -> dict[str, Any]:
        return {
            "linear": mb.linear(x=x, weight=weight, bias=bias),
            "matmul": mb.matmul(x=x, y=y, transpose_y=True),
            "left": mb.matmul(x=x, y=mb.transpose(x=y, perm=[0, 2, 1]), transpose_x=False),
            "einsum": mb.einsum(values=(a, b), equation="nchw,nwhu->nchu"),
        }

    found = run(tmp_path, build, {"x": x, "y": y, "a": images, "b": others})
    close(found["linear"], x @ weight.T + bias)
    close(found["matmul"], x @ y.transpose(0, 2, 1))
    close(found["left"], x @ y.transpose(0, 2, 1))
    close(found["einsum"], np.einsum("nchw,nwhu->nchu", images, np.broadcast_to(others, (2, 5, 4, 6))))


def _pooled(x: Array, kernel: list[int], steps: list[int], sizes: list[int], before: list[int], reduce: Any) -> Array:
    """Return what ``reduce`` makes of the elements of each window that are in the input."""
    result = np.zeros((*x.shape[:2], *sizes), np.float32)
    for place in itertools.product(*map(range, sizes)):
        bounds = [(p * s - b, p * s - b + k) for p, s, b, k in zip(place, steps, before, kernel, strict=True)]
        cut = tuple(slice(max(0, low), max(0, high)) for low, high in bounds)
        window = x[(slice(None), slice(None), *cut)].reshape(*x.shape[:2], -1)
        result[(slice(None), slice(None), *place)] = reduce(window)
    return result


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pooling(tmp_path: Path, ceil_mode: bool) -> None:
    x = normal(2, 3, 7, 8)
    kernel, steps, pad = [3, 2], [2, 3], [1, 1, 0, 0]

    def build(mb: Any, x: Any) -> dict[str, Any]:
        options = {"kernel_sizes": kernel, "strides": steps, "pad_type": "custom", "pad": pad, "ceil_mode": ceil_mode}
        return {
            "max": mb.max_pool(x=x, **options),
            "avg": mb.avg_pool(x=x, exclude_padding_from_average=False, **options),
            "real": mb.avg_pool(x=x, exclude_padding_from_average=True, **options),
            "l2": mb.l2_pool(x=x, **options),
        }

    found = run(tmp_path, build, {"x": x})
    sizes = [4, 3]
    close(found["max"], _pooled(x, kernel, steps, sizes, [1, 0], lambda w: w.max(-1)))
    close(found["real"], _pooled(x, kernel, steps, sizes, [1, 0], lambda w: w.mean(-1)))
    close(found["l2"], _pooled(x, kernel, steps, sizes, [1, 0], lambda w: np.sqrt((w**2).sum(-1))))
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (0, 0)])
    close(found["avg"], _pooled(padded, kernel, steps, sizes, [0, 0], lambda w: w.mean(-1)))


def test_a_window_that_begins_in_the_padding_behind_the_input_is_left_out(tmp_path: Path) -> None:
    x = normal(1, 1, 5)

    def build(mb: Any, x: Any) -> dict[str, Any]:
        options = {"kernel_sizes": [2], "strides": [3], "pad_type": "custom", "pad": [1, 1], "ceil_mode": True}
        return {"y": mb.max_pool(x=x, **options)}

    close(run(tmp_path, build, {"x": x})["y"], np.array([[[x[0, 0, 0], x[0, 0, 2:4].max()]]], np.float32))


def test_normalizations(tmp_path: Path) -> None:
    x, gamma, beta = normal(2, 3, 4, 5), normal(3, seed=1), normal(3, seed=2)
    mean, variance = normal(3, seed=3), np.abs(normal(3, seed=4)) + 0.1
    wide, shift = normal(4, 5, seed=5), normal(4, 5, seed=6)

    def build(mb: Any, x: Any) -> dict[str, Any]:
        return {
            "batch": mb.batch_norm(x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-3),
            "instance": mb.instance_norm(x=x, gamma=gamma, beta=beta, epsilon=1e-3),
            "layer": mb.layer_norm(x=x, axes=[2, 3], gamma=wide, beta=shift, epsilon=1e-3),
            "plain": mb.layer_norm(x=x, axes=[-1]),
            "l2": mb.l2_norm(x=x, epsilon=1e-3),
            "local": mb.local_response_norm(x=x, size=3, alpha=0.3, beta=0.7, k=1.5),
            "even": mb.local_response_norm(x=x, size=4, alpha=0.4, beta=0.7, k=1.5),
        }

    found = run(tmp_path, build, {"x": x})
    close(found["batch"], onnx("BatchNormalization", x, gamma, beta, mean, variance, epsilon=1e-3)[0])
    close(found["instance"], onnx("InstanceNormalization", x, gamma, beta, epsilon=1e-3)[0])
    close(found["layer"], onnx("LayerNormalization", x, wide, shift, axis=2, epsilon=1e-3)[0])
    close(found["plain"], onnx("LayerNormalization", x, np.ones(5, np.float32), axis=-1)[0])
    close(found["l2"], x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True) + 1e-3))
    close(found["local"], onnx("LRN", x, size=3, alpha=0.3, beta=0.7, bias=1.5)[0])
    close(found["even"], found["local"])  # the same sum: of an even size, one channel less counts


def test_attention(tmp_path: Path) -> None:
    query, key, value = normal(1, 2, 3, 8), normal(1, 2, 5, 8, seed=1), normal(1, 2, 5, 6, seed=2)
    mask = np.where(np.arange(5) < 4, 0.0, -1e4).astype(np.float32)[None, None, None]

    def build(mb: Any, q: Any, k: Any, v: Any, m: Any) -> dict[str, Any]:
        allowed = mb.greater(x=m, y=-1.0)
        return {
            "plain": mb.scaled_dot_product_attention(query=q, key=k, value=v),
            "added": mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
            "allowed": mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=allowed),
        }

    found = run(tmp_path, build, {"q": query, "k": key, "v": value, "m": mask}, deployment=18)
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(np.float32(8))
    close(found["plain"], onnx("Softmax", scores, axis=-1)[0] @ value)
    masked = onnx("Softmax", scores[..., :4], axis=-1)[0] @ value[..., :4, :]
    close(found["added"], masked)
    close(found["allowed"], masked)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lstm(tmp_path: Path, direction: str) -> None:
    ways = 2 if direction == "bidirectional" else 1
    steps, batch, size, hidden = 4, 2, 3, 5
    x = normal(steps, batch, size)
    weights = [(normal(4 * hidden, size, seed=w), normal(4 * hidden, hidden, seed=9 + w)) for w in range(ways)]
    biases = [normal(4 * hidden, seed=20 + w) for w in range(ways)]
    h, c = normal(batch, ways * hidden, seed=30), normal(batch, ways * hidden, seed=31)

    def build(mb: Any, x: Any, h: Any, c: Any) -> dict[str, Any]:
        names = ("weight_ih", "weight_hh", "bias")
        options = dict(zip(names, (*weights[0], biases[0]), strict=True))
        if ways == 2:
            options |= dict(zip((f"{name}_back" for name in names), (*weights[1], biases[1]), strict=True))
        made = mb.lstm(x=x, initial_h=h, initial_c=c, direction=direction, output_sequence=True, **options)
        return dict(zip(("sequence", "hidden", "cell"), made, strict=True))

    found = run(tmp_path, build, {"x": x, "h": h, "c": c})

    def ordered(array: Array) -> Array:  # Core ML's gates are i f o z, ONNX's i o f z
        i, f, o, z = np.split(array, 4)
        return np.concatenate([i, o, f, z])

    def split(state: Array) -> Array:
        return np.stack(np.split(state, ways, axis=-1))

    w, r = (np.stack([ordered(pair[index]) for pair in weights]) for index in (0, 1))
    b = np.stack([np.concatenate([ordered(bias), np.zeros(4 * hidden, np.float32)]) for bias in biases])
    sequence, last, cell = onnx(
        "LSTM", x, w, r, b, None, split(h), split(c), outputs=3, hidden_size=hidden, direction=direction
    )
    expected = np.concatenate(list(sequence.transpose(1, 0, 2, 3)), axis=-1)
    # Core ML leaves what it computes backwards in the order of its computation, unless it goes both ways.
    close(found["sequence"], expected[::-1] if direction == "reverse" else expected)
    close(found["hidden"], np.concatenate(list(last), axis=-1))
    close(found["cell"], np.concatenate(list(cell), axis=-1))


@pytest.mark.parametrize("after", [False, True])
def test_gru(tmp_path: Path, after: bool) -> None:
    x, h = normal(4, 2, 3), normal(2, 5, seed=1)
    w, r = normal(15, 3, seed=2), normal(15, 5, seed=3)
    inner, outer = normal(15, seed=4), normal(15, seed=5)

    def build(mb: Any, x: Any, h: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"input_bias": outer, "reset_after": True} if after else {}
        made = mb.gru(x=x, initial_h=h, weight_ih=w, weight_hh=r, bias=inner, output_sequence=True, **options)
        return {"sequence": made[0], "hidden": made[1]}

    found = run(tmp_path, build, {"x": x, "h": h}, deployment=18)

    def ordered(array: Array) -> Array:  # Core ML's gates are r o z, ONNX's z r h
        reset, output, update = np.split(array, 3)
        return np.concatenate([update, reset, output])

    bias = np.concatenate([ordered(outer if after else np.zeros_like(inner)), ordered(inner)])
    attributes = {"hidden_size": 5, "linear_before_reset": int(after)}
    inputs = (x, ordered(w)[None], ordered(r)[None], bias[None], None, h[None])
    sequence, last = onnx("GRU", *inputs, outputs=2, **attributes)
    close(found["sequence"], sequence[:, 0])
    close(found["hidden"], last[0])


def test_rnn(tmp_path: Path) -> None:
    x, h = normal(4, 2, 3), normal(2, 5, seed=1)
    w, r, b = normal(5, 3, seed=2), normal(5, 5, seed=3), normal(5, seed=4)

    def build(mb: Any, x: Any, h: Any) -> dict[str, Any]:
        made = mb.rnn(x=x, initial_h=h, weight_ih=w, weight_hh=r, bias=b, direction="reverse", output_sequence=True)
        return {"sequence": made[0], "hidden": made[1]}

    found = run(tmp_path, build, {"x": x, "h": h})
    bias = np.concatenate([b, np.zeros_like(b)])
    inputs = (x, w[None], r[None], bias[None], None, h[None])
    sequence, last = onnx("RNN", *inputs, outputs=2, hidden_size=5, direction="reverse")
    close(found["sequence"], sequence[::-1, 0])  # in the order of its computation
    close(found["hidden"], last[0])
