"""What tests of lowerings share: a model as a saved Core ML package, run by the interpreter, beside onnxruntime."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.model.loading import load_text
from optkit.session import Session
from optkit_targets.coreml import interpreter, toolkit
from optkit_targets.coreml.lowering.scope import identifier
from optkit_targets.coreml.program import lower, save

DEPLOYMENT = 18
RTOL, ATOL = 1e-5, 1e-6
toolkit.builder()
gc.freeze()  # coremltools collects garbage at every conversion; what is loaded so far stays
# What ONNX's text format calls the types of arrays.
NAMES = {"float32": "float", "float64": "double", "float16": "float16", "bool": "bool"}


def text(
    body: str,
    inputs: dict[str, np.ndarray],
    outputs: str,
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 21,
) -> ir.Model:
    """Return a model whose inputs have the arrays' types and shapes.

    Args:
        body: The nodes, in ONNX's text format.
        inputs: Arrays by input.
        outputs: Outputs as the text format declares them: ``float y`` or ``float[2] y, int64 z``.
        constants: Arrays by initializer.
        opset: The version of the operator set.
    """
    fixed = constants or {}
    declared = ", ".join(f"{_type(array)} {name}" for name, array in (inputs | fixed).items())
    model = load_text(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({declared}) => ({outputs}) {{ {body} }}')
    for value in [value for value in model.graph.inputs if value.name in fixed]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(fixed[value.name or ""], name=value.name)
        model.graph.register_initializer(value)
    return model


def _type(array: np.ndarray) -> str:
    shape = ",".join(map(str, array.shape))
    return NAMES.get(array.dtype.name, array.dtype.name) + (f"[{shape}]" if array.ndim else "")


def executed(
    model: ir.Model, inputs: dict[str, np.ndarray], *, deployment: int = DEPLOYMENT, half: bool = False
) -> dict[str, np.ndarray]:
    """Return what the saved package computes, by output."""
    program = lower(model, deployment)
    with tempfile.TemporaryDirectory() as folder:
        package = save(program, deployment, Path(folder) / "model.mlpackage", half=half, metadata={})
        found = interpreter.load(package).run(
            {identifier(name): np.atleast_1d(array) for name, array in inputs.items()}
        )
    return {str(value.name): found[identifier(value.name or "")] for value in model.graph.outputs}


def operations(model: ir.Model, deployment: int = DEPLOYMENT) -> list[str]:
    """Return the types of the operations that a model is lowered to, constants left out."""
    block: Any = lower(model, deployment).functions["main"]
    return [item.op_type for item in block.operations if item.op_type not in ("const", "identity")]


def check(
    model: ir.Model,
    inputs: dict[str, np.ndarray],
    *,
    deployments: Sequence[int] = (DEPLOYMENT,),
    rtol: float = RTOL,
    atol: float = ATOL,
) -> None:
    """Compare what the packages compute with onnxruntime, in float32."""
    expected = Session(model).run(inputs)
    for deployment in deployments:
        found = executed(model, inputs, deployment=deployment)
        for name, array in expected.items():
            assert found[name].shape == array.shape, (name, found[name].shape, array.shape)
            wanted = array.astype(np.float64)
            np.testing.assert_allclose(found[name].astype(np.float64), wanted, rtol=rtol, atol=atol, err_msg=name)


def numbers(*shape: int, seed: int = 0, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    """Return float32 numbers between two others."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def integers(*shape: int, seed: int = 0, low: int = -9, high: int = 10, kind: str = "int64") -> np.ndarray:
    """Return integers from ``low`` to below ``high``."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(kind)
