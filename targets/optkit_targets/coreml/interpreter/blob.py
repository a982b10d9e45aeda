"""The files that hold the weights of a Core ML package.

A header of 64 bytes (how many blobs, version 2); then, for each blob, 64 bytes of metadata and its bytes, both at
multiples of 64. The metadata is a sentinel, the element type, the size in bytes, the offset of the bytes, and the bits
that pad the last byte of elements narrower than one (apple/coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp and
BlobDataType.hpp).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optkit.errors import InputError
from optkit_targets.coreml.interpreter.elements import BYTE_BITS, ELEMENT_TYPES, ElementType, unpack

HEADER = struct.Struct("<II56x")  # count, version
METADATA = struct.Struct("<IIQQQ32x")  # sentinel, element type, bytes, offset, padding bits
VERSION = 2
SENTINEL = 0xDEADBEEF
TYPES = {
    1: "FLOAT16",
    2: "FLOAT32",
    3: "UINT8",
    4: "INT8",
    5: "BFLOAT16",
    6: "INT16",
    7: "UINT16",
    8: "INT4",
    9: "UINT1",
    10: "UINT2",
    11: "UINT4",
    12: "UINT3",
    13: "UINT6",
    14: "INT32",
    15: "UINT32",
    16: "FLOAT8E4M3FN",
    17: "FLOAT8E5M2",
}
ANOTHER_PACKAGE = "the package is damaged: write it again"


@dataclass(frozen=True)
class Blob:
    """One blob: its elements, one-dimensional, and what it takes in the file."""

    element: ElementType
    values: np.ndarray
    stored_bytes: int


class BlobFile:
    """A weight file, mapped into memory.

    Raises:
        InputError: The file is missing, or no weight file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mapped = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        except (OSError, ValueError) as error:  # ValueError: no path is like this
            reason = error.strerror if isinstance(error, OSError) else error
            raise self._damaged(f"the weight file cannot be read: {reason}") from error
        self._bytes = mapped.view(np.ndarray)
        if self._bytes.size < HEADER.size:
            raise self._damaged(f"the weight file has {self._bytes.size} bytes, less than its header of {HEADER.size}")
        self.count, version = HEADER.unpack(self._bytes[: HEADER.size].tobytes())
        if version != VERSION:
            raise self._damaged(f"the weight file has version {version}, not {VERSION}")

    def read(self, offset: int) -> Blob:
        """Return the blob whose metadata begins at ``offset``.

        Raises:
            InputError: No blob begins there, it ends beyond the file, or its type has no equal in NumPy.
        """
        at = f"at offset {offset}"
        if offset + METADATA.size > self._bytes.size:
            raise self._damaged(f"the weight file ends before the blob {at}")
        fields = METADATA.unpack(self._bytes[offset : offset + METADATA.size].tobytes())
        sentinel, kind, stored_bytes, begin, padding_bits = fields
        if sentinel != SENTINEL:
            raise self._damaged(f"no blob begins {at} of the weight file")
        if begin + stored_bytes > self._bytes.size:
            raise self._damaged(f"the weight file ends within the blob {at}")
        element = ELEMENT_TYPES.get(TYPES.get(kind, ""))
        if element is None:
            what = f"the blob {at} has elements of type {TYPES.get(kind, kind)}, which this interpreter does not read"
            raise InputError(what, where=str(self.path))
        raw = self._bytes[begin : begin + stored_bytes]
        count, rest = divmod(stored_bytes * BYTE_BITS - padding_bits, element.bits)
        if rest or count < 0:
            raise self._damaged(f"the blob {at} has {stored_bytes} bytes, which do not hold whole elements")
        if element.packed:
            return Blob(element, unpack(raw, element.bits, count, signed=element.signed), stored_bytes)
        return Blob(element, raw.view(element.dtype), stored_bytes)

    def _damaged(self, what: str) -> InputError:
        return InputError(what, where=str(self.path), hint=ANOTHER_PACKAGE)
