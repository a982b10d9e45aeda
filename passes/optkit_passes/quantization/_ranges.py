"""Chooses the ranges of activations: by one estimator, or for each tensor by what its readers suffer from each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from optkit.errors import InputError
from optkit.graph import constant, is_constant
from optkit.model.loading import graph_inputs
from optkit.quant.calibrate import RangeMethod, estimate_range
from optkit.quant.histogram import Histogram, merged
from optkit.quant.integers import IntegerGrid, QuantParams, choose_qparams, dequantize, quantize
from optkit.session import Session, with_outputs

from ._layers import ARITHMETIC_OPS
from ._regions import Plan

Method = RangeMethod | Literal["auto"]

CANDIDATES: tuple[RangeMethod, ...] = ("minmax", "average", "percentile", "mse", "entropy")
PROBED = 8  # samples on which candidates are compared
CLEARLY = 0.9  # a candidate replaces the exact range where it leaves less than this share of its squared error


@dataclass(frozen=True)
class RangeChoice:
    """How ranges are read from histograms.

    Attributes:
        method: An estimator, or ``auto``.
        percentile: Per cent of the values that the ``percentile`` estimator keeps.
    """

    method: Method
    percentile: float

    def params(
        self,
        model: ir.Model,
        plan: Plan,
        histograms: Mapping[str, Histogram],
        grid: IntegerGrid,
        samples: Sequence[Mapping[str, np.ndarray]],
        track: Callable[..., Any],
    ) -> dict[ir.Value, QuantParams]:
        """Return scale and zero point of every value to quantize.

        Args:
            model: The model, not yet changed.
            plan: What is to be quantized.
            histograms: What calibration saw, by name.
            grid: The integers of activations.
            samples: The calibration samples.
            track: Wraps the samples in a progress display.
        """
        if self.method != "auto":
            return {value: self._estimate(value, plan, histograms, grid, self.method) for value in plan.quantized}
        found: dict[ir.Value, QuantParams] = {}
        probes = []
        for group in {id(group): group for group in plan.groups.values()}.values():
            estimates = [self._estimate(group[0], plan, histograms, grid, method) for method in CANDIDATES]
            distinct = {(float(each.scale), int(each.zero_point)): each for each in reversed(estimates)}
            candidates = list(reversed(distinct.values()))
            found |= dict.fromkeys(group, estimates[0])
            if len(candidates) > 1:
                probes.append(_probe(model, group, plan, candidates))
        _measure(model, [probe for probe in probes if probe is not None], samples, track)
        for probe in probes:
            if probe is not None:
                found |= dict.fromkeys(probe.group, probe.best())
        return found

    def _estimate(
        self,
        value: ir.Value,
        plan: Plan,
        histograms: Mapping[str, Histogram],
        grid: IntegerGrid,
        method: RangeMethod,
    ) -> QuantParams:
        seen = [histogram_of(source, histograms) for source in plan.sources[value]]
        histogram = seen[0] if len(seen) == 1 else merged(seen)
        return choose_qparams(*estimate_range(histogram, method, grid, self.percentile), grid, name=value.name or "")


def histogram_of(value: ir.Value, histograms: Mapping[str, Histogram]) -> Histogram:
    """Return what calibration saw of a value, or the histogram of a constant.

    Raises:
        InputError: The constant holds NaN or infinity.
    """
    array = constant(value)
    if array is None:
        return histograms[value.name or ""]
    histogram = Histogram()
    low, high = float(array.min(initial=0.0)), float(array.max(initial=0.0))
    if not np.isfinite(high - low):
        raise InputError("it holds values that are not finite and cannot be quantized", where=f"tensor '{value.name}'")
    histogram.add(array.ravel(), low, high)
    return histogram


@dataclass
class _Probe:
    """The piece of a model between values that share a scale and the layers that read them.

    Attributes:
        group: The values.
        candidates: Parameters to compare, the exact range first.
        rounded: Names of the values to round, inputs of the piece.
        others: Names of its other inputs.
        session: The piece; its outputs are what the layers return.
        errors: Squared error by output and candidate.
        power: Squared output, by output.
    """

    group: list[ir.Value]
    candidates: list[QuantParams]
    rounded: list[str]
    others: list[str]
    session: Session
    errors: np.ndarray = field(init=False)
    power: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        outputs = len(self.session.output_names)
        self.errors, self.power = np.zeros((outputs, len(self.candidates))), np.zeros(outputs)

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Measure the candidates on one sample."""
        inputs = {name: values[name] for name in (*self.rounded, *self.others)}
        exact = [array.astype(np.float64) for array in self.session.run(inputs).values()]
        self.power += [float(np.square(array).sum()) for array in exact]
        for index, params in enumerate(self.candidates):
            coarse = {name: dequantize(quantize(values[name], params), params) for name in self.rounded}
            outputs = self.session.run({**inputs, **coarse}).values()
            self.errors[:, index] += [
                float(np.square(array - goal).sum()) for array, goal in zip(outputs, exact, strict=True)
            ]

    def best(self) -> QuantParams:
        """Return the exact range, or the candidate that is clearly better at the layers' outputs."""
        relative = (self.errors / np.where(self.power > 0, self.power, 1)[:, None]).sum(axis=0)
        best = int(np.argmin(relative))
        return self.candidates[best if relative[best] < CLEARLY * relative[0] else 0]


def _probe(model: ir.Model, group: list[ir.Value], plan: Plan, candidates: list[QuantParams]) -> _Probe | None:
    """Return the probe of a group; None where only constants enter it."""
    rounded = [value for value in plan.sources[group[0]] if not is_constant(value)]
    nodes, outputs = _readers(rounded, plan)
    if not rounded or not outputs:
        return None
    made = {output for node in nodes for output in node.outputs} - set(rounded)
    read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    others = [value for value in read if value not in made and value not in rounded and not is_constant(value)]
    graph = ir.convenience.extract(model.graph, [*rounded, *others], outputs)
    graph.opset_imports.update(model.graph.opset_imports)
    session = Session(ir.Model(graph, ir_version=model.ir_version), optimize=True)
    return _Probe(group, candidates, [v.name or "" for v in rounded], [v.name or "" for v in others], session)


def _readers(values: Sequence[ir.Value], plan: Plan) -> tuple[list[ir.Node], list[ir.Value]]:
    """Return the nodes between values and the layers that read them, these included, and the layers' outputs.

    The way leads through one operator that adds or multiplies, not through a second: behind a residual addition stands
    the next one, and the whole network behind that.
    """
    nodes: dict[ir.Node, None] = {}
    outputs: dict[ir.Value, None] = {}
    waiting = [(value, 0) for value in values]
    while waiting:
        value, sums = waiting.pop()
        for node, index in value.uses():
            further = sums + (node.op_type in ARITHMETIC_OPS)
            if node in nodes or not plan.read_as_integer(node, index) or further > 1:
                continue
            nodes[node] = None
            if node in plan.layers:
                outputs |= dict.fromkeys(node.outputs[:1])
            else:
                waiting += [(output, further) for output in node.outputs]
    if not outputs:  # no layer reads them: what the last operators return
        outputs = dict.fromkeys(node.outputs[0] for node in nodes)
    return list(nodes), [value for value in outputs if value not in values]


def _measure(
    model: ir.Model,
    probes: Sequence[_Probe],
    samples: Sequence[Mapping[str, np.ndarray]],
    track: Callable[..., Any],
) -> None:
    """Let every probe compare its candidates on a few samples, spread evenly; one sample is in flight at a time."""
    if not probes:
        return
    fed = {value.name for value in graph_inputs(model)}
    wanted = dict.fromkeys(name for probe in probes for name in (*probe.rounded, *probe.others) if name not in fed)
    session = Session(with_outputs(model, wanted), optimize=True)
    indices = np.unique(np.linspace(0, len(samples) - 1, PROBED).round().astype(int))
    for index in track(indices, "Comparing ranges", len(indices)):
        sample = samples[int(index)]
        values = {**sample, **session.run(sample, list(wanted))}
        for probe in probes:
            probe.add(values)
