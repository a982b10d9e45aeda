"""Arrays on disk: ``.npy`` and ``.npz`` files mapped rather than read where their layout allows, never unpickled."""

from __future__ import annotations

import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from optkit.errors import InputError

SPOOL_BYTES = 64 << 20  # more than this goes to a temporary file


def load_npy(file: Path) -> np.ndarray:
    """Return the array of a ``.npy`` file, memory-mapped.

    Raises:
        InputError: The file is not a ``.npy`` file, is truncated, or holds Python objects.
    """
    try:
        return _mapped(file, 0)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"not a readable .npy file: {error}", where=str(file)) from error


def load_npz(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a ``.npz`` file: memory-mapped as ``np.savez`` stores them, read where compressed.

    Raises:
        InputError: The file is not a ``.npz`` file, is truncated, or holds Python objects.
    """
    arrays = {}
    name = ""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if member.compress_type == zipfile.ZIP_STORED:
                    arrays[name] = _mapped(file, _data_offset(file, member))
                else:
                    with archive.open(member) as stream:
                        arrays[name] = np.lib.format.read_array(cast("BinaryIO", stream), allow_pickle=False)
    except (OSError, ValueError, EOFError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        where = f"{file}: array '{name}'" if name else str(file)
        raise InputError(f"not a readable .npz file: {error}", where=where) from error
    return arrays


def _mapped(file: Path, offset: int) -> np.ndarray:
    with file.open("rb") as stream:
        stream.seek(offset)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
        start = stream.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")


def _data_offset(file: Path, member: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin: behind its local header, whose name and extra field vary in length."""
    with file.open("rb") as stream:
        stream.seek(member.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", stream.read(4))
    return member.header_offset + 30 + int(name_bytes) + int(extra_bytes)


class Spool:
    """Dictionaries of arrays, appended once and read at random, held in a temporary file beyond 64 MiB."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115  # closed by __del__
        self._index: list[dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]] = []

    def append(self, item: Mapping[str, np.ndarray]) -> None:
        """Store one dictionary; its arrays may differ in type and shape from those before."""
        entry = {}
        for name, array in item.items():
            entry[name] = (self._file.seek(0, 2), array.dtype, array.shape)
            self._file.write(array.tobytes())
        self._index.append(entry)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        item = {}
        for name, (offset, dtype, shape) in self._index[index].items():
            self._file.seek(offset)
            count = int(np.prod(shape, dtype=np.int64))
            item[name] = np.frombuffer(self._file.read(count * dtype.itemsize), dtype).reshape(shape)
        return item

    def __del__(self) -> None:
        self._file.close()
