"""Chooses which activations of a graph keep 16 bits where 8 would cost its outputs too much.

A unit computes with one width, so that a place cannot be widened alone. What computes a value decides its width, and
operators without weights that read a wide value compute wide themselves: they cost little, and a residual stream or a
normalization stays exact as a whole. Layers, which cost most, round what they read to 8 bits unless they are widened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from optkit.graph import is_constant, static_shape
from optkit.quant.integers import QuantParams

from ._graph_plan import is_unit
from ._graph_trial import Place, RoundingTrial, place_of
from ._graph_writer import Widths
from ._layers import Layer
from ._regions import Plan

JUDGES = 8  # samples to measure on, at most
RUNS = 800  # runs of the model that measuring single places may take, and the steps after it
WORK = 4e11  # multiply-accumulates that these runs may take: about 20 seconds on two cores
CANDIDATES = 64  # groups that are considered in one step, those with the largest errors
LEAST_GAIN = 0.03  # of what a step may take off the error, so much must be expected, and a third of it measured


@dataclass
class Choice:
    """What is to be wide.

    Attributes:
        units: Nodes that compute with wide activations, and why.
        values: Values that no unit computes and that are rounded to wide integers.
        narrow_db: SQNR in dB of the outputs with all activations narrow, weights in float; None if not measured.
        chosen_db: The same as chosen.
    """

    units: dict[ir.Node, str] = field(default_factory=dict)
    values: set[ir.Value] = field(default_factory=set)
    narrow_db: float | None = None
    chosen_db: float | None = None

    def widths(self, widths: Widths) -> Widths:
        """Return the widths with this choice."""
        return replace(widths, units=frozenset(self.units), values=frozenset(self.values))


def choose_widths(
    model: ir.Model,
    plan: Plan,
    params: Mapping[ir.Value, QuantParams],
    widths: Widths,
    samples: Sequence[Mapping[str, np.ndarray]],
    forced: Mapping[ir.Node, str],
    *,
    goal_db: float,
    most_macs: float,
) -> Choice:
    """Return what must be wide for the outputs to come within a goal.

    Single places are measured first, each rounded to narrow integers while all others are wide. Their errors are
    independent and nearly add up, which predicts what a step gains; every step that is taken is measured.

    Args:
        model: The float model.
        plan: What is rounded.
        params: Scale and zero point of every quantized value, in narrow integers.
        widths: The two kinds of integers.
        samples: Samples to measure on, not those that the ranges come from.
        forced: Units that must be wide, and why.
        goal_db: SQNR of the outputs, in dB, from which on nothing more is widened.
        most_macs: Share of the layers' multiply-accumulates that may become wide.
    """
    state = _closed(plan, forced)
    if not np.isfinite(goal_db) or not plan.quantized:
        return state
    trial = RoundingTrial(model, plan, params, widths, samples[:JUDGES])
    goal = 10 ** (-goal_db / 10)
    error = trial.error(_narrow(plan, trial.places, state))
    state.narrow_db = state.chosen_db = narrow_db = _decibels(error)
    if error <= goal:
        return state
    costs = {node: _macs(layer) for node, layer in plan.layers.items()}
    total = max(sum(costs.values()), 1.0)
    runs = min(RUNS, WORK / total)
    floor, single = _singles(plan, trial, runs)
    tried: set[tuple[ir.Value, bool]] = set()
    while error > goal and trial.runs < 2 * runs:
        steps = _steps(plan, trial, state, single, costs, most_macs * total)
        steps = [s for s in steps if s.gain >= LEAST_GAIN * (error - floor) and (s.group, s.full) not in tried]
        if not steps:
            break
        best = max(steps, key=lambda step: step.gain / (0.01 + step.cost / total))
        tried.add((best.group, best.full))
        found = trial.error(_narrow(plan, trial.places, best.state))
        if error - found >= LEAST_GAIN / 3 * (error - floor):
            state, error = best.state, found
    state.narrow_db, state.chosen_db = narrow_db, _decibels(error)
    return state


def _singles(plan: Plan, trial: RoundingTrial, runs: float) -> tuple[float, dict[Place, float]]:
    """Return the error with all places wide, and what each adds when it alone is narrow.

    Where there are too many places for the runs, those of one kind of operator are measured at once.
    """
    classes: dict[object, list[Place]] = {}
    alone = len(trial.places) < runs
    for place in trial.places:
        node = place if isinstance(place, ir.Node) else place.producer()
        kind = (type(place), "" if node is None else node.op_type)
        classes.setdefault(place if alone else kind, []).append(place)
    judges = int(np.clip(runs // max(len(classes), 1), 1, JUDGES))
    floor = trial.error((), judges)
    single: dict[Place, float] = {}
    for members in classes.values():
        added = max(trial.error(set(members), judges) - floor, 0.0)
        single |= dict.fromkeys(members, added / len(members))
    return floor, {place: single[place] for place in trial.places}


@dataclass(frozen=True)
class _Step:
    """A group made wide, and the layers that read it if ``full``: what becomes of the state, at what gain and cost."""

    group: ir.Value
    full: bool
    state: Choice
    gain: float
    cost: float


def _steps(
    plan: Plan,
    trial: RoundingTrial,
    state: Choice,
    single: Mapping[Place, float],
    costs: Mapping[ir.Node, float],
    budget: float,
) -> list[_Step]:
    now = _narrow(plan, trial.places, state)
    noise = _noise(plan, now, single)
    found = []
    groups = [place for place in trial.places if isinstance(place, ir.Value)]
    for place in sorted(groups, key=lambda place: -single[place])[:CANDIDATES]:
        members = plan.groups[place]
        readers = [use.node for value in members for use in value.uses() if use.node in plan.layers]
        if place not in now and all(reader in state.units for reader in readers):
            continue
        for full in (False, True) if readers else (False,):
            reason = (
                f"'{place.name}' keeps more than 8 bits: {100 * single[place] / max(noise, 1e-30):.0f} % of the error"
            )
            after = Choice(dict(state.units), set(state.values))
            _close(plan, after, [place, *readers] if full else [place], reason)
            cost = sum(costs[node] for node in after.units if node in costs)
            if cost > budget:
                continue
            gain = noise - _noise(plan, _narrow(plan, trial.places, after), single)
            spent = cost - sum(costs[node] for node in state.units if node in costs)
            found.append(_Step(place, full, after, gain, spent))
    return found


def settled(plan: Plan, found: Choice, forced: Mapping[ir.Node, str]) -> Choice:
    """Return a choice that was made for another plan of the same graph, with all that must be wide with it."""
    state = _closed(plan, forced)
    for node, reason in found.units.items():
        if is_unit(node, plan):
            _close(plan, state, [node], reason)
    _close(plan, state, [value for value in found.values if value in plan.quantized], "")
    return state


def _closed(plan: Plan, forced: Mapping[ir.Node, str]) -> Choice:
    state = Choice()
    for node, reason in forced.items():
        _close(plan, state, [node], reason)
    return state


def _noise(plan: Plan, narrow: Collection[Place], single: Mapping[Place, float]) -> float:
    """Return the error that is expected: what a layer rounds once more counts where it was not narrow before."""
    return sum(
        single[place]
        for place in narrow
        if isinstance(place, ir.Value)
        or not all(place_of(value, plan) in narrow for value in _activations(plan, place))
    )


def _activations(plan: Plan, node: ir.Node) -> list[ir.Value]:
    values = (node.inputs[index] for index in plan.layers[node].activations)
    return [value for value in values if value is not None and not is_constant(value)]


def _narrow(plan: Plan, places: Collection[Place], state: Choice) -> set[Place]:
    """Return the places where values are rounded to narrow integers."""
    found: set[Place] = set()
    for place in places:
        wide = place in state.units if isinstance(place, ir.Node) else _is_wide(plan, state, place)
        if not wide:
            found.add(place)
    return found


def _is_wide(plan: Plan, state: Choice, value: ir.Value) -> bool:
    producer = value.producer()
    return producer in state.units if producer is not None and is_unit(producer, plan) else value in state.values


def _close(plan: Plan, state: Choice, items: Iterable[ir.Node | ir.Value], reason: str) -> None:
    """Make units and values wide, and everything that must be wide with them.

    That is what shares a scale, what computes a wide value, and what reads one but has no weights.
    """
    stack, seen = list(items), set[ir.Value]()
    while stack:
        item = stack.pop()
        if isinstance(item, ir.Node):
            if item in state.units:
                continue
            state.units[item] = reason
            for output in item.outputs:
                if output in plan.quantized:
                    stack.append(output)
                else:  # a clamp that the quantizer stands for
                    stack += [use.node for use in output.uses() if use.node in plan.glue]
            source = item.inputs[0]
            producer = None if source is None or source in plan.quantized else source.producer()
            if item in plan.glue and producer is not None and is_unit(producer, plan):
                stack.append(producer)
        elif item not in seen and not is_constant(item):
            seen.add(item)
            producer = item.producer()
            if producer is not None and is_unit(producer, plan):
                stack.append(producer)
            else:
                state.values.add(item)
            stack += plan.groups[item]
            readers = [use for use in item.uses() if use.node in plan.glue]
            stack += [use.node for use in readers if plan.read_as_integer(use.node, use.idx)]


def _macs(layer: Layer) -> float:
    """Return the multiply-accumulates of a layer, as far as its shapes are known."""
    node = layer.node
    output = static_shape(node.outputs[0])
    weight = static_shape(node.inputs[1])
    if output is None or not weight:
        return 1.0
    if node.op_type == "Conv":
        return float(np.prod(output) * np.prod(weight[1:]))
    if node.op_type == "ConvTranspose":
        return float(np.prod(static_shape(node.inputs[0]) or [1]) * np.prod(weight[1:]))
    read = static_shape(node.inputs[0]) or [1]
    turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
    return float(np.prod(output) * read[0 if turned else -1])


def _decibels(error: float) -> float:
    return float(-10 * np.log10(error)) if error > 0 else np.inf
