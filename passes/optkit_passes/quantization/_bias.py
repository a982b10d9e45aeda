"""Joins a matrix product with the bias added to it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, forward, is_constant, remove

from ._layers import describe, why_float


def join_bias(graph: ir.Graph) -> list[ir.Node]:
    """Replace ``Add(MatMul(x, w), b)`` with ``Gemm(x, w, b)`` for x [M, K] and constants w [K, N], b [N] or [1, N].

    onnxruntime does the same before it looks for integer kernels, and then finds a float bias, which they do not take.

    Returns:
        The new nodes.
    """
    joined = []
    for node in [node for node in graph if node.op_type == "MatMul" and node.domain == ""]:
        add, bias = _added_bias(node)
        if add is None or isinstance(describe(node), str) or why_float(add, (0, 1)):
            continue
        gemm = ir.Node("", "Gemm", [*node.inputs, bias], num_outputs=1, name=node.name)
        gemm.metadata_props.update(node.metadata_props)
        graph.insert_before(add, gemm)
        name, add.outputs[0].name = add.outputs[0].name, None
        gemm.outputs[0].name = name
        forward(add.outputs[0], gemm.outputs[0])
        gemm.outputs[0].name = name
        remove(add)
        joined.append(gemm)
    return joined


def _added_bias(node: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the Add that only adds one constant per column to a matrix product, and that constant."""
    data, weight, product = node.inputs[0], constant(node.inputs[1]), node.outputs[0]
    if data is None or data.shape is None or len(data.shape) != 2 or weight is None or weight.ndim != 2:
        return None, None
    uses = list(product.uses())
    if (
        len(uses) != 1
        or product.is_graph_output()
        or uses[0].node.op_type != "Add"
        or uses[0].node.graph is not node.graph
    ):
        return None, None
    bias = uses[0].node.inputs[1 - uses[0].idx]
    if bias is None or not is_constant(bias) or bias.shape is None:
        return None, None
    fits = list(bias.shape) in ([weight.shape[1]], [1, weight.shape[1]])
    held = constant(bias)
    masked = held is not None and np.isinf(held).any()  # minus infinity hides a column: no integer says that
    return (uses[0].node, bias) if fits and not masked else (None, None)
