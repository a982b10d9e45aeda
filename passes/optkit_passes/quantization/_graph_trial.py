"""Measures what rounding single activations to narrow integers does to the outputs of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import is_constant
from optkit.quant.integers import QuantParams
from optkit.session import Session

from ._formats import CONTRIB
from ._graph_writer import Widths, regrid
from ._regions import Plan

# A place where values are rounded: the first value of a group that shares a scale (what computes it rounds it, for all
# readers), or a layer (rounds what it reads once more, where that is wider than what the layer computes with).
Place = ir.Value | ir.Node
Feed = dict[str, np.ndarray]


class RoundingTrial:
    """A float model in which every activation of a plan is rounded by parameters that are fed.

    Weights stay float: their errors are the same whatever the activations' widths.

    Args:
        model: The model, not changed.
        plan: What is rounded.
        params: Scale and zero point of every quantized value, in narrow integers.
        widths: The two kinds of integers.
        samples: The samples to run.
    """

    def __init__(
        self,
        model: ir.Model,
        plan: Plan,
        params: Mapping[ir.Value, QuantParams],
        widths: Widths,
        samples: Sequence[Mapping[str, np.ndarray]],
    ) -> None:
        self.samples = samples
        self.runs = 0
        self._feeds: dict[Place, list[tuple[Feed, Feed]]] = {}
        copy = model.clone()
        copy.opset_imports.setdefault(CONTRIB, 1)
        self._copy, self._plan, self._params, self._widths = copy, plan, params, widths
        self._nodes = dict(zip(model.graph, copy.graph, strict=True))
        named = [*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs)]
        self._values = {value.name: value for value in named}
        self._count = 0
        for value in plan.quantized:
            if not is_constant(value) and _is_rounded(value, plan):
                self._round_value(value)
        for node, layer in plan.layers.items():
            self._round_reads(node, layer.activations)
        exact = Session(model, optimize=True)
        self._goals = [_floats(exact.run(sample)) for sample in samples]
        # onnxruntime 1.31's fusions take a Clip whose bounds are fed for one without bounds, and are no faster here
        self._session = Session(copy, optimize=False)

    @property
    def places(self) -> list[Place]:
        """Every place, those of layers last."""
        return list(self._feeds)

    def error(self, narrow: Collection[Place], judges: int | None = None) -> float:
        """Return the squared error of the outputs relative to their squares, the mean over outputs.

        Args:
            narrow: The places where values are rounded to narrow integers; at all others they are rounded to wide ones.
            judges: Use this many samples; None: all.
        """
        fed: Feed = {}
        for place, feeds in self._feeds.items():
            for small, large in feeds:
                fed |= small if place in narrow else large
        errors = powers = np.zeros(len(self._goals[0]))
        for sample, goal in list(zip(self.samples, self._goals, strict=True))[:judges]:
            self.runs += 1
            outputs = _floats(self._session.run({**sample, **fed}))
            errors = errors + [np.square(a - b).sum() for a, b in zip(outputs, goal, strict=True)]
            powers = powers + [np.square(b).sum() for b in goal]
        return float((errors / np.where(powers > 0, powers, 1)).mean()) if len(errors) else 0.0

    def _round_value(self, value: ir.Value) -> None:
        """Round a value for all its readers, or for units where it is computed in float."""
        everyone = value in self._plan.integer
        twin = self._values[value.name]
        uses = [u for u in value.uses() if everyone or self._plan.read_as_integer(u.node, u.idx)]
        readers = [(self._nodes[use.node], use.idx) for use in uses if use.node in self._nodes]
        rounded, feed = self._rounding(twin, self._params[value], twin.producer())
        for node, index in readers:
            node.replace_input_with(index, rounded)
        if everyone and twin.is_graph_output():
            rounded.type, rounded.shape = twin.type, twin.shape
            for place, output in enumerate(self._copy.graph.outputs):
                if output is twin:
                    self._copy.graph.outputs[place] = rounded
        self._feeds.setdefault(place_of(value, self._plan), []).append(feed)

    def _round_reads(self, node: ir.Node, indices: Sequence[int]) -> None:
        """Round once more what a layer reads."""
        feeds = []
        for index in indices:
            value, twin = node.inputs[index], self._nodes[node]
            read = twin.inputs[index]
            if value is None or read is None or is_constant(value):
                continue
            rounded, feed = self._rounding(read, self._params[value], None, before=twin)
            twin.replace_input_with(index, rounded)
            feeds.append(feed)
        self._feeds[node] = feeds

    def _rounding(
        self, value: ir.Value, params: QuantParams, after: ir.Node | None, before: ir.Node | None = None
    ) -> tuple[ir.Value, tuple[Feed, Feed]]:
        """Return the rounded value and what to feed for narrow and for wide integers.

        All are rounded in uint16; a Clip keeps narrow ones within their range.
        """
        name = f"optkit.{self._count}"
        self._count += 1
        graph = self._copy.graph
        types = {"low": ir.DataType.FLOAT, "high": ir.DataType.FLOAT, "scale": ir.DataType.FLOAT}
        types["zero"] = ir.DataType.UINT16
        low, high, scale, zero = (
            ir.Value(name=f"{name}.{kind}", type=ir.TensorType(dtype), shape=ir.Shape([]))
            for kind, dtype in types.items()
        )
        graph.inputs.extend([low, high, scale, zero])
        clip = ir.Node("", "Clip", [value, low, high], num_outputs=1)
        q = ir.Node(CONTRIB, "QuantizeLinear", [clip.outputs[0], scale, zero], num_outputs=1)
        dq = ir.Node(CONTRIB, "DequantizeLinear", [q.outputs[0], scale, zero], num_outputs=1)
        for number, node in enumerate((clip, q, dq)):
            node.outputs[0].name = f"{name}.{number}"
        if after is not None:
            graph.insert_after(after, [clip, q, dq])
        else:
            graph.insert_before(before or graph[0], [clip, q, dq])
        fed = []
        for grid in (self._widths.narrow, self._widths.wide):
            chosen = regrid(params, grid)
            bottom, top = chosen.limits()
            offset = int(chosen.zero_point) - grid.low
            fed.append(
                {
                    f"{name}.low": np.asarray(bottom, np.float32),
                    f"{name}.high": np.asarray(top, np.float32),
                    f"{name}.scale": np.asarray(chosen.scale),
                    f"{name}.zero": np.asarray(offset, np.uint16),
                }
            )
        return dq.outputs[0], (fed[0], fed[1])


def place_of(value: ir.Value, plan: Plan) -> ir.Value:
    """Return what stands for the group of values that a computed or fed value shares its scale with."""
    return next(member for member in plan.groups[value] if not is_constant(member))


def _is_rounded(value: ir.Value, plan: Plan) -> bool:
    """Whether a value is not a choice of values that are rounded at the same scale already."""
    sources = plan.sources[value]
    return value in sources or all(is_constant(source) for source in sources)


def _floats(outputs: Mapping[str, Any]) -> list[np.ndarray]:
    arrays = [value for value in outputs.values() if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    return [array.astype(np.float64) for array in arrays]
