"""Which format a file that is not ONNX has, by its first bytes, and how its owner gets an ONNX model from it."""

from __future__ import annotations

import zipfile
from pathlib import Path

_TORCH = "export it with torch.onnx.export(module, inputs, 'model.onnx')"
_KERAS = "convert it with tf2onnx"
_UNPACK = "unpack it first"

# offset, first bytes, what it is, what to do
_MAGIC = (
    (0, b"GGUF", "a GGUF file, which holds weights without a graph", "export the model it was made from to ONNX"),
    (4, b"TFL3", "a TensorFlow Lite model", "convert it with tf2onnx --tflite"),
    (4, b"ORTM", "a model in ONNX Runtime's own ORT format", "give the ONNX file it was made from"),
    (4, b"ET", "an ExecuTorch program", _TORCH),
    (0, b"\x89HDF\r\n", "an HDF5 file, as Keras writes", _KERAS),
    (0, b"\x93NUMPY", "a NumPy array", "give an ONNX file"),
    (0, b"\x1f\x8b", "compressed with gzip", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed with Zstandard", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7-Zip archive", _UNPACK),
    (0, b"version https://git-lfs", "a Git LFS pointer instead of the file it stands for", "run 'git lfs pull'"),
    (0, b"<!doctype html", "a web page", "download the file itself"),
    (0, b"<html", "a web page", "download the file itself"),
    (0, b"<?xml", "an XML file, as OpenVINO writes", "give the ONNX file it was made from"),
)


def recognize(path: Path) -> tuple[str, str]:
    """Return what a file that is not an ONNX protobuf is, and what to do about it; both end a sentence.

    Every pickle protocol that PyTorch has used begins ``80 02`` to ``80 05``; safetensors begins with the length of a
    JSON header, 8 bytes little endian.
    """
    with path.open("rb") as stream:
        head = stream.read(1024)
    if not head:
        return "the file is empty", "download or export it again"
    for offset, magic, name, hint in _MAGIC:
        if head[offset : offset + len(magic)].lower() == magic.lower():
            return f"not an ONNX model: it is {name}", hint
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "not an ONNX model: it is a Python pickle, as older versions of PyTorch save", _TORCH
    if zipfile.is_zipfile(path):
        return _archive(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        hint = "export the model it belongs to to ONNX"
        return "not an ONNX model: it is a safetensors file, which holds weights without a graph", hint
    if _is_text(head):
        return "not an ONNX model: it is a text file", "ONNX's text formats end in .onnxtxt, .textproto or .json"
    return "not an ONNX model: the file is truncated, corrupt or of another format", "download or export it again"


def _archive(path: Path) -> tuple[str, str]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("data.pkl") for name in names):
        return "not an ONNX model: it is a PyTorch checkpoint", _TORCH
    if "model.weights.h5" in names:
        return "not an ONNX model: it is a Keras archive", _KERAS
    return "not an ONNX model: it is a zip archive", _UNPACK


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode("utf-8") if error.start > len(head) - 4 else "\0"
    return all(character.isprintable() or character in "\t\r\n" for character in text)
