"""The golden harness reads its files, and fails on a wrong result, a wrong remark and a pass that never settles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import VerificationError
from optkit.pipeline import Context, Pass
from optkit.testing import Golden, assert_close, check_golden, read_golden

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
NEG = HEAD + "main (float[2] x) => (float[2] y) { y = Neg (x) }"
NEG_RENAMED = HEAD + "main (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) y = Neg (b) }"
ABS = HEAD + "main (float[2] x) => (float[2] y) { y = Abs (x) }"


class Refuse(Pass):
    """Refuses everything."""

    reason: str = "not today"

    def run(self, model: ir.Model, context: Context) -> None:
        context.missed(model.graph[0], self.reason)


class NegToAbs(Pass):
    """Replaces ``Neg`` with ``Abs``, which is wrong."""

    def run(self, model: ir.Model, context: Context) -> None:
        for node in model.graph:
            if node.op_type == "Neg":
                node.op_type = "Abs"
                context.applied(node, "wrong")


class AddPair(Pass):
    """Negates the result twice more, every time it runs."""

    def run(self, model: ir.Model, context: Context) -> None:
        last = model.graph[-1]
        for _ in range(2):
            node = ir.node("Neg", [last.inputs[0]])
            model.graph.insert_before(last, node)
            last.replace_input_with(0, node.outputs[0])
        context.applied(last, "again")


def golden(before: str, after: str | None = None, missed: tuple[str, ...] = (), **options: str) -> Golden:
    return Golden("case", before, after, missed, options)


def test_a_file_is_split_into_cases_with_titles_remarks_and_options(tmp_path: Path) -> None:
    path = tmp_path / "refuse.txt"
    path.write_text(
        f"# first\n{NEG}\n---\n{ABS}\n=====\n# second\n# missed: a: b\n# option: reason = a: b\n"
        f"# calibration: -1, 2.5\n{NEG}\n"
    )
    first, second = read_golden(path)
    assert (first.title, first.before, first.after, first.missed) == ("first", NEG, ABS, ())
    assert (second.title, second.after, second.missed, second.options) == (
        "second",
        None,
        ("a: b",),
        {"reason": "a: b"},
    )
    assert (first.calibration, second.calibration) == (None, (-1.0, 2.5))


def test_a_refusal_is_checked_word_for_word() -> None:
    check_golden(golden(NEG, missed=("not today",)), Refuse)
    check_golden(golden(NEG, missed=("never",), reason="never"), Refuse)
    with pytest.raises(AssertionError, match=r"expected missed \['another'\], got \['not today'\]"):
        check_golden(golden(NEG, missed=("another",)), Refuse)
    with pytest.raises(AssertionError, match=r"expected missed \[\], got \['not today'\]"):
        check_golden(golden(NEG), Refuse)


def test_a_result_that_is_not_the_expected_one_fails() -> None:
    with pytest.raises(AssertionError, match="--- expected"):
        check_golden(golden(NEG, ABS), Refuse)


def test_a_wrong_result_fails_although_the_text_is_as_expected() -> None:
    with pytest.raises(VerificationError, match="moved an output by"):
        check_golden(golden(NEG, ABS), NegToAbs)


def test_names_of_inner_values_do_not_matter_and_a_pass_must_settle() -> None:
    with pytest.raises(AssertionError, match="a second run changed it again"):
        check_golden(golden(NEG, NEG_RENAMED), AddPair)


def test_close_is_relative_to_the_largest_value() -> None:
    assert_close(np.array([100.0, 0.0]), np.array([100.0, 0.05]), rtol=1e-3)
    with pytest.raises(AssertionError, match=r"relative error 0\.0005 exceeds 0\.0001"):
        assert_close(np.array([100.0, 0.0]), np.array([100.0, 0.05]), rtol=1e-4)
