"""Static quantization: weights and activations of convolutions and matrix products become integers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from optkit.graph import is_constant, is_unused, opset, remove
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.calibrate import observe
from optkit.quant.histogram import Histogram
from optkit.quant.integers import QuantParams

from ._bias import join_bias
from ._clamps import clamps_alike, remove_clamp
from ._formats import choose_formats
from ._layers import CLAMP_OPS, LAYER_OPS, Layer, embedding_table
from ._qdq import QdqWriter, WrittenLayer
from ._ranges import Method, RangeChoice, histogram_of
from ._reconstruct import Reconstruction, Rounding
from ._regions import Plan, plan_regions

COMPUTED = "computed on integers"  # what is said of operators between layers


class QuantizeStatic(Pass):
    """Quantize weights and activations to integers with scales fixed by calibration, as quantize / dequantize pairs.

    Conv, ConvTranspose, Gemm and MatMul are quantized wherever they can be, the operators between them where all they
    read is integer already and their result is read as integers. The rest stays float: the residual stream of a
    transformer, normalizations, softmax, final logits. Tables that Gather picks rows of are stored in 8 bits.

    Weights have 8 or 4 bits, activations 8 or 16: the types, their symmetry and what shares a scale are the target's.
    Other widths than 8 need opset 21, or onnxruntime's own operators where the target loads no such opset.

    ``minmax`` is the default because it comes within 1.4 dB of the best on all models but one, where a single
    calibration sample widens a range for all others; the other methods lose 6 dB or more on one to three. SQNR in dB of
    the outputs of twelve real models against float on up to 100 evaluation samples, weights and activations in 8 bits,
    biases corrected, quantize / dequantize nodes computed in float:

    ==============  ======  =====  ==========  =======
    model           minmax  mse    percentile  entropy
    ==============  ======  =====  ==========  =======
    mobilenet 0.75   26.2   26.2        27.0     26.2
    squeezenet 1.1   23.7   25.1        21.3     24.1
    resnet20         29.6   29.6        28.7     29.9
    resnet56         28.2   29.2        28.1     28.7
    MNIST, CNTK      45.3   45.0        39.3     40.9
    MNIST, PyTorch   34.0   34.1        34.1     32.3
    autoencoder      46.5   45.0        46.6     46.5
    face detector    48.3   41.9        41.7     36.2
    SST-2 encoder    41.6   40.3        42.4     40.8
    ReLU decoder     39.2   39.4        39.2     31.8
    Llama, 260 K     27.5   27.9        27.9     24.4
    file types       28.3   41.5        44.7     22.1
    ==============  ======  =====  ==========  =======

    `quantize-int8` measures which of the first three suits a model.

    Attributes:
        weight_bits: Width of weights, 8 or 4; embeddings keep 8.
        activation_bits: Width of activations, 8 or 16.
        block_size: Weights of a row of a matrix product that share a scale; 0: the whole channel; None: what the
            target's format names first.
        per_channel: Whether each output channel has its own scale, where the target takes that.
        range_method: How an activation's range is read from what calibration saw: ``minmax``, ``average`` (a
            moving-average observer: the mean of the samples' bounds), ``percentile``, ``entropy`` (smallest KL
            divergence), ``mse`` (smallest squared error), or ``auto``: the one of these that moves the model's outputs
            clearly least on up to 64 calibration samples, for all tensors at once and then tensor by tensor; that takes
            up to 2,400 runs of the model.
        momentum: That of the moving average, over samples in their order; 1: their plain mean.
        percentile: Per cent of the values that the ``percentile`` method keeps inside the range.
        embeddings: Whether tables that Gather picks rows of are stored in 8 bits; costs 0.2 to 1 dB on three language
            models, and saves three quarters of the table.
        rounding: How weights become integers: each to ``nearest``, or by ``gptq`` so that their errors cancel in the
            layer's outputs on the calibration samples. That gains 9 dB where rounding the weights is what a model
            suffers from (MNIST, PyTorch), nothing where the activations are, and takes minutes on large networks.
        bias_correction: Whether the mean error of each output channel, measured layer by layer on calibration samples,
            is taken off the layer's bias.
    """

    effect: ClassVar[Effect] = LOSSY

    weight_bits: Literal[4, 8] = 8
    activation_bits: Literal[8, 16] = 8
    block_size: int | None = Field(default=None, ge=0)
    per_channel: bool = True
    range_method: Method = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)
    momentum: float = Field(default=1.0, gt=0, le=1)
    embeddings: bool = True
    rounding: Rounding = "nearest"
    bias_correction: bool = True

    def run(self, model: ir.Model, context: Context) -> None:
        """Quantize the main graph in place."""
        self.quantize(model, context, Observations(counts=self.range_method not in ("minmax", "average")))

    def quantize(self, model: ir.Model, context: Context, seen: Observations) -> None:
        """Quantize the main graph in place; only tensors that ``seen`` does not hold are observed, and added to it."""
        formats = choose_formats(
            context.target, self.weight_bits, self.activation_bits, self.block_size, per_channel=self.per_channel
        )
        _remark_bodies(model, context)
        objection = formats.objection(opset(model), context.target)
        if objection:
            for node in (node for node in model.graph if node.op_type in LAYER_OPS and node.domain == ""):
                context.missed(node, objection)
            return
        for node in join_bias(model.graph):
            context.applied(node, "joined with the bias added to its result")
        original = model.clone()
        twins = dict(zip(model.graph, original.graph, strict=True))
        plan, histograms = self._calibrate(model, context, seen), seen.histograms
        ranges = RangeChoice(self.range_method, self.percentile)
        params = ranges.params(model, plan, histograms, formats.activations, context.calibration or (), context.track)
        tables = [node for node in model.graph if self.embeddings and embedding_table(node) is not None]
        for node in (node for node in plan.reasons if node not in tables):
            context.missed(node, plan.reasons[node])
        if not plan.layers and not tables:
            return
        picked = {node.inputs[0] for node in tables}
        shared = {layer.stored for layer in plan.layers.values() if layer.stored is not None and layer.stored in picked}
        writer = QdqWriter(model, formats, shared=shared)
        constants = plan.constants() | dict.fromkeys(node.inputs[0] for node in tables if node.inputs[0] is not None)
        written = _write(plan, params, writer, context)
        for node in tables:
            writer.embedding(node)
            context.applied(node, "table stored in 8 bits")
        remove(plan.transposes())
        if written and (self.rounding != "nearest" or self.bias_correction):
            fit = Reconstruction(
                original,
                twins,
                model,
                context,
                largest=max((histogram.size for histogram in histograms.values()), default=1),
                pairs_saturate=formats.pairs_saturate,
            )
            fit.run(written, self.rounding, correct_bias=self.bias_correction)
        for value in constants:
            if is_unused(value):
                model.graph.initializers.pop(value.name or "", None)
            elif value.dtype == ir.DataType.FLOAT:
                use = next(iter(value.uses()), None)  # None: it is an output of the model
                where = value if use is None else use.node
                context.missed(where, f"reads '{value.name}' in float, so that it is stored in both forms")
        model.metadata_props["onnx.infer"] = "onnxruntime.quant"  # as onnxruntime's own tool marks its models

    def _calibrate(self, model: ir.Model, context: Context, seen: Observations) -> Plan:
        """Return the plan; a node whose tensors calibration says nothing about stays float."""
        excluded: dict[ir.Node, str] = {}
        histograms = seen.histograms
        while True:
            plan = plan_regions(model.graph, excluded)
            computed = [value for sources in plan.sources.values() for value in sources if not is_constant(value)]
            wanted = dict.fromkeys(value.name or "" for value in computed if value.name not in histograms)
            if wanted:
                found = observe(
                    model, wanted, context.calibration, counts=seen.counts, momentum=self.momentum, track=context.track
                )
                histograms.update(found)
            useless = [value for value in computed if _is_useless(value, plan, histograms)]
            for value in useless:
                what = "has no elements" if histograms[value.name or ""].empty else "is 0"
                for node in [value.producer(), *(use.node for member in plan.groups[value] for use in member.uses())]:
                    if node is not None:
                        excluded[node] = f"tensor '{value.name}' {what} in every calibration sample"
            if not useless:
                break
        if histograms and context.calibration is not None and len(context.calibration) == 1:
            context.missed("calibration", "one sample only: ranges seen in it may be too narrow for others")
        return plan


@dataclass
class Observations:
    """What calibration saw of a model's tensors: copies of one model, quantized in several ways, may share it.

    Attributes:
        counts: Whether values are counted; ``minmax`` and ``average`` ranges do without.
        histograms: By the tensor's name.
    """

    counts: bool
    histograms: dict[str, Histogram] = field(default_factory=dict)


def _write(
    plan: Plan, params: dict[ir.Value, QuantParams], writer: QdqWriter, context: Context
) -> list[tuple[Layer, WrittenLayer]]:
    """Turn everything in the plan into integers, layers in graph order; return those with weights."""
    layers = []
    input_scales = {node: params[node.inputs[0]].scale for node in plan.layers if node.inputs[0] in params}
    for value in plan.quantized:
        if is_constant(value):
            writer.constant(value, params[value], plan)
        else:
            writer.pair(value, params[value], plan)
    for node, layer in plan.layers.items():
        if layer.weight is None:
            context.applied(node, f"activations in {writer.formats.activations.bits} bits")
            continue
        written = writer.layer(layer, input_scales[node])
        layers.append((layer, written))
        widened = f", {written.widened} of them widened so that the bias fits" if written.widened else ""
        context.applied(
            node,
            f"{written.weight.size} weights in {written.params.grid.bits} bits "
            f"with {written.params.scale.size} scales{widened}",
        )
    for node in plan.glue:
        if not (node.op_type in CLAMP_OPS and _remove_clamp(node, params, plan, context)):
            context.applied(node, COMPUTED)
    for value in plan.quantized:
        producer = value.producer()
        if producer is not None and producer.op_type in CLAMP_OPS and producer not in plan.glue:
            _remove_clamp(producer, params, plan, context)
    return layers


def _is_useless(value: ir.Value, plan: Plan, histograms: dict[str, Histogram]) -> bool:
    """Whether neither the value nor what it shares its scale with was ever other than 0."""
    return all(h.low >= 0.0 >= h.high for h in (histogram_of(source, histograms) for source in plan.sources[value]))


def _remark_bodies(model: ir.Model, context: Context) -> None:
    for node in model.graph.all_nodes():
        if node.graph is not model.graph and node.op_type in LAYER_OPS and node.domain == "":
            context.missed(node, "inside the body of a control-flow node, where activations cannot be observed")


def _remove_clamp(node: ir.Node, params: dict[ir.Value, QuantParams], plan: Plan, context: Context) -> bool:
    """Remove a Relu or Clip that only feeds a quantizer which clamps at the same bounds; return whether it went."""
    value, source = node.outputs[0], node.inputs[0]
    if source is None or source in plan.quantized or not clamps_alike(node, params[value]):
        return False
    if not remove_clamp(node):
        return False
    context.applied(node, f"removed: the quantizer of '{value.name}' clamps at the same bounds")
    return True
