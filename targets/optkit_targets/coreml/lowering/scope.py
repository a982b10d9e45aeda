"""What a lowering sees of the model around its node, and how it names what it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant
from optkit_targets.coreml import toolkit

IDENTIFIER = re.compile(r"[^A-Za-z0-9_]")
RESERVED = frozenset({
    "any", "bf16", "bool", "dict", "false", "fp16", "fp32", "fp64", "func", "int16", "int32", "int64", "int8", "list",
    "program", "state", "string", "tensor", "true", "tuple", "uint16", "uint32", "uint64", "uint8",
})  # fmt: skip
# What MIL has no type for, and what it is written in: 64-bit integers are 32 bits wide on every Apple device.
NARROWED = {
    "int64": "int32",
    "uint64": "int32",
    "uint32": "int32",
    "float64": "float32",
    "int16": "int32",
    "uint16": "int32",
}

MAX_RANK = 5  # axes of a MIL tensor


class CannotLower(Exception):  # noqa: N818  # a refusal with its reason, not an error
    """A node has a form that MIL, or the deployment target, does not have."""


class NoLowering(CannotLower):
    """A node's operator has no lowering in any form, whatever else is in the model."""


@dataclass(frozen=True)
class Folded:
    """A tensor with more axes than MIL has, held in fewer: the same elements in the same order.

    Attributes:
        value: A MIL variable.
        shape: The shape it stands for.
    """

    value: Any
    shape: tuple[int, ...]


class Scope:
    """The MIL program being written.

    Attributes:
        mb: coremltools' builder, every operation named.
        deployment: The number in the deployment target: 15 for iOS 15, 18 for iOS 18.
        settle: Whether a wider form does where only a later deployment target has the narrow one.
        opset: The version of the default operator set, of bodies too.
    """

    def __init__(self, deployment: int, *, settle: bool = True, opset: int = 21) -> None:
        self.mb = Names(self)
        self.deployment = deployment
        self.settle = settle
        self.opset = opset
        self._variables: dict[ir.Value, Any] = {}
        self._taken: set[str] = set()

    def input(self, node: ir.Node, index: int) -> Any:
        """Return the MIL variable or constant that a node reads at ``index``.

        Raises:
            CannotLower: The node has no such input.
        """
        value = argument(node, index)
        if value is None:
            raise CannotLower(f"input {index} is missing")
        return self.variable(value)

    def optional(self, node: ir.Node, index: int) -> Any | None:
        """Return the same, or None where the node leaves the input out."""
        value = argument(node, index)
        return None if value is None else self.variable(value)

    def variable(self, value: ir.Value) -> Any:
        """Return what stands for a value; a constant is written where it is first read.

        Raises:
            CannotLower: Nothing does, or it has too many axes.
        """
        found = self.held(value)
        if isinstance(found, Folded):
            raise too_many_axes(len(found.shape))
        return found

    def held(self, value: ir.Value) -> Any:
        """Return the same, or, for a value of more axes than MIL's tensors have, how it is held."""
        if value not in self._variables:
            array = constant(value)
            if array is None:
                raise CannotLower(f"'{value.name}' is computed by nothing that was lowered")
            self._variables[value] = self.const(array, value.name or "")
        return self._variables[value]

    def written(self, value: ir.Value) -> bool:
        """Return whether something stands for a value already."""
        return value in self._variables

    def constant(self, node: ir.Node, index: int) -> np.ndarray | None:
        """Return the numbers that a node reads at ``index``; None where they are computed or the input is left out."""
        value = argument(node, index)
        return None if value is None else constant(value)

    def const(self, array: np.ndarray, name: str) -> Any:
        """Write a constant in the widest type that MIL has for it."""
        return self.mb.const(val=narrowed(array), name=self.name(name))

    def shape(self, node: ir.Node, index: int) -> tuple[int, ...]:
        """Return the static shape of an input.

        Raises:
            CannotLower: A dimension is not known.
        """
        value = argument(node, index)
        shape = None if value is None else value.shape
        if shape is None or not all(isinstance(dim, int) for dim in shape):
            raise CannotLower(f"the shape of input {index} is not static")
        return tuple(int(dim) for dim in shape)  # type: ignore[arg-type]  # just checked

    def name(self, name: str, suffix: str = "") -> str:
        """Return a MIL identifier that nothing has yet, as close to ``name`` as MIL allows."""
        base = identifier(f"{name}_{suffix}" if suffix else name)
        unique, number = base, 0
        while unique in self._taken:
            number += 1
            unique = f"{base}_{number}"
        self._taken.add(unique)
        return unique

    def bind(self, node: ir.Node, results: Any) -> None:
        """Let what a lowering returned stand for the node's outputs.

        Raises:
            CannotLower: A result has more axes than a MIL tensor, or no elements.
        """
        produced = results if isinstance(results, (list, tuple)) else (results,)
        for result in produced:
            check_shape(result)
        for value, result in zip(node.outputs, produced, strict=False):
            self._variables[value] = result

    def set(self, value: ir.Value, variable: Any) -> None:
        """Let a MIL variable stand for a value."""
        self._variables[value] = variable

    def ints(self, node: ir.Node, attribute: str, default: Sequence[int] | None = None) -> list[int] | None:
        """Return a list of integers among a node's attributes."""
        found = node.attributes.get(attribute)
        return list(found.as_ints()) if found is not None else None if default is None else list(default)


class Names:
    """coremltools' builder, which names what has no name by its operation.

    Its own count of names goes on over all programs of a process, so that the second package of a model would have
    other bytes than the first.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._builder = toolkit.builder()

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        function = getattr(self._builder, operation)

        def write(**inputs: Any) -> Any:
            if "name" not in inputs:
                inputs["name"] = self._scope.name(operation)
            return function(**inputs)

        return write


def too_many_axes(rank: int) -> CannotLower:
    """Return the refusal of a tensor with more axes than MIL has."""
    return CannotLower(f"a result has {rank} axes: MIL tensors have at most {MAX_RANK}")


def check_shape(variable: Any) -> None:
    """Refuse what MIL has no tensors for.

    Raises:
        CannotLower: More than 5 axes, or no elements. Constants without any may be: who reads them leaves them out.
    """
    if isinstance(variable, Folded):
        return
    if len(variable.shape) > MAX_RANK:
        raise too_many_axes(len(variable.shape))
    if variable.val is None and any(dim == 0 for dim in variable.shape):
        raise CannotLower("a result has no elements: MIL has no empty tensors")


def identifier(name: str) -> str:
    """Return a name as MIL allows it: letters, digits and underscores, no digit first, none of MIL's own words."""
    text = IDENTIFIER.sub("_", name) or "value"
    text = f"_{text}" if text[0].isdigit() else text
    return f"{text}_" if text in RESERVED else text


def narrowed(array: np.ndarray) -> np.ndarray:
    """Return an array in a type that MIL has.

    Raises:
        CannotLower: MIL has no such type, or an integer does not fit in 32 bits.
    """
    if array.dtype.kind not in "biuf" and "int" not in array.dtype.name:  # int4 is none of NumPy's kinds
        raise CannotLower(f"MIL has no constants of {array.dtype.name}")
    wanted = NARROWED.get(array.dtype.name)
    if wanted is None:
        return array
    if array.dtype.kind in "iu" and array.size:
        limits = np.iinfo(np.int32)
        beyond = (array > limits.max) | (array < limits.min)
        if beyond.any():  # "to the end" in Slice and its like
            if np.abs(array[beyond].astype(object)).min() < np.iinfo(np.int64).max // 4:
                raise CannotLower("an integer constant needs more than 32 bits")
            array = np.clip(array, limits.min, limits.max)
    return array.astype(wanted)
