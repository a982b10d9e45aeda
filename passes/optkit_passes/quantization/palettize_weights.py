"""Weights as indices into look-up tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field, model_validator

from optkit.graph import constant, names, opset, prune
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.codebook import MOST_ENTRIES, lut_blocks
from optkit.quant.moments import Channels, second_moments
from optkit.quant.palette import Palette, write_palette
from optkit.quant.walk import reads

from ._bias_constants import BiasConstant, bias_constant
from ._layer_moments import LayerInputs, LayerMoments
from ._palette_bits import allocate, measure
from ._palettes import even_channels, fit_palette, zeros_of
from ._weight_uses import WeightUse, weight_uses, why_kept

DAMPING = 0.01  # of the mean second moment, added to all: calibration that never used a channel proves little


class PalettizeWeights(Pass):
    """Store weights as indices into look-up tables (LUTs) found by k-means.

    Weights of Conv, ConvTranspose, Gemm and MatMul and tables that Gather picks from become ``Gather(LUT, indices)``,
    in bodies of If, Loop and Scan too; a tied weight stays one. A runtime without LUTs, onnxruntime is one, expands
    them when it loads the model: there the file shrinks, while time and memory are those of the floats. ONNX has 4-bit
    elements from opset 21 and 2-bit ones from opset 25 on (``raise-opset`` before this pass gives them), but none of
    1, 3 or 6: indices take the next wider type.

    Zeros of a pruned weight (``prune-weights``) stay zeros, and the LUT serves the others: a format that keeps zeros
    apart stores no index for them. In ONNX they have one more entry, the first.

    SQNR in dB of the outputs of float16 packages for Core ML against float32 in onnxruntime, with one LUT for each
    weight: by coremltools' k-means and by this pass, calibrated with 32 samples and evaluated on 16 others
    (``python benchmarks/coreml_palettes.py --samples 16 --bits BITS``). What calibration is worth comes from choosing
    the indices of a row together and from correcting biases, hardly from weighing errors in k-means.

    =================  ===========  ===========  ===========  ===========  ===========
    model                   8 bits            6            4            3            2
    =================  ===========  ===========  ===========  ===========  ===========
    mobilenet_v1_075   21.4 / 38.9  -0.0 / 22.5  -1.2 / 11.9  -2.4 /  3.0  -3.2 / -0.3
    squeezenet1_1      27.7 / 34.4  15.3 / 23.6   4.0 / 13.0  -0.1 /  5.6   0.0 /  0.8
    resnet20_cifar10   37.7 / 46.6  23.2 / 34.7  12.4 / 21.6   0.7 / 15.2  -1.1 /  9.6
    relu_lm            48.3 / 55.4  36.5 / 42.8  23.6 / 30.7  16.8 / 24.9  10.8 / 16.6
    sst2_relu_encoder  49.7 / 55.1  36.8 / 38.8  24.1 / 25.3  18.7 / 24.5  10.1 / 15.1
    stories260k        41.5 / 42.3  28.5 / 29.5  15.6 / 15.8  10.5 / 11.6   6.5 /  8.0
    =================  ===========  ===========  ===========  ===========  ===========

    Attributes:
        bits: Bits of an index; a LUT has ``2**bits`` entries.
        average_bits: Bits that a weight may take on average, LUTs included, instead of ``bits`` for all: each constant
            gets one of ``choices``, greedily those that cost the outputs least for each bit saved, measured with one
            constant at a time on calibration data.
        choices: The bits to choose from.
        channels_per_lut: How many neighbouring output channels share a LUT; 0: one LUT for the whole weight.
        even: Whether all LUTs of a weight are to serve equally many channels, as Core ML wants: then a divisor of their
            number near ``channels_per_lut`` takes its place. Otherwise the last block may be short.
        weighted: Whether calibration data says which weights matter. Without any, all count the same.
        rounding: What weights become with calibration data: ``nearest``: the nearest entry; ``gptq``: the entries of a
            row that give the layer's output the smallest error together, on inputs that the layers palettized before
            give, as quantize-weights chooses integers.
        bias_correction: Whether a layer's bias, where it has one, makes up for the mean error of each output that
            ``gptq`` leaves. At 4 bits that, and rounding grouped convolutions together, gives mobilenet_v1_075
            11.9 in place of 6.6 dB, squeezenet1_1 13.0 in place of 9.8, and resnet20 21.6 in place of 20.0.
    """

    effect: ClassVar[Effect] = LOSSY

    bits: int = Field(default=4, ge=1, le=8)
    average_bits: float | None = Field(default=None, gt=0, le=8)
    choices: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(default=(2, 3, 4, 6, 8), min_length=1)
    channels_per_lut: int = Field(default=0, ge=0)
    even: bool = False
    weighted: bool = True
    rounding: Literal["nearest", "gptq"] = "gptq"
    bias_correction: bool = True

    @model_validator(mode="after")
    def _can_be_met(self) -> PalettizeWeights:
        if self.average_bits is not None and self.average_bits <= min(self.choices):
            raise ValueError(f"an average of {self.average_bits:g} bits needs choices of fewer, not {self.choices}")
        return self

    @property
    def _most(self) -> int:
        return self.bits if self.average_bits is None else max(self.choices)

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
        bits = self._bits(model, weights, moments, context)
        inputs = self._inputs(model, moments, context)
        taken, readers = names(model), _first_readers(model, weights)
        for stored, uses in context.track(list(weights.items()), "Palettizing", len(weights)):
            seen = self._seen(inputs, uses)
            fitted = self._fit(stored, uses, moments, seen, bits[stored])
            palette = fitted.palette
            notes = []
            if moments and not fitted.weighted and any(use.data is not None for use in uses):
                notes.append("unweighted, since calibration does not see what they are multiplied with")
            elif isinstance(seen, str):
                notes.append(f"each takes the nearest entry: {seen}")
            if fitted.bias is not None:
                change = fitted.bias.add(fitted.lost, taken)
                notes.append(f"bias corrected by up to {change:.2g}")
            stored.replace_all_uses_with(
                write_palette(readers[stored], stored.name or "", palette, opset(model), taken)
            )
            prune([stored])
            _remark(stored, uses, palette, opset(model), notes, context)

    def _channels(self, weight: np.ndarray, use: WeightUse) -> int:
        """Return how many channels of a weight share a LUT; 0: all."""
        if not self.channels_per_lut or not self.even:
            return self.channels_per_lut
        return even_channels(weight.shape[use.output_axis], self.channels_per_lut)

    def _why_no_smaller(self, stored: ir.Value, uses: list[WeightUse], version: int) -> str:
        """Return that LUTs and indices would take no less than the weight, with the numbers; empty if they do."""
        weight = constant(stored)
        if weight is None or not weight.size:
            return f"'{stored.name}' has no elements"
        blocks = len(lut_blocks(weight, uses[0].output_axis, self._channels(weight, uses[0])))
        entries = min((1 << self._most) + (zeros_of(weight, self._most) == "apart"), MOST_ENTRIES)
        lut, indices = np.empty((blocks, entries), weight.dtype), np.empty(weight.shape, np.uint8)
        empty = Palette(lut, indices, self._most, uses[0].output_axis, self._channels(weight, uses[0]))
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

    def _bits(
        self,
        model: ir.Model,
        weights: dict[ir.Value, list[WeightUse]],
        moments: dict[Channels, np.ndarray],
        context: Context,
    ) -> dict[ir.Value, int]:
        """Return the bits of each weight's indices."""
        found = dict.fromkeys(weights, self._most)
        if self.average_bits is None:
            return found

        inputs = self._inputs(model, moments, context)

        def fitted(stored: ir.Value) -> dict[int, dict[str, np.ndarray]]:
            seen = self._seen(inputs, weights[stored])
            fits = {bits: self._fit(stored, weights[stored], moments, seen, bits) for bits in self.choices}
            return {bits: fit.constants(stored) for bits, fit in fits.items()}

        errors = measure(model, list(weights), fitted, context)
        luts = []
        for stored in errors:
            weight, use = _weight(stored), weights[stored][0]
            luts.append(len(lut_blocks(weight, use.output_axis, self._channels(weight, use))))
        sizes = [stored.const_value.size for stored in errors if stored.const_value is not None]
        return found | dict(zip(errors, allocate(sizes, luts, list(errors.values()), self.average_bits), strict=True))

    def _inputs(self, model: ir.Model, moments: dict[Channels, np.ndarray], context: Context) -> LayerInputs | None:
        """Return what tells the moments of layers' inputs; None where indices are chosen one by one."""
        return LayerInputs(model, context, self.name()) if moments and self.rounding == "gptq" else None

    def _seen(self, inputs: LayerInputs | None, uses: list[WeightUse]) -> LayerMoments | str | None:
        """Return the moments of what a weight's layer reads, or why there are none; None where none are wanted."""
        return inputs.moments(uses) if inputs is not None and any(use.data is not None for use in uses) else None

    def _fit(
        self,
        stored: ir.Value,
        uses: list[WeightUse],
        moments: dict[Channels, np.ndarray],
        seen: LayerMoments | str | None,
        bits: int,
    ) -> _Fitted:
        """Return the palette of a weight, and what its layer's bias makes up for."""
        weight, importance = _weight(stored), _importance(uses, moments)
        inputs = seen if isinstance(seen, LayerMoments) else None
        channels = weight.shape[uses[0].output_axis]
        bias = bias_constant(uses[0].node, channels) if self.bias_correction and inputs is not None else None
        palette = fit_palette(
            weight,
            bits,
            axis=uses[0].output_axis,
            channels=self._channels(weight, uses[0]),
            importance=importance,
            moments=inputs,
            centered=bias is not None,
            name=stored.name or "",
        )
        lost = np.zeros(channels) if bias is None or inputs is None else inputs.lost(weight, palette.weight)
        return _Fitted(palette, importance is not None, bias, lost)


@dataclass(frozen=True)
class _Fitted:
    """What a weight becomes.

    Attributes:
        palette: Its palette.
        weighted: Whether calibration weighed it.
        bias: What makes up for the mean error of the layer's outputs, or None.
        lost: That error, [output channels].
    """

    palette: Palette
    weighted: bool
    bias: BiasConstant | None
    lost: np.ndarray

    def constants(self, stored: ir.Value) -> dict[str, np.ndarray]:
        """Return what the weight and its layer's bias become, by name."""
        found = {stored.name or "": self.palette.weight}
        if self.bias is not None:
            moved = self.bias.moved(self.lost)
            if self.bias.alone(moved):
                found[self.bias.value.name or ""] = moved
        return found


def _remark(
    stored: ir.Value, uses: list[WeightUse], palette: Palette, version: int, notes: list[str], context: Context
) -> None:
    size, before = palette.indices.size, palette.indices.size * palette.lut.itemsize
    message = f"{size} weights as {palette.bits}-bit indices into {_count(len(palette.lut), 'LUT')}"
    message += f", {before} bytes become {palette.stored_bytes(version)}"
    if palette.sparse:
        zeros = np.count_nonzero(palette.indices == 0)
        message += f"; {zeros} that are 0 stay so, and have no index where the format keeps them apart"
    width = palette.index_type(version).bitwidth
    if width != palette.bits:
        message += f" (opset {version} stores such indices in {width} bits)"
    notes = [message, *notes, "a runtime without LUTs expands them when it loads the model"]
    context.applied(uses[0].node, "; ".join(notes))
    for use in uses[1:]:
        context.applied(use.node, f"shares the LUT of '{stored.name}' with '{uses[0].node.name}'")


def _weight(stored: ir.Value) -> np.ndarray:
    array = constant(stored)
    assert array is not None
    return array


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
