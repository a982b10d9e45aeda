"""Write nearest-neighbour resizes in the one form that HTP rounds as ONNX says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit import Context, Pass
from optkit.errors import InputError
from optkit.graph import argument, constant, static_shape
from optkit.session import Session
from optkit_targets.rewriting import RefusedError, Writer, apply

# (coordinate_transformation_mode, nearest_mode) that HTP computes right at scales 1/2, 1.5, 2 and 3.
RIGHT = {
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_ceil"),
    ("align_corners", "round_prefer_floor"),
    ("align_corners", "round_prefer_ceil"),
}


class LowerResizes(Pass):
    """Write ``Resize`` of mode ``nearest`` as ``asymmetric`` and ``floor``, or as one ``Gather`` per axis.

    Of the 16 combinations of coordinate and rounding mode HTP refuses two and returns pixels beside the right ones for
    ten, at some scales at least (onnxruntime-qnn 2.7; -3 to 0 dB). Where each pixel is repeated, or each k-th taken,
    all of them may mean the same as ``asymmetric`` with ``floor``, which is right; elsewhere constant indices say which
    pixel is meant. onnxruntime is asked for these, on a ramp.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite resize by resize, bodies included."""
        apply({"Resize": _lower}, model, context)


def _lower(node: ir.Node, writer: Writer) -> str | None:
    x, y = argument(node, 0), node.outputs[0]
    mode = node.attributes.get_string("mode", "nearest")
    if x is None or mode not in ("nearest", "linear"):
        if node.attributes.get_int("exclude_outside", 0):
            raise RefusedError("exclude_outside: HTP weighs pixels outside of the image all the same")
        return None
    into, out = static_shape(x), static_shape(y)
    if mode == "linear":
        if into is not None and out is not None and sum(a != b for a, b in zip(into, out, strict=True)) > 2:
            raise RefusedError("HTP computes a linear resize of three axes wrong")
        return None
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") or ""
    if (coordinates, node.attributes.get_string("nearest_mode", "round_prefer_floor")) in RIGHT:
        return None
    if coordinates == "tf_crop_and_resize":
        raise RefusedError("it crops too (tf_crop_and_resize)")
    if into is None or out is None or 0 in into:
        raise RefusedError("its input or output has no fixed shape")
    if all(constant(argument(node, index)) is None for index in (2, 3)):
        raise RefusedError("its scales are computed at run time")
    sources = _sources(node, into, out)
    if all(_is_even(source, into[axis]) for axis, source in sources.items()):
        node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
        node.attributes.add(ir.AttrString("nearest_mode", "floor"))
        return "written as asymmetric, floor: it takes the same pixels"
    value = x
    for axis, source in sources.items():
        if not np.array_equal(source, np.arange(into[axis])):
            value = writer.add("Gather", value, writer.constant("indices", source.astype(np.int64)), axis=axis)
    if value is x:
        value = writer.add("Identity", x)
    writer.replace(value)
    return "written as Gather with the index of each pixel"


def _is_even(source: np.ndarray, size: int) -> bool:
    """Return whether ``floor(i / scale)`` are the indices, with a scale that floats divide by exactly enough."""
    longer, shorter = max(len(source), size), min(len(source), size)
    return longer % shorter == 0 and np.array_equal(source, np.arange(len(source)) * size // len(source))


def _sources(node: ir.Node, into: list[int], out: list[int]) -> dict[int, np.ndarray]:
    """Return the index that each position of each resized axis is read from.

    onnxruntime resizes a ramp along that axis, all others cut to one element.
    """
    found = {}
    for axis in (axis for axis, (a, b) in enumerate(zip(into, out, strict=True)) if a != b):
        shape = [size if place == axis else 1 for place, size in enumerate(into)]
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        kept = {key: value for key, value in node.attributes.items() if key not in ("axes", "keep_aspect_ratio_policy")}
        values = {"scales": _on_axis(node, axis, len(into)), "sizes": None}
        if values["scales"] is None:
            values["sizes"] = np.array([out[place] if place == axis else 1 for place in range(len(into))], np.int64)
        operands = [
            None
            if array is None
            else ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType(kind)),
                shape=ir.Shape([len(into)]),
                const_value=ir.tensor(array, name=name),
            )
            for (name, array), kind in zip(values.items(), (ir.DataType.FLOAT, ir.DataType.INT64), strict=True)
        ]
        copy = ir.Node("", "Resize", [x, None, *operands], list(kept.values()), name="resize")
        copy.outputs[0].name = "y"
        graph = ir.Graph(
            [x],
            copy.outputs,
            nodes=[copy],
            initializers=[value for value in operands if value is not None],
            opset_imports={"": (node.graph.opset_imports.get("") if node.graph is not None else None) or 19},
            name="ramp",
        )
        ramp = np.arange(into[axis], dtype=np.float32).reshape(shape)
        try:
            found[axis] = Session(ir.Model(graph, ir_version=8)).run({"x": ramp})["y"].ravel().astype(np.int64)
        except InputError as error:
            raise RefusedError(f"onnxruntime does not resize it: {error.what}") from error
    return found


def _on_axis(node: ir.Node, axis: int, rank: int) -> np.ndarray | None:
    """Return the scales with all but one axis at 1; None where sizes are given instead."""
    scales = constant(argument(node, 2))
    if scales is None or scales.size == 0:
        return None
    axes = [each % rank for each in node.attributes.get_ints("axes") or range(rank)]
    wanted = np.ones(rank, np.float32)
    wanted[axis] = scales.ravel()[axes.index(axis)]
    return wanted
