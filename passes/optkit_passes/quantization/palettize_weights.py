"""Weights as indices into look-up tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.graph import constant, names, opset, prune
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.codebook import codebook, lut_blocks
from optkit.quant.moments import Channels, second_moments
from optkit.quant.palette import Palette, index_type, write_palette
from optkit.quant.walk import reads

from ._weight_uses import WeightUse, weight_uses, why_kept

DAMPING = 0.01  # of the mean second moment, added to all: calibration that never used a channel proves little


class PalettizeWeights(Pass):
    """Store weights as indices into look-up tables (LUTs) found by k-means.

    Attributes:
        bits: Bits of an index; a LUT has ``2**bits`` entries.
        channels_per_lut: How many neighbouring output channels share a LUT; 0: one LUT for the whole weight.
        weighted: Whether calibration data says which weights matter. Without any, all count the same.
    """

    effect: ClassVar[Effect] = LOSSY

    bits: int = Field(default=4, ge=1, le=8)
    channels_per_lut: int = Field(default=0, ge=0)
    weighted: bool = True

    def run(self, model: ir.Model, context: Context) -> None:
        """Palettize every weight of the model, bodies included, that gets smaller."""
        weights: dict[ir.Value, list[WeightUse]] = {}
        for node in model.graph.all_nodes():
            found = weight_uses(node)
            if isinstance(found, str):
                context.missed(node, found)
                continue
            for use in found:
                weights.setdefault(use.stored, []).append(use)
        for stored in list(weights):
            reason = why_kept(stored, weights[stored]) or self._why_no_smaller(stored, weights[stored], opset(model))
            if reason:
                for use in weights.pop(stored):
                    context.missed(use.node, reason)
        if not weights:
            return
        moments = self._moments(model, weights, context)
        taken, readers = names(model), _first_readers(model, weights)
        for stored, uses in context.track(list(weights.items()), "Palettizing", len(weights)):
            palette, weighted = self._palette(stored, uses, moments)
            stored.replace_all_uses_with(
                write_palette(readers[stored], stored.name or "", palette, opset(model), taken)
            )
            prune([stored])
            self._remark(
                stored, uses, palette, opset(model), unweighted=bool(moments) and not weighted, context=context
            )

    def _why_no_smaller(self, stored: ir.Value, uses: list[WeightUse], version: int) -> str:
        """Return that LUTs and indices would take no less than the weight, with the numbers; empty if they do."""
        weight = constant(stored)
        if weight is None or not weight.size:
            return f"'{stored.name}' has no elements"
        blocks = len(lut_blocks(weight, uses[0].output_axis, self.channels_per_lut))
        lut, indices = np.empty((blocks, 1 << self.bits), weight.dtype), np.empty(weight.shape, np.uint8)
        empty = Palette(lut, indices, self.bits, uses[0].output_axis, self.channels_per_lut)
        after = empty.stored_bytes(version)
        if after < weight.nbytes:
            return ""
        return f"{_count(blocks, 'LUT')} and indices would take {after} bytes, '{stored.name}' takes {weight.nbytes}"

    def _moments(
        self, model: ir.Model, weights: dict[ir.Value, list[WeightUse]], context: Context
    ) -> dict[Channels, np.ndarray]:
        """Return the second moments of the data of all layers in the main graph that can be observed."""
        if not self.weighted:
            return {}
        if context.calibration is None:
            context.missed("calibration", "no data was given: all weights of a layer count the same")
            return {}
        wanted = [_channels(use) for uses in weights.values() for use in uses if _is_observable(use, model)]
        if not wanted:
            return {}
        return second_moments(model, wanted, context.calibration, track=context.track, name=self.name())

    def _palette(
        self, stored: ir.Value, uses: list[WeightUse], moments: dict[Channels, np.ndarray]
    ) -> tuple[Palette, bool]:
        """Return the palette of a weight, and whether calibration weighed it."""
        weight, importance, axis = constant(stored), _importance(uses, moments), uses[0].output_axis
        assert weight is not None
        channels = self.channels_per_lut
        lut, indices = codebook(
            weight, self.bits, axis=axis, channels_per_lut=channels, importance=importance, name=stored.name or ""
        )
        if len(lut) == 1:
            axis = channels = 0
        return Palette(lut, indices, self.bits, axis, channels), importance is not None

    def _remark(
        self,
        stored: ir.Value,
        uses: list[WeightUse],
        palette: Palette,
        version: int,
        *,
        unweighted: bool,
        context: Context,
    ) -> None:
        size, before = palette.indices.size, palette.indices.size * palette.lut.itemsize
        message = f"{size} weights as {self.bits}-bit indices into {_count(len(palette.lut), 'LUT')}"
        message += f", {before} bytes become {palette.stored_bytes(version)}"
        width = index_type(self.bits, version).bitwidth
        if width != self.bits:
            message += f" (opset {version} stores such indices in {width} bits)"
        if unweighted and any(use.data is not None for use in uses):
            message += "; unweighted, since calibration does not see what they are multiplied with"
        context.applied(uses[0].node, message + "; a runtime without LUTs expands them when it loads the model")
        for use in uses[1:]:
            context.applied(use.node, f"shares the LUT of '{stored.name}' with '{uses[0].node.name}'")


def _first_readers(model: ir.Model, weights: Iterable[ir.Value]) -> dict[ir.Value, ir.Node]:
    """Return the first node of each weight's own graph that reads it, itself or in a body."""
    wanted, found = set(weights), dict[ir.Value, ir.Node]()
    for graph in model.graphs():
        for node in graph:
            for value in reads(node):
                if value in wanted and value.graph is graph:
                    found.setdefault(value, node)
    return found


def _channels(use: WeightUse) -> Channels:
    assert use.data is not None
    return use.data.name or "", use.data_axis


def _is_observable(use: WeightUse, model: ir.Model) -> bool:
    """Whether the layer's data is fed to, or computed by, the main graph."""
    value = use.data
    if value is None or use.node.graph is not model.graph or value.is_initializer():
        return False
    return value.is_graph_input() or value.producer() is not None


def _importance(uses: list[WeightUse], moments: dict[Channels, np.ndarray]) -> np.ndarray | None:
    """Return what errors at the weights cost all layers that were observed, or None."""
    total: np.ndarray | None = None
    for use in uses:
        seen = moments.get(_channels(use)) if use.data is not None else None
        found = None if seen is None else use.importance(seen)
        if found is not None:
            total = found if total is None else total + found
    return None if total is None else total + DAMPING * total.mean()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
