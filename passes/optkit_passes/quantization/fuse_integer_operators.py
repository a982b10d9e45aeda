"""Replace an operator between dequantize and quantize nodes with the operator that computes on the integers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, forward, names, opset, remove, unique
from optkit.pipeline import LOSSY, Context, Effect, Pass

from ._integers import Zeros
from ._qoperators import FORMS, Form, integer_form

OLDEST_OPSET = 13  # every operator that moves values takes 8-bit integers


class FuseIntegerOperators(Pass):
    """Turn DequantizeLinear, operator, QuantizeLinear into one operator on integers (QOperator form).

    ::

        q, s, z -> DequantizeLinear -> Conv -> QuantizeLinear      before
        q, s, z -> QLinearConv                                     after

    What runtimes do when they load a model in QDQ form is then written in the file, for those that do not:
    convolutions, matrix products, additions, multiplications, pooling, activations and concatenation become
    QLinearConv, QLinearMatMul, and onnxruntime's QGemm, QLinearAdd, ...; what only moves values (MaxPool, Reshape,
    Transpose, ...) reads and returns the integers themselves. A product whose result is not quantized returns float
    (QGemm, MatMulIntegerToFloat).

    ``lossy``: integer kernels round the scaled accumulator, float ones every product; results differ by one step here
    and there. They equal those of onnxruntime's own fusion of the QDQ form.
    """

    effect: ClassVar[Effect] = LOSSY

    def run(self, model: ir.Model, context: Context) -> None:
        """Fuse in every graph, bodies included."""
        version, writer = opset(model), _Writer(model)
        for graph in list(model.graphs()):
            for node in [node for node in graph if _stands_between(node)]:
                if version < OLDEST_OPSET:
                    context.missed(node, f"opset {version}: operators on 8-bit integers need opset {OLDEST_OPSET}")
                    continue
                form = integer_form(node, version)
                if isinstance(form, str):
                    context.missed(node, form)
                else:
                    new = writer.replace(node, form)
                    context.applied(new, f"stands for {node.op_type} between dequantize and quantize nodes")


def _stands_between(node: ir.Node) -> bool:
    """Whether a node reads dequantized values, and is an operator with a form on integers or quantized itself."""
    if node.domain not in ("", "ai.onnx") or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return False
    readers = {use.node.op_type for output in node.outputs for use in output.uses()}
    producers = {value.producer() for value in node.inputs if value is not None} - {None}
    reads = any(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)
    return reads and (node.op_type in FORMS or "QuantizeLinear" in readers)


class _Writer:
    """Puts new nodes into a model.

    Args:
        model: The model, changed in place.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.taken = names(model)
        self._zeros: dict[Zeros, ir.Value] = {}

    def replace(self, node: ir.Node, form: Form) -> ir.Node:
        """Put a form in the place of a node and of the nodes that quantize its results."""
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        inputs = [self._zero_point(value) if isinstance(value, Zeros) else value for value in form.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        new = ir.Node(
            form.domain, form.op_type, inputs, form.attributes.values(), num_outputs=len(node.outputs), name=node.name
        )
        new.metadata_props.update(node.metadata_props)
        graph.insert_before(node, new)
        if form.domain:
            self.model.opset_imports.setdefault(form.domain, 1)
        stale: list[ir.Node] = [node]
        for old, output in zip(node.outputs, new.outputs, strict=True):
            name, quantizer = old.name, next((use.node for use in old.uses()), None)
            if form.quantized and quantizer is not None:
                old, stale = quantizer.outputs[0], [quantizer, *stale]
                name = old.name
            output.name = unique(f"{name}_integer", self.taken)
            forward(old, output)
            if not output.is_graph_output():
                old.name, output.name = None, name
        remove(stale)
        return new

    def _zero_point(self, zeros: Zeros) -> ir.Value:
        if zeros not in self._zeros:
            array = np.zeros(zeros.shape, zeros.dtype.numpy())
            self._zeros[zeros] = add_constant(self.model.graph, "zero_point", array, self.taken)
        return self._zeros[zeros]
