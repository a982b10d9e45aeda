"""Compares ranges of activations by the error that they cause at a model's outputs.

The squared error of a tensor's own values is the wrong judge, and that of the next layer's output hardly better:
rounding errors of many layers are independent and partly cancel, while clipping makes every layer too small and adds
up. So all activations are rounded at once, and what is compared is the whole model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import is_constant
from optkit.quant.integers import QuantParams
from optkit.quant.walk import spread_samples
from optkit.session import Session

from ._formats import CONTRIB
from ._qdq import element_type
from ._regions import Plan

SAMPLES = 64  # samples on which ranges are compared, spread evenly over the given ones
RUNS = 2000  # runs of the model, at most, that are spent on single tensors
# What an estimator must leave of the error to replace the exact range everywhere, and then at one tensor.
EVERYWHERE, AT_ONE = 0.7, 0.9
ALIKE = 0.02  # scales this close are not compared


def compare_ranges(
    model: ir.Model,
    plan: Plan,
    groups: Sequence[list[ir.Value]],
    estimates: Sequence[Sequence[QuantParams]],
    samples: Sequence[Mapping[str, np.ndarray]],
    track: Callable[..., Any],
) -> list[QuantParams]:
    """Return the parameters to use for each group.

    First one estimator for all groups is chosen, the exact range unless another is clearly better. Then single groups
    try the others, those where they differ most first, while the rest stays as chosen.

    Args:
        model: The model, not changed.
        plan: What is to be quantized.
        groups: Values that share a scale.
        estimates: For each group what every estimator says, the exact range first.
        samples: Calibration samples.
        track: Wraps work in a progress display.
    """
    chosen = [each[0] for each in estimates]
    if not groups or not len(samples):
        return chosen
    judges = spread_samples(samples, SAMPLES)
    kind = element_type(chosen[0].grid)
    trial = _Trial(model, plan, groups, judges, kind)
    least = EVERYWHERE * (error := trial.error(chosen))
    for column in list(zip(*estimates, strict=True))[1:]:
        found = trial.error(column)
        if found < least:
            chosen, error, least = list(column), found, found
    runs = 0
    ranked = sorted(range(len(groups)), key=lambda index: -_spread(estimates[index]))
    for index in track(ranked, "Comparing ranges", len(ranked)):
        for candidate in _distinct(estimates[index], chosen[index]):
            if runs + len(judges) > RUNS:
                return chosen
            runs += len(judges)
            changed = [*chosen[:index], candidate, *chosen[index + 1 :]]
            found = trial.error(changed)
            if found < AT_ONE * error:
                chosen, error = changed, found
    return chosen


def _spread(estimates: Sequence[QuantParams]) -> float:
    scales = [float(each.scale) for each in estimates]
    return max(scales) / min(scales)


def _distinct(estimates: Sequence[QuantParams], chosen: QuantParams) -> list[QuantParams]:
    """Return the estimates that differ from the chosen one and from each other."""
    found = [chosen]
    for each in estimates:
        if all(abs(float(each.scale) / float(other.scale) - 1) > ALIKE for other in found):
            found.append(each)
    return found[1:]


class _Trial:
    """A model whose activations are rounded by parameters that are fed, and the outputs it should have.

    Args:
        model: The model.
        plan: What is rounded.
        groups: Values that share a scale.
        samples: The samples to run.
        kind: The integer type.
    """

    def __init__(
        self,
        model: ir.Model,
        plan: Plan,
        groups: Sequence[list[ir.Value]],
        samples: Sequence[Mapping[str, np.ndarray]],
        kind: ir.DataType,
    ) -> None:
        self.samples = samples
        exact = Session(model, optimize=True)
        self.goals = [_floats(exact.run(sample)) for sample in samples]
        self.session = Session(_rounded(model, plan, groups, kind), optimize=True)

    def error(self, chosen: Sequence[QuantParams]) -> float:
        """Return the squared error of the outputs, each relative to its own square, summed over outputs."""
        params = {_scale(index): np.asarray(each.scale) for index, each in enumerate(chosen)}
        params |= {_zero(index): np.asarray(each.zero_point) for index, each in enumerate(chosen)}
        errors = powers = np.zeros(len(self.goals[0]))
        for sample, goal in zip(self.samples, self.goals, strict=True):
            outputs = _floats(self.session.run({**sample, **params}))
            errors = errors + [np.square(a - b).sum() for a, b in zip(outputs, goal, strict=True)]
            powers = powers + [np.square(b).sum() for b in goal]
        return float((errors / np.where(powers > 0, powers, 1)).sum())


def _floats(outputs: Mapping[str, Any]) -> list[np.ndarray]:
    arrays = [value for value in outputs.values() if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    return [array.astype(np.float64) for array in arrays]


def _scale(index: int) -> str:
    return f"optkit.scale.{index}"


def _zero(index: int) -> str:
    return f"optkit.zero_point.{index}"


def _rounded(model: ir.Model, plan: Plan, groups: Sequence[list[ir.Value]], kind: ir.DataType) -> ir.Model:
    """Return a copy that rounds what enters each group, with the group's scale and zero point as further inputs."""
    copy = model.clone()
    copy.opset_imports.setdefault(CONTRIB, 1)
    nodes = dict(zip(model.graph, copy.graph, strict=True))
    values = {value.name: value for value in (*copy.graph.inputs, *(v for n in copy.graph for v in n.outputs))}
    for index, group in enumerate(groups):
        scale = ir.Value(name=_scale(index), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        zero = ir.Value(name=_zero(index), type=ir.TensorType(kind), shape=ir.Shape([]))
        copy.graph.inputs.extend([scale, zero])
        for source in (value for value in plan.sources[group[0]] if not is_constant(value)):
            everyone = source in plan.integer
            readers = [
                u for u in source.uses() if u.node in nodes and (everyone or plan.read_as_integer(u.node, u.idx))
            ]
            value = values[source.name]
            q = ir.Node(CONTRIB, "QuantizeLinear", [value, scale, zero], num_outputs=1)
            dq = ir.Node(CONTRIB, "DequantizeLinear", [q.outputs[0], scale, zero], num_outputs=1)
            for number, node in enumerate((q, dq)):
                node.outputs[0].name = f"optkit.rounded.{source.name}.{number}"
            producer = value.producer()
            if producer is None:
                copy.graph.insert_before(copy.graph[0], [q, dq])
            else:
                copy.graph.insert_after(producer, [q, dq])
            for use in readers:
                nodes[use.node].replace_input_with(use.idx, dq.outputs[0])
            for place, output in enumerate(copy.graph.outputs):
                if everyone and output is value:
                    dq.outputs[0].type, dq.outputs[0].shape = value.type, value.shape
                    copy.graph.outputs[place] = dq.outputs[0]
    return copy
