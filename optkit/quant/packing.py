"""Integers of 1 to 8 bits packed into bytes, the order of ONNX's and onnxruntime's tensors: lowest bits first."""

from __future__ import annotations

import numpy as np

from optkit.errors import InputError


def pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """Pack along the last axis: integer i takes the bits from ``i * bits`` on, least significant first.

    Two uint4 share a byte, the first in its low half; 3-bit integers cross the bytes' borders. Negative integers are
    stored as two's complement. The last byte is filled up with 0.

    Args:
        integers: int8 or uint8 [.., count].
        bits: Bits of each, 1 to 8.

    Returns:
        uint8 [.., ceil(count * bits / 8)].

    Raises:
        InputError: An integer does not fit.
    """
    _check(bits)
    low, high = int(integers.min(initial=0)), int(integers.max(initial=0))
    if high >= 1 << bits or (low < 0 and (low < -(1 << (bits - 1)) or high >= 1 << (bits - 1))):
        raise InputError(f"integers from {low} to {high} do not fit in {bits} bits")
    fields = integers.astype(np.uint8) & np.uint8((1 << bits) - 1)
    if 8 % bits:
        flags = np.unpackbits(fields[..., None], axis=-1, count=bits, bitorder="little")
        return np.packbits(flags.reshape(*fields.shape[:-1], fields.shape[-1] * bits), axis=-1, bitorder="little")
    per_byte = 8 // bits
    spare = -fields.shape[-1] % per_byte
    if spare:
        fields = np.pad(fields, [(0, 0)] * (fields.ndim - 1) + [(0, spare)])
    packed = fields[..., 0::per_byte].copy()
    for place in range(1, per_byte):
        packed |= fields[..., place::per_byte] << np.uint8(place * bits)
    return packed


def unpack(packed: np.ndarray, bits: int, count: int, *, signed: bool = False) -> np.ndarray:
    """Return what was packed: uint8 [.., count], or int8 where the integers are ``signed``.

    Args:
        packed: uint8 [.., ceil(count * bits / 8)].
        bits: Bits of each integer, 1 to 8.
        count: How many integers each row holds.
        signed: Whether they are two's complement.

    Raises:
        InputError: The rows have another number of bytes.
    """
    _check(bits)
    if packed.shape[-1] != -(-count * bits // 8):
        raise InputError(f"{count} integers of {bits} bits take {-(-count * bits // 8)} bytes, not {packed.shape[-1]}")
    if 8 % bits:
        flags = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
        fields = np.packbits(flags.reshape(*packed.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]
    else:
        places = np.arange(0, 8, bits, dtype=np.uint8)
        fields = (packed[..., None] >> places) & np.uint8((1 << bits) - 1)
        fields = fields.reshape(*packed.shape[:-1], packed.shape[-1] * places.size)[..., :count]
    if not signed:
        return np.ascontiguousarray(fields)
    shift = np.int8(8 - bits)  # the arithmetic shift to the right fills up with the sign
    return np.ascontiguousarray((fields << np.uint8(8 - bits)).view(np.int8) >> shift)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise InputError(f"integers of {bits} bits cannot be packed into bytes", hint="pack 1 to 8 bits")
