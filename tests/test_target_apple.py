"""Apple's Neural Engines as targets: their numbers, what tells them apart, and what the formats are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from optkit.cost.roofline import Work, price_all
from optkit.cost.summary import cost_summary
from optkit.errors import InputError
from optkit.model.loading import load, load_text
from optkit.plugins import pass_class
from optkit.target import Target, load_target, target_names
from optkit_targets.coreml.limits import limits_of
from optkit_targets.coreml.placement import ENGINE, place
from test_target import quantities

GENERATION = {
    "apple-a14-ane": 13,
    "apple-a15-ane": 14,
    "apple-a16-ane": 15,
    "apple-a17-ane": 16,
    "apple-a18-ane": 16,
    "apple-m1-ane": 13,
    "apple-m2-ane": 14,
    "apple-m3-ane": 15,
    "apple-m4-ane": 16,
}
ENGINES = sorted(GENERATION)
TIMED = {"apple-a14-ane", "apple-a16-ane", "apple-a17-ane"}
LUT_BITS = (8, 6, 4, 3, 2, 1)


@pytest.fixture(scope="module")
def phone() -> Target:
    return load_target("apple-a17-ane")


def test_there_are_nine() -> None:
    assert [name for name in target_names() if name.endswith("-ane")] == ENGINES


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_says_what_it_is_and_where_its_numbers_come_from(name: str) -> None:
    target = load_target(name)
    assert (target.name, target.packager, target.static_shapes) == (name, "coreml", True)
    assert target.opset.max == 23
    assert target.isa == (f"ane-h{GENERATION[name]}",)
    assert limits_of(target).generation.value == GENERATION[name]
    assert list(target.memory) == ["sram", "tiled", "dram"]
    numbers = [*quantities(target), *quantities(limits_of(target))]
    assert len(numbers) > 25
    assert all(len(number.source) > 10 for number in numbers)


def test_the_shortest_name_is_the_a17s(phone: Target) -> None:
    assert load_target("apple-ane") == phone


@pytest.mark.parametrize("base", ["coreml-ane", "ane-h13", "ane-h14", "ane-h15", "ane-h16"])
def test_bases_are_no_devices(base: str) -> None:
    assert base not in target_names()
    with pytest.raises(InputError, match="is a base for other targets"):
        load_target(base)


def test_newer_generations_hold_no_less() -> None:
    limits = [limits_of(load_target(name)) for name in ("apple-m1-ane", "apple-m2-ane", "apple-m3-ane", "apple-m4-ane")]
    for key in type(limits[0]).model_fields:
        found = [getattr(each, key).value for each in limits]
        assert found == sorted(found), key
    assert [each.max_dimension.value for each in limits] == [16384, 16384, 16384, 65536]


@pytest.mark.parametrize("name", ENGINES)
def test_every_precision_has_passes_that_exist(name: str) -> None:
    target = load_target(name)
    luts = [f"w{bits}a16-lut" for bits in LUT_BITS]
    assert list(target.precisions) == ["fp16", "fp32", "w8a16", "w4a16", "w8a8", *luts]
    assert target.default_precision == "fp16"
    for precision in target.precisions:
        for spec in target.recipe_for(precision):
            pass_class(spec.pass_).model_validate(spec.options)
    for bits in LUT_BITS:
        (spec,) = [s for s in target.recipe_for(f"w{bits}a16-lut-b16") if s.pass_ == "palettize-weights"]
        assert spec.options == {"bits": bits, "channels_per_lut": 16, "even": True}


@pytest.mark.parametrize(("precision", "block"), [("w4a16", 32), ("w4a16-c", 0), ("w4a16-b64", 64), ("w8a16", 0)])
def test_blocks_of_weights(phone: Target, precision: str, block: int) -> None:
    (spec,) = [s for s in phone.recipe_for(precision) if s.pass_ == "quantize-weights"]
    assert spec.options["block_size"] == block


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_constants_are_standard_dequantize_nodes(phone: Target, name: str) -> None:
    found = phone.weights[name]
    assert (found.dtype, found.symmetric, found.operators) == (name, True, ("DequantizeLinear", "QDQ"))
    assert set(phone.activations) == {"int8"}
    assert (phone.activations["int8"].dtype, phone.activations["int8"].symmetric) == ("uint8", False)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_has_a_kernel_for_everything(name: str) -> None:
    target = load_target(name)
    last = target.kernel[-1]
    assert (last.op, last.kind, last.dtype, last.max_m, last.min_k) == ((), (), None, None, None)
    assert target.launch_seconds is not None
    half, whole = target.macs_per_cycle["float16"].value, target.macs_per_cycle["int8"].value
    assert whole == pytest.approx(half * (2 if GENERATION[name] == 16 else 1.4))


@pytest.mark.parametrize("name", ENGINES)
def test_an_error_band_stands_where_networks_were_timed(name: str) -> None:
    band = load_target(name).error_band
    assert (band is not None) == (name in TIMED)
    if band is not None:
        assert band.low < band.median < band.high
        assert band.samples >= 14
        assert "a family:" in band.source


def test_power_stands_where_it_was_measured() -> None:
    measured = {name for name in ENGINES if load_target(name).energy.active_watts is not None}
    assert measured == {"apple-m1-ane", "apple-m2-ane"}


def conv(dtype: str = "float16", k: int = 576, weight_bytes: int = 10**5) -> Work:
    return Work("c", "Conv", "conv", dtype=dtype, macs=10**9, weight_bytes=weight_bytes, m=10**4, n=10**3, k=k)


@pytest.mark.parametrize("line", ["apple-a{}-ane", "apple-m{}-ane"])
def test_newer_chips_are_faster(line: str) -> None:
    numbers = (14, 15, 16, 17) if "-a" in line[:8] else (1, 2, 3, 4)
    seconds = [price_all([conv()], load_target(line.format(n))).total.seconds for n in numbers]
    bare = [s - load_target(line.format(n)).launch_seconds.value for s, n in zip(seconds, numbers, strict=True)]  # type: ignore[union-attr]
    assert bare == sorted(bare, reverse=True)


def test_few_products_for_an_output_wait_for_their_activations(phone: Target) -> None:
    seconds = [price_all([conv(k=k)], phone).total.seconds for k in (1024, 200, 100, 50, 16)]
    assert seconds == sorted(seconds)


def test_weights_stream_as_they_are_stored(phone: Target) -> None:
    """OPT-1.3B, a token: 1.3 thousand million weights in 4 bits take 14.76 ms on A17 Pro (coremltools' guide)."""
    token = Work("g", "MatMul", "gemm", dtype="float16", macs=1_311_000_000, weight_bytes=655_000_000, m=1)
    assert price_all([token], phone).total.seconds == pytest.approx(14.76e-3, rel=0.1)


@pytest.mark.parametrize(
    ("side", "byte", "milliseconds"),
    [(2048, 2, 0.290), (2048, 1, 0.253), (4096, 2, 0.740), (4096, 1, 0.447), (8192, 2, 2.610), (8192, 1, 1.351)],
)
def test_single_products_take_what_was_measured_on_an_m2(side: int, byte: int, milliseconds: float) -> None:
    """The table of ane-guide's chapter 7, to which nothing was fitted; int8 weights are read as they are stored."""
    work = Work("g", "MatMul", "gemm", dtype="float16", macs=side**2, weight_bytes=byte * side**2, m=1, n=side, k=side)
    seconds = price_all([work], load_target("apple-m2-ane")).total.seconds
    assert 0.75 < milliseconds * 1e-3 / seconds < 1.25


MLP = load_text(
    """<ir_version: 10, opset_import: ["" : 21]> net (float[1,256] x) => (float[1,256] y)
    { h = MatMul (x, w) a = Relu (h) y = MatMul (a, w) }""".replace("x)", "x, float[256,256] w)", 1)
)


def test_floats_are_priced_in_half_width(phone: Target) -> None:
    found = cost_summary(MLP, phone)
    assert found.macs == 2 * 256 * 256
    assert "no peak for float32: priced as float16" in found.nodes[0].note


def test_a_mobile_network_costs_and_lies_where_it_should(shared: Path, phone: Target) -> None:
    """SqueezeNet 1.1 has 0.35 GMAC; Apple times MobileNetV2, 0.30 GMAC, at 0.49 ms on A17 Pro."""
    found = load(shared / "data" / "squeezenet1_1" / "squeezenet1_1.onnx")
    summary = cost_summary(found, phone)
    assert summary.low_seconds is not None
    assert summary.high_seconds is not None
    assert 0.1e-3 < summary.low_seconds < summary.high_seconds < 0.6e-3
    assert not summary.unpriced
    assert {p.device for name in ENGINES for p in place(found, load_target(name))} == {ENGINE}
