"""Models compiled for the Apple Neural Engine: how close the saved package is, how small, and how long it takes.

    python benchmarks/apple.py SHARED [--models NAME ...] [--precisions fp32 fp16 ...] [--samples 400]
    python benchmarks/apple.py SHARED --precisions w4a16-lut --set palettize-weights.average_bits=3.5
    python benchmarks/apple.py SHARED --recipe examples/small_for_apple/pruned.toml --precisions w4a16-lut

SHARED holds models and labelled data (docs/data.md); the extra [ane] must be installed. Every figure is of the saved
package, run by an interpreter of MIL: not a device. *error* is the largest relative error of any output against
onnxruntime in float32; the metric is that of the labels, its drop with the 95 % interval of a paired bootstrap.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from static_models import SUBJECTS, Subject

import optkit
from optkit.dataset.samples import read_samples
from optkit.errors import OptkitError
from optkit.model.loading import load
from optkit.package.running import open_artifact
from optkit.report.contents import Report
from optkit.report.summary import Gates
from optkit.session import Session

TARGET = "apple-a17-ane"
PRECISIONS = ("fp32", "fp16", "w8a16", "w4a16-lut", "w4a16", "w8a8")
COLUMNS = "model | precision | of fp32 | error | SQNR, dB | metric | drop (95 %) | n | iOS | seconds"


def compiled(
    shared: Path, name: str, subject: Subject, precision: str, goal: Path, samples: int, **extra: Any
) -> tuple[Report, float]:
    """Compile a model, and return the report and the seconds it took, evaluation included."""
    start = time.perf_counter()
    report = optkit.compile(
        subject.path(shared, name),
        target=TARGET,
        output=goal,
        precision=precision,
        calibration=None if precision == "fp32" else subject.calibration_data(shared),
        evaluation=subject.evaluation_data(shared, samples),
        preprocess=subject.spec,
        metrics=(subject.metric,) if subject.metric else (),
        dims=dict(subject.dims),
        fixed=dict(subject.fixed),
        gates=Gates(min_coverage=0.0),
        **extra,
    )
    return report, time.perf_counter() - start


def largest_error(shared: Path, name: str, subject: Subject, goal: Path) -> float:
    """Return the largest difference from the original, relative to each output's largest value, on two samples."""
    model = load(subject.path(shared, name), dict(subject.dims), dict(subject.fixed))
    samples = list(read_samples(subject.evaluation_data(shared, 2), model, preprocess=subject.spec, inputs_only=True))
    session = Session(model)
    _, artifact, (executor, *_) = open_artifact(goal)
    worst = 0.0
    for sample, found in zip(samples, executor.load(artifact)(samples), strict=True):
        for key, array in session.run(sample).items():
            scale = float(np.abs(array).max()) or 1.0
            worst = max(worst, float(np.abs(found[key].astype(np.float64) - array).max()) / scale)
    return worst


def row(shared: Path, name: str, precision: str, samples: int, **extra: Any) -> str:
    """Return one row of the table; ``extra`` goes to `optkit.compile`."""
    subject = SUBJECTS[name]
    with tempfile.TemporaryDirectory() as scratch:
        goal = Path(scratch) / name
        try:
            report, seconds = compiled(shared, name, subject, precision, goal, samples, **extra)
        except OptkitError as error:
            return f"{name} | {precision} | refused: {error}"
        error = largest_error(shared, name, subject, goal)
    run = report.executions[0]
    needs = next(fact.value for fact in report.facts if fact.name == "needs").partition(",")[0]
    cells = [name, precision, f"{report.artifact_bytes / report.source_bytes:.1%}", f"{error:.1e}"]
    cells.append(f"{run.fidelity.sqnr_db:.1f}")
    if run.accuracy:
        found = run.accuracy[0]
        low, high = found.interval
        cells.append(f"{found.metric} {found.reference:.4f} -> {found.candidate:.4f}")
        cells += [f"{found.drop:+.4f} ({low:+.4f} to {high:+.4f})", str(found.n)]
    else:
        cells += ["no labels", "-", str(run.fidelity.samples)]
    return " | ".join([*cells, needs.removeprefix("iOS "), f"{seconds:.1f}"])


def main() -> int:
    """Print a row for every model and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--set", nargs="+", default=[], metavar="PASS.OPTION=VALUE")
    parser.add_argument("--recipe", type=Path)
    wanted = parser.parse_args()
    given = dict(text.split("=", 1) for text in wanted.set)
    options = {name: value.split(",") if "," in value else value for name, value in given.items()}
    extra = {"options": options, "recipe": wanted.recipe}
    print(COLUMNS)
    for name in wanted.models:
        for precision in wanted.precisions:
            print(row(wanted.shared, name, precision, wanted.samples, **extra), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
