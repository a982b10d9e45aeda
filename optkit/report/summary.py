"""From what a compilation did to the report about it: sizes, coverage, costs, remarks, gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

import optkit
from optkit.cost.summary import cost_summary
from optkit.evaluate.assess import Assessment
from optkit.package.contract import Artifact, Packager
from optkit.package.placing import summarize_placement
from optkit.pipeline import Context, PipelineResult
from optkit.precision import Precision
from optkit.report.contents import CostSummary, Coverage, FurtherTarget, Gate, Report, group_remarks
from optkit.report.coverage import coverage
from optkit.report.inspection import inspect_model
from optkit.target import Target

LEAST_AGREEMENT_DB = 10.0  # of the package as deployed with the same arithmetic simulated: below it something is wrong
LEAST_COVERAGE = 0.5  # of the weights: a name that says less of the model than that misleads


@dataclass(frozen=True)
class Gates:
    """Limits that the user set; None is no limit.

    Attributes:
        max_size: Bytes of the artifact.
        max_latency: Predicted seconds of one run.
        max_memory: Bytes of weights and peak activations together.
        max_drop: Largest drop of the metric, as a share of it (0.01 is one point of an accuracy).
        min_coverage: Smallest share of the weights that must be in the precision asked for, or in tables of 8 bits;
            half of them by default.
    """

    max_size: float | None = None
    max_latency: float | None = None
    max_memory: float | None = None
    max_drop: float | None = None
    min_coverage: float | None = None


def summarize(
    *,
    name: str,
    sha256: str,
    source_bytes: int,
    artifact: Artifact,
    package: str,
    target: Target,
    toolchain: Packager,
    precision: Precision,
    original: ir.Model,
    compiled: ir.Model,
    context: Context,
    result: PipelineResult,
    assessment: Assessment,
    gates: Gates,
    sample: Mapping[str, np.ndarray],
    demanded: bool = True,
    also: Sequence[Target] = (),
) -> Report:
    """Return the report of a compilation.

    Args:
        name: The model's file name.
        sha256: Digest over the model's files.
        source_bytes: Their size.
        artifact: What the device loads.
        package: Name of the package's folder.
        target: The device.
        toolchain: Its packager.
        precision: The precision compiled.
        original: The model as loaded.
        compiled: The model as packaged.
        context: Holds the remarks.
        result: The pipeline's steps.
        assessment: How the artifact ran and how accurate it is.
        gates: Limits to hold the result against.
        sample: One sample: its shapes are priced where the model leaves dimensions open.
        demanded: Whether a precision was asked for.
        also: Further targets that the package serves.
    """
    before, after = (cost_summary(model, target, sample) for model in (original, compiled))
    lossy = [step.pass_name for step in result.steps if step.effect.kind == "lossy"]
    covered = coverage(compiled, after, precision, context.remarks, lossy)
    artifact_bytes = _bytes(artifact, artifact.files)
    notices = [*artifact.notices, *([artifact.missing] if artifact.missing else ()), *assessment.notices]
    if result.unverified:
        notices.insert(0, f"the passes were not verified by execution: {result.unverified}")
    if context.calibration is not None and context.calibration.random:
        notices.insert(0, "calibrated on RANDOM data: every accuracy figure here is meaningless")
    return Report(
        optkit=optkit.__version__,
        model=name,
        model_sha256=sha256,
        target=target.name,
        target_summary=target.summary,
        precision=str(precision),
        package=package,
        source=inspect_model(original),
        compiled=inspect_model(compiled),
        source_bytes=source_bytes,
        artifact_bytes=artifact_bytes,
        steps=result.steps,
        remarks=group_remarks(context.remarks),
        coverage=covered,
        executions=assessment.executions,
        accuracy=assessment.accuracy,
        cost_before=before,
        cost=after,
        calibration=Path(context.calibration.source).name if context.calibration is not None else "none",
        gates=check_gates(gates, artifact_bytes, after, assessment, covered, demanded=demanded),
        notices=tuple(dict.fromkeys(notices)),
        deployment=assessment.deployment,
        placement=summarize_placement(compiled, toolchain, target, after.nodes),
        facts=artifact.facts,
        stages=artifact.stages,
        also=tuple(_further(compiled, each, sample, artifact) for each in also),
        missing=artifact.missing,
    )


def _further(model: ir.Model, target: Target, sample: Mapping[str, np.ndarray], artifact: Artifact) -> FurtherTarget:
    cost = cost_summary(model, target, sample)
    held = _bytes(artifact, artifact.also.get(target.name, ()))
    return FurtherTarget(
        target.name, target.summary, held, cost.seconds, cost.low_seconds, cost.high_seconds, cost.joules
    )


def _bytes(artifact: Artifact, files: Sequence[str]) -> int:
    return sum((artifact.directory / file).stat().st_size for file in files)


def check_gates(
    gates: Gates,
    artifact_bytes: int,
    cost: CostSummary,
    assessment: Assessment,
    covered: Coverage,
    *,
    demanded: bool = True,
) -> tuple[Gate, ...]:
    """Hold the result against each limit that was set; a figure that is not known does not meet its limit.

    Args:
        gates: The limits.
        artifact_bytes: Size of what the device loads.
        cost: What a run costs.
        assessment: The accuracies measured.
        covered: What is in the precision asked for. Where that is less than `LEAST_COVERAGE` of the weights, a gate
            says so though none was set.
        demanded: Whether a precision was asked for; a recipe with passes of its own need not.

    A package that computes something else as deployed than simulated, less than `LEAST_AGREEMENT_DB`, does not meet the
    gate ``agreement``, which nobody has to set.
    """
    drop = max((evaluation.drop for evaluation in assessment.accuracy), default=None)
    figures: Sequence[tuple[str, float | None, float | None]] = (
        ("size", gates.max_size, artifact_bytes),
        ("latency", gates.max_latency, cost.seconds),
        ("memory", gates.max_memory, cost.weight_bytes + cost.peak_activation_bytes),
        ("drop", gates.max_drop, drop),
    )
    held = [
        Gate(name, limit, actual, actual is not None and actual <= limit)
        for name, limit, actual in figures
        if limit is not None
    ]
    between = assessment.deployment.between
    if between is not None and between.sqnr_db < LEAST_AGREEMENT_DB:
        held.append(Gate("agreement", LEAST_AGREEMENT_DB, between.sqnr_db, False))
    least = LEAST_COVERAGE if gates.min_coverage is None else gates.min_coverage
    share = covered.weights + covered.tables
    if gates.min_coverage is not None or (demanded and share < least):
        held.append(Gate("coverage", least, share, share >= least))
    return tuple(held)
