"""Names of precisions: what they mean, what a target makes of them, and what it says of those it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.errors import InputError
from optkit.precision import Precision, block_sizes, values_for
from optkit.target import Target, load_target

BOARD = """
inherits = "cortex-a53"
name = "board"
[weights.int4]
granularity = ["block", "channel"]
block_size = [32, 128]
[weights.int3]
dtype = "int4"
symmetric = true
[precisions]
w4a16 = [{ pass = "quantize-static", options = { percentile = "{block}", range_method = "{granularity}" } }]
w4a16-lut = [{ pass = "quantize-static", options = { percentile = "{block}" } }]
w3a16 = [{ pass = "quantize-static", options = { percentile = "{weight_bits}" } }]
"""


@pytest.fixture
def board(tmp_path: Path) -> Target:
    return load(tmp_path, BOARD)


def load(folder: Path, text: str) -> Target:
    path = folder / "board.toml"
    path.write_text(text, encoding="utf-8")
    return load_target(str(path))


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("w8a8", Precision("w8a8", 8, 8)),
        ("w4a16-b32", Precision("w4a16", 4, 16, block=32)),
        ("w2a16-c", Precision("w2a16", 2, 16, per_channel=True)),
        ("w4a16-lut", Precision("w4a16", 4, 16, lut=True)),
        ("w4a16-c-lut", Precision("w4a16", 4, 16, lut=True, per_channel=True)),
        ("fp16", Precision("fp16", 16, 16)),
        ("bf16", Precision("bf16", 16, 16)),
        ("fp32", Precision("fp32", 32, 32)),
    ],
)
def test_names_are_read(name: str, parsed: Precision) -> None:
    assert Precision.parse(name) == parsed
    assert Precision.parse(str(parsed)) == parsed


@given(st.integers(1, 32), st.integers(1, 32), st.booleans(), st.one_of(st.none(), st.integers(1, 4096)), st.booleans())
def test_every_name_reads_back(weight: int, activation: int, lut: bool, block: int | None, channel: bool) -> None:
    made = Precision(f"w{weight}a{activation}", weight, activation, lut, block, channel and block is None)
    assert Precision.parse(str(made)) == made
    assert Precision.parse(made.base).base == made.base


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("int8", "'int8' is neither a float type nor bits of weights and activations"),
        ("w08a8", "'w08a8' is neither"),
        ("", "'' is neither"),
        ("w4a16-x", "'-x' is none of -b32 (block size), -c (per channel), -lut (palettes)"),
        ("w4a16-b0", "'-b0' is none of"),
        ("w4a16-", "'-' is none of"),
        ("w4a16-b32-b64", "'-b64' repeats what is said already"),
        ("w4a16-b32-c", "'-b' and '-c' exclude each other"),
        ("fp16-c", "'fp16' takes no suffix, and '-c' is one"),
    ],
)
def test_a_malformed_name_is_said(board: Target, name: str, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        Precision.parse(name)
    assert sentence in str(error.value)
    with pytest.raises(InputError) as error:
        board.precision(name or "w4a16-")
    assert "it offers " in str(error.value)
    assert "w4a16-lut" in str(error.value)


def test_an_unknown_precision_lists_what_there_is(board: Target) -> None:
    with pytest.raises(InputError) as error:
        board.precision("w4a17-b32")
    assert str(error.value).startswith("target 'board' has no precision 'w4a17'; did you mean 'w4a16'")
    assert str(error.value).endswith(f"it offers {', '.join(board.precisions)}")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("w4a16-b48", "target 'board' takes no blocks of 48 for 4-bit weights; it takes -b32, -b128"),
        ("w8a8-b32", "'w8a8' takes no block size on target 'board'; blocks are for "),
        ("w3a16-c", "'w3a16' takes no scale per channel on target 'board'"),
    ],
)
def test_a_suffix_that_the_target_does_not_take_is_said(board: Target, name: str, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        board.precision(name)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("w4a16", {"percentile": 32, "range_method": "block"}),
        ("w4a16-b128", {"percentile": 128, "range_method": "block"}),
        ("w4a16-c", {"percentile": 0, "range_method": "channel"}),
        ("w4a16-lut", {"percentile": 0}),
        ("w4a16-lut-b8", {"percentile": 8}),
        ("w4a16-lut-c", {"percentile": 1}),
        ("w3a16", {"percentile": 3}),
    ],
)
def test_suffixes_fill_the_placeholders_of_options(board: Target, name: str, options: dict[str, object]) -> None:
    assert dict(board.recipe_for(name)[-1].options) == options


def test_what_a_suffix_may_name(board: Target) -> None:
    assert block_sizes(Precision.parse("w4a16"), board) == (32, 128)
    assert block_sizes(Precision.parse("w3a16"), board) == ()
    assert values_for(Precision.parse("w5a16"), board)["block"] == 0
    assert str(board.precision("w8a8-c")) == "w8a8-c"  # one scale per channel is what w8a8 does here


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ('w4a16-b32 = [{ pass = "quantize-static" }]', "'w4a16-b32' must be keyed by its base name, 'w4a16'"),
        ('fast = [{ pass = "quantize-static" }]', "'fast': 'fast' is neither a float type"),
    ],
)
def test_a_table_with_another_key_is_refused(tmp_path: Path, table: str, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path, f'inherits = "host"\n[precisions]\n{table}\n')
    assert sentence in str(error.value)


def test_an_unknown_placeholder_is_said(tmp_path: Path) -> None:
    text = 'w4a16 = [{ pass = "quantize-static", options = { percentile = "{blok}" } }]'
    target = load(tmp_path, f'inherits = "host"\n[precisions]\n{text}\n')
    with pytest.raises(InputError, match=r"the option 'percentile' = \"\{blok\}\" names no placeholder; known: "):
        target.recipe_for("w4a16")


@pytest.mark.parametrize(
    ("isa", "level"), [('["neon"]', 0), ('["neon", "asimddp"]', 4), ('["avx2"]', 4), ('["sse4_2"]', 0)]
)
def test_products_in_int8_only_where_the_isa_is_fast_at_them(tmp_path: Path, isa: str, level: int) -> None:
    target = load(tmp_path, f'inherits = "host"\ndetect = false\nisa = {isa}\n')
    assert {target.weights[name].accuracy_level for name in ("int8", "int4", "int2")} == {level}


@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a72", "cortex-a76", "host"])
def test_every_precision_of_a_device_builds(name: str) -> None:
    from optkit.recipe import build_passes

    target = load_target(name)
    for precision in target.precisions:
        found = target.precision(precision)
        assert build_passes(target.recipe_for(found)) is not None
        for size in block_sizes(found, target):
            assert build_passes(target.recipe_for(f"{precision}-b{size}"))
