"""Remove what no output depends on."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optkit import Context, Pass
from optkit.graph import bodies, is_constant, is_unused, opset
from optkit.ir_passes import run_ir_pass

# Operator sets whose operators do nothing but compute their results.
PURE_DOMAINS = {"", "ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training", "com.microsoft"}


class EliminateDeadCode(Pass):
    """Remove nodes, optional outputs, initializers, functions and operator sets that nothing uses.

    The inputs and outputs of the model stay, and so do operators of a custom domain, which may do more than compute.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Walk every graph from its outputs back, bodies before the nodes that feed them."""
        _nodes(model, model.graph, context)
        for graph in model.graphs():
            for name, value in list(graph.initializers.items()):
                if is_constant(value) and is_unused(value):
                    del graph.initializers[name]
                    context.applied(value, "no node uses this initializer")
        unused_functions = ir_passes.RemoveUnusedFunctionsPass()  # type: ignore[no-untyped-call]
        run_ir_pass(model, unused_functions, context, "no node calls this function")
        run_ir_pass(model, ir_passes.RemoveUnusedOpsetsPass(), context, "no node is of this operator set")


def _nodes(model: ir.Model, graph: ir.Graph, context: Context) -> None:
    for node in reversed(list(graph)):
        if all(is_unused(output) for output in node.outputs):
            if node.domain not in PURE_DOMAINS and node.op_identifier() not in model.functions:
                context.missed(node, f"no result is used, but an operator of domain '{node.domain}' may do more")
                continue
            for body in bodies(node):
                _release(body)
            graph.remove(node, safe=True)
            context.applied(node, "no output depends on it")
            continue
        _optional_outputs(node, opset(model), context)
        for body in bodies(node):
            _nodes(model, body, context)


def _release(body: ir.Graph) -> None:
    """End the uses that a body, about to go, makes of the values around it."""
    for node in body.all_nodes():
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _optional_outputs(node: ir.Node, version: int, context: Context) -> None:
    """Drop unused optional outputs from the end of the list, which kernels would compute."""
    if node.domain != "" or len(node.outputs) < 2 or not is_unused(node.outputs[-1]):
        return
    if node.op_type == "BatchNormalization":
        return  # their number, or training_mode, decides what the first output is
    try:
        formal = onnx.defs.get_schema(node.op_type, version, "").outputs
    except onnx.defs.SchemaError:
        return
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    kept = len(node.outputs)
    while (
        kept > 1 and kept <= len(formal) and formal[kept - 1].option == optional and is_unused(node.outputs[kept - 1])
    ):
        kept -= 1
    dropped = [output.name for output in node.outputs[kept:] if output.name]
    if dropped:
        node.resize_outputs(kept)
        context.applied(node, f"nothing uses its output '{dropped[0]}'")
