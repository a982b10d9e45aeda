"""Weights: external data stays mapped, shared tensors stay one, and saving keeps every byte and every name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from optkit.errors import InputError
from optkit.model import loading as optkit_model
from optkit.model.loading import load, load_text, save, source_files, source_sha256
from round_trips import HEADER, X, assert_same, run, write


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    size = 100_000
    text = f"main (float[{size}] x) => (float[{size}] y) {{ a = Add (x, w) y = Mul (a, w) }}"
    path = tmp_path / "model.onnx"
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(size, np.float32), "w"))
    path.write_bytes(proto.SerializeToString())
    model = assert_same(path, x=np.ones(size, np.float32))
    assert len(model.graph.initializers) == 1
    assert (tmp_path / "saved.onnx").stat().st_size < 1.01 * path.stat().st_size


def external_model(folder: Path, names: list[str], size: int, location: str = "w.bin") -> Path:
    """A sum of external initializers that all lie on the same bytes."""
    folder.mkdir(exist_ok=True)
    uses = " ".join(f"a{n + 1} = Add (a{n}, {name})" for n, name in enumerate(names))
    text = f"main (float[{size}] a0) => (float[{size}] y) {{ {uses} y = Identity (a{len(names)}) }}"
    proto = onnx.parser.parse_model(HEADER + text)
    for name in names:
        tensor = proto.graph.initializer.add(name=name, data_type=1, dims=[size], data_location=1)
        for key, value in {"location": location, "offset": "64", "length": str(4 * size)}.items():
            tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    (folder / location).write_bytes(b"\x00" * 64 + np.arange(size, dtype=np.float32).tobytes())
    return path


def test_weights_that_share_external_bytes_stay_one_tensor(tmp_path: Path) -> None:
    path = external_model(tmp_path, ["embedding", "head"], 50_000)
    assert_same(path, a0=np.ones(50_000, np.float32))
    assert (tmp_path / "saved.onnx").stat().st_size < 1.01 * 200_000


def test_external_data_is_read_by_name_and_hashed(tmp_path: Path) -> None:
    path = external_model(tmp_path, ["w"], 1000)
    assert source_files(path) == [path, tmp_path / "w.bin"]
    digest = source_sha256(path)
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:-1] + b"\x01")
    assert source_sha256(path) != digest


def test_small_external_tensors_are_read_where_shape_inference_needs_them(tmp_path: Path) -> None:
    path = write(tmp_path, "main (float[4] x) => (float[M, N] y) { y = Reshape (x, s) }")
    proto = onnx.load(path)
    tensor = proto.graph.initializer.add(name="s", data_type=7, dims=[2], data_location=1)
    tensor.external_data.add(key="location", value="s.bin")
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "s.bin").write_bytes(np.array([2, -1]).tobytes())
    model = load(path)
    assert list(model.graph.outputs[0].shape) == [2, 2]
    np.testing.assert_array_equal(run(model, x=X)[0], X.reshape(2, 2))


def test_external_link_inside_the_folder(tmp_path: Path) -> None:
    path = external_model(tmp_path, ["w"], 1000)
    (tmp_path / "w.bin").rename(tmp_path / "blob")
    (tmp_path / "w.bin").symlink_to("blob")
    assert load(path).graph.initializers["w"].const_value.numpy()[7] == 7


def test_the_model_itself_may_be_a_link(tmp_path: Path) -> None:
    path = external_model(tmp_path / "real", ["w"], 1000)
    (tmp_path / "link").symlink_to(path.parent)
    assert load(tmp_path / "link").graph.initializers["w"].const_value.numpy()[7] == 7


def test_external_data_in_a_constant_of_a_body(tmp_path: Path) -> None:
    text = """main (float[4] x, bool c) => (float[4] y) {
        y = If (c) <then_branch = t () => (float[4] p) {
                        w = Constant <value = float[4] {0, 0, 0, 0}> () p = Add (x, w) },
                    else_branch = e () => (float[4] q) { q = Identity (x) }> }"""
    path = write(tmp_path, text)
    proto = onnx.load(path)
    tensor = proto.graph.node[0].attribute[0].g.node[0].attribute[0].t
    tensor.CopyFrom(onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1))
    tensor.external_data.add(key="location", value="w.bin")
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "w.bin").write_bytes(X.tobytes())
    assert source_files(path) == [path, tmp_path / "w.bin"]
    model = load(path)
    np.testing.assert_array_equal(run(model, x=X, c=np.array(True))[0], 2 * X)
    (tmp_path / "alone").mkdir()
    save(model, tmp_path / "alone" / "model.onnx")
    np.testing.assert_array_equal(run(tmp_path / "alone" / "model.onnx", x=X, c=np.array(True))[0], 2 * X)


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from optkit.model.loading import load, save
from optkit.session import Session
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
model = load(sys.argv[1])
loaded = peak() - before
session = Session(model)
row = session.run({"index": np.array([123456])})
print(loaded, peak() - before, float(row["y"].sum()))
"""


def test_three_gigabytes_of_external_data_are_mapped_not_read(tmp_path: Path) -> None:
    rows, columns = 750_000, 1024
    text = f"main (int64[1] index) => (float[1, {columns}] y) {{ y = Gather (w, index) }}"
    proto = onnx.parser.parse_model(HEADER + text)
    tensor = proto.graph.initializer.add(name="w", data_type=1, dims=[rows, columns], data_location=1)
    tensor.external_data.add(key="location", value="w.bin")
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(4 * rows * columns)  # sparse: no block is allocated
        file.seek(4 * 123456 * columns)
        file.write(np.ones(columns, np.float32).tobytes())
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    loading_mib, running_mib, total = result.stdout.split()
    assert float(total) == columns
    assert int(loading_mib) < 50
    assert int(running_mib) < 100


def test_external_data_is_written_above_the_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optkit_model, "EXTERNAL_DATA_BYTES", 100_000)
    path = external_model(tmp_path / "a", ["embedding", "head"], 50_000)
    out = tmp_path / "b"
    out.mkdir()
    files = save(load(path), out / "model.onnx")
    assert files == [out / "model.onnx", out / "model.onnx.data"]
    assert sorted(out.iterdir()) == sorted(files)
    assert files[0].stat().st_size < 10_000
    assert files[1].stat().st_size == 200_000
    inputs = {"a0": np.ones(50_000, np.float32)}
    for a, b in zip(run(path, **inputs), run(out / "model.onnx", **inputs), strict=True):
        np.testing.assert_array_equal(a, b)
    first = [file.read_bytes() for file in files]
    save(load(path), out / "model.onnx")
    assert [file.read_bytes() for file in files] == first


def test_saving_over_the_file_that_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optkit_model, "EXTERNAL_DATA_BYTES", 100_000)
    path = external_model(tmp_path, ["w"], 50_000, "model.onnx.data")
    inputs = {"a0": np.ones(50_000, np.float32)}
    expected = run(path, **inputs)
    model = load(path)
    save(model, path)
    np.testing.assert_array_equal(run(path, **inputs)[0], expected[0])


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    path = external_model(tmp_path, ["embedding", "head"], 50_000)
    model = load(path)
    before = ir.to_onnx_text(model, exclude_initializers=True)
    save(model, tmp_path / "saved.onnx")
    assert ir.to_onnx_text(model, exclude_initializers=True) == before
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    model = load_text(HEADER + "main (float[4] x) => (float[4] y) { y = Relu (x) }")
    with pytest.raises(InputError) as caught:
        save(model, tmp_path / "nowhere" / "model.onnx")
    assert str(caught.value) == f"{tmp_path / 'nowhere' / 'model.onnx'}: cannot be written: no such file or directory"


def test_read_only_files(tmp_path: Path) -> None:
    path = external_model(tmp_path, ["w"], 1000)
    for file in (path, tmp_path / "w.bin"):
        file.chmod(0o444)
    run(load(path), a0=np.ones(1000, np.float32))


def test_saving_keeps_what_it_does_not_understand(tmp_path: Path) -> None:
    text = """<ir_version: 7, opset_import: ["" : 15, "com.acme" : 2], producer_name: "acme", producer_version: "1.2",
      domain: "org.acme", model_version: 5, doc_string: "about the model", metadata_props: ["author" : "A. Person"]>
      main (float[4] x) => (float[4] y) {
        [n] y = com.acme.Op <a = 1, b = 2.5, c = "s", d = [1, 2], e = ["p", "q"]> (x)
      }"""
    path = write(tmp_path, text)
    proto = onnx.load(path)
    proto.graph.doc_string, proto.graph.node[0].doc_string = "about the graph", "about the node"
    proto.graph.input[0].doc_string = "about the input"
    proto.graph.node[0].metadata_props.add(key="layer", value="7")
    path.write_bytes(proto.SerializeToString())
    saved = tmp_path / "saved.onnx"
    save(load(path), saved)
    again = onnx.load(saved)
    assert again.graph.node[0] == proto.graph.node[0]
    assert again.graph.input[0] == proto.graph.input[0]
    assert again.graph.doc_string == "about the graph"
    for field in ("ir_version", "opset_import", "producer_name", "producer_version", "domain", "model_version"):
        assert getattr(again, field) == getattr(proto, field), field
    assert again.doc_string == "about the model"
    assert again.metadata_props == proto.metadata_props


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path = external_model(tmp_path, ["a", "b"], 1000)
    contents = []
    for name in ("a.onnx", "b.onnx"):
        save(load(path), tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int4",
        "uint4",
        "float4_e2m1fn",
        "int2",
        "float16",
        "uint64",
        "complex64",
    ],
)
@pytest.mark.parametrize("count", [1, 5, 100_000])
def test_tensor_types_survive_saving(dtype: str, count: int, tmp_path: Path) -> None:
    numbers = np.arange(count) % 2
    values = numbers.astype(getattr(ml_dtypes, dtype) if hasattr(ml_dtypes, dtype) else np.dtype(dtype))
    tensor = ir.Tensor(values, name="w")
    path = write(tmp_path, "main (float[4] x) => (float[4] y) { y = Relu (x) }")
    proto = onnx.load(path)
    proto.graph.initializer.append(ir.to_proto(tensor))
    path.write_bytes(proto.SerializeToString())
    saved = tmp_path / "saved.onnx"
    save(load(path), saved)
    stored = load(saved).graph.initializers["w"].const_value
    assert stored is not None
    assert stored.dtype == tensor.dtype
    assert stored.tobytes() == tensor.tobytes()
