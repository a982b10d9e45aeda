"""Writes docs/snapdragon-support.md from the tables and the constraints: ``python -m optkit_targets.qnn.support``."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import onnx_ir as ir

from optkit_targets.qnn import constraints, operator_constraints
from optkit_targets.qnn.constraints import FLOAT_ARCH, GENERAL, Constraint
from optkit_targets.qnn.operators import (
    DOMAINS,
    OLD_FLOATS,
    OLD_MOVES,
    OLD_WITHOUT,
    OLD_WITHOUT_16,
    OPERATORS,
    Operator,
)

HEAD = f"""# What Snapdragon NPUs take

Written by `python -m optkit_targets.qnn.support > docs/snapdragon-support.md` from the tables and constraints that
`optkit check MODEL --target snapdragon-8gen3-npu` applies: what a row or a sentence here says is what it decides by.
Measured by compiling models of one operator with onnxruntime-qnn 2.7 (QNN 2.51) for architectures 68, 73, 75 and 79.

A node runs on the NPU if it meets every general constraint, and those of its operator. Between Q and DQ nodes that
form a complete unit, all inputs dequantized and the output quantized again, it runs in integers of 8 or 16 bits;
elsewhere floats run in fp16, from architecture {FLOAT_ARCH} on. Q and DQ nodes belong to their unit.

## General constraints
"""

COLUMNS = """
## Operators

Element types and ranks outside QDQ units, and of the integers inside them. `-`: no such form.

| operator | types | ranks | in a unit | ranks | further constraints |
| --- | --- | --- | --- | --- | --- |
"""

SENTENCES = """
## Constraints of operators
"""


def table() -> str:
    """Return the document."""
    lines = [HEAD, *(f"* {sentence(constraint)}" for constraint in GENERAL)]
    numbered = {constraint: index for index, constraint in enumerate(_specific(), start=1)}
    rows = (_row(row, numbered) for row in OPERATORS.values() if row.types or row.unit_types)
    lines += [COLUMNS.rstrip("\n"), *rows, SENTENCES]
    lines += [f"{index}. {sentence(constraint)}" for constraint, index in numbered.items()]
    lines += ["", f"## Before architecture {FLOAT_ARCH}", "", *_old()]
    return "\n".join(lines) + "\n"


def sentence(constraint: Constraint) -> str:
    """Return the sentence with which a constraint refuses."""
    return constraint.__doc__ or ""


def _specific() -> list[Constraint]:
    used = (each for name in OPERATORS for each in operator_constraints.BY_OPERATOR.get(name, ()))
    return list(dict.fromkeys((operator_constraints.constraint_constant_inputs, *used)))


def _row(row: Operator, numbered: dict[Constraint, int]) -> str:
    own = list(operator_constraints.BY_OPERATOR.get(row.name, ()))
    if row.name in operator_constraints.CONSTANT_INPUTS:
        own.insert(0, operator_constraints.constraint_constant_inputs)
    domain = next((f" ({name})" for name, known in DOMAINS.items() if row.name in known and _foreign(row.name)), "")
    cells = (
        row.name + domain,
        _types(row.types),
        _ranks(row.ranks) if row.types else "-",
        _types(row.unit_types),
        _ranks(row.unit_ranks) if row.unit_types else "-",
        ", ".join(str(numbered[constraint]) for constraint in own),
    )
    return "| " + " | ".join(cells) + " |"


def _foreign(name: str) -> bool:
    return name not in ("DequantizeLinear", "Gelu", "QuantizeLinear")


def _types(types: Iterable[ir.DataType]) -> str:
    names = {"FLOAT": "float32"}
    return ", ".join(sorted(names.get(kind.name, kind.name.lower()) for kind in types)) or "-"


def _ranks(ranks: tuple[int, int]) -> str:
    return str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]} to {ranks[1]}"


def _old() -> list[str]:
    return [
        f"* {constraints.constraint_floats.__doc__} Taken nevertheless: float32 where it is only moved "
        f"({_names(OLD_MOVES)}), and {_names(OLD_FLOATS)}.",
        f"* Not taken at all: {_names(OLD_WITHOUT)}; with 16 bits: {_names(OLD_WITHOUT_16)}.",
    ]


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


if __name__ == "__main__":
    sys.stdout.write(table())
