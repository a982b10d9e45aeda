"""Files that cannot be loaded, made by name and refused by sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.numpy_helper
import onnx.parser

NEWEST = onnx.defs.onnx_opset_version()
HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
RELU = HEADER + "main (float[4] x) => (float[4] y) { [r] y = Relu (x) }"
Edit = Callable[[onnx.ModelProto], object]
Build = Callable[[Path], Path]
Case = tuple[Build, str]


def write(folder: Path, text: str, edit: Edit = lambda model: None, name: str = "model.onnx") -> Path:
    model = onnx.parser.parse_model(text)
    edit(model)
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def raw(folder: Path, content: bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path


def registrars(cases: dict[str, Case]) -> tuple[Callable[[str], Callable[[Build], Build]], Callable[..., None]]:
    """Return ``refuses`` and ``text_case``, which add to the cases of one file."""

    def refuses(sentence: str) -> Callable[[Build], Build]:
        """Register a case by its function's name: what it builds is refused with the sentence ({file}: its path)."""

        def register(build: Build) -> Build:
            cases[build.__name__] = (build, sentence)
            return build

        return register

    def text_case(name: str, sentence: str, text: str, edit: Edit = lambda model: None) -> None:
        cases[name] = (lambda folder: write(folder, HEADER + text if text.startswith("main") else text, edit), sentence)

    return refuses, text_case
