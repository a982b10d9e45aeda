"""``y = x / sqrt(mean(x^2) + epsilon)`` over the last axes, as exporters decompose it: reading what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, constant, ints, static_shape
from optkit_passes.fusion.linear import RefusedError, only_use
from optkit_passes.fusion.matching import is_operator, number, other_input, produced_by, sole_reader

# LayerNormalization and RMSNormalization compute the statistics in float32 (stash_type 1), so no double is fused.
FUSED_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Deviation:
    """``sqrt(mean(squared^2) + epsilon)``, or one divided by that.

    Attributes:
        result: The deviation, or its inverse.
        inverse: Which of the two.
        epsilon: What is added to the mean.
    """

    result: ir.Value
    inverse: bool
    epsilon: float


@dataclass(frozen=True)
class Normalized:
    """A normalized value, and what it is multiplied with and shifted by.

    Attributes:
        root: The last operator of the match.
        x: What is normalized.
        dims: The sizes of the axes that it is normalized over.
        epsilon: What is added to the mean of the squares.
        scale: One number for each element of ``dims``: a value of that shape, or an array to be stored; None is one.
        shift: The same; None is zero.
    """

    root: ir.Node
    x: ir.Value
    dims: tuple[int, ...]
    epsilon: float
    scale: ir.Value | np.ndarray | None = None
    shift: ir.Value | np.ndarray | None = None

    @property
    def operands(self) -> list[ir.Value]:
        """The values that the operator takes, but for what is still to be stored."""
        return [value for value in (self.x, self.scale, self.shift) if isinstance(value, ir.Value)]

    def inputs(self, taken: set[str]) -> list[ir.Value]:
        """Return x, scale and, where there is one, the shift; arrays become initializers beside the root."""
        graph = self.root.graph
        assert graph is not None
        assert self.x.dtype is not None
        scale = np.ones(self.dims, self.x.dtype.numpy()) if self.scale is None else self.scale
        found = [self.x]
        for label, parameter in (("scale", scale), ("bias", self.shift)):
            if isinstance(parameter, np.ndarray):
                parameter = add_constant(graph, f"{self.root.name}/{label}", parameter, taken)
            found += [] if parameter is None else [parameter]
        return found

    def attributes(self) -> list[ir.Attr]:
        """Return the attributes that LayerNormalization and RMSNormalization have in common."""
        return [ir.AttrInt64("axis", -len(self.dims)), ir.AttrFloat32("epsilon", self.epsilon)]


def squared(mean: ir.Node) -> ir.Value | None:
    """Return z where the node is ``ReduceMean(z * z)`` or ``ReduceMean(z ^ 2)``."""
    node = produced_by(mean.inputs[0], "Mul", "Pow") if is_operator(mean, "ReduceMean") else None
    if node is None:
        return None
    same = node.inputs[0] is node.inputs[1] if node.op_type == "Mul" else number(node.inputs[1], 1) == 2
    return node.inputs[0] if same else None


def mean_of(value: ir.Value | None) -> ir.Value | None:
    """Return what a ReduceMean took the mean of, where the value is its result."""
    node = produced_by(value, "ReduceMean")
    return node.inputs[0] if node is not None else None


def normalized_dims(mean: ir.Node, x: ir.Value) -> tuple[int, ...]:
    """Return the sizes of the axes that a ReduceMean reduces.

    Raises:
        RefusedError: They are not the last ones, not known, or the fused operator does not take x.
    """
    if x.dtype not in FUSED_TYPES:
        raise RefusedError(f"it computes in {x.dtype}, and the fused operator in FLOAT")
    if x.shape is None or not len(x.shape):
        raise RefusedError("its input is a scalar" if x.shape is not None else "the rank of its input is not known")
    rank = len(x.shape)
    axes = ints(mean, "axes", 1, ())
    if axes is None:
        raise RefusedError("the axes of its mean are computed at run time")
    if not axes and mean.attributes.get_int("noop_with_empty_axes", 0) == 1:
        raise RefusedError("its mean is over no axis")
    if not mean.attributes.get_int("keepdims", 1):
        raise RefusedError("its mean drops the axes (keepdims=0)")
    reduced = sorted(axis % rank for axis in axes or range(rank))
    first = reduced[0]
    if reduced != list(range(first, rank)):
        raise RefusedError(f"it normalizes axes {reduced} of {rank}, not the last ones")
    dims = [size for size in x.shape[first:] if isinstance(size, int)]
    if len(dims) != rank - first:
        raise RefusedError("the sizes of the normalized axes are not known")
    if 0 in x.shape:
        raise RefusedError("its input is empty")
    return tuple(dims)


def deviation(mean: ir.Node) -> Deviation:
    """Read ``sqrt(mean + epsilon)`` or its inverse, from the mean of the squares on.

    Raises:
        RefusedError: Something else is done to the mean.
    """
    add, index = only_use(mean.outputs[0])
    rank = len(mean.outputs[0].shape) if mean.outputs[0].shape is not None else 1
    epsilon = number(other_input(add, index), rank) if is_operator(add, "Add") else None
    if epsilon is None:
        raise RefusedError(f"no constant number is added to the mean of its squares, which {add.op_type} takes")
    if not 0 <= epsilon < np.inf:
        raise RefusedError(f"its epsilon is {epsilon:g}")
    root, index = only_use(add.outputs[0])
    exponent = number(root.inputs[1], rank) if is_operator(root, "Pow") and index == 0 else None
    if exponent == -0.5:
        return Deviation(root.outputs[0], True, epsilon)
    if exponent != 0.5 and not is_operator(root, "Sqrt"):
        raise RefusedError(f"no square root is taken of its variance, which {root.op_type} takes")
    reader, index = only_use(root.outputs[0])
    is_one = is_operator(reader, "Div") and index == 1 and number(reader.inputs[0], rank) == 1
    if is_one or is_operator(reader, "Reciprocal"):
        return Deviation(reader.outputs[0], True, epsilon)
    return Deviation(root.outputs[0], False, epsilon)


def quotient(measure: Deviation, is_numerator: Callable[[ir.Value], bool]) -> tuple[ir.Node, ir.Value | None]:
    """Return the node that divides by the deviation, and what its inverse was multiplied with before, or None.

    Raises:
        RefusedError: What is divided is something else.
    """
    scale = None
    node, index = only_use(measure.result)
    other = other_input(node, index)
    if measure.inverse and is_operator(node, "Mul") and other is not None and not is_numerator(other):
        scale = other
        node, index = only_use(node.outputs[0])
        other = other_input(node, index)
    operator = is_operator(node, "Mul") if measure.inverse else is_operator(node, "Div") and index == 1
    if not operator or other is None or not is_numerator(other):
        raise RefusedError(f"what {node.op_type} divides by the deviation is not what was squared")
    return node, scale


def parameter(value: ir.Value, dims: tuple[int, ...], rank: int) -> ir.Value | np.ndarray | None:
    """Return the value, or the array, of shape ``dims`` that gives the same result; None where there is none.

    Args:
        value: What a normalized value is multiplied with or shifted by.
        dims: The sizes of the normalized axes.
        rank: How many axes the normalized value has.
    """
    if static_shape(value) == list(dims):
        return value
    array = constant(value)
    if array is None or array.ndim > rank:
        return None
    extra = max(array.ndim - len(dims), 0)
    if any(size != 1 for size in array.shape[:extra]):
        return None
    array = array.reshape(array.shape[extra:])
    fits = all(array.shape[-i] in (1, dims[-i]) for i in range(1, array.ndim + 1))
    return np.ascontiguousarray(np.broadcast_to(array, dims)) if fits else None


def parameter_behind(
    node: ir.Node, op_type: str, dims: tuple[int, ...], rank: int
) -> tuple[ir.Node, ir.Value | np.ndarray | None]:
    """Return the operator behind the node that scales or shifts its result, and by what; else the node and None."""
    reader = sole_reader(node.outputs[0], op_type)
    if reader is None:
        return node, None
    found = parameter(reader[1], dims, rank)
    return (node, None) if found is None else (reader[0], found)


def scale_of(
    node: ir.Node, inner: ir.Value | None, dims: tuple[int, ...], rank: int
) -> tuple[ir.Node, ir.Value | np.ndarray | None]:
    """Return the last operator of a scaled quotient, and its scale, which None stands for where it is one.

    Args:
        node: The quotient.
        inner: What the inverse deviation was multiplied with before, or None.
        dims: The sizes of the normalized axes.
        rank: How many axes the quotient has.

    Raises:
        RefusedError: The scale varies along other axes, as that of an instance normalization does.
    """
    reader = sole_reader(node.outputs[0], "Mul")
    behind = reader[1] if reader is not None and constant(reader[1]) is not None else None
    value = inner if inner is not None else behind
    if value is not None and parameter(value, dims, rank) is None:
        raise RefusedError(misfit(value, dims))
    return parameter_behind(node, "Mul", dims, rank) if inner is None else (node, parameter(inner, dims, rank))


def misfit(value: ir.Value, dims: tuple[int, ...]) -> str:
    """Say why a value cannot be the scale or the shift of a normalization over axes of these sizes."""
    shape = "unknown shape" if value.shape is None else f"shape {value.shape}"
    return f"its parameter of {shape} does not fit the normalized axes, of {list(dims)}"


def require_opset(operator: str, since: int, version: int) -> None:
    """Refuse to write an operator that the model's opset does not have.

    Raises:
        RefusedError: It was introduced later.
    """
    if version < since:
        raise RefusedError(f"{operator} exists since opset {since}, and the model has {version}: raise-opset raises it")
