"""float16 and float32 into each other; onnxruntime converts large arrays several times as fast as NumPy."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir

from optkit.session import Session

LARGE = 1 << 15  # elements from which a session's call costs less than it saves
OPSET = 18
MAGNITUDE, INFINITE = (
    np.uint16(0x7FFF),
    np.uint16(0x7C00),
)  # bits of float16: all but the sign; the exponent of infinity


def widened(array: np.ndarray) -> np.ndarray:
    """Return float16 as float32."""
    return _converted(array, ir.DataType.FLOAT) if array.size >= LARGE else array.astype(np.float32)


def rounded(array: np.ndarray) -> np.ndarray:
    """Return floats as float16, each the nearest one, halves to the even one, infinite beyond 65504."""
    if array.size >= LARGE and array.dtype == np.float32:
        return _converted(array, ir.DataType.FLOAT16)
    return array.astype(np.float16)


def overflowed(half: np.ndarray, array: np.ndarray) -> bool:
    """Return whether a finite number of ``array`` became infinite when it was rounded to ``half``."""
    if not half.size or ((half.view(np.uint16) & MAGNITUDE).max() < INFINITE):
        return False
    return bool((np.isinf(half) & np.isfinite(array)).any())


def _converted(array: np.ndarray, wanted: ir.DataType) -> np.ndarray:
    return _session(ir.DataType.from_numpy(array.dtype), wanted).run({"x": np.ascontiguousarray(array)})["y"]


@cache
def _session(given: ir.DataType, wanted: ir.DataType) -> Session:
    x, y = ir.Value(name="x", type=ir.TensorType(given)), ir.Value(name="y", type=ir.TensorType(wanted))
    node = ir.node("Cast", [x], attributes={"to": wanted.value}, outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": OPSET}, name="convert")
    return Session(ir.Model(graph, ir_version=8), threads=1)
