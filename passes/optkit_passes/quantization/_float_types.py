"""Changing the float type of values, tensors and attributes, and the Casts between types; for both directions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import unique

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16

# Operators of these domains take float32 wherever they take float16.
TYPED_BY_INPUT = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
# Attributes that name the element type of a result.
RESULT_ATTRIBUTES = ("to", "dtype", "output_dtype")
# Attributes that name an element type; all but the above one that is only computed in.
DTYPE_ATTRIBUTES = (*RESULT_ATTRIBUTES, "stash_type", "softmax_precision", "precision")


def retyped(kind: ir.TypeProtocol | None, old: ir.DataType, new: ir.DataType) -> ir.TypeProtocol | None:
    """Return the type with ``new`` in the place of ``old``, inside sequences too; the same object where there is none.

    Types are never changed in place: copies of a model share them.
    """
    if isinstance(kind, ir.TensorType | ir.SparseTensorType):
        return type(kind)(new) if kind.dtype == old else kind
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        inner = retyped(kind.elem_type, old, new)
        return kind if inner is kind.elem_type or inner is None else type(kind)(inner)
    return kind


def holds(value: ir.Value, dtype: ir.DataType) -> bool:
    """Whether the value is a tensor of this type, or a sequence or option of such."""
    return retyped(value.type, dtype, ir.DataType.UNDEFINED) is not value.type


class Tensors:
    """Copies of tensors in another float type; a tensor under several names is copied once, so that ties stay ties."""

    def __init__(self, old: ir.DataType, new: ir.DataType) -> None:
        self.old, self.new = old, new
        self._copies: dict[int, tuple[ir.TensorProtocol, ir.TensorProtocol]] = {}

    def copy(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Return the copy; the tensor itself where it has another type. Values beyond the type's range are clamped."""
        if tensor.dtype != self.old:
            return tensor
        if id(tensor) not in self._copies:  # the original is held: its id must not be given to another
            copy = ir.Tensor(rounded(tensor.numpy(), self.new), dtype=self.new, name=tensor.name)
            self._copies[id(tensor)] = tensor, copy
        return self._copies[id(tensor)][1]

    def retype_attributes(self, node: ir.Node, names: tuple[str, ...]) -> None:
        """Change the tensors and types among a node's attributes, and element types in the attributes ``names``."""
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                node.attributes.add(ir.AttrTensor(name, self.copy(attribute.as_tensor())))
            elif attribute.type == ir.AttributeType.TYPE_PROTO:
                kind = attribute.value
                changed = ir.TypeAndShape(retyped(kind.type, self.old, self.new), kind.shape)
                node.attributes.add(ir.AttrTypeProto(name, changed))
            elif name in names and attribute.value == self.old.value:
                node.attributes.add(ir.AttrInt64(name, self.new.value))


def rounded(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """Return float values in another float type, rounded to nearest; finite values stay finite: they are clamped."""
    kind = dtype.numpy()
    limit = np.float32(largest(dtype))
    clamped = np.where(np.isinf(array), array, np.clip(array, -limit, limit))  # NaN stays NaN
    return np.asarray(clamped.astype(kind)).reshape(array.shape)


def largest(dtype: ir.DataType) -> float:
    """Return the largest finite value of a float type: 65504 for float16, 3.39e38 for bfloat16."""
    return float(dtype.max)


def new_cast(source: ir.Value | None, dtype: ir.DataType, name: str, taken: set[str]) -> tuple[ir.Node, ir.Value]:
    """Return a new Cast, in no graph yet, and its result; ``source`` may follow later. Named after the value ``name``.

    Args:
        source: What it reads.
        dtype: The type of its result.
        name: What both are named after.
        taken: Names in use; the new ones are added.
    """
    node = ir.node("Cast", [source], {"to": dtype.value}, name=unique(f"{name}/Cast", taken))
    result = node.outputs[0]
    result.name = unique(f"{name}/{dtype.name.lower()}", taken)
    result.type = ir.TensorType(dtype)
    result.shape = None if source is None or source.shape is None else source.shape.copy()
    return node, result


def take_output(graph: ir.Graph, value: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be the graph output that ``value`` was, under its name and with its metadata."""
    value.name, new.name = new.name, value.name
    new.metadata_props.update(value.metadata_props)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = new
