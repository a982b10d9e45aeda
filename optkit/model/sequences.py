"""Types of values that are no tensors, which onnx_ir's shape inference takes for tensors of their elements."""

from __future__ import annotations

import onnx
import onnx_ir as ir

LARGE_TENSOR_BYTES = 1024  # no type depends on the numbers of larger weights


def type_sequences(model: ir.Model) -> None:
    """Give every value that is a sequence or optional its type, so that shape inference does not make it a tensor.

    Args:
        model: The model; its values receive types. One without such operators is left as it is.
    """
    if not any("Sequence" in node.op_type or node.op_type == "Optional" for node in model.graph.all_nodes()):
        return
    shell = model.clone()
    for graph in shell.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > LARGE_TENSOR_BYTES:
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(shell)))
    for ours, theirs in zip(model.graphs(), inferred.graphs(), strict=True):
        types = {value.name: value.type for node in theirs for value in node.outputs}
        for value in (value for node in ours for value in node.outputs):
            found = types.get(value.name)
            if found is not None and not isinstance(found, ir.TensorType):
                value.type = found
