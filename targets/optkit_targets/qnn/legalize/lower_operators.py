"""Write operators that HTP does not take in terms of those that it takes."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit import Context, Effect, Pass
from optkit.graph import argument, constant, ints, prune, static_shape
from optkit_targets.rewriting import RefusedError, Rule, Writer, apply

AXES_ARE_INPUT = 13  # of ReduceSum; of the other reductions from 18 on


class LowerOperators(Pass):
    """Write operators that onnxruntime-qnn 2.7 leaves to the CPU in terms of those that it takes.

    * ``Celu``: ``a Elu(x / a)``; ``Softsign``: ``x / (1 + |x|)``
    * ``ReduceL1``, ``ReduceSumSquare``, ``ReduceLogSum``: what they are, around ``ReduceSum``
    * ``Pow`` with an integer exponent: a float one, or products where the base is an integer
    * ``Neg`` and ``Sign`` of integers: ``-1 x`` and ``Clip(x, -1, 1)``
    * ``Clip`` with computed bounds: ``Min(Max(x, low), high)``
    * ``Gemm`` with alpha or beta: scaled constants, or a product before it
    * ``LayerNormalization`` and ``RMSNormalization`` over several axes: over one, between reshapes
    * ``InstanceNormalization`` of three axes: of two, between reshapes
    * ``Trilu`` with a constant diagonal: ``Where`` with a constant mask
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-5)

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite node by node, bodies included."""
        apply(RULES, model, context)


def _scalar(writer: Writer, name: str, number: float, like: ir.Value) -> ir.Value:
    if like.dtype is None:
        raise RefusedError("the element type of its input is not known")
    return writer.constant(name, np.array(number).astype(like.dtype.numpy()))


def _input(node: ir.Node) -> ir.Value:
    value = argument(node, 0)
    if value is None:
        raise RefusedError("it has no input")
    return value


def _celu(node: ir.Node, writer: Writer) -> str:
    """``max(0, x) + min(0, a (exp(x / a) - 1))``; Elu is the same with ``a = 1``."""
    x, alpha = _input(node), node.attributes.get_float("alpha", 1.0)
    if alpha == 1.0:
        writer.replace(writer.add("Elu", x))
        return "written as Elu"
    scale = _scalar(writer, "alpha", alpha or 0.0, x)
    writer.replace(writer.add("Mul", writer.add("Elu", writer.add("Div", x, scale)), scale))
    return "written as alpha * Elu(x / alpha)"


def _softsign(node: ir.Node, writer: Writer) -> str:
    x = _input(node)
    writer.replace(writer.add("Div", x, writer.add("Add", writer.add("Abs", x), _scalar(writer, "one", 1, x))))
    return "written as x / (1 + |x|)"


def _reduce(node: ir.Node, writer: Writer) -> str:
    x = _input(node)
    if node.attributes.get_int("noop_with_empty_axes", 0):
        raise RefusedError("without axes it is no reduction (noop_with_empty_axes)")
    axes = ints(node, "axes", 1, [])
    if axes is None:
        raise RefusedError("its axes are computed at run time")
    inner = {"ReduceL1": lambda: writer.add("Abs", x), "ReduceSumSquare": lambda: writer.add("Mul", x, x)}
    value = inner[node.op_type]() if node.op_type in inner else x
    keepdims = node.attributes.get_int("keepdims", 1) or 0
    if not axes:
        total = writer.add("ReduceSum", value, keepdims=keepdims)
    elif writer.version >= AXES_ARE_INPUT:
        total = writer.add("ReduceSum", value, writer.ints("axes", axes), keepdims=keepdims)
    else:
        total = writer.add("ReduceSum", value, axes=axes, keepdims=keepdims)
    writer.replace(writer.add("Log", total) if node.op_type == "ReduceLogSum" else total)
    return "written around ReduceSum"


def _pow(node: ir.Node, writer: Writer) -> str | None:
    x, exponent = _input(node), argument(node, 1)
    if x.dtype is None or exponent is None or exponent.dtype is None:
        raise RefusedError("the element type of its input is not known")
    if exponent.dtype.is_floating_point() and x.dtype.is_floating_point():
        return None
    power = constant(exponent)
    if power is None:
        raise RefusedError("its exponent is computed at run time")
    if x.dtype.is_floating_point():
        node.replace_input_with(1, writer.constant("exponent", power.astype(x.dtype.numpy())))
        prune([exponent])
        return f"its exponent became {x.dtype.name.lower()}, the type of its base"
    if power.size != 1 or power.item() not in (2, 3) or power.ndim > len(x.shape or ()):
        raise RefusedError("an integer to a power other than 2 or 3")
    square = writer.add("Mul", x, x)
    writer.replace(square if power.item() == 2 else writer.add("Mul", square, x))
    return "written as a product"


def _neg(node: ir.Node, writer: Writer) -> str | None:
    x = _input(node)
    if x.dtype is None or x.dtype.is_floating_point():
        return None
    writer.replace(writer.add("Mul", x, _scalar(writer, "minus_one", -1, x)))
    return "written as a product with -1"


def _sign(node: ir.Node, writer: Writer) -> str | None:
    x = _input(node)
    if x.dtype is None or x.dtype.is_floating_point():
        return None
    if not x.dtype.is_signed() or writer.version < 12:
        raise RefusedError(f"Clip takes no {x.dtype.name.lower()} in opset {writer.version}, or it has no sign")
    writer.replace(writer.add("Clip", x, _scalar(writer, "low", -1, x), _scalar(writer, "high", 1, x)))
    return "written as Clip(x, -1, 1)"


def _clip(node: ir.Node, writer: Writer) -> str | None:
    x, low, high = _input(node), argument(node, 1), argument(node, 2)
    if (low is None or constant(low) is not None) and (high is None or constant(high) is not None):
        return None
    value = x if low is None else writer.add("Max", x, low)
    writer.replace(value if high is None else writer.add("Min", value, high))
    return "its computed bounds are written as Max and Min"


def _gemm(node: ir.Node, writer: Writer) -> str | None:
    factors = [node.attributes.get_float(name, 1.0) or 0.0 for name in ("alpha", "beta")]
    if factors == [1.0, 1.0]:
        return None
    weight, bias = argument(node, 1), argument(node, 2)
    alpha, beta = factors
    old = [weight, bias]
    if alpha != 1.0:
        array = constant(weight)
        if array is not None:
            node.replace_input_with(1, writer.constant("weight", (array * array.dtype.type(alpha)).astype(array.dtype)))
        else:
            x = _input(node)
            node.replace_input_with(0, writer.add("Mul", x, _scalar(writer, "alpha", alpha, x)))
    if beta != 1.0 and bias is not None:
        array = constant(bias)
        if array is not None:
            node.replace_input_with(2, writer.constant("bias", (array * array.dtype.type(beta)).astype(array.dtype)))
        else:
            node.replace_input_with(2, writer.add("Mul", bias, _scalar(writer, "beta", beta, bias)))
    node.attributes.pop("alpha", None)
    node.attributes.pop("beta", None)
    prune(old)
    return f"alpha {alpha:g} and beta {beta:g} are multiplied into its operands"


def _normalization(node: ir.Node, writer: Writer) -> str | None:
    x = _input(node)
    axis = node.attributes.get_int("axis", -1) or 0
    if x.shape is not None and axis in (-1, len(x.shape) - 1):
        return None
    shape = static_shape(x)
    if shape is None:
        raise RefusedError("its input has no fixed shape")
    if any(output.name and (output.uses() or output.is_graph_output()) for output in node.outputs[1:]):
        raise RefusedError("its mean or deviation is used too")
    inner = shape[axis:]
    operands = []
    for name, value in zip(("scale", "bias"), node.inputs[1:], strict=False):
        array = constant(value)
        if value is None or array is None:
            raise RefusedError("its scale or bias is computed at run time")
        operands.append(writer.constant(name, np.broadcast_to(array, inner).reshape(-1).copy()))
    flat = writer.add("Reshape", x, writer.ints("shape", [*shape[:axis], prod(inner)]))
    epsilon = node.attributes.get_float("epsilon", 1e-5) or 0.0
    normal = writer.add(node.op_type, flat, *operands, axis=-1, epsilon=epsilon)
    writer.replace(writer.add("Reshape", normal, writer.ints("shape", shape)))
    return f"over one axis in place of {len(inner)}"


def _instance_normalization(node: ir.Node, writer: Writer) -> str | None:
    x = _input(node)
    if x.shape is not None and len(x.shape) <= 4:
        return None
    shape = static_shape(x)
    if shape is None:
        raise RefusedError("its input has no fixed shape")
    flat = writer.add("Reshape", x, writer.ints("shape", [*shape[:2], prod(shape[2:-1]), shape[-1]]))
    epsilon = node.attributes.get_float("epsilon", 1e-5) or 0.0
    normal = writer.add("InstanceNormalization", flat, *node.inputs[1:], epsilon=epsilon)
    writer.replace(writer.add("Reshape", normal, writer.ints("shape", shape)))
    return "over two axes in place of more"


def _trilu(node: ir.Node, writer: Writer) -> str:
    x, k = _input(node), argument(node, 1)
    shape, diagonal = static_shape(x), constant(k)
    if shape is None or (k is not None and diagonal is None):
        raise RefusedError("its input has no fixed shape, or its diagonal is computed at run time")
    offset = 0 if diagonal is None else int(diagonal.item())
    upper = node.attributes.get_int("upper", 1)
    mask = np.triu(np.ones(shape[-2:]), offset) if upper else np.tril(np.ones(shape[-2:]), offset)
    writer.replace(
        writer.add("Where", writer.constant("mask", mask.astype(bool)), x, _scalar(writer, "zero", 0, x), dtype=x.dtype)
    )
    return "written as Where with a constant mask"


RULES: dict[str, Rule] = {
    "Celu": _celu,
    "Clip": _clip,
    "Gemm": _gemm,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _normalization,
    "Neg": _neg,
    "Pow": _pow,
    "RMSNormalization": _normalization,
    "ReduceL1": _reduce,
    "ReduceLogSum": _reduce,
    "ReduceSumSquare": _reduce,
    "Sign": _sign,
    "Softsign": _softsign,
    "Trilu": _trilu,
}
