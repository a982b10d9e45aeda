"""Whether ONNX Runtime has a CPU kernel for a node: found out by loading a model of that node alone."""

from __future__ import annotations

import re
from functools import lru_cache

import onnx
import onnx_ir as ir

from optkit.session import CannotRunError, Session

KNOWN_ELEMENTS = 64  # shapes, axes, scales: kernels may ask for their values; weights only count by type and shape
NO_KERNEL = re.compile(r"Could not find an implementation|not a registered function/op|No opset import for domain")


def missing_kernel(node: ir.Node, model: ir.Model) -> str:
    """Return why onnxruntime cannot run the node here, or nothing when it can.

    Nodes with bodies count as run, their bodies' nodes are asked about one by one; so does a node of unknown types.
    """
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    untyped = any(value is not None and value.type is None for value in node.inputs)
    if untyped or any(attribute.type in graphs for attribute in node.attributes.values()):
        return ""
    return _refusal(ir.to_proto(_alone(node, model)).SerializeToString(deterministic=True))


def _alone(node: ir.Node, model: ir.Model) -> ir.Model:
    """Return a model of the node alone; names are canonical, so that equal nodes give equal models."""
    inputs: dict[ir.Value, ir.Value] = {}
    for value in node.inputs:
        if value is not None and value not in inputs:
            name, constant = f"x{len(inputs)}", value.const_value
            inputs[value] = ir.Value(name=name, type=value.type, shape=value.shape)
            if constant is not None and constant.size <= KNOWN_ELEMENTS and constant.dtype != ir.DataType.STRING:
                inputs[value].const_value = ir.Tensor(constant.numpy(), dtype=constant.dtype, name=name)
    outputs = [ir.Value(name=f"y{i}" if v.name else "", type=v.type) for i, v in enumerate(node.outputs)]
    graph = ir.Graph(
        [value for value in inputs.values() if value.const_value is None],
        [value for value in outputs if value.name],
        nodes=[
            ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else inputs[value] for value in node.inputs],
                node.attributes.values(),
                outputs=outputs,
            )
        ],
        initializers=[value for value in inputs.values() if value.const_value is not None],
        opset_imports=model.opset_imports,
        name="alone",
    )
    return ir.Model(graph, ir_version=model.ir_version)


@lru_cache(maxsize=4096)
def _refusal(model: bytes) -> str:
    try:
        Session(ir.from_proto(onnx.load_model_from_string(model)))
    except CannotRunError as error:
        found = NO_KERNEL.search(error.what)
        return error.what[found.start() :] if found else ""  # a fault of the node's surroundings is not its kernel's
    return ""
