"""Static quantization of whole graphs for NPUs: every operator becomes a complete quantized unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.dataset.samples import Lazy, Samples
from optkit.errors import InputError
from optkit.graph import add_constant, constant, is_unused, names, opset, remove
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.integers import IntegerGrid
from optkit.quant.walk import spread_samples

from ._bias import join_bias
from ._clamps import remove_clamp
from ._formats import OLDEST_OPSET, Formats, choose_formats
from ._graph_calibrate import Calibration, calibrate, has_int16
from ._graph_masks import Masks, lift_masks
from ._graph_widths import JUDGES, Choice, choose_widths, settled
from ._graph_writer import GraphWriter, Widths
from ._layers import CLAMP_OPS, LAYER_OPS, describe
from ._ranges import Method, RangeChoice
from ._reconstruct import Reconstruction, Rounding
from .quantize_static import Observations

HELD_OUT_SHARE = 4  # one calibration sample in so many is held out to measure on
FEW = 8  # fewer samples are not divided


class QuantizeGraph(Pass):
    """Quantize every operator of the main graph statically, so that an NPU computes the whole graph on integers.

    Each operator reads what was dequantized right before it and its result is quantized right after it: what is not so
    complete falls to the CPU, or is computed in float16. What stays float, if the target computes in float: operators
    without a quantized form, those whose results span too many orders of magnitude (Exp, Sqrt, Div, ...), operators
    between such, and those behind the last layer whose results only the caller reads. Where float16 would overflow,
    integers of 16 bits are used. Constants that hide scores from a Softmax (-1e9, minus infinity) are lifted to where
    their share is still nothing. Weights have one scale per output channel where the operator takes that.

    With 8-bit activations it is measured, on calibration samples that were held out, what they do to the outputs. Below
    ``goal_db`` single tensors are widened to 16 bits, those first that gain most for what they cost, until the goal is
    met. Of the models measured only two needed it: one that computes a variance as a difference of means (-1 dB, then
    33), and a Llama of 260 thousand parameters (24 dB).

    Labelled accuracy on Qualcomm's HTP emulator against float32, all nodes on the NPU; 16 bits with ``gptq`` rounding:

    ================  ===========  =====================  =====================
    model             samples      8 bits                 16 bits
    ================  ===========  =====================  =====================
    ResNet-20         200          29.7 dB, +0.002 nats   37.8 dB, -0.002 nats
    MNIST, PyTorch    200          32.6 dB, -0.001 nats   37.0 dB, -0.000 nats
    SqueezeNet 1.1    60           22.2 dB, +0.020 nats   26.4 dB, -0.003 nats
    MobileNet 0.75    60           27.3 dB, +0.015 nats   35.0 dB, +0.001 nats
    ReLU decoder      60 x 128     30.1 dB, +0.001 nats   52.3 dB, -0.000 nats
    SST-2 encoder     60           32.5 dB, +0.001 nats   51.7 dB, +0.000 nats
    ================  ===========  =====================  =====================

    Attributes:
        weight_bits: Width of weights, 8 or 4.
        activation_bits: Width of activations, 8 or 16.
        range_method: How an activation's range is read from what calibration saw, as for `quantize-static`.
        percentile: Per cent of the values that the ``percentile`` method keeps inside the range.
        momentum: That of the ``average`` method, over samples in their order; 1: their plain mean.
        wide: Whether operators compute with 16-bit activations where it is ``measured`` that 8 cost the outputs too
            much, or ``never``.
        goal_db: SQNR in dB of the outputs, with the weights in float, up to which activations are widened.
        wide_macs: Share of the multiply-accumulates of all layers that may become wide; other operators cost little.
        rounding: How weights become integers: each to ``nearest``, or by ``gptq`` so that their errors cancel in the
            layer's outputs on the calibration samples.
        bias_correction: Whether the mean error of each output channel, measured layer by layer on calibration samples,
            is taken off the layer's bias.
    """

    effect: ClassVar[Effect] = LOSSY

    weight_bits: Literal[4, 8] = 8
    activation_bits: Literal[8, 16] = 8
    range_method: Method = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)
    momentum: float = Field(default=1.0, gt=0, le=1)
    wide: Literal["measured", "never"] = "measured"
    goal_db: float = 25.0
    wide_macs: float = Field(default=0.25, ge=0, le=1)
    rounding: Rounding = "nearest"
    bias_correction: bool = True

    def run(self, model: ir.Model, context: Context) -> None:
        """Quantize the main graph in place."""
        formats = choose_formats(context.target, self.weight_bits, self.activation_bits, 0)
        for node in model.graph.all_nodes():
            if node.graph is not model.graph and node.op_type in LAYER_OPS and node.domain == "":
                context.missed(node, "inside the body of a control-flow node, where activations cannot be observed")
        if opset(model) < OLDEST_OPSET:
            for node in (node for node in model.graph if node.op_type in LAYER_OPS and node.domain == ""):
                context.missed(node, f"opset {opset(model)}: one scale per channel needs opset {OLDEST_OPSET}")
            return
        for node in join_bias(model.graph):
            context.applied(node, "joined with the bias added to its result")
        for node in _transpose_constants(model):
            context.applied(node, "reads a constant that was transposed beforehand")
        self._quantize(model, context, formats, lift_masks(model, context, self.activation_bits))

    def _quantize(self, model: ir.Model, context: Context, formats: Formats, masks: Masks) -> None:
        ranges = RangeChoice(self.range_method, self.percentile)
        wide = self._wide(context, formats)
        found: Choice | None = None
        samples = context.calibration
        if self.wide == "measured" and wide != formats.activations and samples is not None and len(samples):
            fitted, held = _split(samples)
            first = calibrate(
                model, context, fitted, self._observations(), masks, formats.activations, ranges, self.momentum
            )
            widths = Widths(formats.activations, wide)
            found = choose_widths(
                model, first.plan, first.params, widths, held, first.forced,
                goal_db=self.goal_db, most_macs=self.wide_macs,
            )  # fmt: skip
        seen = self._observations()
        final = calibrate(model, context, samples, seen, masks, formats.activations, ranges, self.momentum)
        if seen.histograms and samples is not None and len(samples) == 1:
            context.missed("calibration", "one sample only: ranges seen in it may be too narrow for others")
        for node, reason in final.plan.reasons.items():
            context.missed(node, reason)
        if not final.plan.quantized:
            return
        choice = settled(final.plan, found or Choice(), final.forced)
        if found is not None and found.narrow_db is not None and found.units:
            what = f"all in 8 bits give {found.narrow_db:.1f} dB on held-out samples, weights in float; "
            context.applied(
                "activations", f"{what}{len(choice.units)} operators in 16 bits give {found.chosen_db:.1f} dB"
            )
        elif found is not None and found.narrow_db is not None and found.narrow_db < self.goal_db:
            context.missed("activations", f"8 bits give {found.narrow_db:.1f} dB and no few wider operators help")
        widths = Widths(formats.activations, wide, exact_factors=has_int16(context))
        self._write(model, context, formats, final, choice, choice.widths(widths), seen)

    def _observations(self) -> Observations:
        return Observations(counts=self.range_method not in ("minmax", "average"))

    def _wide(self, context: Context, formats: Formats) -> IntegerGrid:
        """Return the integers of wide activations; those of all others where the target has no wider ones."""
        try:
            return choose_formats(context.target, self.weight_bits, 16, 0).activations
        except InputError:
            return formats.activations

    def _write(
        self,
        model: ir.Model,
        context: Context,
        formats: Formats,
        found: Calibration,
        choice: Choice,
        widths: Widths,
        seen: Observations,
    ) -> None:
        plan = found.plan
        original = model.clone()
        twins = dict(zip(model.graph, original.graph, strict=True))
        constants = plan.constants()
        clamps = [node for node in plan.glue if node.op_type in CLAMP_OPS and node.inputs[0] not in plan.quantized]
        written = GraphWriter(model, formats, plan, found.params, widths).write()
        texts = {node: _activations(node, widths, choice) for node in (*plan.layers, *plan.glue)}
        for layer, stored in written:
            widened = f", {stored.widened} of them widened so that the bias fits" if stored.widened else ""
            context.applied(
                layer.node,
                f"{stored.weight.size} weights in {stored.params.grid.bits} bits "
                f"with {stored.params.scale.size} scales{widened}; {texts[layer.node]}",
            )
        for node in [*(node for node, layer in plan.layers.items() if layer.weight is None), *plan.glue]:
            if node in clamps and remove_clamp(node):
                context.applied(node, f"removed: the quantizer of '{node.outputs[0].name}' clamps at the same bounds")
            else:
                context.applied(node, texts[node])
        if written and (self.rounding != "nearest" or self.bias_correction):
            largest = max((histogram.size for histogram in seen.histograms.values()), default=1)
            fit = Reconstruction(original, twins, model, context, largest=largest, pairs_saturate=False)
            fit.run(written, self.rounding, correct_bias=self.bias_correction)
        for value in constants:
            if is_unused(value):
                model.graph.initializers.pop(value.name or "", None)
        model.metadata_props["onnx.infer"] = "onnxruntime.quant"  # as onnxruntime's own tool marks its models


def _activations(node: ir.Node, widths: Widths, choice: Choice) -> str:
    """Return how wide a unit's activations are, and why."""
    reason = choice.units.get(node)
    return f"activations in {widths.of_unit(node).bits} bits" + (f": {reason}" if reason else "")


def _split(samples: Samples) -> tuple[Samples, Sequence[Mapping[str, np.ndarray]]]:
    """Return the samples to read ranges from and those to measure on, the same where there are few."""
    if len(samples) < FEW:
        return samples, spread_samples(samples, JUDGES)
    held = range(HELD_OUT_SHARE - 1, len(samples), HELD_OUT_SHARE)
    fitted = [index for index in range(len(samples)) if index not in held]
    return _pick(samples, fitted), spread_samples(_pick(samples, held), JUDGES)


def _pick(samples: Samples, indices: Sequence[int]) -> Samples:
    """Return some of the samples, each read when it is asked for."""
    items = Lazy(len(indices), lambda index: samples.items[indices[index]])
    return Samples(items, samples.source, random=samples.random)


def _transpose_constants(model: ir.Model) -> list[ir.Node]:
    """Transpose the constant matrices that products read transposed: the weight of a unit must be a constant itself.

    A table that is both embedding and output layer is stored twice: runtimes take one scale per table of rows.
    """
    taken, changed = names(model), []
    for node in [node for node in model.graph if node.op_type == "MatMul" and node.domain in ("", "ai.onnx")]:
        layer = describe(node)
        matrix = None if isinstance(layer, str) or layer.transpose is None else constant(layer.stored)
        if matrix is None or isinstance(layer, str) or layer.transpose is None:
            continue
        transpose, name = layer.transpose, "" if layer.stored is None else layer.stored.name
        turned = add_constant(model.graph, f"{name}_transposed", np.ascontiguousarray(matrix.T), taken)
        node.replace_input_with(1, turned)
        remove(transpose)
        changed.append(node)
    return changed
