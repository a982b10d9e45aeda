"""Files that are no ONNX model: each is refused in one exact sentence that says what it is and what to do."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from optkit.errors import InputError
from optkit.model.loading import load
from refusal_cases import RELU, Build, Case, raw, registrars, write

CASES: dict[str, Case] = {}


refuses, text_case = registrars(CASES)


# Files

ABSENT = "download or export it again"
TORCH = "export it with torch.onnx.export(module, inputs, 'model.onnx')"


@refuses("{file}: no such file; did you mean 'model.onnx'?")
def missing_file(folder: Path) -> Path:
    return write(folder, RELU).with_name("modle.onnx")


@refuses("{file}: no such file")
def missing_folder(folder: Path) -> Path:
    return folder / "nowhere" / "model.onnx"


@refuses("{file}: the folder holds no .onnx file; name one ONNX file")
def folder_without_models(folder: Path) -> Path:
    return folder


@refuses("{file}: the folder holds 2 .onnx files; name one ONNX file")
def folder_with_two_models(folder: Path) -> Path:
    for name in ("a.onnx", "b.onnx"):
        write(folder, RELU, name=name)
    return folder


@refuses("{file}: the file is empty; " + ABSENT)
def empty_file(folder: Path) -> Path:
    return raw(folder, b"")


@refuses("{file}: not an ONNX model: the file is truncated, corrupt or of another format; " + ABSENT)
def truncated(folder: Path) -> Path:
    return raw(folder, onnx.parser.parse_model(RELU).SerializeToString()[:-9])


@refuses("{file}: not an ONNX model: the file is truncated, corrupt or of another format; " + ABSENT)
def garbage(folder: Path) -> Path:
    return raw(folder, np.random.default_rng(0).bytes(4096))


@refuses("{file}: not an ONNX model: it has no graph or no opset; " + ABSENT)
def no_graph(folder: Path) -> Path:
    return raw(folder, onnx.ModelProto(ir_version=8, producer_name="\x00x").SerializeToString())


@refuses("{file}: the file is larger than 2 GiB, which protobuf cannot read; export it with external data")
def too_large(folder: Path) -> Path:
    path = raw(folder, b"")
    with path.open("wb") as file:
        file.truncate(1 << 31)  # sparse: no block is allocated
    return path


@refuses("{file}: not an ONNX model: it is a text file; ONNX's text formats end in .onnxtxt, .textproto or .json")
def text_file(folder: Path) -> Path:
    return raw(folder, RELU.encode())


@refuses("{file}: not an ONNX model: it is a text file; ONNX's text formats end in .onnxtxt, .textproto or .json")
def text_file_cut_within_a_letter(folder: Path) -> Path:
    return raw(folder, b"a" + "é".encode() * 1000)


@refuses("{file}: not an ONNX model: it is a web page; download the file itself")
def web_page(folder: Path) -> Path:
    return raw(folder, b"<!DOCTYPE html><html><body>Sign in</body></html>")


@refuses("{file}: not an ONNX model: it is a Git LFS pointer instead of the file it stands for; run 'git lfs pull'")
def lfs_pointer(folder: Path) -> Path:
    return raw(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")


def archive(*names: str) -> Build:
    def build(folder: Path) -> Path:
        path = folder / "model.onnx"
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"\x00" * 64)
        return path

    return build


CASES["pytorch"] = (
    archive("m/data.pkl", "m/data/0"),
    "{file}: not an ONNX model: it is a PyTorch checkpoint; " + TORCH,
)
CASES["keras"] = (
    archive("config.json", "model.weights.h5"),
    "{file}: not an ONNX model: it is a Keras archive; convert it with tf2onnx",
)
CASES["zip"] = (archive("model.bin"), "{file}: not an ONNX model: it is a zip archive; unpack it first")


@refuses("{file}: not an ONNX model: it is a Python pickle, as older versions of PyTorch save; " + TORCH)
def pickled(folder: Path) -> Path:
    return raw(folder, pickle.dumps({"weight": [1.0] * 100}, protocol=2))


@refuses("{file}: not an ONNX model: it is a TensorFlow Lite model; convert it with tf2onnx --tflite")
def tflite(folder: Path) -> Path:
    return raw(folder, b"\x1c\x00\x00\x00TFL3" + b"\x14\x00\x20\x00" * 50)


@refuses(
    "{file}: not an ONNX model: it is a GGUF file, which holds weights without a graph; "
    "export the model it was made from to ONNX"
)
def gguf(folder: Path) -> Path:
    return raw(folder, b"GGUF\x03\x00\x00\x00" + b"\x00" * 64)


@refuses(
    "{file}: not an ONNX model: it is a safetensors file, which holds weights without a graph; "
    "export the model it belongs to to ONNX"
)
def safetensors(folder: Path) -> Path:
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    return raw(folder, len(header).to_bytes(8, "little") + header + b"\x00" * 16)


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build, sentence = CASES[name]
    folder = tmp_path / "model"
    folder.mkdir()
    path = build(folder)
    with pytest.raises(InputError) as caught:
        load(path)
    expected = sentence.format(file=path, folder=folder.resolve(), outside=folder.parent / "w.bin")
    assert str(caught.value) == expected
    assert caught.value.exit_code == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path, RELU)
    path.chmod(0)
    with pytest.raises(InputError, match=r"cannot be read: permission denied$"):
        load(path)


def test_no_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, RELU)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(onnx, "load", refuse)
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: cannot be read: permission denied"
