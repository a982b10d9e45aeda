"""From what a compilation did to the report about it: sizes, coverage, costs, remarks, gates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

import optkit
from optkit.cost.summary import cost_summary
from optkit.evaluate.assess import Assessment
from optkit.pipeline import Context, PipelineResult
from optkit.precision import Precision
from optkit.report.contents import CostSummary, Coverage, Gate, Report, group_remarks
from optkit.report.inspection import inspect_model
from optkit.target import Target


@dataclass(frozen=True)
class Gates:
    """Limits that the user set; None is no limit.

    Attributes:
        max_size: Bytes of the artifact.
        max_latency: Predicted seconds of one run.
        max_memory: Bytes of weights and peak activations together.
        max_drop: Largest drop of the metric, as a share of it (0.01 is one point of an accuracy).
    """

    max_size: float | None = None
    max_latency: float | None = None
    max_memory: float | None = None
    max_drop: float | None = None


def summarize(
    *,
    name: str,
    sha256: str,
    source_bytes: int,
    artifact_bytes: int,
    package: str,
    target: Target,
    precision: Precision,
    original: ir.Model,
    compiled: ir.Model,
    context: Context,
    result: PipelineResult,
    assessment: Assessment,
    gates: Gates,
    sample: Mapping[str, np.ndarray],
) -> Report:
    """Return the report of a compilation.

    Args:
        name: The model's file name.
        sha256: Digest over the model's files.
        source_bytes: Their size.
        artifact_bytes: Size of what the device loads.
        package: Name of the package's folder.
        target: The device.
        precision: The precision compiled.
        original: The model as loaded.
        compiled: The model as packaged.
        context: Holds the remarks.
        result: The pipeline's steps.
        assessment: How the artifact ran and how accurate it is.
        gates: Limits to hold the result against.
        sample: One sample: its shapes are priced where the model leaves dimensions open.
    """
    before, after = (cost_summary(model, target, sample) for model in (original, compiled))
    notices = list(assessment.notices)
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
        coverage=coverage(compiled, after),
        executions=assessment.executions,
        accuracy=assessment.accuracy,
        cost_before=before,
        cost=after,
        calibration=Path(context.calibration.source).name if context.calibration is not None else "none",
        gates=check_gates(gates, artifact_bytes, after, assessment),
        notices=tuple(dict.fromkeys(notices)),
    )


def coverage(model: ir.Model, cost: CostSummary) -> Coverage:
    """Return the share of weights (by element) held in 8 bits or less, and of MACs done in 8-bit integers.

    Weights are the numbers that arithmetic uses: scales, zero points, shapes and indices are not counted.
    """
    elements: Counter[bool] = Counter()
    for tensor in {id(v.const_value): v for g in model.graphs() for v in g.initializers.values()}.values():
        held = tensor.const_value
        if held is not None and held.size > 1 and (held.dtype.is_floating_point() or held.dtype.bitwidth <= 8):
            elements[held.dtype.bitwidth <= 8 and held.dtype != ir.DataType.BOOL] += held.size
    whole = sum(elements.values())
    return Coverage(elements[True] / whole if whole else 0.0, cost.int8_macs / cost.macs if cost.macs else 0.0)


def check_gates(gates: Gates, artifact_bytes: int, cost: CostSummary, assessment: Assessment) -> tuple[Gate, ...]:
    """Hold the result against each limit that was set; a figure that is not known does not meet its limit."""
    drop = max((evaluation.drop for evaluation in assessment.accuracy), default=None)
    figures: Sequence[tuple[str, float | None, float | None]] = (
        ("size", gates.max_size, artifact_bytes),
        ("latency", gates.max_latency, cost.seconds),
        ("memory", gates.max_memory, cost.weight_bytes + cost.peak_activation_bytes),
        ("drop", gates.max_drop, drop),
    )
    return tuple(
        Gate(name, limit, actual, actual is not None and actual <= limit)
        for name, limit, actual in figures
        if limit is not None
    )
