"""What a pass's tests need: golden before/after pairs in ONNX text, each side executed and compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optkit.dataset.samples import Samples, random_samples
from optkit.model.loading import load_text
from optkit.pipeline import LOSSY, Context, Pass, Pipeline

CASE, ARROW = "=====", "---"


@dataclass(frozen=True)
class Golden:
    """One case of a golden file.

    Attributes:
        title: The comment that opens the case.
        before: The model before the pass, ONNX text.
        after: The model after it; None: the pass must change nothing.
        missed: The messages of all ``missed`` remarks that the pass gives (``# missed: ...`` lines).
        options: Options of the pass (``# option: name = value`` lines).
        calibration: Smallest and largest value of calibration inputs, which are filled evenly between them
            (``# calibration: low, high``); None: the pass gets no calibration data.
    """

    title: str
    before: str
    after: str | None
    missed: tuple[str, ...]
    options: dict[str, str]
    calibration: tuple[float, float] | None = None


def read_golden(path: Path) -> list[Golden]:
    """Read a golden file: cases split by ``=====``, before and after by ``---``, comments opening each case."""
    cases = []
    for text in re.split(rf"^{CASE}.*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
        body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        before, *after = re.split(rf"^{ARROW}$", body, flags=re.MULTILINE)
        missed = tuple(c.removeprefix("missed:").strip() for c in comments if c.startswith("missed:"))
        options = dict(c.removeprefix("option:").split("=", 1) for c in comments if c.startswith("option:"))
        options = {key.strip(): value.strip() for key, value in options.items()}
        bounds = [c.removeprefix("calibration:").split(",") for c in comments if c.startswith("calibration:")]
        low_high = (float(bounds[0][0]), float(bounds[0][1])) if bounds else None
        title = next((c for c in comments if not c.startswith(("missed:", "option:", "calibration:"))), "untitled")
        cases.append(Golden(title, before.strip(), after[0].strip() if after else None, missed, options, low_high))
    return cases


def check_golden(case: Golden, pass_class: type[Pass], *, samples: int = 4) -> None:
    """Run the pass on the case's model, strictly, and compare with the expected model and remarks.

    The pipeline executes the model before and after and compares within the pass's declared effect; a second run of
    the pass must change nothing more.

    Raises:
        AssertionError: The result, a remark or the outputs differ from what the case expects.
    """
    pass_ = pass_class.model_validate(case.options)
    model = load_text(case.before)
    inputs = random_samples(model, samples)
    context = Context(calibration=None if case.calibration is None else _even(inputs, *case.calibration))
    Pipeline([pass_], strict=True).run(model, context, list(inputs))
    expected = load_text(case.after if case.after is not None else case.before)
    got, want = normal_text(model), normal_text(expected)
    assert got == want, f"{case.title}:\n--- expected\n{want}\n--- got\n{got}"
    applied = [remark for remark in context.remarks if remark.kind == "applied"]
    assert bool(applied) == (case.after is not None), f"{case.title}: applied remarks: {applied}"
    given = [remark.message for remark in context.remarks if remark.kind == "missed"]
    assert sorted(given) == sorted(case.missed), f"{case.title}: expected missed {list(case.missed)}, got {given}"
    if pass_.effect is not LOSSY:
        again = Context()
        Pipeline([pass_], strict=True).run(model, again, list(inputs))
        assert not [r for r in again.remarks if r.kind == "applied"], f"{case.title}: a second run changed it again"


def _even(samples: Samples, low: float, high: float) -> Samples:
    """Return samples of the same shapes whose floats go evenly from ``low`` to ``high``."""
    filled = [
        {
            name: np.linspace(low, high, array.size, dtype=array.dtype).reshape(array.shape)
            if array.dtype.kind == "f"
            else array
            for name, array in sample.items()
        }
        for sample in samples
    ]
    return Samples(filled)


def normal_text(model: ir.Model) -> str:
    """Return ONNX text in which names of values and nodes made by a pass do not matter: renamed in order."""
    copy = ir.from_proto(ir.to_proto(model))
    fixed = {value.name for value in [*copy.graph.inputs, *copy.graph.outputs]}
    for graph in copy.graphs():
        for number, value in enumerate(_values_in_order(graph)):
            if value.name not in fixed:
                value.name = f"v{number}" if graph is copy.graph else f"{graph.name}_v{number}"
            if value.producer() is not None and not value.is_graph_output():
                value.shape = value.type = None  # how much was inferred is not the pass's doing
        graph.metadata_props.clear()
    for node in copy.graph.all_nodes():
        node.name = None
        node.metadata_props.clear()
    return ir.to_onnx_text(copy)


def _values_in_order(graph: ir.Graph) -> Sequence[ir.Value]:
    seen: dict[int, ir.Value] = {}
    for node in graph:
        for value in [*node.inputs, *node.outputs]:
            if value is not None and value.graph is graph:
                seen.setdefault(id(value), value)
    for value in graph.initializers.values():
        seen.setdefault(id(value), value)
    return list(seen.values())


def assert_close(a: np.ndarray, b: np.ndarray, rtol: float) -> None:
    """Assert ``max|a - b| <= rtol * max|a|``."""
    from optkit.evaluate.fidelity import relative_error

    error = relative_error(a, b)
    assert error <= rtol, f"relative error {error:.3g} exceeds {rtol:g}"
