"""Palettes rounded together, fitted, and given different bits: what that is worth, and what it keeps to."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.pipeline import Context
from optkit.quant.lut_rounding import fit_entries
from optkit.session import run_samples
from optkit_passes.quantization._palette_bits import allocate
from optkit_passes.quantization.palettize_weights import PalettizeWeights
from palettizing import palettes, palettized
from quantizing import build, inputs_of, random

GEMM = "(float[4,16] x) => (float[4,24] y) { y = Gemm (x, w, b) }"
CHAIN = "(float[8,32] x) => (float[8,32] y) { a = MatMul (x, u) b = Relu (a) c = MatMul (b, v) y = MatMul (c, w) }"


def test_rounding_together_loses_less_than_nearest_entries() -> None:
    model = build(CHAIN, u=random(32, 32), v=random(32, 32, seed=1), w=random(32, 32, seed=2))
    mixing = random(32, 32, seed=9) @ np.diag(np.geomspace(3, 0.05, 32).astype(np.float32))
    samples, fresh = ([{"x": each["x"] @ mixing} for each in inputs_of(model, 24, seed=seed)] for seed in (1, 2))
    expected = run_samples(model, fresh)
    for channels in (0, 8):
        for bits in (2, 4):
            found = [
                palettized(model, samples, bits=bits, channels_per_lut=channels, rounding=rounding)[0]
                for rounding in ("nearest", "gptq")
            ]
            nearest, together = (compare(expected, run_samples(each, fresh)).sqnr_db for each in found)
            assert together > nearest + 1.5


LAYERS = {
    "depthwise": ("(float[2,12,9,9] x) => (float[2,12,7,7] y) { y = Conv <group = 12> (x, w, b) }", (12, 1, 3, 3), 12),
    "grouped": ("(float[2,12,9,9] x) => (float[2,8,7,7] y) { y = Conv <group = 2> (x, w, b) }", (8, 6, 3, 3), 8),
    "dense": ("(float[2,6,9,9] x) => (float[2,8,7,7] y) { y = Conv (x, w, b) }", (8, 6, 3, 3), 8),
    "gemm": ("(float[9,16] x) => (float[9,24] y) { y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) }", (16, 24), 24),
    "matmul": ("(float[3,9,16] x) => (float[3,9,24] y) { a = MatMul (x, w) y = Add (b, a) }", (16, 24), 24),
    "one for all": ("(float[9,16] x) => (float[9,24] y) { y = Gemm (x, w, b) }", (16, 24), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_biases_make_up_for_the_mean_error(name: str) -> None:
    text, shape, values = LAYERS[name]
    model = build(text, w=random(*shape), b=random(values, seed=1))
    samples = [{"x": 1 + each["x"] @ np.diag(np.linspace(1, 2, each["x"].shape[-1]))} for each in inputs_of(model, 16)]
    samples = [{"x": each["x"].astype(np.float32)} for each in samples]
    expected, channel = run_samples(model, samples), 1 if "Conv" in text else -1
    found, applied, lost = {}, {}, {}
    for rounding, corrected in (("nearest", True), ("gptq", False), ("gptq", True)):
        options = {"bits": 2, "rounding": rounding, "bias_correction": corrected}
        result, (applied[rounding, corrected],), _ = palettized(model, samples, **options)
        outputs = run_samples(result, samples)
        found[rounding, corrected] = compare(expected, outputs).sqnr_db
        errors = [np.moveaxis(a["y"] - b["y"], channel, 0) for a, b in zip(outputs, expected, strict=True)]
        lost[rounding, corrected] = np.abs(
            np.concatenate([e.reshape(len(e), -1) for e in errors], axis=1).mean(axis=1)
        ).max()
    assert found["gptq", True] > found["gptq", False] + 0.2 > found["nearest", True] + 0.4
    assert lost["gptq", True] < 1e-4 < lost["gptq", False]
    assert ["; bias corrected by up to " in message for message in applied.values()] == [False, False, True]


def test_a_bias_that_others_read_stays_theirs() -> None:
    text = "(float[9,16] x) => (float[9,24] y, float[24] z) { y = Gemm (x, w, b) z = Neg (b) }"
    model = build(text, w=random(16, 24), b=random(24, seed=1))
    samples = [{"x": 1 + each["x"]} for each in inputs_of(model, 8)]
    result, (message,), _ = palettized(model, samples, bits=2)
    assert "bias corrected" in message
    outputs = run_samples(result, samples[:1])
    np.testing.assert_array_equal(outputs[0]["z"], -random(24, seed=1))


@pytest.mark.parametrize(
    "text",
    [
        "(float[9,16] x) => (float[9,24] y) { y = Gemm (x, w) }",
        "(float[9,16] x) => (float[9,24] y) { a = Gemm <beta = 0.0> (x, w, b) y = Add (a, b) }",
        "(float[9,16] x) => (float[9,24] y, float[9,24] a) { a = MatMul (x, w) y = Add (a, b) }",
        "(float[9,16] x) => (float[9,24] y) { a = MatMul (x, w) y = Sub (a, b) }",
        "(float[9,16] x, float[24] c) => (float[9,24] y) { a = MatMul (x, w) d = Add (c, b) y = Add (a, d) }",
        "(float[9,16] x) => (float[9,24] y) { y = Gemm (x, w, c) }",
    ],
)
def test_without_a_bias_for_each_channel_there_is_no_correction(text: str) -> None:
    constants = {"w": random(16, 24), "b": random(24), "c": random(9, 1)}
    model = build(text, **{name: array for name, array in constants.items() if f", {name}" in text})
    samples = inputs_of(model, 8)
    _, (message,), _ = palettized(model, samples, bits=2)
    assert "bias corrected" not in message


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 2), st.integers(2, 10), st.sampled_from([0, 1]))
def test_fitted_entries_are_the_least_squares(seed: int, rows: int, groups: int, columns: int, fixed: int) -> None:
    generator = np.random.default_rng(seed)
    rows *= groups
    weight, x = generator.standard_normal((rows, columns)), generator.standard_normal((groups, 40, columns))
    indices = generator.integers(0, 4, (rows, columns)).astype(np.uint8)
    block = np.arange(rows) // 2
    luts = np.sort(generator.standard_normal((block[-1] + 1, 4)), axis=1)
    luts[:, :fixed] = 0
    moments = x.swapaxes(1, 2) @ x
    found = fit_entries(weight, luts, indices, block, [(slice(None), moments, moments)], fixed=fixed)

    def error(entries: np.ndarray) -> float:
        lost = weight - entries[block[:, None], indices]
        own = lost.reshape(groups, -1, columns)
        return float(((own @ moments) * own).sum())

    assert np.array_equal(found[:, :fixed], luts[:, :fixed])
    assert error(found) <= error(luts) * (1 + 1e-9)
    for _ in range(5):
        change = generator.standard_normal(found.shape) * 0.01
        change[:, :fixed] = 0
        assert error(found) <= error(found + change) * (1 + 1e-4) + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(2.05, 6))
def test_mixed_bits_keep_to_their_average(seed: int, count: int, average: float) -> None:
    generator = np.random.default_rng(seed)
    sizes = [int(size) for size in generator.integers(5_000, 100_000, count)]
    errors = [
        {bits: float(e) for bits, e in zip((2, 4, 6), 10 ** -generator.uniform(0, 4, 3), strict=True)} for _ in sizes
    ]
    found = allocate(sizes, [1] * count, errors, average)
    taken = sum(size * bits + 16 * (1 << bits) for size, bits in zip(sizes, found, strict=True))
    assert taken <= average * sum(sizes)
    assert found == allocate(sizes, [1] * count, errors, average)


def test_mixed_bits_go_to_the_weights_that_need_them() -> None:
    even = {2: 1.0, 4: 0.1}
    assert allocate([10_000] * 4, [1] * 4, [even, {2: 9.0, 4: 0.1}, even, {2: 0.2, 4: 0.1}], 3.1) == [2, 4, 4, 2]
    assert allocate([10_000] * 2, [1] * 2, [even, even], 8) == [4, 4]
    with pytest.raises(InputError, match=r"an average of 2 bits a weight cannot be met: the fewest take 2\.01"):
        allocate([10_000], [1], [even], 2)


def test_mixed_bits_in_a_model() -> None:
    model = build(CHAIN, u=random(32, 32), v=random(32, 32, seed=1) * 0.001, w=random(32, 32, seed=2))
    model.graph.initializers["v"].const_value = ir.tensor(np.eye(32, dtype=np.float32), name="v")
    result, applied, missed = palettized(model, inputs_of(model, 6), bits=8, average_bits=3.6, choices=(2, 4))
    assert missed == []
    assert [palette.bits for palette in palettes(result)] == [4, 2, 4]  # two values suit 2 bits
    assert "2-bit indices" in applied[1]


@pytest.mark.parametrize("options", [{"average_bits": 2}, {"average_bits": 3, "choices": (4, 6)}])
def test_averages_that_no_choice_meets_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="needs choices of fewer"):
        PalettizeWeights.model_validate(options)


def test_mixed_bits_need_calibration_data() -> None:
    model = build(GEMM, w=random(16, 24), b=random(24))
    with pytest.raises(InputError, match="average_bits needs calibration data and none was given"):
        PalettizeWeights(average_bits=3).run(model, Context())
