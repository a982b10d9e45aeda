"""The shapes that the provider sees: what onnxruntime infers, which knows its own operators as well as ONNX's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from optkit.graph import static_shape
from optkit.model.loading import infer_shapes, save
from optkit.session import session_options

# Operators that ONNX's inference knows by another name or not at all, by domain and name. 16-bit Q and DQ nodes were
# Microsoft's before opset 21; the others give the shape that they are given.
STANDARD_OPSET = 21
STANDARD = {
    ("com.microsoft", "DequantizeLinear"): "DequantizeLinear",
    ("com.microsoft", "QuantizeLinear"): "QuantizeLinear",
    ("com.microsoft", "BiasGelu"): "Identity",
    ("com.microsoft", "FastGelu"): "Identity",
    ("com.microsoft", "Gelu"): "Identity",
    ("com.microsoft", "QuickGelu"): "Identity",
    ("", "ImageScaler"): "Identity",
    ("", "SimplifiedLayerNormalization"): "Identity",
}


def with_shapes(model: ir.Model) -> ir.Model:
    """Return the model, or a copy that shares its tensors where shapes had to be found; nodes stay in their order.

    Shapes are never observed by running the model: the provider refuses what is known only then.
    """
    if not any(_unknown(model)):
        return model
    copy = model.clone()
    if any((node.domain, node.op_type) in STANDARD for node in copy.graph):
        _infer_as_standard(copy)
    infer_shapes(copy)
    if any(_unknown(copy)):
        _fill(copy, _inferred_by_onnxruntime(copy))
    return copy


def _unknown(model: ir.Model) -> Iterator[ir.Value]:
    values = (value for node in model.graph for value in node.outputs if value.name)
    return (value for value in values if static_shape(value) is None or value.dtype is None)


def _infer_as_standard(model: ir.Model) -> None:
    standard = model.clone()
    if any(node.domain == "com.microsoft" for node in standard.graph):
        standard.opset_imports[""] = max(standard.opset_imports.get("", 1), STANDARD_OPSET)
    for node in standard.graph:
        if (name := STANDARD.get((node.domain, node.op_type))) is not None:
            node.domain, node.op_type = "", name
            if name == "Identity":
                node.resize_inputs(1)
    infer_shapes(standard)
    _fill(model, {value.name: value for node in standard.graph for value in node.outputs})


def _inferred_by_onnxruntime(model: ir.Model) -> Mapping[str | None, ir.Value]:
    """Return the values of the graph that onnxruntime loads: it follows shapes that are computed from shapes."""
    options = session_options(optimize=False)
    with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
        path, result = Path(folder) / "model.onnx", Path(folder) / "shapes.onnx"
        save(model, path)
        options.optimized_model_filepath = str(result)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        try:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception:  # onnxruntime's exceptions share no base class; a model it refuses keeps its open shapes
            return {}
        return {value.name: value for node in ir.load(result).graph for value in node.outputs}


def _fill(model: ir.Model, known: Mapping[str | None, ir.Value]) -> None:
    for value in list(_unknown(model)):
        found = known.get(value.name)
        if found is not None and static_shape(found) is not None:
            value.shape, value.type = found.shape, found.type
