"""What has to be rewritten in a node when the definition of its operator changes: one function per change.

The key is the operator and the opset that changed it (onnx/defs/*/old.cc against its successor). A change without an
adapter only added types, optional inputs, or attributes whose default is the old behaviour; all changes up to opset 28
were read. ``onnx.version_converter`` is not used: it works on the serialized main graph, so that bodies keep their old
nodes, weights, ties and metadata do not survive, and a linear Upsample comes back with other coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, argument, constant, ints, unique

NEWEST = 28


class CannotAdaptError(Exception):
    """Why a node has no equivalent in the newer opset; nothing was changed."""


class Editor:
    """Edits one node: settings move from attributes to inputs, new nodes are named after it."""

    def __init__(self, node: ir.Node, taken: set[str]) -> None:
        self.node, self.taken = node, taken

    def put(self, index: int, name: str, array: np.ndarray) -> None:
        """Set the input at ``index`` to a constant."""
        assert self.node.graph is not None
        self.node.resize_inputs(max(index + 1, len(self.node.inputs)))
        self.node.replace_input_with(
            index, add_constant(self.node.graph, f"{self.node.name}/{name}", array, self.taken)
        )

    def move_ints(self, index: int, name: str) -> None:
        """Turn an attribute of integers into the int64 input at ``index``; without the attribute nothing happens."""
        values = ints(self.node, name, len(self.node.inputs))
        if self.node.attributes.pop(name, None) is not None:
            self.put(index, name, np.array(values, np.int64))

    def insert_before(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Value:
        """Insert a node before this one and return its result."""
        node = ir.node(op_type, inputs, attributes, name=unique(f"{self.node.name}/{op_type}", self.taken))
        node.outputs[0].name = unique(f"{self.node.name}/{op_type}", self.taken)
        node.metadata_props.update(self.node.metadata_props)
        assert self.node.graph is not None
        self.node.graph.insert_before(self.node, node)
        return node.outputs[0]

    def insert_after(self, op_type: str, *operands: ir.Value) -> None:
        """Insert ``op_type(result, *operands)`` behind this node; it takes over the result's name and uses."""
        old = self.node.outputs[0]
        node = ir.node(op_type, [None, *operands], name=unique(f"{self.node.name}/{op_type}", self.taken))
        new = node.outputs[0]
        name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, new.type, new.shape = name, old.type, old.shape
        new.metadata_props.update(old.metadata_props)
        old.name, old.shape = unique(f"{self.node.name}/{self.node.op_type}", self.taken), None
        node.replace_input_with(0, old)
        node.metadata_props.update(self.node.metadata_props)
        assert self.node.graph is not None
        self.node.graph.insert_after(self.node, node)


def _dtype(node: ir.Node) -> np.dtype[np.generic]:
    for value in (*node.inputs[:1], *node.outputs[:1]):
        if value is not None and value.dtype is not None:
            return value.dtype.numpy()
    raise CannotAdaptError("the element type of its input is not known")


def _batch_normalization_9(edit: Editor) -> None:
    if not edit.node.attributes.get_int("spatial", 1):
        raise CannotAdaptError("it normalizes every position for itself (spatial=0), which no newer opset does")
    edit.node.attributes.pop("spatial", None)


def _batch_normalization_14(edit: Editor) -> None:
    if any(output.name for output in edit.node.outputs[1:]):
        raise CannotAdaptError("it is in training mode, whose outputs changed")
    edit.node.resize_outputs(1)


def _clip_11(edit: Editor) -> None:
    for index, name in enumerate(("min", "max"), start=1):
        bound = edit.node.attributes.get_float(name, None)
        if bound is not None:
            edit.put(index, name, np.array(bound).astype(_dtype(edit.node)))
            edit.node.attributes.pop(name)


def _dft_20(edit: Editor) -> None:
    axis = edit.node.attributes.get_int("axis", 1)
    edit.node.attributes.pop("axis", None)
    edit.put(2, "axis", np.array(axis, np.int64))


def _dropout_10(edit: Editor) -> None:
    if len(edit.node.outputs) > 1 and edit.node.outputs[1].uses():
        raise CannotAdaptError("its mask is used, which became boolean")


def _dropout_12(edit: Editor) -> None:
    edit.node.attributes.pop("ratio", None)  # it only matters in training


def _grid_sample_20(edit: Editor) -> None:
    new = {"bilinear": "linear", "bicubic": "cubic"}.get(edit.node.attributes.get_string("mode", "bilinear") or "")
    if new is not None:
        edit.node.attributes.add(ir.AttrString("mode", new))


def _group_normalization_21(edit: Editor) -> None:
    """Give scale and bias, one number per group until 20, one number per channel."""
    shape = edit.node.inputs[0].shape if edit.node.inputs[0] is not None else None
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    arrays = [constant(argument(edit.node, index)) for index in (1, 2)]
    if not isinstance(channels, int) or any(array is None for array in arrays):
        raise CannotAdaptError("its channels are not known, or its scale and bias are not constant")
    for index, array in enumerate(arrays, start=1):
        assert array is not None
        edit.put(index, ("", "scale", "bias")[index], np.repeat(array, channels // array.size))


def _pad_11(edit: Editor) -> None:
    edit.move_ints(1, "pads")
    value = edit.node.attributes.pop("value", None)
    if value is not None and value.as_float():
        edit.put(2, "value", np.array(value.as_float()).astype(_dtype(edit.node)))


def _resize_11(edit: Editor) -> None:
    """Spell out what Resize-10 does: ``x / scale``, rounded down where it enlarges and up where it shrinks."""
    scales = constant(argument(edit.node, 1))
    if edit.node.attributes.get_string("mode", "nearest") == "nearest":
        if scales is None:
            raise CannotAdaptError("its scales are computed at run time, which decides how it rounds")
        if (scales < 1).any() and (scales > 1).any():
            raise CannotAdaptError("it enlarges one axis and shrinks another, which newer opsets cannot round alike")
        edit.node.attributes.add(ir.AttrString("nearest_mode", "ceil" if (scales < 1).any() else "floor"))
    edit.node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
    edit.node.resize_inputs(3)
    edit.node.replace_input_with(2, edit.node.inputs[1])
    edit.put(1, "roi", np.zeros(0, np.float32))


def _roi_align_16(edit: Editor) -> None:
    edit.node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))


def _scan_9(edit: Editor) -> None:
    raise CannotAdaptError("Scan took a batch axis until opset 8")


def _scatter_11(edit: Editor) -> None:
    edit.node.op_type = "ScatterElements"


def _slice_10(edit: Editor) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        edit.move_ints(index, name)


def _softmax_13(edit: Editor) -> None:
    """Until opset 12 it worked on ``[prod(shape[:axis]), prod(shape[axis:])]``, since then on one axis."""
    node, source = edit.node, edit.node.inputs[0]
    axis = node.attributes.get_int("axis", 1)
    shape = source.shape if source is not None else None
    if shape is not None:
        axis %= len(shape)
        long = [index for index in range(axis, len(shape)) if shape[index] != 1]
        if len(long) <= 1:
            node.attributes.add(ir.AttrInt64("axis", long[0] if long else axis))
            return
    original = edit.insert_before("Shape", [source])
    node.replace_input_with(0, edit.insert_before("Flatten", [source], axis=axis))
    node.attributes.add(ir.AttrInt64("axis", -1))
    edit.insert_after("Reshape", original)


def _split_18(edit: Editor) -> None:
    if argument(edit.node, 1) is None:
        edit.node.attributes.add(ir.AttrInt64("num_outputs", len(edit.node.outputs)))


def _top_k_10(edit: Editor) -> None:
    k = edit.node.attributes.pop("k", None)
    edit.put(1, "k", np.array([k.as_int() if k is not None else 0], np.int64))


def _upsample_9(edit: Editor) -> None:
    scales = edit.node.attributes.pop("scales", None)
    edit.put(1, "scales", np.array(scales.as_floats() if scales is not None else (), np.float32))


def _upsample_10(edit: Editor) -> None:
    edit.node.op_type = "Resize"


def _axes_to_input(edit: Editor) -> None:
    edit.move_ints(1, "axes")


def _split_to_input(edit: Editor) -> None:
    edit.move_ints(1, "split")


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
ADAPTERS: dict[tuple[str, int], Callable[[Editor], None]] = {
    ("BatchNormalization", 9): _batch_normalization_9,
    ("BatchNormalization", 14): _batch_normalization_14,
    ("Clip", 11): _clip_11,
    ("DFT", 20): _dft_20,
    ("Dropout", 10): _dropout_10,
    ("Dropout", 12): _dropout_12,
    ("GridSample", 20): _grid_sample_20,
    ("GroupNormalization", 21): _group_normalization_21,
    ("Hardmax", 13): _softmax_13,
    ("LogSoftmax", 13): _softmax_13,
    ("Pad", 11): _pad_11,
    ("ReduceSum", 13): _axes_to_input,
    **{(f"Reduce{name}", 18): _axes_to_input for name in REDUCTIONS},
    ("Resize", 11): _resize_11,
    ("RoiAlign", 16): _roi_align_16,
    ("Scan", 9): _scan_9,
    ("Scatter", 11): _scatter_11,
    ("Slice", 10): _slice_10,
    ("Softmax", 13): _softmax_13,
    ("Split", 13): _split_to_input,
    ("Split", 18): _split_18,
    ("Squeeze", 13): _axes_to_input,
    ("TopK", 10): _top_k_10,
    ("Unsqueeze", 13): _axes_to_input,
    ("Upsample", 9): _upsample_9,
    ("Upsample", 10): _upsample_10,
}
