"""Weight-only quantization: constants of matrix products, convolutions and tables in 8, 4 or 2 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import BeforeValidator, Field

from optkit.errors import InputError
from optkit.graph import argument, constant, opset
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.target import Target

from ._awq import fold_input_scales
from ._blocks import BlockWriter
from ._constants import Weights, find_weights
from ._fitting import Fitting, Method
from ._moments import Observer

PACKED, TABLE, STANDARD = "MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"
FORMS = (PACKED, TABLE, STANDARD)  # without a target: what onnxruntime takes on every CPU
SMALLEST_BLOCK = 16  # onnxruntime's operators: a power of two, 16 at least

# The first opset whose DequantizeLinear takes integers of so many bits with one scale per block.
BLOCK_OPSET = {2: 25, 4: 21, 8: 21}
CHANNEL_OPSET = {2: 25, 4: 21, 8: 13}

# Recipes and command lines may give numbers as text.
Number = BeforeValidator(lambda given: int(given) if isinstance(given, str) and given.isdecimal() else given)


class QuantizeWeights(Pass):
    """Store the constants of MatMul, Gemm, Conv and of tables in 8, 4 or 2 bits; activations stay float.

    Attributes:
        bits: Bits of a weight: 8, 4 or 2.
        block_size: Neighbours along the summed axis that share a scale: a power of two from 16 on; 0: one scale per
            output channel.
        symmetric: Whether zero points are fixed at the middle; ``auto``: per constant, where that costs no accuracy.
        method: ``gptq`` (the default with calibration data), ``rtn``: nearest integer, scales searched for the smallest
            squared error (the default without), ``hqq``, ``awq``, or ``minmax``: nearest integer, the whole range.
        embeddings: Bits of tables that Gather picks rows of, and of weights that are tables as well; 0: in float.
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


@dataclass(frozen=True)
class Plan:
    """How a constant is stored."""

    form: str
    bits: int
    block_size: int
    why: str = ""


class _Run:
    def __init__(self, options: QuantizeWeights, model: ir.Model, context: Context) -> None:
        self.options, self.model, self.context = options, model, context
        self.opset = opset(model)
        self.method: Method = "gptq" if context.calibration is not None else "rtn"
        if options.method != "auto":
            self.method = "rtn" if options.method == "awq" else options.method
        level = options.accuracy_level
        self.writer = BlockWriter(model, _accuracy_level(context.target, options.bits) if level is None else level)

    def run(self) -> None:
        found, reasons = find_weights(self.model)
        for node, reason in reasons.items():
            self.context.missed(node, reason)
        plans: dict[Weights, Plan] = {}
        for weights in found:
            plan = self._plan(weights)
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
        observer = Observer(self.model, self.context, list(plans), name)
        for weights, plan in self.context.track(plans.items(), "Quantizing weights", len(plans)):
            self._quantize(weights, plan, observer)

    def _quantize(self, weights: Weights, plan: Plan, observer: Observer) -> None:
        node, method = weights.uses[0].node, self.method
        moments = observer.moments(weights)
        if method == "gptq" and moments is None:
            method = "rtn"
            self.context.missed(node, _why_unseen(weights, self.model.graph))
        whole = weights.is_convolution and not plan.block_size
        rows = weights.array.reshape(len(weights.array), -1).astype(np.float32) if whole else weights.rows()
        rows = rows * np.float32(weights.gain) if weights.gain != 1.0 else rows
        integers = self._fitting(weights, plan, method).fit(rows, moments, weights.name)
        scope = f"blocks of {plan.block_size}" if plan.block_size else "one scale per channel"
        name = "awq" if self.options.method == "awq" else method
        zero = "" if integers.zero_point is None else " and zero points"
        what = f"{rows.size} weights in {plan.bits} bits, {scope}{zero}, by {name}, as {plan.form}"
        if plan.form == STANDARD:
            self.writer.dequantized(weights, integers, plan.block_size)
            self.context.applied(node, what)
        else:
            names = [use.node.name or "" for use in weights.uses]
            for origin, new in zip(names, self.writer.packed(weights, integers, plan.block_size), strict=True):
                self.context.applied(new, what if origin == names[0] else f"reads the integers stored for '{names[0]}'")
        if plan.why:
            self.context.missed(node, plan.why)

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

    def _plan(self, weights: Weights) -> Plan | str:
        """Return the form of a constant, or why it stays in float."""
        options = self.options
        bits = options.embeddings if weights.is_table else options.bits
        if not bits:
            return "tables stay in float (embeddings = 0)"
        if weights.array.size < options.min_elements:
            return f"{weights.array.size} weights are fewer than {options.min_elements}"
        forms = _forms(self.context.target, bits)
        if options.form != "auto":
            forms = FORMS if options.form == PACKED else (STANDARD,)
        reason = ""
        for form in forms:
            found = self._packed(weights, bits, forms) if form in (PACKED, TABLE) else None
            if form == STANDARD or form == "QDQ":
                found = self._standard(weights, bits)
            if isinstance(found, Plan):
                return found
            reason = reason or found or ""
        return reason or f"the target takes no {bits}-bit weights in any form known here"

    def _packed(self, weights: Weights, bits: int, forms: tuple[str, ...]) -> Plan | str:
        block = self.options.block_size
        if weights.is_convolution:
            return "no block operator computes convolutions"
        tables = [use for use in weights.uses if use.is_table]
        if tables and TABLE not in forms:
            return "the target has no block operator for tables"
        if len(tables) < len(weights.uses) and PACKED not in forms:
            return "the target has no block operator for matrix products"
        if weights.others:
            return f"'{weights.name}' is also read by '{weights.others[0].name}' in float: it would be stored twice"
        if block and (block < SMALLEST_BLOCK or block & (block - 1)):
            return f"blocks of {block}: the block operators take powers of two from {SMALLEST_BLOCK} on"
        for use in weights.uses:
            if reason := _why_not_packed(use.node):
                return reason
        alone = len(tables) == len(weights.uses)
        if not block and not alone and STANDARD in forms and self.opset >= CHANNEL_OPSET[bits]:
            return "one scale per channel: a block operator would fill up each row to a power of two"
        if alone and weights.length % (8 // bits):
            return f"its rows of {weights.length} do not fill bytes at {bits} bits"
        if not block or (alone and bits == 8):  # 8 bits have range to spare: one scale for the whole row of a table
            block = _power_of_two(weights.length)
        return Plan(PACKED if len(tables) < len(weights.uses) else TABLE, bits, block)

    def _standard(self, weights: Weights, bits: int) -> Plan | str:
        block = self.options.block_size
        if (
            weights.is_convolution
            and bits < 8
            and block
            and weights.length < SMALLEST_BLOCK
            and self.opset >= CHANNEL_OPSET[8]
        ):
            return Plan(STANDARD, 8, 0, f"{weights.length} input channels a group are too few for blocks: 8 bits")
        if self.opset >= (BLOCK_OPSET if block else CHANNEL_OPSET)[bits]:
            return Plan(STANDARD, bits, block if block < weights.length else 0)
        if self.opset < CHANNEL_OPSET[8]:
            return f"opset {self.opset}: one scale per channel needs opset {CHANNEL_OPSET[8]}"
        needed = (BLOCK_OPSET if block else CHANNEL_OPSET)[bits]
        what = f"{bits}-bit weights need" if bits < 8 else "one scale per block needs"
        return Plan(
            STANDARD, 8, 0, f"opset {self.opset}: {what} opset {needed}; stored in 8 bits, one scale per channel"
        )


def _why_not_packed(node: ir.Node) -> str:
    data = argument(node, 0)
    if node.op_type == "Gather":
        return ""
    if data is None or data.shape is None or len(data.shape) < 2:
        return "the rank of its input is not known to be 2 or more"
    if node.op_type == "Gemm":
        if "transA" in node.attributes and node.attributes["transA"].as_int():
            return "it transposes its input"
        beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
        added = argument(node, 2)
        if added is not None and constant(added) is None and beta not in (0.0, 1.0):
            return "it scales what it adds, and that is not constant"
    return ""


def _why_unseen(weights: Weights, main: ir.Graph) -> str:
    """Return why calibration says nothing about a constant's inputs."""
    what = "rounded to nearest: "
    if weights.is_table:
        return f"{what}a table has no inputs to fit its rows to"
    if weights.uses[0].node.graph is not main:
        return f"{what}inside the body of a control-flow node, where inputs cannot be observed"
    if weights.is_convolution:
        return f"{what}gptq fits convolutions of one element, without groups or padding, only"
    return f"{what}its input had no elements in any calibration sample"


def _symmetric(wanted: bool | Literal["auto"], plan: Plan) -> bool | None:
    """Return whether zero points are fixed; None: choose by the error. 8 bits per channel are symmetric everywhere."""
    if plan.form == STANDARD and not plan.block_size and plan.bits == 8:
        return True if wanted == "auto" else wanted
    return None if wanted == "auto" else wanted


def _power_of_two(length: int) -> int:
    return max(SMALLEST_BLOCK, 1 << (length - 1).bit_length())


def _forms(target: Target | None, bits: int) -> tuple[str, ...]:
    """Return the forms in which the target's runtime takes such weights, best first.

    Raises:
        InputError: It takes none.
    """
    if target is None:
        return FORMS
    if f"int{bits}" not in target.weights:
        raise InputError(f"target '{target.name}' takes no {bits}-bit weights", hint="choose another precision")
    return target.weights[f"int{bits}"].operators


def _accuracy_level(target: Target | None, bits: int) -> int:
    found = None if target is None else target.weights.get(f"int{bits}")
    return 0 if found is None else found.accuracy_level
