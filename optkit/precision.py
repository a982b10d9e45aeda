"""Names of precisions (`w8a8`, `w4a16-b32`, `w4a16-lut`, `fp16`): bits of weights and activations, and their storage.

A target's table of precisions is keyed by base names (`w4a16`, `w4a16-lut`); what a name adds to its base (`-b32`,
`-c`) reaches the passes through placeholders in their options, such as `block_size = "{block}"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optkit.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from optkit.target import PassSpec, Target

FLOATS = {"fp32": 32, "fp16": 16, "bf16": 16}
FORMS = (
    "w8a8, w4a16 (bits of weights and activations), fp16, bf16, fp32; then -b32 (block size), -c (per channel), -lut"
)
PLACEHOLDER = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Precision:
    """A precision by name.

    Attributes:
        kind: ``w4a16``, or a float type.
        weight_bits: Bits of one weight.
        activation_bits: Bits of one activation; 16 may be float, in whatever width the target computes, or integer.
        lut: Weights are indices into palettes of 2^weight_bits values (look-up tables).
        block: The block size that was asked for, or None.
        per_channel: One scale (or palette) per channel was asked for.
    """

    kind: str
    weight_bits: int
    activation_bits: int
    lut: bool = False
    block: int | None = None
    per_channel: bool = False

    @staticmethod
    def parse(name: str) -> Precision:
        """Read a name; suffixes stand in any order, each once.

        Raises:
            InputError: The name has another form; says which part.
        """
        kind, *suffixes = name.split("-")
        match = re.fullmatch(r"w([1-9]\d?)a([1-9]\d?)", kind)
        if match is None and kind not in FLOATS:
            raise InputError(f"'{kind}' is neither a float type nor bits of weights and activations")
        weight, activation = (int(bits) for bits in match.groups()) if match else (FLOATS[kind], FLOATS[kind])
        given: dict[str, Any] = {}
        for suffix in suffixes:
            if match is None:
                raise InputError(f"'{kind}' takes no suffix, and '-{suffix}' is one")
            key, value = _suffix(suffix)
            if key in given:
                raise InputError(f"'-{suffix}' repeats what is said already")
            given[key] = value
        if "block" in given and "per_channel" in given:
            raise InputError("'-b' and '-c' exclude each other: a scale covers a block or a channel")
        return Precision(kind, weight, activation, **given)

    @property
    def base(self) -> str:
        """The key of the target's table: the name without block size and granularity."""
        return f"{self.kind}-lut" if self.lut else self.kind

    @property
    def is_float(self) -> bool:
        """Whether it names a float type."""
        return self.kind in FLOATS

    @property
    def integer_activations(self) -> bool:
        """Whether products are to be computed in integers of 8 bits or fewer."""
        return self.activation_bits <= 8

    def __str__(self) -> str:
        """Return the name in its one normal form."""
        return f"{self.base}{f'-b{self.block}' if self.block else '-c' if self.per_channel else ''}"


def _suffix(text: str) -> tuple[str, Any]:
    if text == "lut":
        return "lut", True
    if text == "c":
        return "per_channel", True
    if re.fullmatch(r"b[1-9]\d*", text):
        return "block", int(text[1:])
    raise InputError(f"'-{text}' is none of -b32 (block size), -c (per channel), -lut (palettes)")


def check_table(tables: Mapping[str, Any]) -> None:
    """Refuse a table of precisions with a key that is no base name.

    Raises:
        ValueError: A key is malformed or carries a suffix that only a request has.
    """
    for name in tables:
        try:
            base = Precision.parse(name).base
        except InputError as error:
            raise ValueError(f"'{name}': {error}") from error
        if base != name:
            raise ValueError(f"'{name}' must be keyed by its base name, '{base}'")


def choose(name: str, target: Target) -> Precision:
    """Return a precision by name, checked against what a target takes.

    Raises:
        InputError: The name is malformed, no table has it, or its block size or granularity is not taken.
    """
    try:
        found = Precision.parse(name)
        known, why = found.base in target.precisions, ""
    except InputError as error:
        found, known, why = None, False, f": {error}"
    if found is None or not known:
        wanted = name if found is None else found.base
        close = did_you_mean(wanted, target.precisions)
        offer = f"it offers {', '.join(target.precisions)}"
        hint = f"{close} {offer}" if close.startswith("did") else offer
        raise InputError(f"target '{target.name}' has no precision '{wanted}'{why}", hint=hint)
    if found.block is not None:
        _check_block(found, target)
    if found.per_channel:
        _check_channels(found, target)
    return found


def _check_block(precision: Precision, target: Target) -> None:
    if "block" not in _placeholders(target.precisions[precision.base]):
        takers = ", ".join(name for name, specs in target.precisions.items() if "block" in _placeholders(specs))
        hint = f"blocks are for {takers}" if takers else "leave it out"
        raise InputError(f"'{precision.base}' takes no block size on target '{target.name}'", hint=hint)
    sizes = block_sizes(precision, target)
    if not precision.lut and precision.block not in sizes:  # a palette's block counts channels: any number is good
        what = f"target '{target.name}' takes no blocks of {precision.block} for {precision.weight_bits}-bit weights"
        accepted = ", ".join(f"-b{size}" for size in sizes)
        raise InputError(what, hint=f"it takes {accepted}" if sizes else "leave it out")


def block_sizes(precision: Precision, target: Target) -> tuple[int, ...]:
    """Return the sizes that ``-b`` may name for weights of this width, best first; none where no pass reads them."""
    weights = target.weights.get(f"int{precision.weight_bits}")
    reads = "block" in _placeholders(target.precisions[precision.base])
    return weights.block_size if weights is not None and reads and not precision.lut else ()


def _check_channels(precision: Precision, target: Target) -> None:
    weights = target.weights.get(f"int{precision.weight_bits}")
    granularity = ("channel",) if weights is None or precision.lut else weights.granularity
    used = _placeholders(target.precisions[precision.base]) & {"block", "granularity"}
    if "channel" not in granularity or not (used or granularity[0] == "channel"):
        raise InputError(f"'{precision.base}' takes no scale per channel on target '{target.name}'")


def values_for(precision: Precision, target: Target) -> dict[str, Any]:
    """Return what the placeholders in a table's options stand for.

    ``{weight_bits}``, ``{activation_bits}``; ``{granularity}``, what was asked for, else the best that the target's
    format of that width takes: ``block``, ``channel`` or ``tensor``; ``{block}``, the block size asked for, else the
    first that the format takes, 0 where the granularity is another. With palettes a block is the channels that share
    one: as many as asked for, 1 for ``-c``, else 0: one palette for all.
    """
    weights = None if precision.lut else target.weights.get(f"int{precision.weight_bits}")
    best = weights.granularity[0] if weights is not None else "tensor" if precision.lut else "channel"
    granularity = "block" if precision.block else "channel" if precision.per_channel else best
    first = weights.block_size[0] if weights is not None and weights.block_size else 0
    if precision.lut:
        block = precision.block or int(precision.per_channel)
    else:
        block = (precision.block or first) if granularity == "block" else 0
    return {
        "weight_bits": precision.weight_bits,
        "activation_bits": precision.activation_bits,
        "block": block,
        "granularity": granularity,
    }


def substitute(options: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with every value that is a placeholder, ``"{name}"``, replaced by what it stands for.

    Raises:
        InputError: A placeholder stands for nothing.
    """
    filled = {}
    for option, value in options.items():
        name = _placeholder(value)
        if name is not None and name not in values:
            known = ", ".join(f"{{{key}}}" for key in values)
            raise InputError(f"the option '{option}' = \"{value}\" names no placeholder", hint=f"known: {known}")
        filled[option] = value if name is None else values[name]
    return filled


def _placeholder(value: Any) -> str | None:
    match = PLACEHOLDER.fullmatch(value) if isinstance(value, str) else None
    return match.group(1) if match else None


def _placeholders(specs: Sequence[PassSpec]) -> set[str | None]:
    return {_placeholder(value) for spec in specs for value in spec.options.values()}
