"""Finished packages: run one on the executor closest to its target, and check one against its own record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit import plugins
from optkit.dataset.samples import read_samples
from optkit.errors import InputError, OptkitError, did_you_mean
from optkit.evaluate.assess import choose_executors
from optkit.model.loading import dynamic_dims, load
from optkit.package.artifact import Package, check_hashes, open_package
from optkit.package.contract import Artifact, Executor
from optkit.target import load_target


@dataclass(frozen=True)
class OutputFacts:
    """One output over all samples: element type, shape of the first sample, smallest and largest value."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    minimum: float
    maximum: float


@dataclass(frozen=True)
class RunResult:
    """What running a package gave, on which executor, and why not on a closer one."""

    executor: str
    kind: str
    notice: str
    samples: int
    outputs: tuple[OutputFacts, ...]
    written: str = ""


@dataclass(frozen=True)
class PackageCheck:
    """One check of `optkit verify`."""

    name: str
    passed: bool
    detail: str


def open_artifact(directory: Path, target: str | None = None) -> tuple[Package, Artifact, list[Executor]]:
    """Return a package, its artifact, and what can run it here, closest to the target first.

    Args:
        directory: The package.
        target: Which of its targets; the first by default.

    Raises:
        InputError: The package cannot be used, or does not serve that target.
    """
    package = open_package(directory)
    toolchain = plugins.packager(package.provenance.packager)
    served = (package.provenance.target, *package.provenance.also)
    device = load_target(target or served[0])
    if device.name not in served:
        what = f"the package does not serve target '{device.name}'"
        raise InputError(what, where=str(directory), hint=did_you_mean(device.name, served))
    return package, toolchain.open(directory, package.manifest), toolchain.executors(device)


def load_model(path: Path, dims: Mapping[str, int] | None = None) -> ir.Model:
    """Load an ONNX file, or the model of a package; ``dims`` that a package has fixed already are passed over."""
    if not (path / "manifest.json").is_file():
        return load(path, dims)
    _, artifact, _ = open_artifact(path)
    model = load(artifact.directory / artifact.plain)
    left = {name: size for name, size in (dims or {}).items() if name in dynamic_dims(model)}
    return load(artifact.directory / artifact.plain, left) if left else model


def run_package(
    directory: Path,
    data: str,
    *,
    preprocess: Path | None = None,
    executor: str | None = None,
    target: str | None = None,
    output: Path | None = None,
) -> RunResult:
    """Run a package on samples.

    Args:
        directory: The package.
        data: Samples in any form that `optkit.dataset.samples.read_samples` takes.
        preprocess: How images become inputs, where the data does not say so.
        executor: ``native``, ``emulated`` or ``simulated``; the one closest to the target by default.
        target: Which of the package's targets; the first by default.
        output: Write the outputs of all samples there, an ``.npz`` with the samples along a new leading axis.

    Raises:
        InputError: The package or the data cannot be used, or outputs of different shapes cannot be written as one.
    """
    _, artifact, available = open_artifact(directory, target)
    chosen = choose_executors(available, executor)[0]
    samples = read_samples(data, load(artifact.directory / artifact.plain), preprocess=preprocess)
    results = chosen.load(artifact)(list(samples))
    outputs = tuple(
        OutputFacts(name, str(array.dtype), array.shape, *_range([result[name] for result in results]))
        for name, array in results[0].items()
    )
    found = RunResult(chosen.name, chosen.kind, chosen.notice, len(results), outputs)
    if output is None:
        return found
    if any(result[name].shape != array.shape for name, array in results[0].items() for result in results):
        raise InputError("outputs of different shapes cannot be written as one array", hint="run the samples singly")
    stacked: dict[str, Any] = {name: np.stack([result[name] for result in results]) for name in results[0]}
    try:
        np.savez(output, **stacked)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(output)) from error
    return replace(found, written=str(output))


def _range(arrays: list[np.ndarray]) -> tuple[float, float]:
    numbers = [array for array in arrays if array.size and array.dtype.kind in "fiub"]
    if not numbers:
        return float("nan"), float("nan")
    return float(min(array.min() for array in numbers)), float(max(array.max() for array in numbers))


def verify_package(directory: Path) -> list[PackageCheck]:
    """Check a package: every file's hash, that the artifact loads and runs, and that its report is the record's.

    Raises:
        InputError: The directory is no package.
    """
    package = open_package(directory)
    differences = check_hashes(package)
    names = ", ".join(f"{difference.path} is {difference.kind}" for difference in differences[:3])
    checks = [PackageCheck("hashes", not differences, names or f"{len(package.files)} files are as written")]
    try:
        opened = [open_artifact(directory, name) for name in (package.provenance.target, *package.provenance.also)]
        artifact, executors = opened[0][1], {each.name: each for _, _, found in opened for each in found}
        model = load(artifact.directory / artifact.plain)
    except OptkitError as error:
        return [*checks, PackageCheck("loads", False, str(error))]
    checks.append(PackageCheck("loads", True, f"{sum(1 for _ in model.graph.all_nodes())} nodes"))
    from optkit.dataset.samples import random_samples

    for executor in executors.values():
        try:
            executor.load(artifact)(list(random_samples(model, 1)))
            checks.append(PackageCheck("runs", True, f"on {executor.name}"))
        except OptkitError as error:
            checks.append(PackageCheck("runs", False, f"on {executor.name}: {error}"))
    return [*checks, _report_agrees(package)]


def _report_agrees(package: Package) -> PackageCheck:
    """Check that the report speaks of the model, target and artifact of the manifest."""
    try:
        report = json.loads((package.directory / "report.json").read_text(encoding="utf-8"))
        same = (report["model_sha256"], report["target"], report["precision"]) == (
            package.provenance.source_sha256,
            package.provenance.target,
            package.provenance.precision,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return PackageCheck("report", False, f"the report cannot be read: {error}")
    return PackageCheck("report", same, "is of this package" if same else "is of another package")
