"""What the methods of weight-only quantization make of calibration data, and what they say about its absence."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optkit.dataset.samples import Samples, random_samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.pipeline import Context
from optkit.session import run_samples
from optkit_passes.quantization import _moments
from optkit_passes.quantization.quantize_weights import QuantizeWeights
from quantizing import build, random, transformer_block
from weight_runs import missed, product, quantize


def calibration(model: ir.Model, count: int = 64) -> Samples:
    """Inputs that vary along a few directions, as real ones do."""
    generator = np.random.default_rng(0)
    value = model.graph.inputs[0]
    shape = [int(dim) for dim in value.shape or ()]
    basis = generator.standard_normal((max(shape[-1] // 8, 1), shape[-1]))
    rows = [generator.standard_normal((*shape[:-1], len(basis))) @ basis for _ in range(count)]
    noise = [0.1 * generator.standard_normal(shape) for _ in range(count)]
    return Samples([{value.name or "": (a + b).astype(np.float32)} for a, b in zip(rows, noise, strict=True)])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("build_model", [product, transformer_block])
def test_gptq_beats_rounding_to_nearest(bits: int, build_model: Any) -> None:
    before = build_model()
    samples = calibration(before, 96)
    found = {}
    for method in ("rtn", "gptq"):
        model = before.clone()
        quantize(model, Samples(samples[:64]), bits=bits, method=method, block_size=16)
        found[method] = compare(run_samples(before, samples[64:]), run_samples(model, samples[64:])).sqnr_db
    assert found["gptq"] > found["rtn"] + 1


@pytest.mark.parametrize(
    "options",
    [{"bits": 4, "block_size": 16}, {"bits": 4, "block_size": 24}, {"bits": 8, "block_size": 0}],
    ids=["cut between blocks", "cut within blocks", "one scale per channel"],
)
def test_wide_inputs_are_fitted_in_pieces(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = product(k=144)
    samples = calibration(before, 96)
    found = {}
    for name, method, most in (("nearest", "rtn", 144), ("whole", "gptq", 144), ("pieces", "gptq", 143)):
        monkeypatch.setattr(_moments, "MOST_COLUMNS", most)
        monkeypatch.setattr(_moments, "PIECE", 64)
        model = before.clone()
        quantize(model, Samples(samples[:64]), method=method, form="DequantizeLinear", **options)
        found[name] = compare(run_samples(before, samples[64:]), run_samples(model, samples[64:])).sqnr_db
    assert found["whole"] != found["pieces"] > found["nearest"] + 1


CONVOLUTIONS = {
    "3x3": ((24, 12, 3, 3), ""),
    "1x1": ((48, 24, 1, 1), ""),
    "depthwise": ((24, 1, 3, 3), "<group = 24>"),
    "in two groups, strided": ((24, 12, 3, 3), "<group = 2, strides = [2, 2], pads = [1, 1, 1, 1]>"),
}


@pytest.mark.parametrize(
    "options", [{"bits": 4, "block_size": 8}, {"bits": 4, "block_size": 0}], ids=["blocks", "channels"]
)
@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_convolutions_are_fitted_and_their_biases_corrected(form: str, options: dict[str, Any]) -> None:
    shape, attributes = CONVOLUTIONS[form]
    channels = 24 if "group" in attributes else shape[1]
    text = (
        f"(float[1,{channels},9,9] x) => (float[1,{shape[0]},h,w] y) {{ a = Conv {attributes} (x, w, b) y = Relu (a) }}"
    )
    before = build(text, w=random(*shape), b=random(shape[0], seed=1))
    generator = np.random.default_rng(0)
    mix = generator.standard_normal((channels, channels)) * np.geomspace(2, 0.1, channels)
    smooth = generator.standard_normal((48, channels, 11, 11)).cumsum(axis=2).cumsum(axis=3)[..., 2:, 2:]
    samples = [{"x": (1 + np.einsum("chw,dc->dhw", each, mix))[None].astype(np.float32)} for each in smooth]
    found, given = {}, {}
    for method in ("rtn", "gptq"):
        model = before.clone()
        context = quantize(
            model, Samples(samples[:32]), method=method, min_elements=0, form="DequantizeLinear", **options
        )
        given[method] = [r.message for r in context.remarks if r.kind == "applied"]
        found[method] = compare(run_samples(before, samples[32:]), run_samples(model, samples[32:])).sqnr_db
    assert found["gptq"] > found["rtn"] + 1
    assert [any("bias corrected" in message for message in messages) for messages in given.values()] == [False, True]
    assert any("by gptq" in message for message in given["gptq"])


NORMED = """(float[3,7,64] x) => (float[3,7,16] y) {{
  n = {norm}  a = MatMul (n, w)  b = MatMul (n, v)  y = Mul (a, b)
}}"""
LAYER_NORM = "LayerNormalization (x, g, z)"


def normed(norm: str = LAYER_NORM) -> ir.Model:
    gain = np.ones(64, np.float32)
    gain[::16] = 30  # what AWQ is for: a few channels with large inputs
    given = {"g": gain, "z": random(64), "w": random(64, 16), "v": random(64, 16, seed=5)}
    return build(NORMED.format(norm=norm), **{k: a for k, a in given.items() if k != "z" or "z" in norm})


@pytest.mark.parametrize("norm", [LAYER_NORM, "Mul (x, g)", "Mul (g, x)"])
def test_awq_folds_input_scales_into_a_gain(norm: str) -> None:
    before = normed(norm)
    samples = Samples(list(random_samples(before, 24)))
    found = {}
    for method in ("rtn", "awq"):
        model = before.clone()
        context = quantize(model, Samples(samples[:16]), method=method)
        found[method] = compare(run_samples(before, samples[16:]), run_samples(model, samples[16:])).sqnr_db
    assert next(r.message for r in context.remarks if r.kind == "applied") == (
        "input scales of 2 products folded into 'g'"
    )
    assert found["awq"] > found["rtn"] + 1


def test_awq_says_where_scales_cannot_be_folded() -> None:
    for norm, reason in {
        "Sin (x)": "no input scales: 'Sin_0' (Sin) has no gain to take them",
        "Mul (x, x)": "no input scales: 'Mul_0' has no constant gain of one value per channel",
    }.items():
        model = build(NORMED.format(norm=norm), w=random(64, 16), v=random(64, 16, seed=5))
        samples = Samples(list(random_samples(model, 4)))
        assert missed(quantize(model, samples, method="awq")) == [reason] * 2
    model = product()
    assert missed(quantize(model, calibration(model, 4), method="awq")) == [
        "no input scales: its input is not computed in the main graph"
    ]


def test_few_samples_do_not_mislead_gptq() -> None:
    before = product(k=256)
    samples = Samples([{"x": a} for a in np.random.default_rng(0).standard_normal((12, 3, 7, 256)).astype(np.float32)])
    found = {}
    for method in ("rtn", "gptq"):
        model = before.clone()
        quantize(model, Samples(samples[:4]), method=method)
        found[method] = compare(run_samples(before, samples[4:]), run_samples(model, samples[4:])).sqnr_db
    assert found["gptq"] > found["rtn"] - 0.5


@pytest.mark.parametrize("method", ["minmax", "rtn", "hqq", "awq", "gptq"])
def test_methods_say_their_name(method: str) -> None:
    model = product()
    context = quantize(model, calibration(model, 4), method=method)
    assert [r.message for r in context.remarks if r.kind == "applied"] == [
        f"1920 weights in 4 bits, blocks of 32 and zero points, by {method}, as MatMulNBits"
    ]


def test_without_calibration_the_default_says_what_it_does() -> None:
    assert missed(quantize(product())) == ["none was given: weights are rounded to nearest, not fitted by gptq"]


def test_one_sample_is_said_to_be_few() -> None:
    model = product()
    assert missed(quantize(model, calibration(model, 1))) == ["one sample only: weights fitted to it may suit no other"]


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (None, "method 'gptq' needs calibration data and none was given"),
        ([], "method 'gptq' needs calibration data and the data given holds no samples"),
        ([{"x": np.full((3, 7, 80), np.nan, np.float32)}], "tensor 'x' has NaN values"),
        ([{"z": np.zeros(3, np.float32)}], "it has no array for input 'x'"),
        ([{"x": np.zeros((3, 7, 81), np.float32)}] * 2, "does not run|not the shape|inputs|dimension|Got"),
    ],
)
def test_bad_calibration_is_a_sentence(samples: list[dict[str, np.ndarray]] | None, sentence: str) -> None:
    model = build(
        "(float[3,7,80] x) => (float[3,7,24] y) { s = Sin (x)  p = MatMul (x, w)  q = MatMul (s, w)  y = Add (p, q) }",
        w=random(80, 24),
    )
    context = Context(calibration=None if samples is None else Samples(samples))
    with pytest.raises(InputError, match=sentence):
        QuantizeWeights(method="gptq").run(model, context)
