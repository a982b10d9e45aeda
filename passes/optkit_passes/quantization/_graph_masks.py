"""Lifts constants that stand for minus infinity to a level that integers can hold beside ordinary scores.

A mask adds -1e9 or minus infinity to the scores that a Softmax must not see. Rounded to integers, such a range leaves
all ordinary scores on one step; in float16 it is infinite. What the Softmax needs is only that a hidden score lies so
far below the largest of its row that its share is nothing: below the lowest score ever seen by a margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, constant, is_constant, names
from optkit.pipeline import Context
from optkit.quant.calibrate import observe
from optkit.quant.histogram import Histogram

from ._graph_operators import HIDDEN
from ._masks import hidden_values

# Share of a hidden score in the smallest row: exp(-8) is less than a tenth of a step of 8 bits, exp(-16) of 16.
MARGINS = {8: 8.0, 16: 16.0}


@dataclass
class Masks:
    """What was lifted.

    Attributes:
        floors: By the name of a tensor that holds scores, hidden ones among them: below this all are hidden.
    """

    floors: dict[str, float] = field(default_factory=dict)

    def clip(self, histograms: Mapping[str, Histogram]) -> None:
        """Leave hidden scores out of what calibration saw."""
        for name, floor in self.floors.items():
            histogram = histograms.get(name)
            if histogram is not None and not histogram.empty and histogram.low < floor:
                low, high, weight = histogram.moving
                histogram.low = min(floor, histogram.high)
                histogram.moving = (max(low, floor * weight), high, weight)


def lift_masks(model: ir.Model, context: Context, bits: int) -> Masks:
    """Replace the hidden elements of mask constants in the main graph.

    Args:
        model: The model, changed in place.
        context: Holds the calibration samples; receives the remarks.
        bits: Width of activations, which decides what share of a Softmax is nothing.

    Raises:
        InputError: No samples, or ones that the model does not take.
    """
    masks = Masks()
    found: dict[ir.Value, set[ir.Value]] = {}
    for value in list(model.graph.initializers.values()):
        if not is_constant(value) or value.dtype != ir.DataType.FLOAT or value.is_graph_output():
            continue
        array = constant(value)
        hidden = hidden_values(value) if array is not None and (array <= HIDDEN).any() else None
        if hidden is not None and all(each.graph is model.graph for each in hidden):
            found[value] = hidden
    if not found:
        return masks
    ranges = _visible_ranges(model, found, context)
    taken = names(model)
    for value, hidden in found.items():
        scores = [ranges[each.name or ""] for each in hidden if (each.name or "") in ranges]
        scores = [each for each in scores if not each.empty]
        array = constant(value)
        if not scores or array is None:
            continue
        lowest, highest = min(each.low for each in scores), max(each.high for each in scores)
        level = np.float32(lowest - highest - MARGINS[bits])
        if not level > HIDDEN:
            continue
        readers = list(value.uses())
        lifted = add_constant(model.graph, f"{value.name}_lifted", np.where(array <= HIDDEN, level, array), taken)
        for use in readers:
            use.node.replace_input_with(use.idx, lifted)
        model.graph.initializers.pop(value.name or "")
        context.applied(readers[0].node, f"hides scores at {float(level):.4g} instead of {float(array.min()):.4g}")
        for each in _combined(hidden):
            seen = ranges.get(each.name or "")
            if seen is not None and not seen.empty:
                masks.floors[each.name or ""] = seen.low - MARGINS[bits]
    return masks


def _visible_ranges(model: ir.Model, found: Mapping[ir.Value, set[ir.Value]], context: Context) -> dict[str, Histogram]:
    """Return what the scores are where nothing is hidden."""
    copy = model.clone()
    for value in found:
        array = constant(value)
        assert array is not None
        shown = copy.graph.initializers[value.name or ""]
        shown.const_value = ir.tensor(np.where(array <= HIDDEN, np.float32(0), array), name=value.name)
    wanted = dict.fromkeys(each.name or "" for hidden in found.values() for each in _combined(hidden))
    return observe(copy, wanted, context.calibration, counts=False, track=context.track)


def _combined(hidden: set[ir.Value]) -> list[ir.Value]:
    """Return the values that hold scores as well as hidden places, behind the sum or the choice that joins them."""
    combined: dict[ir.Value, None] = {}
    changed = True
    while changed:
        changed = False
        for value in hidden - combined.keys():
            node = value.producer()
            if node is None:
                continue
            read = [each for each in node.inputs if each is not None and each.dtype == ir.DataType.FLOAT]
            joins = node.op_type in ("Add", "Where", "Concat", "Max", "Min")
            beside = joins and any(each not in hidden and not is_constant(each) for each in read)
            if beside or any(each in combined for each in read):
                combined[value] = None
                changed = True
    return list(combined)
