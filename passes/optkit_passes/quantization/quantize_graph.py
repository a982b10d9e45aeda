"""Static quantization of whole graphs for NPUs: every operator becomes a complete quantized unit."""

from __future__ import annotations

from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from optkit.graph import is_constant, is_unused, opset
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.calibrate import observe
from optkit.quant.integers import QuantParams, choose_qparams

from ._bias import join_bias
from ._clamps import clamps_alike, remove_clamp
from ._formats import Formats, choose_formats
from ._graph_operators import FIXED_RANGES
from ._graph_plan import fused_clamps, plan_graph
from ._graph_writer import GraphWriter, Widths
from ._layers import CLAMP_OPS, LAYER_OPS
from ._ranges import Method, RangeChoice, histogram_of
from ._reconstruct import Reconstruction
from ._regions import Plan
from .quantize_static import Observations


class QuantizeGraph(Pass):
    """Quantize every operator of the main graph statically, so that an NPU computes the whole graph on integers.

    Attributes:
        weight_bits: Width of weights, 8 or 4.
        activation_bits: Width of activations, 8 or 16.
        range_method: How an activation's range is read from what calibration saw, as for `quantize-static`.
        percentile: Per cent of the values that the ``percentile`` method keeps inside the range.
        momentum: That of the ``average`` method, over samples in their order; 1: their plain mean.
        bias_correction: Whether the mean error of each output channel, measured layer by layer on calibration samples,
            is taken off the layer's bias.
    """

    effect: ClassVar[Effect] = LOSSY

    weight_bits: Literal[4, 8] = 8
    activation_bits: Literal[8, 16] = 8
    range_method: Method = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)
    momentum: float = Field(default=1.0, gt=0, le=1)
    bias_correction: bool = True

    def run(self, model: ir.Model, context: Context) -> None:
        """Quantize the main graph in place."""
        formats = choose_formats(context.target, self.weight_bits, self.activation_bits, 0)
        for node in model.graph.all_nodes():
            if node.graph is not model.graph and node.op_type in LAYER_OPS and node.domain == "":
                context.missed(node, "inside the body of a control-flow node, where activations cannot be observed")
        objection = formats.objection(opset(model), context.target)
        if objection:
            for node in (node for node in model.graph if node.op_type in LAYER_OPS and node.domain == ""):
                context.missed(node, objection)
            return
        for node in join_bias(model.graph):
            context.applied(node, "joined with the bias added to its result")
        seen = Observations(counts=self.range_method not in ("minmax", "average"))
        plan, params = self._calibrate(model, context, formats, seen)
        for node, reason in plan.reasons.items():
            context.missed(node, reason)
        if not plan.quantized:
            return
        self._write(model, context, formats, plan, params, seen)

    def _write(
        self,
        model: ir.Model,
        context: Context,
        formats: Formats,
        plan: Plan,
        params: dict[ir.Value, QuantParams],
        seen: Observations,
    ) -> None:
        original = model.clone()
        twins = dict(zip(model.graph, original.graph, strict=True))
        constants = plan.constants()
        widths = Widths(formats.activations, formats.activations)
        clamps = [node for node in plan.glue if node.op_type in CLAMP_OPS and node.inputs[0] not in plan.quantized]
        written = GraphWriter(model, formats, plan, params, widths).write()
        bits = formats.activations.bits
        for layer, stored in written:
            widened = f", {stored.widened} of them widened so that the bias fits" if stored.widened else ""
            context.applied(
                layer.node,
                f"{stored.weight.size} weights in {stored.params.grid.bits} bits "
                f"with {stored.params.scale.size} scales{widened}; activations in {bits} bits",
            )
        for node in [*(node for node, layer in plan.layers.items() if layer.weight is None), *plan.glue]:
            if node in clamps and remove_clamp(node):
                context.applied(node, f"removed: the quantizer of '{node.outputs[0].name}' clamps at the same bounds")
            else:
                context.applied(node, f"activations in {bits} bits")
        if written and self.bias_correction:
            largest = max((histogram.size for histogram in seen.histograms.values()), default=1)
            fit = Reconstruction(original, twins, model, context, largest=largest, pairs_saturate=False)
            fit.run(written, "nearest", correct_bias=True)
        for value in constants:
            if is_unused(value):
                model.graph.initializers.pop(value.name or "", None)
        model.metadata_props["onnx.infer"] = "onnxruntime.quant"  # as onnxruntime's own tool marks its models

    def _calibrate(
        self, model: ir.Model, context: Context, formats: Formats, seen: Observations
    ) -> tuple[Plan, dict[ir.Value, QuantParams]]:
        """Return the plan and the parameters; a node whose tensors calibration says nothing about stays float."""
        excluded: dict[ir.Node, str] = {}
        separate: set[ir.Node] = set()
        while True:
            plan = plan_graph(model.graph, excluded, floats=_has_floats(context), separate=separate)
            self._observe(model, context, plan, seen)
            useless = _useless(plan, seen)
            if useless:
                excluded |= useless
                continue
            ranges = RangeChoice(self.range_method, self.percentile)
            params = ranges.params(
                model, plan, seen.histograms, formats.activations, context.calibration or (), context.track
            )
            params |= _fixed(plan, params)
            unlike = {node for node in fused_clamps(plan, separate) if not clamps_alike(node, params[node.outputs[0]])}
            if not unlike:
                break
            separate |= unlike
        if seen.histograms and context.calibration is not None and len(context.calibration) == 1:
            context.missed("calibration", "one sample only: ranges seen in it may be too narrow for others")
        return plan, params

    def _observe(self, model: ir.Model, context: Context, plan: Plan, seen: Observations) -> None:
        computed = [value for sources in plan.sources.values() for value in sources if not is_constant(value)]
        wanted = dict.fromkeys(value.name or "" for value in computed if value.name not in seen.histograms)
        if wanted:
            found = observe(
                model, wanted, context.calibration, counts=seen.counts, momentum=self.momentum, track=context.track
            )
            seen.histograms.update(found)


def _has_floats(context: Context) -> bool:
    """Whether the target computes in float."""
    return context.target is None or not context.target.dtypes or "float32" in context.target.dtypes


def _useless(plan: Plan, seen: Observations) -> dict[ir.Node, str]:
    """Return the nodes around tensors that calibration says nothing about, and why they must stay float."""
    found: dict[ir.Node, str] = {}
    for value, sources in plan.sources.items():
        histograms = [histogram_of(source, seen.histograms) for source in sources]
        if is_constant(value) or not histograms or not all(each.low >= 0.0 >= each.high for each in histograms):
            continue
        what = "has no elements" if all(each.empty for each in histograms) else "is 0"
        for node in (value.producer(), *(use.node for use in value.uses())):
            if node is not None:
                found[node] = f"tensor '{value.name}' {what} in every calibration sample"
    return found


def _fixed(plan: Plan, params: dict[ir.Value, QuantParams]) -> dict[ir.Value, QuantParams]:
    """Return the parameters of values whose operator returns the same range whatever it reads."""
    found = {}
    for value, sources in plan.sources.items():
        producers = [source.producer() for source in sources]
        ranges = {FIXED_RANGES.get(each.op_type) if each is not None else None for each in producers}
        bounds = ranges.pop() if len(ranges) == 1 else None
        if bounds is not None:
            found[value] = choose_qparams(*bounds, params[value].grid, name=value.name or "")
    return found
