"""Decides in which form, with how many bits and in what blocks a constant is stored, or why it stays in float."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from optkit.errors import InputError
from optkit.graph import argument, constant
from optkit.target import Target

from ._constants import Weights

PACKED, TABLE, STANDARD = "MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"
FORMS = (PACKED, TABLE, STANDARD)  # without a target: what onnxruntime takes on every CPU
SMALLEST_BLOCK = 16  # onnxruntime's operators take powers of two from here on

# The first opset whose DequantizeLinear takes integers of so many bits, with one scale per block or per channel.
BLOCK_OPSET = {2: 25, 4: 21, 8: 21}
CHANNEL_OPSET = {2: 25, 4: 21, 8: 13}


@dataclass(frozen=True)
class Request:
    """What was asked for: the options of the pass, and the model's opset."""

    bits: int
    table_bits: int
    block_size: int
    form: str
    min_elements: int
    opset: int


@dataclass(frozen=True)
class Plan:
    """How a constant is stored.

    Attributes:
        form: The operator that reads it.
        bits: 2, 4 or 8.
        block_size: Elements that share a scale; 0: the whole row.
        why: Why that is not what was asked for; empty where it is.
    """

    form: str
    bits: int
    block_size: int
    why: str = ""


def plan_storage(weights: Weights, request: Request, target: Target | None) -> Plan | str:
    """Return the first form that the constant, the model and the target allow, or why there is none.

    Raises:
        InputError: The target takes no weights of such a width.
    """
    bits = request.table_bits if weights.is_table else request.bits
    if not bits:
        return "tables stay in float (embeddings = 0)"
    if weights.array.size < request.min_elements:
        return f"{weights.array.size} weights are fewer than {request.min_elements}"
    forms = _forms(target, bits)
    if request.form != "auto":
        forms = FORMS if request.form == PACKED else (STANDARD,)
    reason = ""
    for form in forms:
        found = _packed(weights, request, bits, forms) if form in (PACKED, TABLE) else _standard(weights, request, bits)
        if isinstance(found, Plan):
            return found
        reason = reason or found
    return reason or f"the target takes no {bits}-bit weights in any form known here"


def accuracy_level(target: Target | None, bits: int) -> int:
    """Return how far the target's MatMulNBits may round activations; 0 without a target: not at all."""
    found = None if target is None else target.weights.get(f"int{bits}")
    return 0 if found is None else found.accuracy_level


def _packed(weights: Weights, request: Request, bits: int, forms: tuple[str, ...]) -> Plan | str:
    """Return the plan for onnxruntime's block operators, or why they cannot read the constant."""
    block = request.block_size
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
    if not block and not alone and STANDARD in forms and request.opset >= CHANNEL_OPSET[bits]:
        return "one scale per channel: a block operator would fill up each row to a power of two"
    if alone and weights.length % (8 // bits):
        return f"its rows of {weights.length} do not fill bytes at {bits} bits"
    if not block or (alone and bits == 8):  # 8 bits have range to spare: one scale for the whole row of a table
        block = _power_of_two(weights.length)
    return Plan(PACKED if len(tables) < len(weights.uses) else TABLE, bits, block)


def _standard(weights: Weights, request: Request, bits: int) -> Plan | str:
    """Return the plan for DequantizeLinear, with 8 bits per channel where the opset has no more, or why not."""
    block = request.block_size
    few = weights.is_convolution and block and bits < 8 and weights.length < SMALLEST_BLOCK
    if few and request.opset >= CHANNEL_OPSET[8]:
        return Plan(STANDARD, 8, 0, f"{weights.length} input channels a group are too few for blocks: 8 bits")
    if request.opset >= (BLOCK_OPSET if block else CHANNEL_OPSET)[bits]:
        return Plan(STANDARD, bits, block if block < weights.length else 0)
    if request.opset < CHANNEL_OPSET[8]:
        return f"opset {request.opset}: one scale per channel needs opset {CHANNEL_OPSET[8]}"
    needed = (BLOCK_OPSET if block else CHANNEL_OPSET)[bits]
    what = f"{bits}-bit weights need" if bits < 8 else "one scale per block needs"
    return Plan(
        STANDARD, 8, 0, f"opset {request.opset}: {what} opset {needed}; stored in 8 bits, one scale per channel"
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
