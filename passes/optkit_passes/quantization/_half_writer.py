"""Writes half precision into a model: the types of nodes and weights, and the Casts between them and float32."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from optkit.graph import bodies, constant, is_constant, names, unique
from optkit.pipeline import Context

from ._float_types import (
    FLOAT,
    RESULT_ATTRIBUTES,
    TYPED_BY_INPUT,
    Tensors,
    largest,
    new_cast,
    rounded,
    take_output,
)
from ._half_forms import INTEGER_OPS, HalfForm, reads_values

# A Cast takes about as many bytes in a file as this many elements save.
STORED_ELEMENTS = 128
# Significant bits, the hidden one included; rounding moves a normal number by 2^-bits of it at most.
SIGNIFICANT_BITS = {ir.DataType.FLOAT16: 11, ir.DataType.BFLOAT16: 8}
PART = 1 << 20  # elements looked at together: large weights are not copied whole

Use = tuple[ir.Node, int]


class HalfWriter:
    """Turns values of a model into half precision, in place.

    Args:
        model: The model.
        dtype: float16 or bfloat16.
        context: Receives the remarks.
    """

    def __init__(self, model: ir.Model, dtype: ir.DataType, context: Context) -> None:
        self.model, self.dtype, self.context = model, dtype, context
        self.called = dtype.name.lower()
        self.taken = names(model)
        self.tensors = Tensors(FLOAT, dtype)

    def compute(self, forms: Mapping[ir.Node, HalfForm], masks: Collection[ir.Value]) -> None:
        """Let nodes of the main graph compute in half precision, with Casts where types meet.

        Args:
            forms: The nodes.
            masks: Constants that only hide scores from a Softmax: their large negative values need not be exact.
        """
        graph = self.model.graph
        halves = {node.outputs[index] for node, form in forms.items() for index in form.outputs}
        holders: dict[ir.Value, list[ir.Graph]] = {}
        for each in self.model.graphs():
            for output in each.outputs:
                holders.setdefault(output, []).append(each)
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in [value for value in values if value.dtype == FLOAT]:
            half = value in halves
            readers = [use for use in value.uses() if reads_values(use.node)]
            others = [(n, i) for n, i in readers if half != (n in forms and i in forms[n].inputs)]
            if is_constant(value):
                if others:
                    self._constant(value, others, hides=value in masks)
                continue
            if half:
                value.type = ir.TensorType(self.dtype)
            self._cast(value, others, holders.get(value, []) if half else [])
        for node in forms:
            self.tensors.retype_attributes(node, RESULT_ATTRIBUTES)
            self.context.applied(node, f"computed in {self.called}")

    def _cast(self, value: ir.Value, uses: Sequence[Use], holders: Sequence[ir.Graph]) -> None:
        """Put one Cast behind a value for all who want its other type: nodes, and graphs whose output it is."""
        if not uses and not holders:
            return
        dtype = FLOAT if value.dtype == self.dtype else self.dtype
        cast, result = new_cast(None, dtype, value.name or "", self.taken)
        result.shape = None if value.shape is None else value.shape.copy()
        for node, index in uses:
            node.replace_input_with(index, result)
        for graph in dict.fromkeys(holders):
            if graph is self.model.graph:
                take_output(graph, value, result)
            else:  # the name of a body's output is nobody's concern
                for index, output in enumerate(graph.outputs):
                    if output is value:
                        graph.outputs[index] = result
        cast.replace_input_with(0, value)
        producer = value.producer()
        if producer is not None:
            self.model.graph.insert_after(producer, cast)
        else:
            self.model.graph.insert_before(self.model.graph[0], cast)

    def _constant(self, value: ir.Value, halves: Sequence[Use], *, hides: bool) -> None:
        """Let nodes read a constant in half precision; where others read it in float32, a large one is stored once."""
        array = constant(value)
        assert array is not None
        assert value.const_value is not None
        tensor, lowest = value.const_value, -largest(self.dtype) / 4  # two of them and a score are still finite
        clamps = hides and float(array.min(initial=0.0, where=np.isfinite(array))) < lowest
        if clamps:
            self.context.applied(value, f"clamped to {lowest:.5g}: it only hides scores from a Softmax")
            array = np.where(np.isinf(array), array, np.maximum(array, np.float32(lowest)))
            tensor = ir.tensor(array, name=value.name)
        floats = [(n, i) for n, i in value.uses() if (n, i) not in halves and reads_values(n)]
        stays = value.is_graph_output() or (floats and (array.size < STORED_ELEMENTS or clamps))
        if not stays:
            value.const_value = tensor
            self._store(value, array, floats)
            return
        tensor = self.tensors.copy(tensor)
        name = unique(f"{value.name}/{self.called}", self.taken)
        twin = ir.Value(name=name, type=ir.TensorType(self.dtype), shape=value.shape, const_value=tensor)
        self.model.graph.register_initializer(twin)
        for node, index in halves:
            node.replace_input_with(index, twin)

    def store(self) -> None:
        """Store the weights that are still read in float32 in half precision, with a Cast behind each."""
        for graph in list(self.model.graphs()):
            for value in list(graph.initializers.values()):
                array = constant(value) if value.dtype == FLOAT else None
                if array is None or array.size < STORED_ELEMENTS or not value.uses():
                    continue
                reason = self._objection(value) or unfit(array, value.name or "", self.dtype)
                if reason:
                    self.context.missed(value, reason)
                else:
                    self._store(value, array, list(value.uses()))

    def _objection(self, value: ir.Value) -> str:
        """Return why a constant is to stay in float32 whatever it holds; empty if nothing speaks against half."""
        if value.is_graph_output():
            return "it is an output of the model"
        for node, _ in value.uses():
            if node.op_type in INTEGER_OPS or node.domain not in TYPED_BY_INPUT or "NBits" in node.op_type:
                return f"{node.op_type} '{node.name}' takes it as a constant"
        return ""

    def _store(self, value: ir.Value, array: np.ndarray, readers: Sequence[Use]) -> None:
        """Change a constant's type, and put a Cast before the first of those that read it in float32."""
        assert value.const_value is not None
        graph = value.graph
        assert graph is not None
        half = rounded(array, self.dtype)
        vanished = int(((half == 0) & (array != 0)).sum())
        lost = f", {vanished} of them underflow to 0" if vanished else ""
        if array.size >= STORED_ELEMENTS:
            self.context.applied(value, f"{array.size} values stored in {self.called}{lost}")
        value.const_value = self.tensors.copy(value.const_value)
        value.type = ir.TensorType(self.dtype)
        if not readers:
            return
        cast, result = new_cast(value, FLOAT, value.name or "", self.taken)
        for node, index in readers:
            node.replace_input_with(index, result)
        graph.insert_before(_first(graph, {node for node, _ in readers}), cast)


def _first(graph: ir.Graph, readers: Collection[ir.Node]) -> ir.Node:
    """Return the first node of the graph that is one of these or holds one in a body."""
    return next(
        node
        for node in graph
        if node in readers or any(inner in readers for body in bodies(node) for inner in body.all_nodes())
    )


def unfit(array: np.ndarray, name: str, dtype: ir.DataType) -> str:
    """Return why half precision does not hold what a constant says; empty if it does.

    It does not where a value is beyond the largest one, or where the squared error is above what rounding normal
    numbers can cause: then too much of it is below the smallest normal number.
    """
    smallest = 2.0 ** (-14 if dtype == ir.DataType.FLOAT16 else -126)  # normal number
    beyond = error = energy = 0.0
    below = 0
    flat = array.ravel()
    for part in (flat[start : start + PART].astype(np.float64) for start in range(0, flat.size, PART)):
        finite = np.where(np.isfinite(part), part, 0.0)
        beyond = max(beyond, float(np.abs(finite).max(initial=0.0)))
        error += float(((finite - rounded(finite, dtype).astype(np.float64)) ** 2).sum())
        energy += float((finite**2).sum())
        below += int(((np.abs(finite) < smallest) & (finite != 0)).sum())
    if beyond > largest(dtype):
        return f"constant '{name}' holds {beyond:.4g}, beyond {largest(dtype):.5g}"
    if error > energy * 4.0 ** -SIGNIFICANT_BITS[dtype]:
        return f"constant '{name}' loses too much: {below} of {array.size} values are below {smallest:.2g}"
    return ""
