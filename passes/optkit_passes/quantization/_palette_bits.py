"""How many bits the indices of each palettized weight get, so that all together take so many on average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from optkit.errors import InputError
from optkit.pipeline import Context
from optkit.quant.walk import require_samples, spread_samples
from optkit.session import Session

from ._weight_uses import FLOATS

MEASURED = 8  # calibration samples that the error of each weight is measured on
ENTRY_BITS = 16  # of an entry of a LUT: floats of 16 bits

Errors = Mapping[int, float]  # by bits
Fit = Callable[[ir.Value], Mapping[int, Mapping[str, np.ndarray]]]


def measure(model: ir.Model, weights: Sequence[ir.Value], fit: Fit, context: Context) -> dict[ir.Value, Errors]:
    """Return the relative squared error of the model's outputs with each weight alone at each number of bits.

    Weights in bodies of control-flow nodes cannot be exchanged from outside and are not in the result.

    Args:
        model: The model.
        weights: Its constants that will be palettized.
        fit: Returns what a weight, and other constants with it, become with each number of bits, by name.
        context: Holds the calibration samples.

    Raises:
        InputError: There are no samples, or the model does not run on one.
    """
    samples = spread_samples(require_samples(context.calibration, "average_bits"), MEASURED)
    copy = model.clone()
    own = [weight for weight in weights if weight.graph is model.graph]
    for value in copy.graph.initializers.values():  # one that is an input too is a default
        if value.dtype in FLOATS and not value.is_graph_input():
            copy.graph.inputs.append(value)
    session = Session(copy, optimize=True)
    expected = [_floats(session.run(sample)) for sample in samples]
    found: dict[ir.Value, Errors] = {}
    for weight in context.track(own, "Measuring sensitivity", len(own)):
        errors = {}
        for bits, changed in fit(weight).items():
            outputs = (_floats(session.run({**sample, **changed})) for sample in samples)
            errors[bits] = sum(_error(*pair) for pair in zip(expected, outputs, strict=True)) / len(samples)
        found[weight] = errors
    return found


def _floats(outputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(array, np.float64) for array in outputs.values() if array.dtype.kind == "f"]


def _error(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Return the squared error, each output's as a share of its own square; infinite where it is no number."""
    total = 0.0
    for wanted, got in zip(expected, found, strict=True):
        lost, whole = float(np.square(got - wanted).sum()), float(np.square(wanted).sum())
        total += lost / whole if whole > 0 else lost
    return total if np.isfinite(total) else np.inf


def allocate(sizes: Sequence[int], luts: Sequence[int], errors: Sequence[Errors], average: float) -> list[int]:
    """Return the bits of each weight: greedily those that cost the least error for each bit saved.

    All begin with the most bits. Errors are taken to add up. What the last step saved too much goes to the weights that
    gain most by it. Of equals the first is chosen.

    Args:
        sizes: Elements of each weight.
        luts: How many LUTs each has.
        errors: The error of each at each number of bits.
        average: Bits that a weight may take on average, LUTs included.

    Raises:
        InputError: Not even the fewest bits take so little.
    """
    budget = average * sum(sizes)
    choices = [sorted(each) for each in errors]
    chosen = [each[-1] for each in choices]

    def taken(index: int, bits: int) -> int:
        return sizes[index] * bits + luts[index] * ENTRY_BITS * (1 << bits)

    def change(index: int, bits: int) -> float:
        return errors[index][bits] - errors[index][chosen[index]]

    total = sum(taken(index, bits) for index, bits in enumerate(chosen))
    while total > budget:
        steps = [(index, bits) for index, bits in enumerate(chosen) if bits > choices[index][0]]
        if not steps:
            least = total / max(sum(sizes), 1)
            raise InputError(
                f"an average of {average:g} bits a weight cannot be met: the fewest take {least:.2f}",
                hint="allow fewer bits in 'choices', or more on average",
            )
        lower = [(index, choices[index][choices[index].index(bits) - 1]) for index, bits in steps]
        index, bits = min(lower, key=lambda step: change(*step) / (taken(step[0], chosen[step[0]]) - taken(*step)))
        total += taken(index, bits) - taken(index, chosen[index])
        chosen[index] = bits
    while True:
        raised = [
            (index, bits)
            for index, each in enumerate(choices)
            for bits in each
            if bits > chosen[index] and total + taken(index, bits) - taken(index, chosen[index]) <= budget
        ]
        gains = [step for step in raised if change(*step) < 0]
        if not gains:
            return chosen
        index, bits = min(gains, key=lambda step: change(*step) / (taken(*step) - taken(step[0], chosen[step[0]])))
        total += taken(index, bits) - taken(index, chosen[index])
        chosen[index] = bits
