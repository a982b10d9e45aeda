"""The integers that quantize-static writes: what the target takes, and the operator set that says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optkit.errors import InputError
from optkit.quant.integers import IntegerGrid, integer_grid
from optkit.target import IntegerFormat, Target

OLDEST_OPSET = 13  # DequantizeLinear with one scale per channel
WIDTHS_OPSET = 21  # QuantizeLinear and DequantizeLinear of 4 and 16 bits, and one scale per block
CONTRIB = "com.microsoft"  # onnxruntime's own operators: the same two with every width, at any opset

# Without a target: what onnxruntime takes on every CPU, and Qualcomm's NPUs with it.
WEIGHTS = {
    "int8": IntegerFormat(dtype="int8", symmetric=True, granularity=("channel", "tensor")),
    "int4": IntegerFormat(dtype="int4", symmetric=True, granularity=("channel", "tensor")),
}
ACTIVATIONS = {
    "int8": IntegerFormat(dtype="uint8", symmetric=False),
    "int16": IntegerFormat(dtype="uint16", symmetric=False),
}


@dataclass(frozen=True)
class Formats:
    """What is written.

    Attributes:
        weights: Integers of weights.
        tables: Integers of embeddings, and of weights that are embeddings as well: never less than 8 bits.
        activations: Integers of activations.
        per_channel: Whether weights may have one scale per output channel.
        block_size: Elements of a row of a matrix product that share a scale; 0: the whole row.
        pairs_saturate: Whether kernels add the products of two neighbouring weights in int16.
    """

    weights: IntegerGrid
    tables: IntegerGrid
    activations: IntegerGrid
    per_channel: bool
    block_size: int
    pairs_saturate: bool

    @property
    def opset(self) -> int:
        """The first opset of ai.onnx whose quantize and dequantize operators take all of it."""
        return WIDTHS_OPSET if self._widest else OLDEST_OPSET

    @property
    def _widest(self) -> str:
        """What needs the newest opset; empty where 8 bits are all."""
        if self.activations.bits != 8:
            return f"{self.activations.bits}-bit activations need"
        if self.weights.bits != 8:
            return f"{self.weights.bits}-bit weights need"
        return "one scale per block needs" if self.block_size else ""

    def domain(self, version: int) -> str:
        """Return the domain of the quantize and dequantize nodes that ai.onnx lacks at a model's opset."""
        return "" if version >= self.opset else CONTRIB

    def objection(self, version: int, target: Target | None) -> str:
        """Return why a model of this opset cannot hold what is to be written; empty if it can.

        Where the target loads an opset that has the widths, the model must have been raised to it. Where it loads none,
        onnxruntime's own operators say the same.
        """
        if version < OLDEST_OPSET:
            return f"opset {version}: one scale per channel needs opset {OLDEST_OPSET}"
        if version >= self.opset or (target is not None and target.opset.max < self.opset):
            return ""
        return f"opset {version}: {self._widest} opset {self.opset}"


def choose_formats(
    target: Target | None,
    weight_bits: int,
    activation_bits: int,
    block_size: int | None = None,
    *,
    per_channel: bool = True,
) -> Formats:
    """Return the target's formats of these widths, or onnxruntime's where there is no target.

    Args:
        target: The device.
        weight_bits: Width of weights.
        activation_bits: Width of activations.
        block_size: Weights that share a scale; 0: a whole channel; None: what the format names first.
        per_channel: Whether an output channel has a scale of its own where the target takes that.

    Raises:
        InputError: The target takes no weights or no activations of such a width, or no such blocks.
    """
    weights = _format(target, "weights", WEIGHTS, weight_bits)
    activations = _format(target, "activations", ACTIVATIONS, activation_bits)
    if block_size is None:
        blocks = weights.granularity[0] == "block" and "DequantizeLinear" in weights.operators
        block_size = weights.block_size[0] if blocks and weights.block_size and per_channel else 0
    elif block_size and target is not None and block_size not in weights.block_size:
        hint = f"it takes {', '.join(map(str, weights.block_size))}" if weights.block_size else "leave the size out"
        raise InputError(f"target '{target.name}' takes no blocks of {block_size} weights", hint=hint)
    tables = weights if weight_bits == 8 else WEIGHTS["int8"]
    if target is not None:
        tables = target.weights.get("int8", tables)
    reduced = target is not None and activation_bits == 8 and target.needs_reduced_range(weights)
    by_pairs = reduced and weights.symmetric and weights.dtype == "int8" and activations.dtype == "uint8"
    grid = integer_grid(weights.dtype, symmetric=weights.symmetric, reduced_range=reduced and not by_pairs)
    return Formats(
        weights=grid,
        tables=grid if weight_bits == 8 else integer_grid(tables.dtype, symmetric=tables.symmetric),
        activations=integer_grid(activations.dtype, symmetric=activations.symmetric),
        per_channel=per_channel and "channel" in weights.granularity,
        block_size=block_size,
        pairs_saturate=by_pairs,
    )


def _format(target: Target | None, what: str, defaults: Mapping[str, IntegerFormat], bits: int) -> IntegerFormat:
    if target is None:
        return defaults[f"int{bits}"]
    formats: Mapping[str, IntegerFormat] = getattr(target, what)
    if f"int{bits}" not in formats:
        raise InputError(f"target '{target.name}' takes no {bits}-bit {what}", hint="choose another precision")
    return formats[f"int{bits}"]
