"""Weight-only quantization: constants of matrix products, convolutions and tables in 8, 4 or 2 bits."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import BeforeValidator, Field

from optkit.graph import names, opset
from optkit.pipeline import LOSSY, Context, Effect, Pass

from ._awq import fold_input_scales
from ._bias_constants import bias_constant
from ._blocks import BlockWriter, Integers
from ._constants import Weights, find_weights
from ._fit_convolutions import dequantized, fit_convolution
from ._fitting import Fitting, Method
from ._layer_moments import LayerInputs, LayerMoments
from ._moments import Observer
from ._storage import STANDARD, Plan, Request, accuracy_level, plan_storage
from ._weight_uses import weight_uses

# Recipes and command lines may give numbers as text.
Number = BeforeValidator(lambda given: int(given) if isinstance(given, str) and given.isdecimal() else given)


class QuantizeWeights(Pass):
    """Store the constants of MatMul, Gemm, Conv and of tables in 8, 4 or 2 bits; activations stay float.

    Products become onnxruntime's MatMulNBits, tables its GatherBlockQuantized, which need no opset. What they cannot
    read, convolutions above all, gets a DequantizeLinear in front: in blocks from opset 21 (2 bits: 25) on, before that
    in 8 bits with one scale per channel. A table that is an output layer too stays one tensor, packed once. Bodies of
    If and Loop are rounded to nearest.

    With calibration data ``gptq`` is the default: layer by layer, on inputs that the layers quantized before give. Each
    weight is first changed so that it makes up for what those lost (ridge regression), and last its scales are fitted
    to the integers found; where inputs are few, held-out ones decide how far their correlations are trusted. A
    convolution's bias makes up for the mean error of its outputs. SQNR in dB of the outputs of five real models against
    float, blocks of 32, tables in 8 bits (``python benchmarks/weight_methods.py --bits 4``):

    =============  ======  ====  ====  ====  ====  ======  ====
    bits                4     4     4     4     4       2     2
    model          minmax   rtn   hqq   awq  gptq  minmax  gptq
    =============  ======  ====  ====  ====  ====  ======  ====
    autoencoder      22.7  26.7  27.0  26.7  42.0    11.5  32.7
    file types       33.3  33.6  28.6  33.6  32.0    17.3  14.2
    SST-2 encoder    29.4  30.7  30.6  29.9  34.7    16.0  21.2
    Llama, 260 K     20.5  20.7  20.7  21.1  22.2     7.7   9.8
    ReLU decoder     28.5  28.8  28.6  28.7  35.7    14.6  21.3
    =============  ======  ====  ====  ====  ====  ======  ====

    The classifier of file types has 19 samples on either side: one of them decides its row. The ridge's share of the
    gain at 4 bits was 3.7, 3.5, 0.4, 0.9 and 1.1 dB.

    Attributes:
        bits: Bits of a weight: 8, 4 or 2.
        block_size: Neighbours along the summed axis that share a scale: a power of two from 16 on; 0: one scale per
            output channel.
        symmetric: Whether zero points are fixed at the middle; ``auto``: per constant, where that costs no accuracy.
        method: ``gptq`` (the default with calibration data); ``rtn``: nearest integer, scales of the smallest squared
            error (the default without); ``hqq``: of the smallest sum of roots; ``awq``: rtn after input scales were
            folded into the gains of normalizations; ``minmax``: nearest integer, the whole range.
        embeddings: Bits of tables that Gather picks rows of, and of weights that are tables as well; 0: in float. Their
            rows enter the model as they are, and no later layer makes up for them.
        act_order: GPTQ rounds columns with the largest inputs first.
        damping: GPTQ adds this share of the mean of the Hessian's diagonal to it.
        compensation: Before it, GPTQ changes a weight so that it makes up for what earlier layers lost, held to the
            given weight this strongly, in means of the diagonal; 0: no change.
        form: ``auto``: the first in which the target's runtime takes the constant; ``MatMulNBits``: onnxruntime's
            block operators; ``DequantizeLinear``: the standard's.
        accuracy_level: How MatMulNBits may round activations: 0 and 1 not at all, 4 to int8; None: as the target says.
        min_elements: Constants with fewer elements stay in float.
    """

    effect: ClassVar[Effect] = LOSSY

    bits: Annotated[Literal[2, 4, 8], Number] = 4
    block_size: int = Field(default=32, ge=0)
    symmetric: bool | Literal["auto"] = "auto"
    method: Literal["auto", "awq"] | Method = "auto"
    embeddings: Annotated[Literal[0, 2, 4, 8], Number] = 8
    act_order: bool = True
    damping: float = Field(default=0.01, gt=0, lt=1)
    compensation: float = Field(default=0.1, ge=0)
    form: Literal["auto", "MatMulNBits", "DequantizeLinear"] = "auto"
    accuracy_level: Annotated[int, Field(ge=0, le=4)] | None = None
    min_elements: int = Field(default=1024, ge=0)

    def run(self, model: ir.Model, context: Context) -> None:
        """Quantize every constant that has a form, in graph order."""
        _Run(self, model, context).run()


class _Run:
    def __init__(self, options: QuantizeWeights, model: ir.Model, context: Context) -> None:
        self.options, self.model, self.context = options, model, context
        self.request = Request(
            bits=options.bits,
            table_bits=options.embeddings,
            block_size=options.block_size,
            form=options.form,
            min_elements=options.min_elements,
            opset=opset(model),
        )
        self.method: Method = "gptq" if context.calibration is not None else "rtn"
        if options.method != "auto":
            self.method = "rtn" if options.method == "awq" else options.method
        self.layers: LayerInputs | None = None
        self.taken = names(model)
        level = options.accuracy_level
        self.writer = BlockWriter(model, accuracy_level(context.target, options.bits) if level is None else level)

    def run(self) -> None:
        found, reasons = find_weights(self.model)
        for node, reason in reasons.items():
            self.context.missed(node, reason)
        plans: dict[Weights, Plan] = {}
        for weights in found:
            plan = plan_storage(weights, self.request, self.context.target)
            if isinstance(plan, str):
                for use in weights.uses:
                    self.context.missed(use.node, plan)
            else:
                plans[weights] = plan
        if not plans:
            return
        samples = self.context.calibration
        if self.options.method == "auto" and samples is None:
            self.context.missed("calibration", "none was given: weights are rounded to nearest, not fitted by gptq")
        if (self.method == "gptq" or self.options.method == "awq") and samples is not None and len(samples) == 1:
            self.context.missed("calibration", "one sample only: weights fitted to it may suit no other")
        if self.options.method == "awq":
            quantizers = {w: self._fitting(w, plan, "minmax").rounded for w, plan in plans.items()}
            fold_input_scales(self.model, self.context, quantizers)
        name = f"method '{self.method}'" if self.method == "gptq" else ""
        products = [weights for weights in plans if not weights.is_convolution]
        observer = Observer(self.model, self.context, products, name if products else "")
        if name and len(products) < len(plans):
            self.layers = LayerInputs(self.model, self.context, name)
        for weights, plan in self.context.track(plans.items(), "Quantizing weights", len(plans)):
            self._quantize(weights, plan, observer)

    def _quantize(self, weights: Weights, plan: Plan, observer: Observer) -> None:
        node, method = weights.uses[0].node, self.method
        if weights.is_convolution:
            integers, method = self._convolution(weights, plan)
        else:
            moments = observer.moments(weights)
            if method == "gptq" and not moments:
                method = "rtn"
                self.context.missed(node, _why_unseen(weights, self.model.graph))
            rows = weights.rows()
            if weights.gain != 1.0 and plan.form != STANDARD:  # what stands for a Gemm does not scale
                rows = rows * np.float32(weights.gain)
            integers = self._fitting(weights, plan, method).fit(rows, moments, weights.name)
        scope = f"blocks of {plan.block_size}" if plan.block_size else "one scale per channel"
        name = "awq" if self.options.method == "awq" else method
        zero = "" if integers.zero_point is None else " and zero points"
        what = f"{weights.array.size} weights in {plan.bits} bits, {scope}{zero}, by {name}, as {plan.form}"
        if plan.form == STANDARD:
            self.writer.dequantized(weights, integers, plan.block_size)
            self.context.applied(node, what)
        else:
            names = [use.node.name or "" for use in weights.uses]
            for origin, new in zip(names, self.writer.packed(weights, integers, plan.block_size), strict=True):
                self.context.applied(new, what if origin == names[0] else f"reads the integers stored for '{names[0]}'")
        if plan.why:
            self.context.missed(node, plan.why)

    def _convolution(self, weights: Weights, plan: Plan) -> tuple[Integers, Method]:
        """Return the integers of a convolution's weight, and how they were found."""
        node, seen = weights.uses[0].node, self._seen(weights)
        if not isinstance(seen, LayerMoments):
            method = "rtn" if self.method == "gptq" else self.method
            if seen:
                self.context.missed(node, f"rounded to nearest: {seen}")
            rows = weights.rows() if plan.block_size else weights.array.reshape(len(weights.array), -1)
            return self._fitting(weights, plan, method).fit(rows.astype(np.float32), (), weights.name), method
        bias = bias_constant(node, len(weights.array))
        fitting = self._fitting(weights, plan, "gptq")
        integers = fit_convolution(weights, fitting, seen, centered=bias is not None)
        if bias is not None:
            change = bias.add(seen.lost(weights.array, dequantized(weights, integers)), self.taken)
            self.context.applied(node, f"bias corrected by up to {change:.2g}")
        return integers, "gptq"

    def _seen(self, weights: Weights) -> LayerMoments | str:
        """Return the moments of what a convolution reads, or why there are none; empty where none are wanted."""
        if self.layers is None:
            return ""
        uses = weight_uses(weights.uses[0].node)
        if len(weights.uses) > 1:
            return f"'{weights.name}' has several readers"
        return uses if isinstance(uses, str) else self.layers.moments(uses)

    def _fitting(self, weights: Weights, plan: Plan, method: Method) -> Fitting:
        options = self.options
        return Fitting(
            method=method,
            bits=plan.bits,
            block_size=plan.block_size,
            symmetric=_symmetric(options.symmetric, plan),
            signed=plan.form == STANDARD,
            float16=weights.value.dtype == ir.DataType.FLOAT16,
            act_order=options.act_order,
            damping=options.damping,
            compensation=options.compensation,
        )


def _why_unseen(weights: Weights, main: ir.Graph) -> str:
    """Return why calibration says nothing about a constant's inputs."""
    what = "rounded to nearest: "
    if weights.is_table:
        return f"{what}a table has no inputs to fit its rows to"
    if weights.uses[0].node.graph is not main:
        return f"{what}inside the body of a control-flow node, where inputs cannot be observed"
    return f"{what}its input had no elements in any calibration sample"


def _symmetric(wanted: bool | Literal["auto"], plan: Plan) -> bool | None:
    """Return whether zero points are fixed; None: choose by the error. 8 bits per channel are symmetric everywhere."""
    if plan.form == STANDARD and not plan.block_size and plan.bits == 8:
        return True if wanted == "auto" else wanted
    return None if wanted == "auto" else wanted
