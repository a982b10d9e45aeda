"""Models written, loaded, saved and loaded again, and run each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir

from optkit.model.loading import (
    load,
    save,
)
from optkit.session import Session

NEWEST = onnx.defs.onnx_opset_version()
HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
X = np.array([1, -2, 3, -4], np.float32)


def write(folder: Path, text: str, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(onnx.parser.parse_model(text if text.startswith("<") else HEADER + text).SerializeToString())
    return path


def run(model: ir.Model | Path, **inputs: np.ndarray) -> list[np.ndarray]:
    return list(Session(model).run(inputs).values())


def assert_same(path: Path, **inputs: np.ndarray) -> ir.Model:
    """Load, run, save, run again and load again: the outputs never change, nor do opset and IR version."""
    expected = run(path, **inputs)
    model = load(path)
    saved = path.with_name("saved.onnx")
    save(model, saved)
    for outcome in (run(model, **inputs), run(saved, **inputs), run(load(saved), **inputs)):
        for a, b in zip(expected, outcome, strict=True):
            np.testing.assert_array_equal(a, b)
    source, proto = onnx.load(path), onnx.load(saved)
    assert proto.ir_version == source.ir_version
    assert {o.domain: o.version for o in proto.opset_import if not o.domain} == {
        o.domain: o.version for o in source.opset_import if not o.domain
    }
    onnx.checker.check_model(proto)
    return model
