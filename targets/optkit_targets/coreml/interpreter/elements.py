"""The element types of MIL: their width in a file, and the NumPy type that holds them in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BYTE_BITS = 8


@dataclass(frozen=True)
class ElementType:
    """One element type.

    Attributes:
        name: MIL's name in the specification (``FLOAT16``).
        bits: What one element takes in a file.
        dtype: What holds one in memory; types below a byte take a whole one there.
    """

    name: str
    bits: int
    dtype: np.dtype

    @property
    def signed(self) -> bool:
        """Whether negative numbers can be held."""
        return self.dtype.kind in "if"

    @property
    def packed(self) -> bool:
        """Whether several elements share a byte in a file."""
        return self.bits < BYTE_BITS


def _table() -> dict[str, ElementType]:
    rows = [("BOOL", 8, "bool"), ("FLOAT16", 16, "float16"), ("FLOAT32", 32, "float32"), ("FLOAT64", 64, "float64")]
    rows += [(f"{sign}INT{bits}", bits, f"{sign.lower()}int{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)]
    rows += [("INT4", 4, "int8"), *((f"UINT{bits}", bits, "uint8") for bits in (1, 2, 3, 4, 6))]
    return {name: ElementType(name, bits, np.dtype(dtype)) for name, bits, dtype in rows}


ELEMENT_TYPES = _table()
"""Every type with an equal in NumPy, by MIL's name; strings, bfloat16 and the 8-bit floats have none."""

# MIL's names for types where an operator has one as a parameter (``cast``'s ``dtype``).
SHORT_NAMES = {
    "bool": "BOOL",
    "fp16": "FLOAT16",
    "fp32": "FLOAT32",
    "fp64": "FLOAT64",
    **{f"{sign}int{bits}": f"{sign}INT{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


def named(short: str) -> ElementType:
    """Return the type that an operator's parameter names (``fp16``).

    Raises:
        ValueError: No such type is known.
    """
    if short not in SHORT_NAMES:
        raise ValueError(f"there is no type '{short}'")
    return ELEMENT_TYPES[SHORT_NAMES[short]]


def unpack(packed: np.ndarray, bits: int, count: int, *, signed: bool = False) -> np.ndarray:
    """Return elements narrower than a byte, one a byte.

    The first element lies in the lowest bits of the first byte; an element that does not fit in what is left of a byte
    goes on in the lowest bits of the next (coremltools, documentation of ``constexpr_lut_to_dense``).

    Args:
        packed: Bytes, uint8, one-dimensional, at least ``count * bits / 8`` of them.
        bits: Width of an element: 1, 2, 3, 4, 6 or 8.
        count: Elements wanted.
        signed: Whether elements are in two's complement.

    Raises:
        ValueError: There are too few bytes.
    """
    if packed.size * BYTE_BITS < count * bits:
        raise ValueError(f"{count} elements of {bits} bits do not fit in {packed.size} bytes")
    width = 1 if BYTE_BITS % bits == 0 else 3  # bytes after which elements begin at a byte again
    share = width * BYTE_BITS // bits
    words = -(-count // share)
    padded = np.zeros(words * width, np.uint8)
    padded[: min(packed.size, padded.size)] = packed[: padded.size]
    if width == 1:
        word = padded
    else:
        word = padded.reshape(words, width).astype(np.uint32) @ (np.uint32(1) << np.arange(0, 24, 8, dtype=np.uint32))
    shifts = np.arange(0, width * BYTE_BITS, bits, dtype=word.dtype)
    elements = ((word[:, None] >> shifts) & word.dtype.type((1 << bits) - 1)).astype(np.uint8).reshape(-1)[:count]
    if not signed:
        return elements
    sign = 1 << (bits - 1)
    return ((elements.astype(np.int16) ^ sign) - sign).astype(np.int8)  # 4 bits: (u ^ 8) - 8 extends the sign
