"""Remove nodes whose result is one of their inputs, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import (
    NO_LIMIT,
    argument,
    cannot_forward,
    constant,
    forward,
    ints,
    is_unused,
    opset,
    remove,
    static_shape,
)


class Refused(Exception):  # noqa: N818  # it is an answer, not an error
    """A node that could have been a no-op, and why it is not."""


class EliminateNoOps(Pass):
    """Remove nodes that change nothing: ``y = Identity(x)``, ``x * 1``, ``Reshape`` to the same shape, ...

    Also Dropout in inference mode, Cast to the same type, ``x - 0``, ``x / 1``, ``x ** 1``, Transpose, Slice, Pad,
    Expand, Tile, Resize, Squeeze, Unsqueeze and Flatten that keep every element where it is, and Concat, Sum, Mean,
    Max, Min and Split of one tensor. A node stays where the name of a graph output would be lost with it.
    """

    special_values: bool = True  # keep Add(x, 0.0), which turns -0.0 into 0.0, and Clip(x), which turns inf finite

    def run(self, model: ir.Model, context: Context) -> None:
        """Walk the nodes of every graph in order."""
        version = opset(model)
        for graph in list(model.graphs()):
            for node in list(graph):
                check = CHECKS.get(node.op_type) if node.domain == "" and node.outputs else None
                if check is None:
                    continue
                try:
                    kept = check(node, version, self)
                    if kept is None:
                        continue
                    objection = cannot_forward(node.outputs[0], kept)
                    if objection:
                        raise Refused(objection)
                except Refused as refusal:
                    context.missed(node, str(refusal))
                    continue
                context.applied(node, f"its result is its input '{kept.name}'")
                forward(node.outputs[0], kept)
                remove(node)


def _data(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    return argument(node, 0)


def _only_input(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    return argument(node, 0) if len(node.inputs) == 1 else None


def _split(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    return argument(node, 0) if len(node.outputs) == 1 else None


def _dropout(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    training = argument(node, 2)
    mode = constant(training)
    if training is not None and (mode is None or mode.any()):
        raise Refused("Dropout may run in training mode")
    if len(node.outputs) > 1 and not is_unused(node.outputs[1]):
        raise Refused("the mask of Dropout is used")
    return argument(node, 0)


def _cast(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    x, like = argument(node, 0), argument(node, 1)
    to = like.dtype if like is not None else ir.DataType(node.attributes.get_int("to", 0))
    return x if x is not None and x.dtype is not None and x.dtype == to else None


def _keeps_shape(x: ir.Value, other: ir.Value) -> bool:
    """Return whether broadcasting the constant ``other`` against ``x`` gives the shape of ``x``."""
    dims = static_shape(other)
    if dims is None:
        return False
    if x.shape is None:
        return not dims
    if len(dims) > len(x.shape):
        return False
    return all(dim == 1 or dim == own for dim, own in zip(reversed(dims), reversed(list(x.shape)), strict=False))


def _is_float(x: ir.Value) -> bool:
    return x.dtype is not None and x.dtype.is_floating_point()


def _neutral(element: float, *, commutes: bool) -> Check:
    """Return the check of ``x op element``: 0 for Add and Sub, 1 for Mul, Div and Pow."""

    def check(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
        for index in (1, 0) if commutes else (1,):
            x, other = argument(node, 1 - index), argument(node, index)
            array = constant(other)
            if x is None or other is None or array is None or not array.size or array.dtype.kind not in "fiu":
                continue
            if not (array == element).all() or (node.op_type == "Pow" and not _is_float(x)):
                continue
            if not _keeps_shape(x, other):
                raise Refused(f"'{other.name}' may broadcast its other input to a larger shape")
            # x + 0.0 and x - (-0.0) turn -0.0 into 0.0; x - 0.0 and x + (-0.0) are x
            clears_sign = array.dtype.kind == "f" and element == 0 and not np.signbit(array).all()
            if node.op_type == "Sub":
                clears_sign = array.dtype.kind == "f" and bool(np.signbit(array).any())
            if clears_sign and options.special_values:
                raise Refused(f"{node.op_type} of '{other.name}' turns -0.0 into 0.0")
            return x
        return None

    return check


def _transpose(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    x, perm = argument(node, 0), node.attributes.get_ints("perm")
    if x is None or (perm is None and x.shape is None):
        return None
    axes = list(perm) if perm is not None else list(range(len(x.shape or ())))[::-1]
    return x if axes == sorted(axes) else None


def _same_shape(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    """Reshape, Flatten, Squeeze, Unsqueeze and Expand between two values of one static shape."""
    x = argument(node, 0)
    dims = static_shape(x)
    return x if dims is not None and dims == static_shape(node.outputs[0]) else None


def _is_shape_of(shape: ir.Value | None, x: ir.Value) -> bool:
    producer = shape.producer() if shape is not None else None
    if producer is None or (producer.domain, producer.op_type) != ("", "Shape") or producer.inputs[0] is not x:
        return False
    return producer.attributes.get_int("start", 0) == 0 and "end" not in producer.attributes


def _reshape(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    x, shape = argument(node, 0), constant(argument(node, 1))
    if x is None or _same_shape(node, version, options) is not None or _is_shape_of(argument(node, 1), x):
        return x
    if shape is None or x.shape is None or shape.size != len(x.shape):
        return None
    target = shape.tolist()
    copies = node.attributes.get_int("allowzero", 0) == 0
    kept = [want == own or (want == 0 and copies) for want, own in zip(target, x.shape, strict=True)]
    # one -1 among kept dimensions is what is left for it, unless one of them is empty
    inferred = target.count(-1) == 1 and 0 not in list(x.shape) and kept.count(False) == 1
    return x if all(kept) or (inferred and not kept[target.index(-1)]) else None


def _expand(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    x, shape = argument(node, 0), constant(argument(node, 1))
    if x is None or _same_shape(node, version, options) is not None or _is_shape_of(argument(node, 1), x):
        return x
    if shape is None:
        return None
    if x.shape is None:
        return x if not shape.size else None
    own = list(x.shape)[::-1]
    want = shape.tolist()[::-1]
    return x if len(want) <= len(own) and all(w in (1, o) for w, o in zip(want, own, strict=False)) else None


def _unsqueeze(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    return argument(node, 0) if ints(node, "axes", 1) == [] else None


def _squeeze(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    x = argument(node, 0)
    dims = static_shape(x)
    absent = "axes" not in node.attributes and argument(node, 1) is None
    return x if absent and dims is not None and 1 not in dims else None


def _flatten(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    x, axis = argument(node, 0), node.attributes.get_int("axis", 1)
    return x if x is not None and x.shape is not None and len(x.shape) == 2 and axis in (1, -1) else None


def _slice(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    x = argument(node, 0)
    starts, ends = ints(node, "starts", 1), ints(node, "ends", 2)
    if x is None or starts is None or ends is None:
        return None
    axes = ints(node, "axes", 3, default=range(len(starts)))
    steps = ints(node, "steps", 4, default=[1] * len(starts))
    if axes is None or steps is None or any(step != 1 for step in steps):
        return None
    for start, end, axis in zip(starts, ends, axes, strict=True):
        dim = x.shape[axis] if x.shape is not None else None
        size = dim if isinstance(dim, int) else NO_LIMIT
        if not (start == 0 or start <= -size) or not (end >= NO_LIMIT or end >= size):
            return None
    return x


def _pad(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    pads = ints(node, "pads", 1)
    return argument(node, 0) if pads is not None and not any(pads) else None


def _tile(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    repeats = constant(argument(node, 1))
    return argument(node, 0) if repeats is not None and (repeats == 1).all() else None


def _resize(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    x = argument(node, 0)
    upsample = node.op_type == "Upsample" or version < 11
    scales = constant(argument(node, 1 if upsample else 2))
    factors = node.attributes.get_floats("scales") if scales is None else scales.tolist()
    same = bool(factors) and all(factor == 1 for factor in factors or ())
    if not upsample and argument(node, 3) is not None:
        same = _same_shape(node, version, options) is not None
    if same and node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Refused("Resize crops to its region of interest")
    return x if same else None


def _clip(node: ir.Node, version: int, options: EliminateNoOps) -> ir.Value | None:
    x = argument(node, 0)
    bounded = any(value is not None for value in node.inputs[1:]) or {"min", "max"} & set(node.attributes)
    if x is None or bounded:
        return None
    if options.special_values and (x.dtype is None or _is_float(x)):
        raise Refused("Clip without bounds turns infinities into the largest finite numbers")
    return x


Check = Callable[[ir.Node, int, EliminateNoOps], ir.Value | None]

CHECKS: dict[str, Check] = {
    "Identity": _data,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast,
    "Add": _neutral(0, commutes=True),
    "Sub": _neutral(0, commutes=False),
    "Mul": _neutral(1, commutes=True),
    "Div": _neutral(1, commutes=False),
    "Pow": _neutral(1, commutes=False),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": _tile,
    "Slice": _slice,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _resize,
    "Clip": _clip,
    "Concat": _only_input,
    "Sum": _only_input,
    "Mean": _only_input,
    "Max": _only_input,
    "Min": _only_input,
    "Split": _split,
}
