"""8-bit weights and activations, with activation ranges fixed or found at run time: whichever measures better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.dataset.samples import Lazy, Sample, Samples
from optkit.evaluate.fidelity import Outputs, compare
from optkit.graph import is_constant, opset
from optkit.pipeline import LOSSY, Context, Effect, Pass, Remark
from optkit.recipe import FLOAT, PRECISION_KEY
from optkit.session import run_samples
from optkit.target import Target

from ._layers import CONVOLUTIONS, GLUE_OPS, Layer
from .equalize_channels import EqualizeChannels
from .quantize_dynamic import DYNAMIC, QuantizeDynamic, dynamic_layer, is_product
from .quantize_static import COMPUTED, Observations, QuantizeStatic
from .quantize_weights import QuantizeWeights

# Below this share of the weights, products without a sequence axis (a classifier's last layer) are no reason to try.
PRODUCT_SHARE = 0.5
HELD_OUT_SHARE = 4  # one sample in so many is held out
CLOSE = 1.0  # dB; forms this close to the best static one are measured with bias correction too, dynamic ones preferred
FLOAT_COSTS = 2.0  # dB that convolutions in float must be worth
FEW = 16  # with fewer samples the ranges miss those held out: the form chosen is fitted again, to all

STORED = QuantizeWeights(bits=8, block_size=0, method="minmax", embeddings=0, form="DequantizeLinear")


class QuantizeInt8(Pass):
    """Quantize to 8 bits statically or dynamically, as measured on calibration samples that were held out.

    Activations of transformers have outliers that a fixed range must cover in every run; those of convolutions have
    not, and a dynamic convolution is slow. So these forms are tried on copies of the model:

    - everything static, with the exact ranges of the calibration data. Ranges that leave rare values out gain 3 dB on
      MobileNet, but lose 8 on a face detector that was calibrated without faces, which no held-out sample tells;
    - products dynamic (weights covered, or clipped) with the convolutions, if any, static; or in float on weights of
      8 bits, if that is worth 2 dB (10 on the classifier of file types);
    - static with equalized channels, where products read channels whose weights differ much in size;
    - static with float sums, where the target computes in float between layers: 2 dB on ResNet-56, whose sums are
      rounded 27 times one upon another, for 14 % of its time.

    They are measured without bias correction first, since that takes longer than to write and measure a form. It has
    moved two forms against each other by 3 dB: those with static layers that come within a decibel of the best of their
    kind are then measured with it. The form with the highest SQNR against the model as it came is kept; one without
    fixed ranges if it comes within a decibel, since no input can leave them; float sums if they are half a decibel
    better. Where the target is this machine, the copies run with onnxruntime's integer kernels, else in float as
    written.

    Of fewer than 16 samples those held out would be missed, and the form chosen is fitted again to all of them. With 8
    samples that gained 1 to 3 dB on five of seven real models and lost 2 on one; from 16 on nothing on average.

    Attributes:
        form: ``measured``, or one of the two without a measurement.
        embeddings: Whether tables that Gather picks rows of are stored in 8 bits.
        held_out: The most samples to measure on; at most a quarter of the calibration data is held out.
    """

    effect: ClassVar[Effect] = LOSSY

    form: Literal["measured", "static", "dynamic"] = "measured"
    embeddings: bool = True
    held_out: int = Field(default=8, ge=1)

    def run(self, model: ir.Model, context: Context) -> None:
        """Quantize the model in place, in the better form."""
        static = QuantizeStatic(embeddings=self.embeddings)
        reason = "as asked for" if self.form == "static" else _why_static(model, context.target)
        if reason and context.calibration is None:
            context.missed(_where(model), f"quantized statically: {reason}")
            static.run(model, context)
            return
        exact, clipped = (QuantizeDynamic(embeddings=self.embeddings, clip=clip) for clip in (False, True))
        if context.calibration is None:
            what = "without calibration data, so that nothing could be measured or quantized statically"
            context.missed(_where(model), f"quantized dynamically {what}")
            exact.run(model, context)
            return
        beside = static if any(node.op_type in CONVOLUTIONS for node in model.graph) else None
        if self.form == "dynamic":
            context.missed(_where(model), "quantized dynamically: as asked for")
            _Form("dynamic", beside, exact).quantize(model, context, Observations(counts=False))
            return
        forms = [_Form("static", static)]
        if not reason:
            forms += [_Form("dynamic", beside, exact), _Form("dynamic with clipped weights", beside, clipped)]
            if beside is not None:
                forms.append(_Form("dynamic with convolutions in float", None, exact, STORED))
        self._choose(model, forms, context, context.calibration, reason)

    def _choose(self, model: ir.Model, forms: list[_Form], context: Context, calibration: Samples, reason: str) -> None:
        """Quantize in every form and keep the one with the highest SQNR."""
        fitted, held = self._split(calibration)
        trial = _Trial(model, context, fitted, held)
        if trial.equalize():
            forms.append(replace(forms[0], name="static with equalized channels", equalized=True))
        alone = len(forms) == 1 and not (_has_sums(model.graph) and _between_in_float(context.target))
        if alone:  # nothing to choose from, so that nothing needs to be held out
            tried = [_Trial(model, context, calibration, held).quantize(forms[0])]
        else:
            tried = [trial.quantize(form.corrected(on=False)) for form in forms]
        changed = [each for each in tried if each.changed]
        if not changed:
            context.remarks.extend(tried[0].remarks)
            if not tried[0].remarks:
                context.missed(_where(model), "it has no convolution, matrix product or table to quantize")
            return
        if reason:
            context.missed(_where(model), f"quantized statically: {reason}")
        if alone:
            _take(tried[0], model, context)
            return
        sqnr = {each: trial.sqnr(each) for each in changed}
        sums = self._with_float_sums(trial, sqnr)
        sqnr |= {each: trial.sqnr(each) for each in sums}
        final = self._corrected(trial, sqnr)
        sqnr |= (found := {each: trial.sqnr(each) for each in final if each not in sqnr})
        best = max(final, key=lambda each: sqnr[each] - each.form.handicap)  # of equals the first
        kind = "calibration" if held is fitted else "held-out"
        what = f"chose {best.form.name}: SQNR on {len(held)} {kind} sample{'s' * (len(held) > 1)}: "
        what += _figures({each: sqnr[each] for each in (*changed, *sums)})
        if found:
            what += f"; with biases corrected: {_figures(found)}"
        if held is not fitted and len(calibration) < FEW:
            what += f"; then fitted to all {len(calibration)} samples, and not measured again"
            trial = _Trial(model, context, calibration, held)
            best = trial.quantize(replace(best.form, equalized=best.form.equalized and trial.equalize()))
        context.remarks.extend(trial.equalizing if best.form.equalized else [])
        _take(best, model, context)
        context.applied(_where(model), what)

    def _with_float_sums(self, trial: _Trial, sqnr: Mapping[_Tried, float]) -> list[_Tried]:
        """Return the best static form with its sums in float, if it has any and the target computes in float there."""
        best = max(sqnr, key=lambda each: -np.inf if each.form.dynamic else sqnr[each])
        sums = frozenset(r.node for r in best.remarks if (r.op_type, r.message) == ("Add", COMPUTED))
        if best.form.dynamic or not sums or not _between_in_float(trial.context.target):
            return []
        name = f"{best.form.name} {'and' if best.form.equalized else 'with'} float sums"
        return [trial.quantize(replace(best.form, name=name, sums=sums))]

    def _corrected(self, trial: _Trial, sqnr: Mapping[_Tried, float]) -> list[_Tried]:
        """Return what comes into question: forms whose biases are corrected, if close to the best, or hold still."""
        best = max((found for each, found in sqnr.items() if each.form.static is not None), default=-np.inf)
        final = []
        for each, found in sqnr.items():
            if each.form.static is None:
                final.append(each)
            elif found >= best - CLOSE:
                corrected = trial.quantize(each.form.corrected(on=True))
                final.append(corrected if corrected.remarks != each.remarks else each)  # else: no bias moved
        return final

    def _split(self, samples: Samples) -> tuple[Samples, Samples]:
        """Return samples to fit ranges to, and samples to measure on; the same ones where there are too few."""
        every = max(HELD_OUT_SHARE, -(-len(samples) // self.held_out))
        if len(samples) < HELD_OUT_SHARE:
            return samples, samples
        held = set(range(every - 1, len(samples), every))
        return _pick(samples, [i for i in range(len(samples)) if i not in held]), _pick(samples, sorted(held))


@dataclass(frozen=True)
class _Form:
    """A way to quantize the whole model: matrix products dynamically if asked for, everything else statically."""

    name: str
    static: QuantizeStatic | None
    dynamic: QuantizeDynamic | None = None
    stored: QuantizeWeights | None = None
    equalized: bool = False
    sums: frozenset[str] = frozenset()

    @property
    def handicap(self) -> float:
        """Decibels that its measurement must be ahead by.

        Fixed ranges may be missed by inputs that nobody has seen yet; what is computed in float takes time.
        """
        return (CLOSE if self.static else 0) + (CLOSE / 2 if self.sums else 0) + (FLOAT_COSTS if self.stored else 0)

    def corrected(self, *, on: bool) -> _Form:
        """Return this form with or without bias correction."""
        return replace(self, static=self.static and self.static.model_copy(update={"bias_correction": on}))

    def quantize(self, model: ir.Model, context: Context, seen: Observations) -> None:
        """Quantize the model in place."""
        if self.dynamic is None:
            assert self.static is not None
            sums = [node for node in model.graph if node.name in self.sums]
            _with_floats(self.static, sums, model, context, seen)
            for node in sums:
                context.missed(node, "kept in float: rounding every sum of a deep network again costs it accuracy")
            return
        if self.static is not None:
            products = [n for n in model.graph.all_nodes() if isinstance(_layer_of(n, opset(model)), Layer)]
            floats = [n for n in products if PRECISION_KEY not in n.metadata_props and not _reads_convolution(n)]
            _with_floats(self.static.model_copy(update={"embeddings": False}), floats, model, context, seen)
        self.dynamic.run(model, context)
        if self.stored is not None:
            self.stored.run(model, _inner(context, None, context.remarks))


def _with_floats(
    static: QuantizeStatic, floats: Sequence[ir.Node], model: ir.Model, context: Context, seen: Observations
) -> None:
    """Quantize statically but for some nodes, about which nothing is said."""
    for node in floats:
        node.metadata_props[PRECISION_KEY] = FLOAT  # not for quantize-static
    inner = _inner(context, context.calibration, [])
    static.quantize(model, inner, seen)
    for node in floats:
        del node.metadata_props[PRECISION_KEY]
    hidden = {node.name for node in floats}
    context.remarks.extend(remark for remark in inner.remarks if remark.node not in hidden)


@dataclass(frozen=True, eq=False)
class _Tried:
    """The model in one form, and the remarks made on the way."""

    form: _Form
    model: ir.Model
    remarks: list[Remark]

    @property
    def changed(self) -> bool:
        """Whether anything was quantized."""
        return any(remark.kind == "applied" for remark in self.remarks)


def _take(tried: _Tried, model: ir.Model, context: Context) -> None:
    """Let the model become the one tried."""
    model.graph = tried.model.graph
    model.opset_imports.update(tried.model.opset_imports)
    model.metadata_props.update(tried.model.metadata_props)
    context.remarks.extend(tried.remarks)


class _Trial:
    """Quantizes copies of a model that share one calibration, and measures them.

    Args:
        model: The model as it came; not changed.
        context: Says what the target is.
        fitted: Samples that ranges and biases are fitted to.
        held: Samples to measure on.
    """

    def __init__(self, model: ir.Model, context: Context, fitted: Samples, held: Samples) -> None:
        self.model, self.context, self.fitted, self.held = model, context, fitted, held
        self.seen = Observations(counts=False)
        self.equalized = model
        self.seen_equalized = Observations(counts=False)
        self.equalizing: list[Remark] = []
        self.native = context.target is not None and bool(context.target.executor.get("native"))

    def quantize(self, form: _Form) -> _Tried:
        """Return a copy of the model in this form."""
        model, seen = (self.equalized, self.seen_equalized) if form.equalized else (self.model, self.seen)
        tried = _Tried(form, model.clone(), [])
        form.quantize(tried.model, _inner(self.context, self.fitted, tried.remarks), seen)
        return tried

    def equalize(self) -> bool:
        """Equalize the channels that products read, on a copy; return whether that changed any."""
        copy, remarks = self.model.clone(), list[Remark]()
        EqualizeChannels(products_only=True).run(copy, _inner(self.context, self.fitted, remarks))
        self.equalized, self.equalizing = copy, [remark for remark in remarks if remark.kind == "applied"]
        return bool(self.equalizing)

    def sqnr(self, tried: _Tried) -> float:
        """Return the SQNR in dB on the held-out samples; minus infinity where outputs are no numbers."""
        samples, reference = self._reference
        sqnr = compare(reference, run_samples(tried.model, samples, optimize=self.native)).sqnr_db
        return -np.inf if np.isnan(sqnr) else sqnr

    @cached_property
    def _reference(self) -> tuple[list[Sample], list[Outputs]]:
        """The held-out samples, read once, and the model's outputs for them."""
        samples = list(self.held)
        return samples, run_samples(self.model, samples, optimize=True)


def _why_static(model: ir.Model, target: Target | None) -> str:
    """Return why only static quantization comes into question; empty if both do."""
    if not _between_in_float(target):
        assert target is not None
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


def _between_in_float(target: Target | None) -> bool:
    """Whether a target computes in float between integer layers, as those do that find ranges as they run."""
    return target is None or DYNAMIC in target.activations


def _has_sums(graph: ir.Graph) -> bool:
    return any(node.op_type == "Add" and not any(is_constant(value) for value in node.inputs) for node in graph)


def _reads_convolution(node: ir.Node) -> bool:
    """Whether a product reads what a convolution computes, moved or clamped at most: integers already."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    while source is not None and source.op_type in GLUE_OPS and source.inputs and source.inputs[0] is not None:
        source = source.inputs[0].producer()
    return source is not None and source.op_type in CONVOLUTIONS


def _layer_of(node: ir.Node, version: int) -> Layer | str:
    return dynamic_layer(node, version) if is_product(node) else ""


def _inner(context: Context, samples: Samples | None, remarks: list[Remark]) -> Context:
    """Return a context with other samples, whose remarks go elsewhere."""
    return Context(context.target, samples, remarks, context.track, context.pass_name)


def _figures(sqnr: Mapping[_Tried, float]) -> str:
    return ", ".join(f"{each.form.name} {found:.2f} dB" for each, found in sqnr.items())


def _where(model: ir.Model) -> str:
    return model.graph.name or "model"


def _pick(samples: Samples, indices: Sequence[int]) -> Samples:
    """Return some of the samples, without their labels, each read when it is asked for."""
    items = Lazy(len(indices), lambda index: samples.items[indices[index]])
    return Samples(items, samples.source, random=samples.random)
