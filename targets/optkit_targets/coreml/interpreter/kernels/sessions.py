"""Single operators that onnxruntime computes, where NumPy would be slow."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.session import Session

OPSET = 18


def run(op_type: str, *inputs: np.ndarray, **attributes: int | float | str | tuple[int, ...]) -> np.ndarray:
    """Return the result of an ONNX operator on float32 inputs.

    Args:
        op_type: The operator, of ai.onnx, with one output.
        inputs: Its inputs, all of them float32.
        attributes: Its attributes.

    Raises:
        CannotRunError: onnxruntime rejects the operator or its inputs.
    """
    session = _session(op_type, len(inputs), tuple(sorted(attributes.items())))
    feeds = {f"x{index}": np.ascontiguousarray(array) for index, array in enumerate(inputs)}
    return session.run(feeds)["y"]


@cache
def _session(op_type: str, count: int, attributes: tuple[tuple[str, Any], ...]) -> Session:
    float32 = ir.TensorType(ir.DataType.FLOAT)
    inputs = [ir.Value(name=f"x{index}", type=float32) for index in range(count)]
    node = ir.node(op_type, inputs, attributes=dict(attributes), outputs=[ir.Value(name="y", type=float32)])
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": OPSET}, name=op_type)
    # One thread each: the pools of many small sessions wait for work against each other.
    return Session(ir.Model(graph, ir_version=8), optimize=True, threads=1)
