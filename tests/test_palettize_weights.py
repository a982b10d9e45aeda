"""Weights as look-up tables in a graph: what is written, read back, computed, and left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.dataset.samples import Samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.graph import constant, names
from optkit.model.loading import load, save
from optkit.pipeline import Context, Pipeline
from optkit.quant.moments import second_moments
from optkit.quant.palette import LUT_BITS_KEY, Palette, index_type, palette_of, write_palette
from optkit.recipe import PRECISION_KEY
from optkit.session import run_samples
from optkit_passes.quantization._palettes import even_channels
from optkit_passes.quantization.palettize_weights import PalettizeWeights
from palettizing import palettes, palettized
from pass_runs import create, messages, op_types
from quantizing import HEADER, LAYERS, build, inputs_of, random

NEWEST = '<ir_version: 13, opset_import: ["" : 25]>'
GEMM = "(float[4,16] x) => (float[4,24] y) { y = Gemm (x, w, b) }"
TABLE = "(int64[1,3] t) => (float[1,3,8] y) { y = Gather (w, t) }"


def replaced(model: ir.Model, weights: dict[str, np.ndarray]) -> ir.Model:
    """Return the model with other weights."""
    copy = model.clone()
    for name, array in weights.items():
        copy.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return copy


@pytest.mark.parametrize("name", [name for name in LAYERS if "activations" not in name])
@pytest.mark.parametrize("channels", [0, 3])
def test_every_layer_computes_what_its_palette_says(name: str, channels: int) -> None:
    model = LAYERS[name]()
    result, applied, missed = palettized(model, bits=2, channels_per_lut=channels, weighted=False)
    assert (len(applied), missed) == (1, [])
    (palette,) = palettes(result)
    stored = model.graph.initializers["w"]
    weight = constant(stored)
    assert weight is not None
    assert palette.weight.shape == weight.shape
    assert palette.weight.dtype == weight.dtype
    assert np.abs(palette.weight - weight).max() < np.abs(weight).max()
    fresh = inputs_of(model, 2, seed=5)
    expected = run_samples(replaced(model, {"w": palette.weight}), fresh)
    for optimize in (False, True):
        for a, b in zip(expected, run_samples(result, fresh, optimize=optimize), strict=True):
            assert np.allclose(a["y"], b["y"], atol=1e-5)
    assert "w" not in result.graph.initializers


@pytest.mark.parametrize(
    ("bits", "header", "stored", "width"),
    [
        (1, NEWEST, "UINT2", "2 bits"),
        (2, NEWEST, "UINT2", ""),
        (3, NEWEST, "UINT4", "4 bits"),
        (4, NEWEST, "UINT4", ""),
        (6, NEWEST, "UINT8", "8 bits"),
        (8, NEWEST, "UINT8", ""),
        (2, NEWEST.replace("25", "21").replace("13", "10"), "UINT4", "4 bits"),
        (4, HEADER, "UINT8", "8 bits"),
    ],
)
def test_indices_take_the_narrowest_type_of_the_opset(
    bits: int, header: str, stored: str, width: str, tmp_path: Path
) -> None:
    model = build(GEMM.replace("24", "201"), header=header, w=random(16, 201), b=random(201))
    result, applied, _ = palettized(model, bits=bits, channels_per_lut=100, weighted=False)
    indices = result.graph.initializers["w/indices"]
    assert indices.dtype is not None
    assert indices.dtype.name == stored
    assert (f"stores such indices in {width}" in applied[0]) == bool(width)
    (palette,) = palettes(result)
    assert palette.lut.shape == (3, 1 << bits)
    assert (palette.bits, palette.axis, palette.channels_per_lut) == (bits, 1, 100)
    weights = [v.const_value for name, v in result.graph.initializers.items() if name.startswith("w/")]
    assert palette.stored_bytes(result.opset_imports[""]) == sum(t.nbytes for t in weights if t is not None)
    assert f"{16 * 201 * 4} bytes become {palette.stored_bytes(result.opset_imports[''])}" in applied[0]
    (path,) = save(result, tmp_path / "model.onnx")
    (again,) = palettes(load(path))
    assert np.array_equal(again.weight, palette.weight)
    assert np.array_equal(again.indices, palette.indices)


def test_float16_weights_have_float16_luts() -> None:
    w = random(16, 24).astype(np.float16)
    text = "(float16[4,16] x) => (float16[4,24] y) { y = MatMul (x, w) }"
    model = build(text, w=w)
    context = Context()
    PalettizeWeights(bits=3, weighted=False).run(model, context)
    (palette,) = palettes(model)
    assert palette.lut.dtype == np.float16
    sample = {"x": random(4, 16).astype(np.float16)}
    (found,), (expected,) = run_samples(model, [sample]), run_samples(build(text, w=palette.weight), [sample])
    assert np.array_equal(found["y"], expected["y"])


def test_calibration_weighs_what_large_inputs_are_multiplied_with() -> None:
    scales = np.geomspace(0.01, 10, 32, dtype=np.float32)
    w = random(32, 24) / scales[:, None] ** 0.5
    model = build("(float[4,32] x) => (float[4,24] y) { y = MatMul (x, w) }", w=w)
    samples = [{"x": sample["x"] * scales} for sample in inputs_of(model, 16)]
    plain, _, none = palettized(model, samples, bits=3, weighted=False)
    weighted, _, _ = palettized(model, samples, bits=3)
    fresh = [{"x": sample["x"] * scales} for sample in inputs_of(model, 8, seed=7)]
    reference = run_samples(model, fresh)
    quality = [compare(reference, run_samples(each, fresh)).sqnr_db for each in (plain, weighted)]
    assert none == []
    assert quality[1] > quality[0] + 3


@pytest.mark.parametrize("name", [name for name in LAYERS if "activations" not in name])
def test_every_layer_can_be_weighted(name: str) -> None:
    model = LAYERS[name]()
    _, applied, missed = palettized(model, inputs_of(model, 2), bits=2)
    assert missed == []
    assert "unweighted" not in applied[0]


def test_moments_are_means_over_all_samples() -> None:
    model = build("(float[N,3,4] x) => (float[N,3,4] y) { a = Relu (x)  y = Neg (a) }")
    samples = [{"x": random(n, 3, 4, seed=n)} for n in (1, 2, 0, 5)]
    found = second_moments(model, [("x", 1), ("a", -1), ("a", -1)], samples)
    together = np.concatenate([sample["x"] for sample in samples]).astype(np.float64)
    assert np.allclose(found["x", 1], (together**2).mean(axis=(0, 2)))
    assert np.allclose(found["a", -1], (np.maximum(together, 0) ** 2).mean(axis=(0, 1)))
    assert second_moments(model, [("x", 1)], [samples[2]]) == {}


def test_bad_calibration_is_refused() -> None:
    model = build(GEMM, w=random(16, 24), b=random(24))
    nan = [{"x": np.full((4, 16), np.nan, np.float32)}]
    for samples, sentence in (
        (nan, "tensor 'x' has NaN values"),
        ([], "palettize-weights needs calibration data and the data given holds no samples"),
        ([{"z": nan[0]["x"]}], "it has no array for input 'x'"),
    ):
        with pytest.raises(InputError, match=sentence):
            palettized(model, samples)


def test_without_calibration_it_says_so() -> None:
    _, applied, missed = palettized(build(GEMM, w=random(16, 24), b=random(24)), bits=2)
    assert missed == ["no data was given: all weights of a layer count the same"]
    assert "a runtime without LUTs expands them when it loads the model" in applied[0]


def test_a_layer_that_calibration_does_not_see_is_unweighted() -> None:
    model = build(
        "(float[4,16] x, bool c) => (float[4,16] y) { m = MatMul (x, v)  y = If (c) <then_branch = then () => "
        "(float[4,16] p) { p = MatMul (m, w) }, else_branch = other () => (float[4,16] q) { q = Neg (m) }> }",
        v=random(16, 16),
        w=random(16, 16),
    )
    context = Context(calibration=Samples([{"x": random(4, 16), "c": np.array(True)}]))
    PalettizeWeights(bits=2).run(model, context)
    seen, unseen = (remark.message for remark in context.remarks)
    assert "unweighted" not in seen
    assert "unweighted, since calibration does not see what they are multiplied with" in unseen
    assert len(palettes(model)) == 2


def test_rules_keep_layers_and_everything_tied_to_them() -> None:
    model = build(
        "(float[4,8] x, int64[3] t) => (float[4,40] y, float[3,8] e) "
        "{ r = Transpose <perm=[1,0]> (w)  y = MatMul (x, r)  e = Gather (w, t) }",
        w=random(40, 8),
    )
    tied = model.clone()
    node = next(node for node in tied.graph if node.op_type == "Gather")
    node.metadata_props[PRECISION_KEY] = "fp32"
    pass_ = create("palettize-weights", bits=2, weighted=False)
    assert messages(tied, pass_) == [f"kept in float by a rule (fp32) at '{node.name}'"] * 2
    assert palettes(tied) == []
    applied = messages(model, pass_, kind="applied")
    assert len(applied) == 2
    assert applied[1] == "shares the LUT of 'w' with 'MatMul_0'"
    assert len(palettes(model)) == 1
    assert op_types(model)["Cast"] == 1
    alone = build(GEMM, w=random(16, 24), b=random(24))
    alone.graph[0].metadata_props[PRECISION_KEY] = "fp16"
    assert messages(alone, pass_) == ["kept in float by a rule (fp16)"]


def test_a_weight_that_is_an_output_too_stays() -> None:
    model = build(GEMM, w=random(16, 24), b=random(24))
    model.graph.outputs.append(model.graph.initializers["w"])
    assert messages(model, create("palettize-weights", weighted=False)) == ["'w' is an output of the model too"]


def test_a_weight_beside_nan_is_refused() -> None:
    w = random(40, 8)
    w[3, 3] = np.nan
    with pytest.raises(InputError, match="not finite and no LUT has") as error:
        palettized(build(TABLE, w=w), weighted=False)
    assert error.value.where == "tensor 'w'"


def test_a_second_run_changes_nothing() -> None:
    model = build(GEMM, w=random(16, 24), b=random(24))
    pass_ = create("palettize-weights", bits=2, weighted=False)
    assert len(messages(model, pass_, kind="applied")) == 1
    assert messages(model, pass_, kind="applied") == []
    assert messages(model, pass_) == ["its weights have a LUT already"]


def test_quantized_weights_stay() -> None:
    model = build(
        "(float[4,16] x) => (float[4,24] y) { w = DequantizeLinear (q, s)  y = MatMul (x, w) }",
        q=np.ones((16, 24), np.int8),
        s=np.array(0.5, np.float32),
    )
    assert messages(model, create("palettize-weights", weighted=False)) == ["its weights are already quantized"]


@pytest.mark.parametrize("change", ["mark", "bits", "lut", "indices", "offset", "channels", "op"])
def test_what_is_no_palette_any_more_is_not_read_as_one(change: str) -> None:
    model = build("(float[4,6] x) => (float[4,6] y) { y = Neg (x) }")
    palette = Palette(random(3, 4), np.arange(24).reshape(4, 6).astype(np.uint8) % 4, 2, 1, 2)
    value = write_palette(model.graph[0], "w", palette, 17, names(model))
    gather = value.producer()
    assert gather is not None
    found = palette_of(gather)
    assert found is not None
    assert np.array_equal(found.weight, palette.weight)
    if change == "mark":
        del gather.metadata_props[LUT_BITS_KEY]
    elif change == "bits":
        gather.metadata_props[LUT_BITS_KEY] = "none"
    elif change in ("lut", "indices"):
        gather.replace_input_with(0 if change == "lut" else 1, model.graph.inputs[0])
    elif change == "op":
        assert palette_of(model.graph[-1]) is None
        assert palette_of(None) is None
        return
    else:
        add = gather.inputs[1].producer()  # type: ignore[union-attr]  # it has two inputs
        offset = np.array([[0, 0, 4, 4, 8, 8]] if change == "channels" else [[4, 4, 0, 0, 8, 8]], np.int32)
        offset[0, -1] -= 8 * (change == "channels")
        add.inputs[1].const_value = ir.tensor(offset, name="w/offset")  # type: ignore[union-attr]
    assert palette_of(gather) is None


def test_index_types() -> None:
    assert [index_type(bits, 24).bitwidth for bits in range(1, 9)] == [4, 4, 4, 4, 8, 8, 8, 8]
    assert [index_type(bits, 20).bitwidth for bits in (1, 4, 8)] == [8, 8, 8]


def test_options_out_of_range_are_refused() -> None:
    for options in ({"bits": 9}, {"bits": 0}, {"channels_per_lut": -1}):
        with pytest.raises(ValueError, match=r"(less|greater) than or equal"):
            PalettizeWeights.model_validate(options)


def test_weights_in_files_and_other_passes_after_it(tmp_path: Path) -> None:
    model = build(GEMM, w=random(16, 24), b=random(24))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded = load(tmp_path / "m.onnx")
    passes = [create("palettize-weights", bits=2, weighted=False)]
    passes += [create(name) for name in ("fold-constants", "eliminate-duplicates", "prune-metadata")]
    Pipeline(passes, strict=True).run(loaded, Context(), inputs_of(model, 2))
    (palette,) = palettes(loaded)
    assert palette.weight.shape == (16, 24)
    assert messages(loaded, create("fold-constants")) == [
        "folding would expand a weight that is stored as indices into a LUT"
    ]


def test_a_real_model(shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "resnet20_cifar10" / "resnet20_cifar10.onnx"
    model = load(path)
    samples = inputs_of(model, 2)
    reference = run_samples(model, samples)
    context = Context()
    PalettizeWeights(bits=8, weighted=False).run(model, context)
    assert compare(reference, run_samples(model, samples)).sqnr_db > 30
    (saved,) = save(model, tmp_path / "m.onnx")
    assert saved.stat().st_size < 0.35 * path.stat().st_size


@pytest.mark.parametrize(
    ("count", "wanted", "found"),
    [(64, 16, 16), (100, 16, 20), (1001, 16, 13), (30522, 16, 6), (101, 16, 0), (6, 16, 6), (3, 16, 0), (1, 1, 1)],
)
def test_even_luts_serve_a_divisor_of_the_channels(count: int, wanted: int, found: int) -> None:
    assert even_channels(count, wanted) == found


@pytest.mark.parametrize(("channels", "luts"), [(60, 4), (61, 1)])
def test_even_luts_have_no_short_last_block(channels: int, luts: int) -> None:
    model = build(f"(float[2,64] x) => (float[2,{channels}] y) {{ y = MatMul (x, w) }}", w=random(64, channels))
    result, _, missed = palettized(model, bits=2, channels_per_lut=16, even=True, weighted=False)
    assert missed == []
    assert [len(palette.lut) for palette in palettes(result)] == [luts]
