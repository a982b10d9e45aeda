"""Write poolings that HTP refuses or computes otherwise in forms that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import onnx_ir as ir

from optkit import Context, Effect, Pass
from optkit.graph import static_shape
from optkit_targets.rewriting import RefusedError, Writer, apply


class LowerPools(Pass):
    """Write ``ceil_mode`` as pads, and a ``MaxPool`` over three axes as one over the first and one over the others.

    Where ``ceil_mode`` lets the last window reach past the end, HTP divides an average by another count, and returns a
    window too many where the last one would begin in the pads (onnxruntime-qnn 2.7). With the same reach as pads, which
    ``count_include_pad = 0`` does not count, it is right. It refuses ``MaxPool`` over three axes; the largest value of
    a box is the largest of its rows' largest.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-6)  # onnxruntime adds up in another order with ceil_mode

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite pool by pool, bodies included."""
        apply({"AveragePool": _lower, "MaxPool": _lower, "LpPool": _lower}, model, context)


@dataclass(frozen=True)
class _Window:
    """One axis: ``size`` of the input, ``reach`` from the first to the last element of a window, both included."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def reach(self) -> int:
        return (self.kernel - 1) * self.dilation + 1

    def count_up(self) -> int:
        """Return the number of windows in ``ceil_mode``: none begins in the pads behind the input."""
        count = ceil((self.size + self.before + self.after - self.reach) / self.stride) + 1
        return count - 1 if (count - 1) * self.stride >= self.size + self.before else count

    def missing(self) -> int:
        """Return how far the last of them reaches past the pads."""
        return max(0, (self.count_up() - 1) * self.stride + self.reach - self.size - self.before - self.after)


def _lower(node: ir.Node, writer: Writer) -> str | None:
    x = node.inputs[0]
    up = node.attributes.get_int("ceil_mode", 0)
    solid = node.op_type == "MaxPool" and len(node.attributes.get_ints("kernel_shape") or ()) == 3
    if x is None or not (up or solid):
        return None
    windows = _windows(node, x)
    message = _spell_out(node, windows) if up else None
    if not solid:
        return message
    if len(node.outputs) > 1 and node.outputs[1].name:
        raise RefusedError("its second output, the indices of the largest, is used")
    if any(window.dilation != 1 for window in windows):
        raise RefusedError("it is dilated, which HTP does not take over two axes either")
    return _split(writer, x, _windows(node, x))


def _windows(node: ir.Node, x: ir.Value) -> list[_Window]:
    shape = static_shape(x)
    kernel = node.attributes.get_ints("kernel_shape") or ()
    if shape is None or len(shape) != len(kernel) + 2:
        raise RefusedError("its input has no fixed shape")
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise RefusedError("auto_pad decides its pads")
    rank = len(kernel)
    strides = node.attributes.get_ints("strides") or (1,) * rank
    dilations = node.attributes.get_ints("dilations") or (1,) * rank
    pads = node.attributes.get_ints("pads") or (0,) * 2 * rank
    columns = zip(shape[2:], kernel, strides, dilations, pads[:rank], pads[rank:], strict=True)
    return [_Window(*column) for column in columns]


def _spell_out(node: ir.Node, windows: list[_Window]) -> str:
    """Put the reach of the last windows into the pads."""
    missing = [window.missing() for window in windows]
    padded = any(window.before or window.after for window in windows)
    if any(missing):
        if node.op_type == "LpPool":
            raise RefusedError("the last windows reach past the end")
        counted = node.attributes.get_int("count_include_pad", 0)
        if node.op_type == "AveragePool" and padded and counted:
            raise RefusedError("its pads count and the reach past the end does not: pads cannot say both")
        for window, more in zip(windows, missing, strict=True):
            if window.after + more >= window.reach:
                raise RefusedError(f"a window would lie in {window.after + more} pads alone")
        pads = [window.before for window in windows]
        pads += [window.after + more for window, more in zip(windows, missing, strict=True)]
        node.attributes.add(ir.AttrInt64s("pads", pads))
        node.attributes.pop("auto_pad", None)
        node.attributes.pop("count_include_pad", None)
    node.attributes.pop("ceil_mode")
    return "ceil_mode is written as pads" if any(missing) else "ceil_mode adds no window: removed"


def _split(writer: Writer, x: ir.Value, windows: list[_Window]) -> str:
    """``[N, C, D, H, W]``: pool D in ``[N, C, D, H * W]``, then H and W in ``[N, C * D', H, W]``."""
    batch, channels, *_ = static_shape(x) or []
    depth, height, width = windows
    out = [(w.size + w.before + w.after - w.reach) // w.stride + 1 for w in windows]
    flat = writer.add("Reshape", x, writer.ints("shape", [batch, channels, depth.size, height.size * width.size]))
    value = writer.add(
        "MaxPool",
        flat,
        kernel_shape=[depth.kernel, 1],
        strides=[depth.stride, 1],
        pads=[depth.before, 0, depth.after, 0],
    )
    value = writer.add("Reshape", value, writer.ints("shape", [batch, channels * out[0], height.size, width.size]))
    value = writer.add(
        "MaxPool",
        value,
        kernel_shape=[height.kernel, width.kernel],
        strides=[height.stride, width.stride],
        pads=[height.before, width.before, height.after, width.after],
    )
    writer.replace(writer.add("Reshape", value, writer.ints("shape", [batch, channels, *out])))
    return "split into one over the first axis and one over the other two"
