"""Constants of a specification, immediate or in a weight file, as NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from optkit.errors import InputError
from optkit_targets.coreml import toolkit
from optkit_targets.coreml.interpreter.blob import ANOTHER_PACKAGE, BlobFile
from optkit_targets.coreml.interpreter.elements import ELEMENT_TYPES, ElementType, unpack

MODEL_PATH = "@model_path/"  # what the paths of weight files begin with: the folder of the specification


@dataclass(frozen=True)
class TensorType:
    """The type of a tensor: its elements, and its shape, None where a dimension is open, or how many there are."""

    element: ElementType
    shape: tuple[int | None, ...] | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a tensor whose dimensions are all known, as those of constants and states are."""
        return tuple(size or 0 for size in self.shape or ())


@dataclass(frozen=True)
class Constant:
    """A constant.

    Attributes:
        value: An array, a string, or a tuple of them.
        element: Its element type; None for strings and tuples.
        stored_bytes: What it takes, in the weight file or in the specification.
        origin: ``file:offset`` where it lies in a weight file, else empty.
    """

    value: Any
    element: ElementType | None
    stored_bytes: int
    origin: str = ""


class ConstantReader:
    """Reads the constants of one specification.

    Args:
        folder: The folder that ``@model_path`` stands for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BlobFile] = {}

    def read(self, value: Any, name: str) -> Constant:
        """Return a ``Value`` of the specification.

        Args:
            value: The message.
            name: The variable or parameter it is for, which errors name.

        Raises:
            InputError: It has no equal in NumPy, or the package is damaged.
        """
        if value.WhichOneof("value") == "blobFileValue":
            return self._stored(value, name)
        content = value.immediateValue
        kind = content.WhichOneof("value")
        if kind == "list":
            return Constant(tuple(self.read(item, name).value for item in content.list.values), None, 0)
        if kind != "tensor":
            raise InputError(f"the constant '{name}' is a {kind}, which this interpreter does not read")
        if _type_name(value.type) == "STRING":
            return Constant(_strings(content.tensor, value.type), None, 0)
        wanted = tensor_type(value.type, name)
        flat, stored_bytes = _immediate(content.tensor, wanted)
        return Constant(_shaped(flat, wanted, name), wanted.element, stored_bytes)

    def _stored(self, value: Any, name: str) -> Constant:
        wanted = tensor_type(value.type, name)
        path, offset = value.blobFileValue.fileName, value.blobFileValue.offset
        relative = PurePosixPath(path.removeprefix(MODEL_PATH))
        if relative.is_absolute() or ".." in relative.parts:
            what = f"the constant '{name}' lies in '{path}', outside the package"
            raise InputError(what, where=str(self._folder))
        if path not in self._files:
            self._files[path] = BlobFile(self._folder / relative)
        blob = self._files[path].read(offset)
        if blob.element.bits != wanted.element.bits:
            what = f"the constant '{name}' is {wanted.element.name}, and the weight file has {blob.element.name} for it"
            raise InputError(what, where=str(self._folder / relative), hint=ANOTHER_PACKAGE)
        flat = blob.values if wanted.element.packed else blob.values.view(wanted.element.dtype)
        return Constant(_shaped(flat, wanted, name), wanted.element, blob.stored_bytes, f"{relative}:{offset}")


def tensor_type(type_: Any, name: str) -> TensorType:
    """Return a tensor's ``ValueType``; a state's is the type of what it holds.

    Raises:
        InputError: It is no tensor, or one of elements that have no equal in NumPy.
    """
    kind = type_.WhichOneof("type")
    if kind == "stateType":
        return tensor_type(type_.stateType.wrappedType, name)
    element = ELEMENT_TYPES.get(_type_name(type_))
    if kind != "tensorType" or element is None:
        what = _type_name(type_) or (kind or "nothing").removesuffix("Type")
        raise InputError(f"'{name}' is of type {what}, which this interpreter does not have")
    dimensions = type_.tensorType.dimensions
    if any(dim.unknown.variadic for dim in dimensions):
        return TensorType(element, None)
    return TensorType(
        element, tuple(int(dim.constant.size) if dim.HasField("constant") else None for dim in dimensions)
    )


def fits(shape: Sequence[int], declared: Sequence[int | None] | None) -> bool:
    """Return whether a shape is what is declared."""
    if declared is None:
        return True
    return len(shape) == len(declared) and all(
        size in (None, found) for size, found in zip(declared, shape, strict=True)
    )


def shown(shape: Sequence[int | None] | None) -> str:
    """Return a shape as errors show it: ``[2, ?]``."""
    return "[...]" if shape is None else "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _type_name(type_: Any) -> str:
    """Return the name of a tensor's elements, or nothing for what is no tensor."""
    if type_.WhichOneof("type") != "tensorType":
        return ""
    number = type_.tensorType.dataType
    known = toolkit.proto().MIL__pb2.DataType.DESCRIPTOR.values_by_number
    return str(known[number].name) if number in known else f"number {number}"


def _strings(tensor: Any, type_: Any) -> str | tuple[str, ...]:
    values: Sequence[str] = tensor.strings.values
    return values[0] if type_.tensorType.rank == 0 else tuple(values)


def _immediate(tensor: Any, wanted: TensorType) -> tuple[np.ndarray, int]:
    """Return the elements that a specification has inline, and the bytes they take in the type they have."""
    element = wanted.element
    field = tensor.WhichOneof("value")
    if field is None:  # a tensor without elements
        return np.zeros(0, element.dtype), 0
    values = getattr(tensor, field).values
    if field != "bytes":
        flat = np.array(values, element.dtype)
        return flat, flat.nbytes
    raw = np.frombuffer(values, np.uint8)
    if element.packed:
        return unpack(raw, element.bits, math.prod(wanted.sizes), signed=element.signed), raw.size
    return raw.view(element.dtype), raw.size


def _shaped(flat: np.ndarray, wanted: TensorType, name: str) -> np.ndarray:
    if flat.size != math.prod(wanted.sizes):
        what = f"the constant '{name}' has {flat.size} elements, which do not make its shape {list(wanted.sizes)}"
        raise InputError(what, hint=ANOTHER_PACKAGE)
    return flat.reshape(wanted.sizes)
