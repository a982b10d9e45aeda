"""Fold zero padding into the convolution or pooling that takes its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, remove, static_shape
from optkit.pipeline import EXACT, Context, Effect, Pass
from optkit_passes.fusion.padding import Padding, padding


class FoldPad(Pass):
    """Fold a Pad of the spatial axes into the ``pads`` of the operators that take its result.

    ``Conv(Pad(x, p), pads=q)  ->  Conv(x, pads=p + q)`` where the Pad adds zeros. The same for AveragePool where it
    counts the padding (``count_include_pad``), and for MaxPool where the Pad adds the lowest value there is. A Pad
    with several users is folded into all of them or none.
    """

    effect: ClassVar[Effect] = EXACT

    def run(self, model: ir.Model, context: Context) -> None:
        """Fold every Pad, bodies included."""
        for graph in list(model.graphs()):
            for pad in list(graph):
                if pad.domain or pad.op_type != "Pad" or pad.graph is None:
                    continue
                reason = _objection(pad)
                if reason:
                    context.missed(pad, reason)
                    continue
                read, source = padding(pad), pad.inputs[0]
                assert isinstance(read, Padding)
                assert source is not None
                users = [use.node for use in pad.outputs[0].uses()]
                for user in users:
                    _widen(user, read)
                pad.outputs[0].replace_all_uses_with(source)
                remove(pad)
                context.applied(pad, "folded into " + ", ".join(f"{user.op_type} '{user.name}'" for user in users))


def _objection(pad: ir.Node) -> str:
    """Return why the Pad must stay, or nothing."""
    read, output = padding(pad), pad.outputs[0]
    if isinstance(read, str):
        return read
    if read.mode != "constant":
        return f"it pads in mode '{read.mode}'"
    if any(amount < 0 for amount in [*read.begins, *read.ends]):
        return "it crops"
    if any([*read.begins[:2], *read.ends[:2]]):
        return "it pads the batch or the channels"
    if output.is_graph_output():
        return "its result is an output of the graph"
    if not output.uses():
        return "its result is not used"
    return next((reason for user, index in output.uses() if (reason := _user_objection(user, index, read))), "")


def _user_objection(user: ir.Node, index: int, read: Padding) -> str:
    name = f"{user.op_type} '{user.name}'"
    if user.domain or index != 0 or user.op_type not in ("Conv", "AveragePool", "MaxPool"):
        return f"{user.op_type} takes its result, which has no padding of its own to widen"
    own = _own_pads(user)
    if own is None:
        return f"the padding of {name} depends on a shape that is not known (auto_pad)"
    if user.op_type == "Conv":
        return f"it adds {read.value:g} where {name} pads with 0" if read.value else ""
    if user.attributes.get_int("ceil_mode", 0):
        return f"{name} rounds its output size up, which counts padding differently"
    kernel = user.attributes.get_ints("kernel_shape", ())
    begins, ends = (np.add(a, b) for a, b in zip(_halves(own), _spatial(read), strict=True))
    if any(amount >= size for size, *sides in zip(kernel, begins, ends, strict=True) for amount in sides):
        return f"the padding would be as wide as the kernel of {name}"
    if user.op_type == "AveragePool":
        if any(own) and not user.attributes.get_int("count_include_pad", 0):
            return f"{name} does not count the padding of its own"
        return f"it adds {read.value:g} where {name} pads with 0" if read.value else ""
    if len([output for output in user.outputs if output.name]) > 1:
        return f"the indices that {name} returns count the padding"
    dtype = user.outputs[0].dtype or ir.DataType.FLOAT
    lowest = -np.inf if dtype.is_floating_point() else np.iinfo(dtype.numpy()).min
    return "" if read.value == lowest else f"it adds {read.value:g} where {name} pads with the lowest value"


def _widen(user: ir.Node, read: Padding) -> None:
    own = _own_pads(user)
    assert own is not None
    begins, ends = (np.add(a, b).tolist() for a, b in zip(_halves(own), _spatial(read), strict=True))
    user.attributes.pop("auto_pad", None)
    user.attributes.add(ir.AttrInt64s("pads", [*begins, *ends]))
    if user.op_type == "AveragePool":
        user.attributes.add(ir.AttrInt64("count_include_pad", 1))


def _halves(pads: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return pads[: len(pads) // 2], pads[len(pads) // 2 :]


def _spatial(read: Padding) -> tuple[Sequence[int], Sequence[int]]:
    return read.begins[2:], read.ends[2:]


def _own_pads(user: ir.Node) -> list[int] | None:
    """Return begin and end padding of a convolution or pooling; None where ``auto_pad`` needs an unknown shape.

    ``SAME`` makes ``ceil(size / stride)`` outputs (ONNX Conv): the total padding is
    ``(outputs - 1) * stride + (kernel - 1) * dilation + 1 - size``, its odd element at the end for ``SAME_UPPER``.
    """
    weight = argument(user, 1)
    kernel = list(user.attributes.get_ints("kernel_shape", ()) or ())
    if not kernel and weight is not None and weight.shape is not None:
        kernel = [size for size in weight.shape[2:] if isinstance(size, int)]
    mode = user.attributes.get_string("auto_pad", "NOTSET") or "NOTSET"
    shape = static_shape(user.inputs[0])
    if mode == "NOTSET" and "pads" in user.attributes:
        return list(user.attributes.get_ints("pads", ()))
    if mode in ("NOTSET", "VALID"):
        rank = len(kernel) or (len(shape) - 2 if shape else 0)
        return [0] * (2 * rank) if rank else None
    if shape is None or len(kernel) != len(shape) - 2:
        return None
    ones = [1] * len(kernel)
    strides = user.attributes.get_ints("strides", ones) or ones
    dilations = user.attributes.get_ints("dilations", ones) or ones
    totals = [
        max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        for size, k, stride, dilation in zip(shape[2:], kernel, strides, dilations, strict=True)
    ]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]
