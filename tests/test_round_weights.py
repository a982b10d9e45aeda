"""Rounding the weights of a layer together inside quantize-static."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optkit.evaluate.fidelity import compare
from optkit.graph import constant
from optkit.quant.integers import MOST_PAIR, largest_pairs
from optkit.session import run_samples
from optkit.target import Target, load_target
from optkit_passes.quantization import _reconstruct
from quantizing import LAYERS, build, quantized, random
from reconstructing import EVERYWHERE, NEW, decibels, digest, mixed, power, refusals, rounded, two_gemms


@pytest.mark.parametrize("block_size", [0, 32, 48])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_rounding_4_bits_together_gains(block_size: int, bias_correction: bool) -> None:
    model = two_gemms()
    samples = mixed(model)
    options: dict[str, Any] = {"weight_bits": 4, "block_size": block_size, "bias_correction": bias_correction}
    nearest, _ = quantized(model, samples, rounding="nearest", **options)
    result, remarks = quantized(model, samples, rounding="gptq", **options)
    assert len(rounded(remarks)) == 2
    assert all(" dB less output error" in message for message in rounded(remarks))
    for name in ("a", "y"):
        before, after = (power(model, each, name, samples, EVERYWHERE) for each in (nearest, result))
        assert decibels(before, after) > 2
    fresh = mixed(model, 32)[16:]
    assert decibels(*(power(model, each, "y", fresh, EVERYWHERE) for each in (nearest, result))) > 1
    for value in result.graph.initializers.values():
        if value.dtype == ir.DataType.INT4:
            stored = constant(value)
            assert stored is not None
            assert np.abs(stored.astype(int)).max() <= 7


def test_the_remark_says_what_the_outputs_gain() -> None:
    model = build(
        "(float[64,48] x) => (float[64,6] y) { y = Gemm <transB=1> (x, w, b) }", NEW, w=random(6, 48), b=random(6)
    )
    samples = mixed(model, 6)  # as many rows as the rounding is fitted to
    # 16-bit inputs, so that the error of the outputs is that of the weights
    options: dict[str, Any] = {"weight_bits": 4, "activation_bits": 16, "block_size": 0}
    nearest, _ = quantized(model, samples, rounding="nearest", **options)
    result, remarks = quantized(model, samples, rounding="gptq", **options)
    said = float(rounded(remarks)[0].removeprefix("weights rounded together: ").partition(" ")[0])
    gained = decibels(*(power(model, each, "y", samples, EVERYWHERE) for each in (nearest, result)))
    assert said == pytest.approx(gained, abs=0.3)
    assert said > 3


@pytest.mark.parametrize("name", ["conv", "conv one axis", "gemm", "gemm transposed", "matmul transposed constant"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_form_of_a_layer_is_rounded(name: str, bits: int) -> None:
    model = LAYERS[name]()
    header = ir.from_proto(ir.to_proto(model))
    header.opset_imports[""] = 21
    samples = mixed(model)
    options: dict[str, Any] = {"weight_bits": bits, "block_size": 0, "activation_bits": 16}
    nearest, _ = quantized(header, samples, rounding="nearest", **options)
    result, remarks = quantized(header, samples, rounding="gptq", **options)
    assert len(rounded(remarks)) == 1
    fidelities = [
        compare(run_samples(model, samples), run_samples(each, samples)).sqnr_db for each in (nearest, result)
    ]
    assert fidelities[1] > fidelities[0] + 0.5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("depthwise", "its channels are summed in groups"),
        ("grouped", "its channels are summed in groups"),
        ("matmul of a batch of weights", "its weights are no matrix"),
        ("transposed", "an input of a transposed convolution adds to many outputs"),
    ],
)
def test_layers_that_cannot_be_rounded_together_say_why(name: str, reason: str) -> None:
    transposed = "(float[1,3,5,5] x) => (float[1,4,7,7] y) { y = ConvTranspose (x, w) }"
    model = build(transposed, w=random(3, 4, 3, 3)) if name == "transposed" else LAYERS[name]()
    _, remarks = quantized(model, rounding="gptq")
    assert refusals(remarks) == [f"weights rounded to nearest: {reason}"]
    assert rounded(remarks) == []


def test_weights_with_several_readers_are_not_rounded_for_one_of_them() -> None:
    model = build(
        "(float[4,16] x) => (float[4,16] y) { a = MatMul (x, w)  r = Relu (a)  y = MatMul (r, w) }", w=random(16, 16)
    )
    _, remarks = quantized(model, rounding="gptq")
    assert refusals(remarks) == ["weights rounded to nearest: 'w_quantized' has several readers"] * 2


def test_weights_on_the_grid_have_nothing_to_gain() -> None:
    model = build("(float[4,8] x) => (float[4,2] y) { y = Gemm <transB=1> (x, w) }", w=np.full((2, 8), 127, np.float32))
    _, remarks = quantized(model, rounding="gptq")
    assert refusals(remarks) == ["weights rounded to nearest: rounded together they do no better"]


def avx2() -> Target:
    """The host target as on a machine whose kernels add two products in int16."""
    return load_target("host").model_copy(update={"isa": ("x86_64", "avx2")})


@pytest.mark.parametrize("name", ["conv", "gemm", "gemm transposed"])
def test_no_pair_of_weights_saturates(name: str) -> None:
    model = LAYERS[name]()
    result, remarks = quantized(model, mixed(model), target=avx2(), rounding="gptq")
    stored = constant(result.graph.initializers["w_quantized"])
    assert stored is not None
    rows = np.moveaxis(stored, 1, -1).reshape(len(stored), -1) if stored.ndim == 4 else stored
    rows = rows.T if name == "gemm" else rows
    assert 64 < largest_pairs(rows).max() <= MOST_PAIR
    assert len(rounded(remarks)) + len(refusals(remarks)) == 1


@pytest.mark.parametrize(("most", "block_size"), [(32, 0), (32, 16), (32, 48), (64, 48), (40, 16), (1, 0)])
def test_wide_layers_are_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch, most: int, block_size: int) -> None:
    model = two_gemms()
    samples = mixed(model)
    options: dict[str, Any] = {"weight_bits": 4, "block_size": block_size}
    nearest, _ = quantized(model, samples, rounding="nearest", **options)
    monkeypatch.setattr(_reconstruct, "MOST_COLUMNS", most)
    result, _ = quantized(model, samples, rounding="gptq", **options)
    gained = decibels(*(power(model, each, "y", samples, EVERYWHERE) for each in (nearest, result)))
    assert gained > (0.5 if most > 1 else -0.1)


def test_results_are_the_same_bytes_in_every_process() -> None:
    here = Path(__file__).parent
    program = (
        f"import sys; sys.path.insert(0, {str(here)!r})\nfrom quantizing import quantized\nimport reconstructing as t\n"
        "m = t.two_gemms()\nprint(t.digest(quantized(m, t.mixed(m), rounding='gptq', weight_bits=4)[0]))"
    )
    seeded = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], env=seeded, capture_output=True, text=True, check=True)
    model = two_gemms()
    assert digest(quantized(model, mixed(model), rounding="gptq", weight_bits=4)[0]) == other.stdout.strip()
