"""Small repairs of a loaded model that change no meaning, so that passes find one form of each thing."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optkit.errors import InputError
from optkit.model.check_graph import all_graphs, innermost, schema

SMALL_TENSOR_BYTES = 1024


def normalize_proto(proto: onnx.ModelProto) -> None:
    """Write down in one way what files write in several: the default domain, and sizes that are not known."""
    for imports in [proto.opset_import, *(function.opset_import for function in proto.functions)]:
        for item in imports:
            if item.domain == "ai.onnx":
                item.domain = ""
    for graph in all_graphs(proto.graph):
        for value in [*graph.input, *graph.output, *graph.value_info]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_value < 0:  # some exporters write -1 for "dynamic"; onnxruntime reads it so
                    dim.Clear()


def inline_functions(model: ir.Model, file: Path) -> None:
    """Inline every function; one of another opset whose operators mean the same there is taken as written for ours.

    Raises:
        InputError: An operator differs between the opsets, or the function cannot be inlined.
    """
    for function in model.functions.values():
        for domain, version in function.opset_imports.items():
            ours = model.opset_imports.setdefault(domain, version)
            if domain == "" and ours != version:
                for node in (node for node in function.all_nodes() if node.domain == ""):
                    old, new = schema(node.op_type, version), schema(node.op_type, ours)
                    if old is None or new is None or old.since_version != new.since_version:
                        what = f"{node.op_type} of opset {version} differs from the model's, opset {ours}"
                        where = f"{file}: function '{function.domain}::{function.name}'"
                        raise InputError(what, where=where, hint="export the model with one opset")
            function.opset_imports[domain] = ours
    if model.functions:
        try:
            ir_passes.InlinePass()(model)
        except Exception as error:
            raise InputError(f"a function cannot be inlined: {innermost(error)}", where=str(file)) from error


def drop_listed_initializers(model: ir.Model) -> None:
    """Make initializers plain constants where, up to IR version 4, all of them are listed as inputs too."""
    listed = [value for value in model.graph.inputs if value.is_initializer()]
    if model.ir_version <= 4 and len(listed) == len(model.graph.initializers):
        for value in listed:
            model.graph.inputs.remove(value)


def read_small_tensors(model: ir.Model) -> None:
    """Read external shapes, axes and scales into memory: the checker and shape inference look at their values."""
    for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SMALL_TENSOR_BYTES:
            values = tensor.numpy().copy()
            value.const_value = ir.Tensor(values, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
