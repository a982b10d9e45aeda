"""Compute in float32 what a model computes in float16, where the target has no float16 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from optkit.graph import add_constant, cannot_forward, forward, is_constant, names, remove
from optkit.pipeline import LOSSY, Context, Effect, Pass

from ._float_types import (
    DTYPE_ATTRIBUTES,
    FLOAT,
    FLOAT16,
    TYPED_BY_INPUT,
    Tensors,
    holds,
    new_cast,
    retyped,
    take_output,
)


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
    return holds(value, FLOAT16)


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
        self.tensors = Tensors(FLOAT16, FLOAT)

    def run(self) -> None:
        for node in list(self.model.graph.all_nodes()):
            if node.domain not in TYPED_BY_INPUT:
                self._enclose(node)
        self._inputs()
        self._outputs()
        count = 0
        for value in _values(self.model):
            if value not in self.kept and _holds_float16(value):
                value.type = retyped(value.type, FLOAT16, FLOAT)
                count += 1
                if value.const_value is not None:
                    value.const_value = self.tensors.copy(value.const_value)
        for node in list(self.model.graph.all_nodes()):
            if node.domain in TYPED_BY_INPUT and node not in self.casts:
                self.tensors.retype_attributes(node, DTYPE_ATTRIBUTES)
        self.context.applied(self.model.graph.name or "model", f"widened {count} float16 values to float32")
        for node in list(self.model.graph.all_nodes()):
            self._drop_idle_cast(node)

    def _cast(self, source: ir.Value | None, dtype: ir.DataType, name: str) -> ir.Value:
        """Return the result of a new Cast, in no graph yet; ``source`` may follow later."""
        node, result = new_cast(source, dtype, name, self.taken)
        self.casts.add(node)
        if dtype == FLOAT16:
            self.kept.add(result)
        return result

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
                wide = add_constant(
                    graph, f"{value.name}/float32", self.tensors.copy(value.const_value).numpy(), self.taken
                )
                for user, index in list(value.uses()):
                    user.replace_input_with(index, wide)
                continue
            narrow = self._cast(value, FLOAT16, value.name or "")
            narrow.shape, producer = value.shape, value.producer()
            assert producer is not None
            take_output(graph, value, narrow)
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

    def _drop_idle_cast(self, node: ir.Node) -> None:
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Cast" or node.domain or source is None or node in self.casts or source.dtype != FLOAT:
            return
        if node.attributes.get_int("to", 0) == FLOAT.value and not cannot_forward(node.outputs[0], source):
            forward(node.outputs[0], source)
            remove(node)
            self.context.applied(node, "a Cast to float16 has become one from float32 to float32")
