"""ONNX's own tests of the operators in the table of lowerings, and the page that tells how they end."""

from __future__ import annotations

import pytest

import backend_nodes
import operator_table
from optkit_targets.coreml.lowering.table import table

FLOOR = 1200  # tests that must pass, of all operators together


def test_page_lists_every_operator_and_what_its_lowering_says():
    written = operator_table.written()
    assert list(written) == sorted(table()), "run: python tests/operator_table.py"
    assert {op: cells[0] for op, cells in written.items()} == {op: operator_table.how(op) for op in table()}


def test_page_claims_no_less_than_the_floor():
    assert sum(int(cells[3]) for cells in operator_table.written().values()) >= FLOOR


def test_cells_of_the_page_may_hold_bars():
    row = operator_table.Row("Add", "a | b", "`add`", "iOS 15", 1, "")
    assert str(row) == r"| `Add` | a \| b | `add` | iOS 15 | 1 |  |"


def test_lines_are_kept_but_for_their_words():
    written = operator_table.written()
    rows = [operator_table.kept(operator, cells) for operator, cells in written.items()]
    assert operator_table.page(rows) == operator_table.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("operator", sorted(table()))
def test_no_test_of_onnx_fails_and_as_many_pass_as_the_page_says(operator):
    ends = backend_nodes.outcomes(operator)
    assert [end for end in ends if end.verdict == "failed"] == []
    assert all(end.reason for end in ends if end.verdict == "refused")
    passed = sum(end.verdict == "passed" for end in ends)
    assert passed >= int(operator_table.written()[operator][3])
