"""The cost report of a model on a target: its work priced, its memory planned, summed up for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from optkit.cost.memory import plan_static
from optkit.cost.roofline import CostReport, integer_bits, price_all
from optkit.cost.shapes import with_shapes
from optkit.cost.work import describe_static
from optkit.dataset.samples import random_samples
from optkit.model.loading import graph_inputs
from optkit.report.contents import CostRow, CostSummary
from optkit.target import Target


def cost_summary(model: ir.Model, target: Target, sample: Mapping[str, np.ndarray] | None = None) -> CostSummary:
    """Price a model as it stands.

    Args:
        model: The model; not changed.
        target: The device.
        sample: Inputs whose shapes are priced where the model leaves dimensions open; without one, those of
            `optkit.dataset.samples.random_samples` are, and the summary names them.
    """
    sample = sample if sample is not None else random_samples(model, 1)[0]
    bound = with_shapes(model, sample=sample)
    works = describe_static(bound, integer_bits(target), reads_palettes=target.reads_palettes)
    report = price_all(works, target)
    rows = [*_rows(report)]
    int8 = sum(node.cost.macs for node in report.nodes if node.work.dtype == "int8")
    low, high = report.range_seconds or (None, None)
    return CostSummary(
        macs=report.total.macs,
        int8_macs=int8,
        weight_bytes=report.total.weight_bytes,
        activation_bytes=report.total.activation_bytes,
        seconds=report.total.seconds,
        low_seconds=low,
        high_seconds=high,
        joules=report.total.joules,
        peak_activation_bytes=plan_static(bound, integer_bits(target)).peak_bytes,
        unpriced=dict(Counter(work.op_type for work in report.unpriced)),
        tag=report.total.tag if report.nodes else "predicted",
        band_source=target.error_band.source if target.error_band is not None else "",
        shapes={value.name or "": list(np.shape(sample[value.name or ""])) for value in graph_inputs(model)},
        nodes=tuple(rows),
    )


def _rows(report: CostReport) -> list[CostRow]:
    rows = [
        CostRow(
            node.work.name,
            node.work.op_type,
            node.work.dtype,
            node.cost.macs,
            node.cost.weight_bytes,
            node.cost.activation_bytes,
            node.intensity,
            node.cost.seconds,
            node.bound,
            node.kernel,
            node.note,
        )
        for node in report.nodes
    ]
    rows += [
        CostRow(w.name, w.op_type, w.dtype, 0, w.weight_bytes, 0, None, None, "unpriced", "", w.unpriced)
        for w in report.unpriced
    ]
    return rows
