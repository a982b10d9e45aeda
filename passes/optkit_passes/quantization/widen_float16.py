"""Compute in float32 what a model computes in float16, where the target has no float16 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from optkit.graph import add_constant, cannot_forward, forward, is_constant, names, remove, unique
from optkit.pipeline import LOSSY, Context, Effect, Pass

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
# Operators of these domains take float32 wherever they take float16.
TYPED_BY_INPUT = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
# Attributes that name an element type.
DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision", "precision")


class WidenFloat16(Pass):
    """Turn float16 values, weights and attributes into float32, bodies included, for a target without float16.

    The model's inputs and outputs keep their type: a Cast stands behind each float16 input and before each float16
    output. Operators of custom domains keep their types too, between Casts.

    ``lossy``: a float16 model rounds every result to 11 bits and overflows at 65504; the widened one does neither, so
    it agrees with the original to about 1e-3, and not at all where the original overflows.
    """

    effect: ClassVar[Effect] = LOSSY

    def run(self, model: ir.Model, context: Context) -> None:
        """Widen the whole model, or say why not."""
        where = model.graph.name or "model"
        if not any(_computes_float16(node) for node in model.graph.all_nodes()):
            return
        if context.target is None:
            context.missed(where, "it computes float16, and no target says whether it can")
        elif "float16" in context.target.dtypes:
            context.missed(where, f"target '{context.target.name}' computes float16")
        elif reason := _objection(model):
            context.missed(where, reason)
        else:
            _Widening(model, context).run()


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _computes_float16(node: ir.Node) -> bool:
    """Return whether a standard operator works on float16; a Cast to or from it only stores."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return node.domain in TYPED_BY_INPUT and node.op_type != "Cast" and any(map(_holds_float16, values))


def _holds_float16(value: ir.Value) -> bool:
    return _widened(value.type) is not value.type


def _widened(kind: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    """Return the type with float32 in the place of float16; the same object where there is none."""
    if isinstance(kind, ir.TensorType | ir.SparseTensorType):
        return type(kind)(FLOAT) if kind.dtype == FLOAT16 else kind
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        inner = _widened(kind.elem_type)
        return kind if inner is kind.elem_type or inner is None else type(kind)(inner)
    return kind


def _objection(model: ir.Model) -> str:
    for outer in [*model.graph.inputs, *model.graph.outputs]:
        if _holds_float16(outer) and not isinstance(outer.type, ir.TensorType):
            return f"'{outer.name}' is not a plain tensor of float16, so no Cast can stand for it"
    for node in model.graph.all_nodes():
        values = (*node.inputs, *node.outputs) if node.domain not in TYPED_BY_INPUT else ()
        for value in values:
            if value is not None and value.name and value.type is None:
                return f"the type of '{value.name}' at {node.domain}::{node.op_type} is not known"
    return ""


class _Widening:
    """One run: the values and nodes that stay float16, and the tensors already widened (tied weights stay tied)."""

    def __init__(self, model: ir.Model, context: Context) -> None:
        self.model, self.context, self.taken = model, context, names(model)
        self.kept: set[ir.Value] = set()
        self.casts: set[ir.Node] = set()
        self.tensors: dict[int, ir.TensorProtocol] = {}

    def run(self) -> None:
        for node in list(self.model.graph.all_nodes()):
            if node.domain not in TYPED_BY_INPUT:
                self._enclose(node)
        self._inputs()
        self._outputs()
        count = 0
        for value in _values(self.model):
            if value not in self.kept and _holds_float16(value):
                value.type = _widened(value.type)
                count += 1
                if value.const_value is not None:
                    value.const_value = self._tensor(value.const_value)
        for node in list(self.model.graph.all_nodes()):
            if node.domain in TYPED_BY_INPUT and node not in self.casts:
                self._attributes(node)
        self.context.applied(self.model.graph.name or "model", f"widened {count} float16 values to float32")
        for node in list(self.model.graph.all_nodes()):
            self._drop_idle_cast(node)

    def _cast(self, source: ir.Value | None, dtype: ir.DataType, name: str) -> ir.Value:
        """Return the result of a new Cast, in no graph yet; ``source`` may follow later."""
        node = ir.node("Cast", [source], {"to": dtype.value}, name=unique(f"{name}/Cast", self.taken))
        node.outputs[0].name = unique(f"{name}/{dtype.name.lower()}", self.taken)
        node.outputs[0].type = ir.TensorType(dtype)
        self.casts.add(node)
        if dtype == FLOAT16:
            self.kept.add(node.outputs[0])
        return node.outputs[0]

    def _widen_uses(self, value: ir.Value) -> ir.Node:
        """Let every node that takes a value which stays float16 take a float32 copy of it; return the new Cast."""
        self.kept.add(value)
        wide = self._cast(None, FLOAT, value.name or "")
        wide.shape = value.shape
        for user, index in list(value.uses()):
            user.replace_input_with(index, wide)
        cast = wide.producer()
        assert cast is not None
        cast.replace_input_with(0, value)
        return cast

    def _inputs(self) -> None:
        graph = self.model.graph
        first = next(iter(graph), None)
        for value in graph.inputs:
            if value.dtype == FLOAT16 and first is not None:
                graph.insert_before(first, self._widen_uses(value))

    def _outputs(self) -> None:
        graph = self.model.graph
        for value in dict.fromkeys(graph.outputs):
            if value.dtype != FLOAT16 or value in self.kept:
                continue
            if is_constant(value) and value.const_value is not None:
                self.kept.add(value)  # the constant is returned as it is, and used as a copy
                wide = add_constant(graph, f"{value.name}/float32", self._tensor(value.const_value).numpy(), self.taken)
                for user, index in list(value.uses()):
                    user.replace_input_with(index, wide)
                continue
            narrow = self._cast(value, FLOAT16, value.name or "")
            narrow.shape, producer = value.shape, value.producer()
            assert producer is not None
            value.name, narrow.name = narrow.name, value.name
            narrow.metadata_props.update(value.metadata_props)
            for index, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[index] = narrow
            cast = narrow.producer()
            assert cast is not None
            graph.append(cast)

    def _enclose(self, node: ir.Node) -> None:
        """Put Casts around an operator that may know no other type than float16."""
        graph = node.graph
        assert graph is not None
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == FLOAT16 and value not in self.kept:
                narrow = self._cast(value, FLOAT16, f"{node.name}/{index}")
                narrow.shape = value.shape
                node.replace_input_with(index, narrow)
                graph.insert_before(node, narrow.producer())  # type: ignore[arg-type]  # a Cast computes it
        for value in node.outputs:
            if value.dtype == FLOAT16:
                graph.insert_after(node, self._widen_uses(value))

    def _tensor(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if tensor.dtype != FLOAT16:
            return tensor
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)
        return self.tensors[id(tensor)]

    def _attributes(self, node: ir.Node) -> None:
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                node.attributes.add(ir.AttrTensor(name, self._tensor(attribute.as_tensor())))
            elif attribute.type == ir.AttributeType.TYPE_PROTO:
                kind = attribute.value
                widened = ir.TypeAndShape(_widened(kind.type), kind.shape)
                node.attributes.add(ir.AttrTypeProto(name, widened))
            elif name in DTYPE_ATTRIBUTES and attribute.value == FLOAT16.value:
                node.attributes.add(ir.AttrInt64(name, FLOAT.value))

    def _drop_idle_cast(self, node: ir.Node) -> None:
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Cast" or node.domain or source is None or node in self.casts or source.dtype != FLOAT:
            return
        if node.attributes.get_int("to", 0) == FLOAT.value and not cannot_forward(node.outputs[0], source):
            forward(node.outputs[0], source)
            remove(node)
            self.context.applied(node, "a Cast to float16 has become one from float32 to float32")
