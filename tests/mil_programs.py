"""Programs written with coremltools, saved, and run by the interpreter; and ONNX operators to hold them against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.session import Session
from optkit_targets.coreml import toolkit
from optkit_targets.coreml.interpreter import Interpreter, load
from optkit_targets.coreml.program import save

Build = Callable[..., Any]


def saved(
    folder: Path, build: Build, inputs: Mapping[str, np.ndarray], *, deployment: int = 17, half: bool = False
) -> Path:
    """Write a program as a package.

    Args:
        folder: Where; the package is new in it.
        build: Takes coremltools' builder and the inputs' variables, and returns the outputs by name.
        inputs: Arrays in the inputs' shapes and types.
        deployment: The number in the deployment target.
        half: Whether floats are computed in float16.
    """
    mil, mb = toolkit.mil(), toolkit.builder()
    kinds = {"float32": mil.types.fp32, "float16": mil.types.fp16, "int32": mil.types.int32, "bool": mil.types.bool}
    placeholders = {name: mb.placeholder(array.shape, dtype=kinds[array.dtype.name]) for name, array in inputs.items()}
    program = mil.Program()
    target = getattr(toolkit.coremltools().target, f"iOS{deployment}")
    with mil.Function(placeholders, opset_version=target) as function:
        made = build(mb, **{name: function.inputs[name] for name in inputs})
        function.set_outputs([mb.identity(x=variable, name=name) for name, variable in made.items()])
    program.add_function("main", function)
    goal = folder / f"{len(list(folder.iterdir()))}.mlpackage"
    return save(program, deployment, goal, half=half, metadata={})


def interpreter(folder: Path, build: Build, inputs: Mapping[str, np.ndarray], **options: Any) -> Interpreter:
    """Return an interpreter of a program that was saved."""
    return load(saved(folder, build, inputs, **options))


def run(folder: Path, build: Build, inputs: Mapping[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    """Return the outputs of a program that was saved."""
    return interpreter(folder, build, inputs, **options).run(inputs)


def onnx(op_type: str, *inputs: np.ndarray | None, outputs: int = 1, **attributes: Any) -> list[np.ndarray]:
    """Return the outputs of one ONNX operator, run by onnxruntime."""
    values = [
        None
        if array is None
        else ir.Value(
            name=f"x{index}", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape)
        )
        for index, array in enumerate(inputs)
    ]
    node = ir.node(op_type, values, attributes=attributes, num_outputs=outputs)
    for index, value in enumerate(node.outputs):
        value.name = f"y{index}"
    given = [value for value in values if value is not None]
    graph = ir.Graph(given, node.outputs, nodes=[node], opset_imports={"": 20}, name="one")
    feeds = {f"x{index}": array for index, array in enumerate(inputs) if array is not None}
    found = Session(ir.Model(graph, ir_version=9)).run(feeds)
    return [found[f"y{index}"] for index in range(outputs)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Return normal random numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Assert that arrays have the same shape and nearly the same elements."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
