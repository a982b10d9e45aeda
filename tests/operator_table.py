"""docs/coreml-operators.md: what every operator is written as in Core ML, and how ONNX's own tests of it end.

``python tests/operator_table.py`` brings its words up to date and runs the tests of operators that it lacks; with
``--all`` it runs all of them, in a few minutes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backend_nodes
from optkit_targets.coreml.lowering.table import table

PAGE = Path(__file__).parent.parent / "docs" / "coreml-operators.md"
DEPLOYMENTS = (15, 16, 17, 18)
HEADER = """# ONNX operators in Core ML

What optkit writes each operator of ONNX as in Core ML's MIL, and how ONNX's own tests of it end: lowered for iOS 18 in
float32, saved as a package, and run by optkit's interpreter of packages, not by Core ML. A refused test names its
reason; none fails. *From* is the first deployment target that takes every test that passes (iOS 15 is macOS 12, 16 is
13, 17 is 14, 18 is 15); where some tests pass on an older one too, that stands in brackets. The operations are those
that the tests need for iOS 18, without constants and changes of type.

Written by `python tests/operator_table.py`.

"""
COLUMNS = ("Operator", "How", "MIL operations", "From", "Passed", "Refused")
LEFT_OUT = frozenset({"const", "identity", "cast"})
# What a refusal's reason is cut to: the node's name, and what only this test's model has.
NOISE = (
    (r"^the model has forms that Core ML's MIL does not have: (?:\S+ \(\w+\): |output '\w+': )?", ""),
    (r"; .*$", ""),
    (r"^.*\.onnx: ", ""),
    (r"^the body '\w+' of (\w+) that produces .*$", r"a body of \1 has inputs without a type"),
    (r"^Core ML's inputs have at most 5 axes and at least one element: '\w+' has shape .*$", "empty or 6-axis inputs"),
)


@dataclass(frozen=True)
class Row:
    """One operator's line.

    Attributes:
        operator: ONNX's name.
        how: The first line of its lowering's docstring.
        operations: MIL operations.
        since: Deployment targets.
        passed: How many tests pass.
        refused: How many are refused, and why.
    """

    operator: str
    how: str
    operations: str
    since: str
    passed: int
    refused: str

    def __str__(self) -> str:
        """Return the line."""
        cells = (f"`{self.operator}`", self.how, self.operations, self.since, str(self.passed), self.refused)
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def how(operator: str) -> str:
    """Return what an operator's lowering says that it writes."""
    return (inspect.getdoc(table()[operator]) or "").splitlines()[0].replace("``", "`")


def row(operator: str) -> Row:
    """Run an operator's tests."""
    ends = backend_nodes.outcomes(operator)
    passed = {end.case for end in ends if end.verdict == "passed"}
    reasons = Counter(_short(end.reason) for end in ends if end.verdict == "refused")
    refused = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    operations, since = _forms([case for case in backend_nodes.cases().get(operator, []) if case.name in passed])
    return Row(operator, how(operator), operations, since, len(passed), refused)


def _short(reason: str) -> str:
    for pattern, text in NOISE:
        reason = re.sub(pattern, text, reason)
    return reason


def _forms(cases: list[Any]) -> tuple[str, str]:
    """Return the MIL operations that cases become, and the first deployment targets that have all, or some."""
    operations, taken = set[str](), Counter[int]()
    for case in cases:
        for deployment in DEPLOYMENTS:
            ready = backend_nodes.prepared(case, deployment)
            taken[deployment] += isinstance(ready, backend_nodes.Ready)
        program = backend_nodes.lowered(backend_nodes.prepared(case).model)
        operations |= {item.op_type for item in program.functions["main"].operations} - LEFT_OUT
    every = [deployment for deployment in DEPLOYMENTS if cases and taken[deployment] == len(cases)]
    some = [deployment for deployment in DEPLOYMENTS if taken[deployment]]
    since = f"iOS {every[0]}" if every else ""
    if every and some[0] < every[0]:
        since += f" ({some[0]})"
    return ", ".join(f"`{name}`" for name in sorted(operations)), since


def page(rows: list[Row]) -> str:
    """Return the whole page."""
    total = sum(row.passed for row in rows)
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    lines = "".join(f"{row}\n" for row in rows)
    return f"{HEADER}{len(rows)} operators, {total} tests pass.\n\n{head}{lines}"


def written() -> dict[str, list[str]]:
    """Return the page's lines as they stand, by operator: the cells after its name."""
    cells = [
        re.split(r"(?<!\\)\|", line)[1:-1]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line[:3] == "| `"
    ]
    return {each[0].strip(" `"): [cell.strip().replace(r"\|", "|") for cell in each[1:]] for each in cells}


def kept(operator: str, cells: list[str]) -> Row:
    """Return a line as it stands, with the words of today."""
    return Row(operator, how(operator), *cells[1:3], int(cells[3]), cells[4])


def main(arguments: list[str]) -> None:
    """Write the page: the tests of operators that are not on it are run, with ``--all`` or their names those again."""
    old = {} if arguments == ["--all"] else {op: cells for op, cells in written().items() if op not in arguments}
    rows = [kept(op, old[op]) if op in old else row(op) for op in backend_nodes.operators()]
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
