"""The pass against its golden file: each pair is compared as text, and both sides are executed."""

from __future__ import annotations

from pathlib import Path

import pytest
from div_to_mul import DivToMul

from optkit.authoring.conformance import check_pass
from optkit.plugins import pass_class
from optkit.testing import Golden, check_golden, read_golden

CASES = read_golden(Path(__file__).with_name("div_to_mul.txt"))


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_golden(case: Golden) -> None:
    check_golden(case, DivToMul)


def test_optkit_finds_it_by_its_entry_point() -> None:
    assert pass_class("div-to-mul") is DivToMul


def test_conformance() -> None:
    assert {result.check: result.problem for result in check_pass("div-to-mul") if result.problem} == {}
