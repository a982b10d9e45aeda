"""Tensors and external data that cannot be loaded: each is refused in one exact sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from optkit.errors import InputError
from optkit.model.loading import load
from refusal_cases import HEADER, Case, Edit, registrars, write

CASES: dict[str, Case] = {}


refuses, text_case = registrars(CASES)


# Tensors

ADD = "main (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { y = Add (x, w) }"


def tensor_case(name: str, sentence: str, **fields: object) -> None:
    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.CopyFrom(onnx.TensorProto(name="w", **{"data_type": 1, "dims": [4], **fields}))

    text_case(name, "{file}: tensor 'w': " + sentence, ADD, edit)


tensor_case("too_few_bytes", "it holds 12 bytes where shape [4] of FLOAT takes 16", raw_data=b"\x00" * 12)
tensor_case("too_many_values", "it holds 5 values where shape [4] of FLOAT takes 4", float_data=[0.0] * 5)
tensor_case("no_values", "it holds 0 values where shape [4] of FLOAT takes 4")
tensor_case("values_of_another_type", "it holds 0 values where shape [4] of FLOAT takes 4", int64_data=[0] * 4)
tensor_case("negative_dimension", "its shape [-4] has a negative dimension", dims=[-4], raw_data=b"\x00" * 16)
tensor_case("no_element_type", "it has no element type", data_type=0, raw_data=b"\x00" * 16)
tensor_case("unknown_element_type", "its element type 77 is unknown", data_type=77, raw_data=b"\x00" * 16)
tensor_case("int4_bytes", "it holds 4 bytes where shape [4] of INT4 takes 2", data_type=22, raw_data=b"\x00" * 4)
tensor_case("strings", "it holds 1 values where shape [4] of STRING takes 4", data_type=8, string_data=[b"a"])
text_case(
    "bytes_of_a_constant",
    "{file}: tensor 'c': it holds 3 values where shape [4] of FLOAT takes 4",
    "main (float[4] x) => (float[4] y) { c = Constant <value = float[4] {1, 2, 3, 4}> () y = Add (x, c) }",
    lambda model: model.graph.node[0].attribute[0].t.float_data.pop(),
)


def make_sparse(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float32), "w"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.int64), "w_indices"))
    del model.graph.initializer[:]


text_case(
    "sparse_initializer",
    "{file}: tensor 'w': it is stored sparse, which is not read; store it as a dense initializer",
    ADD,
    make_sparse,
)
text_case(
    "sparse_constant",
    "{file}: node 'r' (Constant): its attribute 'sparse_value' is a sparse tensor, which is not read; store it dense",
    "main () => (float[4] y) { [r] y = Constant () }",
    lambda model: model.graph.node[0].attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR),
)

# External data


def external(sentence: str, entries: dict[str, str] | None = None, **fields: object) -> Callable[[Edit], Edit]:
    """Register a case whose initializer 'w' is external; the function prepares the model's folder."""

    def register(prepare: Callable[[Path], object]) -> Callable[[Path], object]:
        def build(folder: Path) -> Path:
            prepare(folder)

            def edit(model: onnx.ModelProto) -> None:
                tensor = onnx.TensorProto(name="w", **{"data_type": 1, "dims": [4], "data_location": 1, **fields})
                for key, value in (entries if entries is not None else {"location": "w.bin"}).items():
                    tensor.external_data.add(key=key, value=value.replace("OUTSIDE", str(folder.parent / "w.bin")))
                model.graph.initializer[0].CopyFrom(tensor)

            return write(folder, HEADER + ADD, edit)

        CASES[prepare.__name__] = (build, "{file}: tensor 'w': " + sentence)
        return prepare

    return register


@external("its external data file 'w.bin' is missing; put it into {folder}")
def external_file_missing(folder: Path) -> None:
    pass


@external("its external data file 'w.bin' is missing; put it into {folder}")
def external_file_is_a_folder(folder: Path) -> None:
    (folder / "w.bin").mkdir()


@external("it names no external data file", {})
def external_without_location(folder: Path) -> None:
    pass


@external("its external data '{outside}' points outside the model's folder", {"location": "OUTSIDE"})
def external_absolute(folder: Path) -> None:
    (folder.parent / "w.bin").write_bytes(b"\x00" * 16)


@external("its external data '../w.bin' points outside the model's folder", {"location": "../w.bin"})
def external_parent(folder: Path) -> None:
    (folder.parent / "w.bin").write_bytes(b"\x00" * 16)


@external("its external data 'a/../../w.bin' points outside the model's folder", {"location": "a/../../w.bin"})
def external_parent_in_the_middle(folder: Path) -> None:
    (folder.parent / "w.bin").write_bytes(b"\x00" * 16)


@external("its external data 'w.bin' is a link that leaves the model's folder; copy the file into the folder")
def external_link_out(folder: Path) -> None:
    (folder.parent / "w.bin").write_bytes(b"\x00" * 16)
    (folder / "w.bin").symlink_to(folder.parent / "w.bin")


@external(
    "its external data 'sub/w.bin' is a link that leaves the model's folder; copy the file into the folder",
    {"location": "sub/w.bin"},
)
def external_folder_link_out(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "w.bin").write_bytes(b"\x00" * 16)
    (folder / "sub").symlink_to(folder.parent / "elsewhere")


@external("its external data 'w.bin' is a hard link, which may name a file outside the model's folder; copy the file")
def external_hard_link(folder: Path) -> None:
    (folder.parent / "w.bin").write_bytes(b"\x00" * 16)
    os.link(folder.parent / "w.bin", folder / "w.bin")


@external("its external data ends 6 bytes before the tensor does")
def external_too_short(folder: Path) -> None:
    (folder / "w.bin").write_bytes(b"\x00" * 10)


@external("its external data ends 8 bytes before the tensor does", {"location": "w.bin", "offset": "8"})
def external_too_short_after_its_offset(folder: Path) -> None:
    (folder / "w.bin").write_bytes(b"\x00" * 16)


@external(
    "its external data holds 12 bytes where shape [4] of FLOAT takes 16",
    {"location": "w.bin", "offset": "0", "length": "12"},
)
def external_length_mismatch(folder: Path) -> None:
    (folder / "w.bin").write_bytes(b"\x00" * 16)


@external("its external data begins at byte -4", {"location": "w.bin", "offset": "-4"})
def external_negative_offset(folder: Path) -> None:
    (folder / "w.bin").write_bytes(b"\x00" * 16)


@external("the offset or length of its external data is not a number", {"location": "w.bin", "offset": "four"})
def external_offset_in_words(folder: Path) -> None:
    (folder / "w.bin").write_bytes(b"\x00" * 16)


@external("it is a string tensor with external data, which ONNX does not allow", data_type=8)
def external_strings(folder: Path) -> None:
    (folder / "w.bin").write_bytes(b"\x00" * 16)


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


def test_external_data_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, _ = CASES["external_too_short"]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "w.bin")
    with pytest.raises(InputError, match=r"its external data file 'w.bin' cannot be read: permission denied$"):
        load(build(tmp_path))
