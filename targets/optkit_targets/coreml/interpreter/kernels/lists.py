"""Lists of tensors, which loops write to and read from; each operation returns a new list."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.elements import named
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray


class TensorList:
    """A list of tensors of one shape and type; an element that was not written is zeros."""

    def __init__(self, elements: list[Array | None], empty: Array, grows: bool) -> None:
        self.elements, self.empty, self.grows = elements, empty, grows

    def __getitem__(self, index: int) -> Array:
        if not 0 <= index < len(self.elements):
            raise IndexError(f"index {index} is out of bounds for a list of {len(self.elements)}")
        element = self.elements[index]
        return self.empty if element is None else element

    def written(self, index: int, value: Array) -> TensorList:
        """Return a list with ``value`` at ``index``, longer if need be and allowed."""
        if index < 0 or (index >= len(self.elements) and not self.grows):
            raise IndexError(f"index {index} is out of bounds for a list of {len(self.elements)}")
        elements = [*self.elements, *[None] * (index + 1 - len(self.elements))]
        elements[index] = value
        return TensorList(elements, np.zeros(value.shape, value.dtype), self.grows)


@executes("make_list", widen=False)
def make_list(
    elem_shape: tuple[Array | str, ...],
    init_length: Array | int = 1,
    dynamic_length: Array | bool = True,
    dtype: str = "fp32",
) -> TensorList:
    """Return a list of ``init_length`` elements; a dimension that is a name is known once one is written."""
    shape = [0 if isinstance(size, str) else int(size) for size in elem_shape]
    return TensorList([None] * int(init_length), np.zeros(shape, named(dtype).dtype), bool(dynamic_length))


@executes("list_length", widen=False)
def list_length(ls: TensorList) -> Array:
    """Return how many elements a list has."""
    return np.array(len(ls.elements), np.int32)


@executes("list_read", widen=False)
def list_read(ls: TensorList, index: Array) -> Array:
    """Return an element."""
    return ls[int(index)]


@executes("list_write", widen=False)
def list_write(ls: TensorList, index: Array, value: Array) -> TensorList:
    """Return the list with an element replaced."""
    return ls.written(int(index), value)


@executes("list_gather", widen=False)
def list_gather(ls: TensorList, indices: Array) -> Array:
    """Return elements along a new first axis."""
    return np.stack([ls[int(index)] for index in indices])


@executes("list_scatter", widen=False)
def list_scatter(ls: TensorList, indices: Array, value: Array) -> TensorList:
    """Return the list with elements replaced by slices along the first axis."""
    for index, element in zip(indices, value, strict=True):
        ls = ls.written(int(index), element)
    return ls
