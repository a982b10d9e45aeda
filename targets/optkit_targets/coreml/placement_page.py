"""The page docs/ane-placement.md, written from the constraints: ``python -m optkit_targets.coreml.placement_page``."""

from __future__ import annotations

import sys
import textwrap

from optkit.target import load_target
from optkit_targets.coreml.constraints import REJECTED, SOURCES
from optkit_targets.coreml.limits import Limits, limits_of
from optkit_targets.coreml.operator_constraints import ALL, PLAIN

GENERATIONS = {
    "13 (A14, M1)": "apple-m1-ane",
    "14 (A15, M2)": "apple-m2-ane",
    "15 (A16, M3)": "apple-m3-ane",
    "16 (A17 Pro, A18, M4)": "apple-m4-ane",
}
HEAD = """# Where a node is likely to run on Apple's devices

Written by `python -m optkit_targets.coreml.placement_page` from the constraints themselves; do not edit.

Core ML decides on the device which nodes its Neural Engine (ANE) runs, and Apple documents no rule. `optkit check` and
the report say `likely ANE` where no constraint of this page stands against a node, and `likely GPU/CPU` with the
constraint and its sources where one does. Neither says that a node ran there: Xcode's performance report and
`MLComputePlan` do, on the device. Core ML may also leave a node to the GPU or CPU because its neighbours are there.
"""


def page() -> str:
    """Return the page."""
    parts = [HEAD, "## Constraints\n", "| A node is likely to run elsewhere, since | sources |\n| --- | --- |"]
    parts += [f"| {constraint.sentence}. | {', '.join(constraint.sources)} |" for constraint in ALL]
    parts += ["", "## Limits by generation\n", *_limits()]
    parts += ["", "## Operators without a constraint of their own\n", _wrapped(sorted(PLAIN))]
    parts += ["## Said elsewhere, and not held against a node\n"]
    parts += [f"* {what}: {why}." for what, why in REJECTED.items()]
    parts += ["", "## Sources\n", *(f"* `{key}`: {text}" for key, text in SOURCES.items())]
    return "\n".join(parts) + "\n"


def _limits() -> list[str]:
    found = [limits_of(load_target(name)) for name in GENERATIONS.values()]
    rows = [f"| limit | {' | '.join(GENERATIONS)} |", "| --- |" + " ---: |" * len(found)]
    for name in Limits.model_fields:
        if name != "generation":
            numbers = [getattr(limits, name) for limits in found]
            rows.append(f"| {name} | {' | '.join(f'{q.value:g} ({q.status})' for q in numbers)} |")
    return rows


def _wrapped(names: list[str]) -> str:
    return "\n".join(textwrap.wrap(", ".join(names), 118)) + ".\n"


if __name__ == "__main__":
    sys.stdout.write(page())
