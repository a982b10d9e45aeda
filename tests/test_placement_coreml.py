"""Where Core ML is likely to run each node: every constraint fires on a small model and not on its neighbour."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from ane_constraint_cases import CASES, H13, H14, H15, H16, IMAGE, model, one
from optkit.errors import InputError
from optkit.package.contract import Placement
from optkit.target import Target, load_target
from optkit_targets.coreml import constraints, operator_constraints
from optkit_targets.coreml.limits import limits_of
from optkit_targets.coreml.placement import ENGINE, OTHER, place
from optkit_targets.coreml.placement_page import page


def placed(what: ir.Model, name: str = H16) -> list[Placement]:
    return place(what, load_target(name))


@pytest.mark.parametrize("name", CASES)
def test_a_constraint_fires_on_a_model_and_not_on_its_neighbour(name: str) -> None:
    rule = getattr(operator_constraints, name, None) or getattr(constraints, name)
    for bad, bad_chip, good, good_chip in CASES[name]:
        refused = placed(bad, bad_chip)[-1] if name != "body" else placed(bad, bad_chip)[0]
        assert (refused.device, refused.supported) == (OTHER, False)
        assert refused.reason.startswith(f"{rule.sentence} (")
        assert refused.reason.endswith(f") [{', '.join(rule.sources)}]")
        taken = placed(good, good_chip)
        assert {(p.device, p.supported) for p in taken} == {(ENGINE, True)}, taken


def test_every_constraint_is_held_and_has_a_case() -> None:
    names = [rule.check.__name__ for rule in operator_constraints.ALL]
    assert sorted(names) == sorted([*CASES, "float32"])
    assert len(set(names)) == len(names)


def test_every_source_is_cited_and_every_citation_has_a_source() -> None:
    cited = {source for rule in operator_constraints.ALL for source in rule.sources}
    assert cited == set(constraints.SOURCES)


def test_no_operator_is_both_plain_and_refused_on_every_generation() -> None:
    never = ("LSTM", "ScatterND", "NonZero", "And", "ReduceProd", "OneHot", "Tan", "RandomNormal", "CumSum")
    assert not set(never) & operator_constraints.PLAIN


def test_the_page_is_current() -> None:
    path = Path(__file__).parents[1] / "docs" / "ane-placement.md"
    assert path.read_text(encoding="utf-8") == page(), "run: python -m optkit_targets.coreml.placement_page > docs/..."


def test_a_program_in_float32_stays_off_the_engine() -> None:
    kept = one("y = Relu (x)")
    kept.metadata_props["optkit.float"] = "float32"
    (found,) = placed(kept)
    assert (found.device, found.precision) == (OTHER, "float32")
    assert found.reason.startswith("Floats must be computed in fp16: what is kept in float32 is for the CPU and GPU (")


def test_where_passes_chose_types_only_float32_stays_off_the_engine() -> None:
    mixed = model(
        "float16[4] x",
        "float16[4] y",
        "a = Relu (x) w = Cast <to = 1> (a) b = Exp (w) c = Cast <to = 10> (b) y = Abs (c)",
    )
    assert [(p.op_type, p.device == ENGINE, p.precision) for p in placed(mixed)] == [
        ("Relu", True, "float16"),
        ("Cast", True, "float16"),
        ("Exp", False, "float32"),
        ("Cast", True, "float32"),
        ("Abs", True, "float16"),
    ]


def test_outputs_that_nothing_uses_are_not_looked_at() -> None:
    dropped = model(f"{IMAGE} x", f"{IMAGE} y", "y, unused = Dropout (x)")
    dropped.graph.node(0).outputs[1].shape = None
    assert placed(dropped)[0].device == ENGINE


def test_nodes_in_bodies_are_placed_too() -> None:
    found = placed(CASES["body"][0][0])
    assert [p.op_type for p in found] == ["If", "Relu", "Abs"]
    assert [p.reason.partition(" (")[2].partition(")")[0] for p in found] == ["If has a body", "in a body", "in a body"]


def test_an_offset_slice_of_the_last_axis_warns_where_it_saturates() -> None:
    cut = one(
        "y = Slice (x, s, e, a)",
        y="float[1,4,8,6]",
        constants="int64[1] s = {2}, int64[1] e = {8}, int64[1] a = {3}",
    )
    assert "4094" in placed(cut, H13)[0].reason
    assert "4094" in placed(cut, H14)[0].reason
    assert "4094" not in placed(cut, H15)[0].reason
    start = one(
        "y = Slice (x, s, e, a)",
        y="float[1,4,8,6]",
        constants="int64[1] s = {0}, int64[1] e = {6}, int64[1] a = {3}",
    )
    assert "4094" not in placed(start, H13)[0].reason
    split = model(f"{IMAGE} x", "float[1,4,8,4] y, float[1,4,8,4] z", "y, z = Split <axis = -1, num_outputs = 2> (x)")
    assert "4094" in placed(split, H13)[0].reason


QUANTIZED = model(
    "float[1,4] x",
    "float[1,2] y",
    """
    xq = QuantizeLinear (x, s, z)
    xd = DequantizeLinear (xq, s, z)
    wd = DequantizeLinear (w, s)
    y = MatMul (xd, wd)
    """,
    constants="float s = {0.1}, uint8 z = {128}, int8[4,2] w = {1,2,3,4,5,6,7,8}",
)


@pytest.mark.parametrize(("chip", "precision"), [(H13, "float16"), (H15, "float16"), (H16, "int8")])
def test_integers_are_multiplied_from_generation_16_on(chip: str, precision: str) -> None:
    found = {p.op_type: p for p in placed(QUANTIZED, chip)}
    assert found["MatMul"].precision == precision
    assert {p.device for p in found.values()} == {ENGINE}
    assert found["QuantizeLinear"].precision == "-"


def test_only_products_are_said_to_be_multiplied() -> None:
    pooled = model(
        "float[1,1,4,4] x",
        "float[1,1,2,2] y",
        """
        xq = QuantizeLinear (x, s, z)
        xd = DequantizeLinear (xq, s, z)
        p = MaxPool <kernel_shape = [3,3]> (xd)
        pq = QuantizeLinear (p, s, z)
        y = DequantizeLinear (pq, s, z)
        """,
        constants="float s = {0.1}, uint8 z = {128}",
    )
    found = {p.op_type: p for p in placed(pooled)}
    assert found["MaxPool"].precision == "float16"
    assert found["QuantizeLinear"].reason == "converts between floats and 8-bit integers"


@pytest.mark.parametrize(("chip", "expanded"), [(H13, True), (H14, False)])
def test_constants_say_whether_they_are_read_as_stored(chip: str, expanded: bool) -> None:
    weight = next(p for p in placed(QUANTIZED, chip) if "constant" in p.reason)
    assert ("expanded to fp16" in weight.reason) == expanded


def test_blocks_and_palettes_of_constants() -> None:
    blocks = model(
        "float[1,4] x",
        "float[1,2] y",
        "wd = DequantizeLinear <axis = 0, block_size = 2> (w, s) y = MatMul (x, wd)",
        constants="float[2,2] s = {1,1,1,1}, int8[4,2] w = {1,2,3,4,5,6,7,8}",
    )
    assert "expanded to fp16 before generation 15" in placed(blocks, H14)[0].reason
    assert "read as they are stored" in placed(blocks, H15)[0].reason
    palette = model(
        "float[1,2] x",
        "float[1,2] y",
        "i = Cast <to = 6> (k) w = Gather (lut, i) y = MatMul (x, w)",
        constants="float[4] lut = {1,2,3,4}, uint8[2,2] k = {0,1,2,3}",
    )
    plain = placed(palette, H13)
    assert [p.device for p in plain] == [ENGINE] * 3
    for node in list(palette.graph)[:2]:
        node.metadata_props["optkit.lut_bits"] = "2"
    assert "palettes are read as they are stored" in placed(palette, H13)[1].reason


def test_a_target_without_limits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('inherits = "host"\nname = "mine"\n', encoding="utf-8")
    with pytest.raises(
        InputError, match=r"'mine' does not say what its Neural Engine holds: 'options\.limits\.generation'"
    ):
        limits_of(load_target(str(path)))


def test_a_limit_needs_a_source(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('inherits = "apple-m1-ane"\n[options.limits]\nmax_rank = { value = 4 }\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"'options\.limits\.max_rank\.source'"):
        limits_of(load_target(str(path)))


def test_limits_can_be_set_on_the_command_line() -> None:
    target: Target = load_target("apple-a17-ane:options.limits.max_rank=3")
    assert place(one("y = Relu (x)"), target)[0].device == OTHER
