"""What many lowerings share: settings that must be known, shapes, axes, indices, and types that an operation lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml import toolkit
from optkit_targets.coreml.lowering.scope import MAX_RANK, CannotLower, Scope

# What writes indices that are never negative.
COUNTING = frozenset({"reduce_argmax", "reduce_argmin", "topk", "shape", "range_1d", "argsort", "non_zero"})


def dims(variable: Any) -> tuple[int, ...]:
    """Return the static shape of a MIL variable.

    Raises:
        CannotLower: A dimension is not known.
    """
    try:
        return tuple(int(size) for size in variable.shape)
    except TypeError:
        raise CannotLower(f"the shape of '{variable.name}' is not static") from None


def known(scope: Scope, node: ir.Node, index: int) -> np.ndarray | None:
    """Return the numbers that a node reads at ``index``, as far as constants or MIL's own inference tell them."""
    array = scope.constant(node, index)
    if array is not None:
        return array
    variable = scope.optional(node, index)
    value = None if variable is None else variable.val
    return None if value is None else np.asarray(value)


def setting(scope: Scope, node: ir.Node, index: int, what: str) -> list[int] | None:
    """Return integers that an operator reads as an input; None where it is left out.

    Raises:
        CannotLower: They are computed at run time.
    """
    array = known(scope, node, index)
    if array is None:
        if scope.optional(node, index) is not None:
            raise CannotLower(f"its {what} is computed at run time")
        return None
    return [int(item) for item in array.ravel()]


def attribute_or_input(scope: Scope, node: ir.Node, attribute: str, index: int) -> list[int] | None:
    """Return integers that old opsets give as an attribute and new ones as an input; None where both are absent."""
    given = node.attributes.get(attribute)
    if given is None:
        return setting(scope, node, index, attribute)
    return [given.as_int()] if given.type == ir.AttributeType.INT else list(given.as_ints())


def required(found: list[int] | None, what: str) -> list[int]:
    """Return a setting that the operator cannot do without."""
    if found is None:
        raise CannotLower(f"it has no {what}")
    return found


def needs(scope: Scope, deployment: int, what: str) -> None:
    """Refuse what only a later deployment target has.

    Raises:
        CannotLower: Names that target.
    """
    if scope.deployment < deployment:
        raise CannotLower(f"{what} needs the deployment target iOS {deployment}, this one is iOS {scope.deployment}")


def prefers(scope: Scope, deployment: int, what: str) -> None:
    """Refuse what a later deployment target has a smaller form for, if that one may be chosen instead.

    Raises:
        CannotLower: Names that target.
    """
    if not scope.settle:
        needs(scope, deployment, what)


def check_rank(rank: int, what: str = "a result") -> None:
    """Refuse more axes than a MIL tensor has.

    Raises:
        CannotLower: Names the rank.
    """
    if rank > MAX_RANK:
        raise CannotLower(f"{what} has {rank} axes: MIL tensors have at most {MAX_RANK}")


def check_filled(shape: Sequence[int], what: str = "a result") -> None:
    """Refuse a tensor without elements.

    Raises:
        CannotLower: MIL has no such tensors.
    """
    if 0 in shape:
        raise CannotLower(f"{what} has no elements: MIL has no empty tensors")


def axis_of(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    if not -rank <= axis < max(rank, 1):
        raise CannotLower(f"axis {axis} is not one of its {rank} axes")
    return axis + rank if axis < 0 else axis


def axes_of(axes: Iterable[int], rank: int) -> list[int]:
    """Return axes counted from the front, in order."""
    return sorted(axis_of(axis, rank) for axis in axes)


def label(scope: Scope, node: ir.Node, suffix: str = "") -> str:
    """Return a free name for an operation of a node."""
    return scope.name(node.name or node.op_type, suffix)


def dtype(variable: Any) -> str:
    """Return the type's short name: fp32, fp16, int32, bool, int8, ..."""
    return str(toolkit.mil().types.builtin_to_string(variable.dtype))


def is_float(variable: Any) -> bool:
    """Return whether a variable holds floats."""
    return dtype(variable) in ("fp16", "fp32")


def cast(scope: Scope, variable: Any, name: str) -> Any:
    """Return a variable in another type."""
    return variable if dtype(variable) == name else scope.mb.cast(x=variable, dtype=name)


def as_type(scope: Scope, variable: Any, allowed: Sequence[str], otherwise: str) -> Any:
    """Return a variable in its own type where an operation takes it, else in another."""
    return variable if dtype(variable) in allowed else cast(scope, variable, otherwise)


def through(scope: Scope, variable: Any, allowed: Sequence[str], other: str, work: Callable[[Any], Any]) -> Any:
    """Do some work in a type that its operation takes, and return to the variable's own type."""
    if dtype(variable) in allowed:
        return work(variable)
    return cast(scope, work(cast(scope, variable, other)), dtype(variable))


def wide(scope: Scope, node: ir.Node, index: int) -> Any:
    """Return an input with integers of 8 bits widened, as graph inputs are: then all inputs of a node agree."""
    array = scope.constant(node, index)
    if array is not None and array.dtype.name in ("int8", "uint8"):
        return scope.const(array.astype(np.int32), label(scope, node, f"input_{index}"))
    return scope.input(node, index)


def reshaped(scope: Scope, variable: Any, shape: Sequence[int], **name: str) -> Any:
    """Return a variable in another static shape; a scalar too."""
    if dims(variable) == tuple(shape):
        return variable
    check_rank(len(shape))
    if shape:
        return scope.mb.reshape(x=variable, shape=np.array(shape, np.int32), **name)
    return scope.mb.squeeze(x=variable, axes=list(range(len(dims(variable)))), **name)


def transposed(scope: Scope, variable: Any, perm: Sequence[int], **name: str) -> Any:
    """Return a variable with its axes in another order."""
    if list(perm) == list(range(len(perm))):
        return variable
    return scope.mb.transpose(x=variable, perm=list(perm), **name)


def broadcast(scope: Scope, variable: Any, shape: Sequence[int]) -> Any:
    """Return a variable repeated along axes of length 1 until it has ``shape``."""
    own = (1,) * (len(shape) - len(dims(variable))) + dims(variable)
    repeats = [wanted // size for wanted, size in zip(shape, own, strict=True)]
    variable = reshaped(scope, variable, own)
    return variable if set(repeats) <= {1} else scope.mb.tile(x=variable, reps=repeats)


def counted(scope: Scope, indices: Any, size: int | np.ndarray) -> Any:
    """Return indices with the negative ones counted from the end, as MIL's iOS 17 gather and scatter need them.

    Args:
        scope: The program being written.
        indices: Integers.
        size: The length of the axis, or one length for each column.
    """
    indices = cast(scope, indices, "int32")
    if indices.val is not None:
        array = np.asarray(indices.val)
        return scope.mb.const(val=np.where(array < 0, array + size, array).astype(np.int32))
    if indices.op is not None and indices.op.op_type in COUNTING:
        return indices
    behind = scope.mb.add(x=indices, y=np.asarray(size, np.int32))
    return scope.mb.select(cond=scope.mb.less(x=indices, y=np.int32(0)), a=behind, b=indices)


def empty(scope: Scope, like: Any, shape: Sequence[int]) -> Any:
    """Return a constant without elements, which Concat leaves out and no program may hold."""
    return scope.mb.const(val=np.zeros(shape, toolkit.mil().types.nptype_from_builtin(like.dtype)))


def volume(shape: Sequence[int]) -> int:
    """Return the number of elements."""
    return math.prod(shape)
