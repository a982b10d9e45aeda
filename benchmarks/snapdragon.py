"""Models compiled for Snapdragon NPUs: what runs there, how accurate it is on the emulator, and how long it takes.

    python benchmarks/snapdragon.py SHARED [--models NAME ...] [--precisions w8a8 w8a16 ...] [--samples 400]

SHARED holds the models and labelled data of docs/data.md; the extra [qnn] must be installed. Every model is compiled
as `optkit compile` does it, once without evaluation for the time, whose share in the vendor's compiler is that of the
whole process that runs it, and twice for the context binaries' digests; the accuracy is that of the emulator on the
labelled data, the first target's chip, against float32. The emulator's times say nothing about a phone.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from static_models import SUBJECTS, Subject

import optkit
from optkit.report.contents import Report
from optkit_targets.qnn import runtime

MODELS = (
    "squeezenet1_1", "mobilenet_v1_075", "resnet20_cifar10", "resnet56_cifar10", "mnist_burn_cnn", "ultraface_rfb320",
    "sst2_relu_encoder", "relu_lm",
)  # fmt: skip
TARGETS = ("snapdragon-8gen3-npu", "snapdragon-8gen2-npu", "snapdragon-8-elite-npu")


@dataclass
class Spent:
    """Seconds in the vendor's processes."""

    seconds: float = 0.0


@contextmanager
def watched() -> Iterator[Spent]:
    """Count the seconds that this process waits for the vendor's compiler: all that goes through one function."""
    spent, ask = Spent(), runtime.Child.ask

    def counted(child: runtime.Child, method: str, **arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return ask(child, method, **arguments)
        finally:
            spent.seconds += time.perf_counter() - start if method in ("compile", "assign") else 0.0

    runtime.Child.ask = counted  # type: ignore[method-assign]  # for the time of one compilation
    try:
        yield spent
    finally:
        runtime.Child.ask = ask  # type: ignore[method-assign]


def compiled(shared: Path, subject: Subject, name: str, precision: str, goal: Path, samples: int) -> Report:
    """Compile a model for all targets; with ``samples`` to evaluate on, for the first one only."""
    return optkit.compile(
        subject.path(shared, name),
        target=TARGETS[:1] if samples else TARGETS,
        output=goal,
        precision=precision,
        calibration=subject.calibration_data(shared),
        evaluation=subject.evaluation_data(shared, samples) if samples else None,
        preprocess=subject.spec,
        dims=dict(subject.dims),
    )


def digests(goal: Path) -> dict[str, str]:
    """Return the digest of every context binary in a package, by its folder."""
    binaries = sorted(goal.glob("model/*/*.bin"))
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in binaries}


def row(shared: Path, name: str, precision: str, samples: int) -> str:
    """Return one row of the table."""
    subject = SUBJECTS[name]
    with tempfile.TemporaryDirectory() as scratch:
        goals = [Path(scratch) / str(number) for number in range(3)]
        start = time.perf_counter()
        with watched() as spent:
            report = compiled(shared, subject, name, precision, goals[0], 0)
        seconds = time.perf_counter() - start
        compiled(shared, subject, name, precision, goals[1], 0)
        measured = compiled(shared, subject, name, precision, goals[2], samples)
        first, second = digests(goals[0]), digests(goals[1])
    npu = next(each for each in report.placement.devices if each.device == "npu")
    emulated, simulated = (
        next(run for run in measured.executions if run.kind == kind) for kind in ("emulated", "simulated")
    )
    between = measured.deployment.between
    cells = [
        name,
        precision,
        f"{len(first)}{'' if first == second else ' DIFFERENT BYTES'}",
        f"{npu.node_share:.1%} / {npu.macs_share:.1%}",
        f"{simulated.fidelity.sqnr_db:.1f}",
        f"{between.sqnr_db:.1f}" if between is not None else "-",
        f"{emulated.fidelity.sqnr_db:.1f}",
    ]
    if emulated.accuracy:
        found = emulated.accuracy[0]
        low, high = found.interval
        cells += [
            f"{found.metric} {found.reference:.4f} -> {found.candidate:.4f}",
            f"{found.drop:+.4f} ({low:+.4f} to {high:+.4f})",
            str(found.n),
        ]
    else:
        cells += ["no labels", "-", str(emulated.fidelity.samples)]
    return " | ".join([*cells, f"{seconds:.1f}", f"{spent.seconds / seconds:.0%}"])


def main() -> int:
    """Print a row for every model and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(SUBJECTS))
    parser.add_argument("--precisions", nargs="+", default=["w8a8", "w8a16"])
    parser.add_argument("--samples", type=int, default=400)
    wanted = parser.parse_args()
    print(
        "model | precision | binaries | nodes / MACs on the NPU | SQNR float32 to QDQ | QDQ to HTP | float32 to HTP | "
        "metric on HTP | drop (95 %) | n | seconds | of them in the vendor's compiler"
    )
    for name in wanted.models:
        for precision in wanted.precisions:
            print(row(wanted.shared, name, precision, wanted.samples), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
