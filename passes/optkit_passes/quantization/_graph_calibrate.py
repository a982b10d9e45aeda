"""Observes a model's activations and fixes how each is rounded, until plan and ranges agree with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.dataset.samples import Samples
from optkit.graph import is_constant
from optkit.pipeline import Context
from optkit.quant.calibrate import observe
from optkit.quant.integers import IntegerGrid, QuantParams, choose_qparams
from optkit.quant.walk import require_samples, spread_samples
from optkit.session import Session, with_outputs

from ._clamps import clamps_alike
from ._graph_masks import Masks
from ._graph_operators import FIXED_RANGES, unit_inputs
from ._graph_plan import fused_clamps, is_unit, plan_graph
from ._ranges import RangeChoice, histogram_of
from ._regions import Plan
from .quantize_static import Observations

LARGEST_FLOAT = 2.0**15  # computed in float16, which ends at 65504: half of it is left to inputs not seen
FLOAT_SAMPLES = 8  # on which values computed in float are looked at


@dataclass
class Calibration:
    """What calibration says.

    Attributes:
        plan: What is rounded.
        params: Scale and zero point of every quantized value.
        forced: Units that would overflow in float16, and why.
    """

    plan: Plan
    params: dict[ir.Value, QuantParams]
    forced: dict[ir.Node, str]


def calibrate(
    model: ir.Model,
    context: Context,
    samples: Samples | None,
    seen: Observations,
    masks: Masks,
    grid: IntegerGrid,
    ranges: RangeChoice,
    momentum: float,
) -> Calibration:
    """Return the plan and the parameters; a node whose tensors calibration says nothing about stays float.

    Args:
        model: The model, not changed.
        context: Says what the target is.
        samples: What to observe.
        seen: What was observed already; what is observed is added.
        masks: What is hidden from a Softmax.
        grid: The integers of activations.
        ranges: How ranges are chosen.
        momentum: That of moving averages.

    Raises:
        InputError: No samples, ones that the model does not take, or values that are not finite.
    """
    excluded: dict[ir.Node, str] = {}
    separate: set[ir.Node] = set()
    forced: dict[ir.Node, str] = {}
    floats = has_floats(context)
    while True:
        plan = plan_graph(model.graph, excluded, floats=floats, separate=separate, forced=forced)
        computed = [value for sources in plan.sources.values() for value in sources if not is_constant(value)]
        wanted = dict.fromkeys(value.name or "" for value in computed if value.name not in seen.histograms)
        if wanted:
            found = observe(model, wanted, samples, counts=seen.counts, momentum=momentum, track=context.track)
            seen.histograms.update(found)
        masks.clip(seen.histograms)
        useless = _useless(plan, seen)
        if useless:
            excluded |= useless
            continue
        overflowing = _overflowing(model, plan, samples) if floats else {}
        if overflowing.keys() - forced.keys():
            forced |= overflowing
            continue
        params = ranges.params(model, plan, seen.histograms, grid, samples or (), context.track)
        params |= _fixed(plan, params)
        unlike = {node for node in fused_clamps(plan, separate) if not clamps_alike(node, params[node.outputs[0]])}
        if not unlike:
            return Calibration(plan, params, forced)
        separate |= unlike


def has_floats(context: Context) -> bool:
    """Whether the target computes in float."""
    return context.target is None or "float32" in context.target.dtypes


def has_int16(context: Context) -> bool:
    """Whether the target multiplies 16-bit activations with each other: the right ones signed."""
    return context.target is None or "int16" in context.target.dtypes


def _useless(plan: Plan, seen: Observations) -> dict[ir.Node, str]:
    """Return the nodes around tensors that calibration says nothing about, and why they must stay float."""
    found: dict[ir.Node, str] = {}
    for value, sources in plan.sources.items():
        histograms = [histogram_of(source, seen.histograms) for source in sources]
        if is_constant(value) or not histograms or not all(each.low >= 0.0 >= each.high for each in histograms):
            continue
        what = "has no elements" if all(each.empty for each in histograms) else "is 0"
        for node in (value.producer(), *(use.node for use in value.uses())):
            if node is not None:
                found[node] = f"tensor '{value.name}' {what} in every calibration sample"
    return found


def _overflowing(model: ir.Model, plan: Plan, samples: Samples | None) -> dict[ir.Node, str]:
    """Return the nodes that read or return in float what float16 does not hold but integers could, and why."""
    nodes = [
        node for node in model.graph if not is_unit(node, plan) and isinstance(unit_inputs(node, floats=False), tuple)
    ]
    around = {value: None for node in nodes for value in (*node.inputs, *node.outputs) if value is not None}
    computed = {value.name or "": value for value in around if value.producer() and value.dtype == ir.DataType.FLOAT}
    if not computed:
        return {}
    peaks = _peaks(
        model, list(computed), spread_samples(require_samples(samples, "static quantization"), FLOAT_SAMPLES)
    )
    found = {}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            peak = peaks.get(value.name or "", 0.0) if value is not None else 0.0
            if value is not None and peak > LARGEST_FLOAT:
                found[node] = f"tensor '{value.name}' reaches {peak:.3g}, which float16 may not hold"
    return found


def _peaks(model: ir.Model, names: list[str], samples: Sequence[object]) -> dict[str, float]:
    """Return the largest finite value of each tensor; hidden scores, large and negative, do no harm."""
    session = Session(with_outputs(model, names), optimize=True)
    peaks = dict.fromkeys(names, 0.0)
    for sample in samples:
        assert isinstance(sample, dict)
        for name, array in session.run(sample, names).items():
            peaks[name] = max(peaks[name], float(array.max(initial=0.0, where=np.isfinite(array))))
    return peaks


def _fixed(plan: Plan, params: dict[ir.Value, QuantParams]) -> dict[ir.Value, QuantParams]:
    """Return the parameters of values whose operator returns the same range whatever it reads."""
    found = {}
    for value, sources in plan.sources.items():
        producers = [source.producer() for source in sources]
        ranges = {FIXED_RANGES.get(each.op_type) if each is not None else None for each in producers}
        bounds = ranges.pop() if len(ranges) == 1 else None
        if bounds is not None:
            found[value] = choose_qparams(*bounds, params[value].grid, name=value.name or "")
    return found
