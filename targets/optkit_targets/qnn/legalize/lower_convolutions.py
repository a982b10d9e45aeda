"""Write depthwise convolutions that HTP does not take as one that it takes."""

from __future__ import annotations

import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import argument, static_shape
from optkit_targets.rewriting import RefusedError, Writer, apply


class LowerConvolutions(Pass):
    """A depthwise ``Conv`` with strides and dilations becomes one with dilations, of which every n-th pixel is taken.

    The provider asks onnxruntime for the layout of such a node, then refuses it, and the whole session fails
    (onnxruntime-qnn 2.7: "inserted using the NHWC format ... but was not selected"). The product of the strides is what
    the MACs grow by; those of a depthwise convolution are few.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite convolution by convolution, bodies included."""
        apply({"Conv": _lower}, model, context)


def _lower(node: ir.Node, writer: Writer) -> str | None:
    x, weight = argument(node, 0), argument(node, 1)
    strides, dilations = node.attributes.get_ints("strides") or (), node.attributes.get_ints("dilations") or ()
    group = node.attributes.get_int("group", 1) or 1
    if group == 1 or all(stride == 1 for stride in strides) or all(dilation == 1 for dilation in dilations):
        return None
    into, kernel = static_shape(x), static_shape(weight)
    if into is None or kernel is None:
        raise RefusedError("its input or weight has no fixed shape")
    if group != into[1]:
        return None
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise RefusedError("auto_pad depends on the strides")
    axes = range(2, len(into))
    pads = node.attributes.get_ints("pads") or [0] * 2 * len(axes)
    everywhere = writer.add(
        "Conv", *node.inputs, group=group, kernel_shape=kernel[2:], dilations=list(dilations), pads=list(pads)
    )
    bounds = ("starts", [0] * len(axes)), ("ends", [2**31 - 1] * len(axes)), ("axes", list(axes)), ("steps", strides)
    writer.replace(writer.add("Slice", everywhere, *(writer.ints(name, values) for name, values in bounds)))
    return f"computed at every pixel, of which strides {list(strides)} are taken"
