"""8-bit weights and activations, with activation ranges fixed or found at run time: whichever measures better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.dataset.samples import Lazy, Samples
from optkit.evaluate.fidelity import compare
from optkit.graph import opset
from optkit.pipeline import LOSSY, Context, Effect, Pass, Remark
from optkit.recipe import FLOAT, PRECISION_KEY
from optkit.session import run_samples
from optkit.target import Target

from ._layers import GLUE_OPS, Layer
from .quantize_dynamic import DYNAMIC, QuantizeDynamic, dynamic_layer, is_product
from .quantize_static import QuantizeStatic

CONVOLUTIONS = ("Conv", "ConvTranspose")
# Below this share of the weights, products without a sequence axis (a classifier's last layer) are no reason to try.
PRODUCT_SHARE = 0.5
HELD_OUT_SHARE = 4  # one sample in so many is held out


class QuantizeInt8(Pass):
    """Quantize to 8 bits statically or dynamically, as measured on calibration samples that were held out.

    Activations of transformers have outliers that a fixed range must cover in every run; those of convolutions have
    not, and a dynamic convolution is slow. Ranges that clip rare values gain 3 dB on one network and lose 6 on another.
    So these forms are tried on copies of the model: everything static, with exact ranges and with those of smallest
    squared error, and products dynamic (weights covered, or clipped) with the convolutions, if any, static. The one
    with the highest SQNR against the model as it came is kept. Where the target is this machine, the copies run with
    onnxruntime's integer kernels, else in float as written.

    Attributes:
        form: ``measured``, or one of the two without a measurement.
        embeddings: Whether tables that Gather picks rows of are stored in 8 bits.
        held_out: The most samples to measure on; at most a quarter of the calibration data is held out.
    """

    effect: ClassVar[Effect] = LOSSY

    form: Literal["measured", "static", "dynamic"] = "measured"
    embeddings: bool = True
    held_out: int = Field(default=16, ge=1)

    def run(self, model: ir.Model, context: Context) -> None:
        """Quantize the model in place, in the better form."""
        static = QuantizeStatic(embeddings=self.embeddings)
        tight = QuantizeStatic(embeddings=self.embeddings, range_method="mse")
        where = model.graph.name or "model"
        forms = [_Form("static", static.run), _Form("static with clipped activations", tight.run)]
        reason = "as asked for" if self.form == "static" else _why_static(model, context.target)
        if reason:
            context.missed(where, f"quantized statically: {reason}")
            if context.calibration is None:
                static.run(model, context)
            else:
                self._choose(model, forms, context, context.calibration)
            return
        exact, clipped = (QuantizeDynamic(embeddings=self.embeddings, clip=clip) for clip in (False, True))
        if context.calibration is None:
            what = "without calibration data, so that nothing could be measured or quantized statically"
            context.missed(where, f"quantized dynamically {what}")
            exact.run(model, context)
            return
        if self.form == "dynamic":
            context.missed(where, "quantized dynamically: as asked for")
            _Mixed(static, exact).run(model, context)
            return
        forms += [
            _Form("dynamic", _Mixed(static, exact).run),
            _Form("dynamic with clipped weights", _Mixed(static, clipped).run),
        ]
        self._choose(model, forms, context, context.calibration)

    def _choose(self, model: ir.Model, forms: Sequence[_Form], context: Context, calibration: Samples) -> None:
        """Quantize in every form and keep the one with the highest SQNR."""
        fitted, held = self._split(calibration)
        tried = _measure(model, forms, context, fitted, held)
        best = max(tried, key=lambda each: each.sqnr_db)  # of equals the first
        model.graph = best.model.graph
        model.opset_imports.update(best.model.opset_imports)
        model.metadata_props.update(best.model.metadata_props)
        context.remarks.extend(best.remarks)
        told = ", ".join(f"{each.name} {each.sqnr_db:.2f} dB" for each in tried)
        kind = "calibration" if held is fitted else "held-out"
        what = f"chose {best.name}: SQNR on {len(held)} {kind} sample{'s' * (len(held) > 1)}: {told}"
        context.applied(model.graph.name or "model", what)

    def _split(self, samples: Samples) -> tuple[Samples, Samples]:
        """Return samples to fit ranges to, and samples to measure on; the same ones where there are too few."""
        every = max(HELD_OUT_SHARE, -(-len(samples) // self.held_out))
        if len(samples) < HELD_OUT_SHARE:
            return samples, samples
        held = set(range(every - 1, len(samples), every))
        return _pick(samples, [i for i in range(len(samples)) if i not in held]), _pick(samples, sorted(held))


@dataclass(frozen=True)
class _Form:
    """A way to quantize the whole model."""

    name: str
    run: Callable[[ir.Model, Context], None]


@dataclass(frozen=True)
class _Tried:
    """The model in one form, the remarks made on the way, and its SQNR; minus infinity where outputs are no numbers."""

    name: str
    model: ir.Model
    remarks: list[Remark]
    sqnr_db: float


@dataclass(frozen=True)
class _Mixed:
    """Matrix products dynamic, everything else static."""

    static: QuantizeStatic
    dynamic: QuantizeDynamic

    def run(self, model: ir.Model, context: Context) -> None:
        """Quantize the model in place."""
        products = [n for n in model.graph.all_nodes() if isinstance(_layer_of(n, opset(model)), Layer)]
        if any(node.op_type in CONVOLUTIONS for node in model.graph):
            marked = [n for n in products if PRECISION_KEY not in n.metadata_props and not _reads_convolution(n)]
            for node in marked:
                node.metadata_props[PRECISION_KEY] = FLOAT  # not for quantize-static
            inner = _inner(context, context.calibration, [])
            self.static.model_copy(update={"embeddings": False}).run(model, inner)
            for node in marked:
                del node.metadata_props[PRECISION_KEY]
            hidden = {node.name for node in marked}
            context.remarks.extend(remark for remark in inner.remarks if remark.node not in hidden)
        self.dynamic.run(model, context)


def _why_static(model: ir.Model, target: Target | None) -> str:
    """Return why only static quantization comes into question; empty if both do."""
    if target is not None and DYNAMIC not in target.activations:
        return f"target '{target.name}' does not quantize activations at run time"
    layers = [_layer_of(node, opset(model)) for node in model.graph.all_nodes()]
    products = [layer for layer in layers if isinstance(layer, Layer)]
    if not products:
        return "no matrix product has constant weights"
    if any(len(layer.node.inputs[0].shape or ()) > 2 for layer in products if layer.node.inputs[0] is not None):
        return ""
    stored = {layer.stored for layer in products}
    weights = sum(value.const_value.size for value in stored if value is not None and value.const_value is not None)
    total = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)
    if weights < PRODUCT_SHARE * total:
        return f"matrix products hold {100 * weights / max(total, 1):.0f} % of the weights and none reads a sequence"
    return ""


def _reads_convolution(node: ir.Node) -> bool:
    """Whether a product reads what a convolution computes, moved or clamped at most: integers already."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    while source is not None and source.op_type in GLUE_OPS and source.inputs and source.inputs[0] is not None:
        source = source.inputs[0].producer()
    return source is not None and source.op_type in CONVOLUTIONS


def _layer_of(node: ir.Node, version: int) -> Layer | str:
    return dynamic_layer(node, version) if is_product(node) else ""


def _measure(model: ir.Model, forms: Sequence[_Form], context: Context, fitted: Samples, held: Samples) -> list[_Tried]:
    """Return the model in each form, measured on held-out samples."""
    native = context.target is not None and bool(context.target.executor.get("native"))
    reference = run_samples(model, held)
    tried = []
    for form in forms:
        copy, remarks = model.clone(), list[Remark]()
        form.run(copy, _inner(context, fitted, remarks))
        sqnr = compare(reference, run_samples(copy, held, optimize=native)).sqnr_db
        tried.append(_Tried(form.name, copy, remarks, -np.inf if np.isnan(sqnr) else sqnr))
    return tried


def _inner(context: Context, samples: Samples | None, remarks: list[Remark]) -> Context:
    """Return a context with other samples, whose remarks go elsewhere."""
    return Context(context.target, samples, remarks, context.track, context.pass_name)


def _pick(samples: Samples, indices: Sequence[int]) -> Samples:
    """Return some of the samples, without their labels, each read when it is asked for."""
    items = Lazy(len(indices), lambda index: samples.items[indices[index]])
    return Samples(items, samples.source, random=samples.random)
