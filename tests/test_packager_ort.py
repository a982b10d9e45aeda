"""The ONNX Runtime packager: the layout it writes, and what reads it back."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import optkit.model.loading
from optkit.errors import InputError
from optkit.package.artifact import Provenance, check_hashes, open_package, seal_package
from optkit.package.contract import Artifact
from optkit.package.write import write_package
from optkit.target import Target, load_target
from optkit_targets.ort.packager import OrtPackager
from ort_models import FLOAT, with_weights


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_the_layout_is_that_of_a_model_package(tmp_path: Path, packager: OrtPackager, a53: Target) -> None:
    artifact = packager.package(with_weights(FLOAT), a53, tmp_path)
    assert artifact.entry == "model/cpu/model.onnx"
    assert artifact.files == ("model/cpu/model.onnx",)
    assert artifact.manifest == {"schema_version": "1.0", "layout": "portable", "components": {"model": "model"}}
    variant = json.loads((tmp_path / "model" / "component.json").read_text())["variants"]["cpu"]
    assert variant == {
        "variant_directory": "cpu",
        "ep": "CPUExecutionProvider",
        "executor_info": {
            "ort": {"model_file": "model.onnx", "session_options": {"session.intra_op_num_threads": "4"}}
        },
    }


def test_plain_onnxruntime_loads_it(tmp_path: Path, packager: OrtPackager, a53: Target) -> None:
    packager.package(with_weights(FLOAT), a53, tmp_path)
    session = ort.InferenceSession(tmp_path / "model" / "cpu" / "model.onnx")
    assert session.run(None, {"x": np.zeros((2, 3, 8, 8), np.float32)})[0].shape == (2, 5)


def test_opset_and_ir_version_stay_and_bytes_are_the_same(tmp_path: Path, packager: OrtPackager, a53: Target) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        packager.package(with_weights(FLOAT), a53, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    written = ir.load(tmp_path / "a" / "model" / "cpu" / "model.onnx")
    assert (written.opset_imports[""], written.ir_version) == (17, 8)


def test_large_weights_lie_beside_the_model(
    tmp_path: Path, packager: OrtPackager, a53: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optkit.model.loading, "EXTERNAL_DATA_BYTES", 100)
    artifact = packager.package(with_weights(FLOAT), a53, tmp_path)
    assert artifact.files == ("model/cpu/model.onnx", "model/cpu/model.onnx.data")
    x = np.ones((1, 3, 8, 8), np.float32)
    (result,) = packager.executors(load_target("host"))[0].load(artifact)([{"x": x}])
    assert np.abs(result["y"]).max() > 0


def test_session_options_follow_the_target(a53: Target, tmp_path: Path, packager: OrtPackager) -> None:
    two = load_target("cortex-a53:cores=2").model_copy(
        update={"options": {"session_options": {"session.intra_op.allow_spinning": 0}}}
    )
    packager.package(with_weights(FLOAT), two, tmp_path)
    component = json.loads((tmp_path / "model" / "component.json").read_text())
    assert component["variants"]["cpu"]["executor_info"]["ort"]["session_options"] == {
        "session.intra_op_num_threads": "2",
        "session.intra_op.allow_spinning": "0",
    }
    (tmp_path / "host").mkdir()
    packager.package(with_weights(FLOAT), load_target("host"), tmp_path / "host")
    component = json.loads((tmp_path / "host" / "model" / "component.json").read_text())
    assert component["variants"]["cpu"]["executor_info"]["ort"]["session_options"] == {}


def test_an_opset_the_target_does_not_load_is_refused(tmp_path: Path, packager: OrtPackager, a53: Target) -> None:
    old = a53.model_copy(update={"opset": a53.opset.model_copy(update={"max": 15})})
    with pytest.raises(InputError) as caught:
        packager.package(with_weights(FLOAT), old, tmp_path)
    assert str(caught.value) == (
        "the model uses opset 17, and target 'cortex-a53' loads none above 15; export it with an older opset, "
        "or pass --target cortex-a53:opset.max=17 if the runtime on the device is newer"
    )
    new = a53.model_copy(update={"opset": a53.opset.model_copy(update={"min": 18})})
    with pytest.raises(InputError, match="loads none below 18; raise it with the pass 'raise-opset'"):
        packager.package(with_weights(FLOAT), new, tmp_path)
    assert files(tmp_path) == {}


def write(goal: Path, model: ir.Model, target: Target) -> Artifact:
    provenance = Provenance("net.onnx", "ab" * 32, target.name, "ort", "fp32", "cd" * 32, "nothing")

    def build(folder: Path) -> None:
        seal_package(folder, OrtPackager().package(model, target, folder), {"report.json": b"{}"}, provenance)

    write_package(goal, build)
    return OrtPackager().open(goal, open_package(goal).manifest)


def test_a_written_package_opens_and_runs(tmp_path: Path, packager: OrtPackager, a53: Target) -> None:
    artifact = write(tmp_path / "net", with_weights(FLOAT), a53)
    assert artifact.entry == "model/cpu/model.onnx"
    assert artifact.files == ("model/cpu/model.onnx",)
    assert check_hashes(open_package(tmp_path / "net")) == []


class ModelPackageApi:
    """ONNX Runtime's own reader of model packages, by its place in the C API of version 31."""

    def __init__(self) -> None:
        libraries = sorted(Path(ort.__file__).parent.glob("capi/libonnxruntime.so*"))
        if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 31) or not libraries:
            pytest.skip("this onnxruntime has no reader of model packages")
        library = ctypes.CDLL(str(libraries[0]))
        library.OrtGetApiBase.restype = ctypes.POINTER(ctypes.c_void_p)
        get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(library.OrtGetApiBase()[0])
        self.api = ctypes.cast(get_api(31), ctypes.POINTER(ctypes.c_void_p))
        table = ctypes.CFUNCTYPE(ctypes.c_void_p)(self.api[427])()  # GetModelPackageApi
        self.packages = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))

    def call(self, table: Any, index: int, *arguments: Any) -> None:
        types = [type(a) if isinstance(a, (ctypes.c_char_p, ctypes.c_int)) else ctypes.c_void_p for a in arguments]
        status = ctypes.CFUNCTYPE(ctypes.c_void_p, *types)(table[index])(*arguments)
        if status:
            message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(self.api[2])(status)
            raise ValueError((message or b"").decode())

    def session(self, package: Path) -> str:
        """Open a package, let it choose a variant with default options, create its session; return the folder."""
        env, options, chosen, context, component, session = (ctypes.c_void_p() for _ in range(6))
        folder = ctypes.c_char_p()
        self.call(self.api, 3, ctypes.c_int(3), ctypes.c_char_p(b"test"), ctypes.byref(env))  # CreateEnv
        self.call(self.api, 10, ctypes.byref(options))  # CreateSessionOptions
        self.call(self.packages, 0, env, options, ctypes.byref(chosen))
        self.call(self.packages, 2, ctypes.c_char_p(os.fsencode(package)), ctypes.byref(context))
        self.call(self.packages, 11, context, ctypes.c_char_p(b"model"), chosen, ctypes.byref(component))
        self.call(self.packages, 14, component, ctypes.byref(folder))
        self.call(self.packages, 15, env, component, None, ctypes.byref(session))
        assert session.value
        return (folder.value or b"").decode()


def test_onnxruntime_reads_the_package(tmp_path: Path, a53: Target) -> None:
    write(tmp_path / "net", with_weights(FLOAT), a53)
    assert ModelPackageApi().session(tmp_path / "net") == str(tmp_path / "net" / "model" / "cpu")


def test_onnxruntime_understands_the_thread_count(tmp_path: Path, a53: Target) -> None:
    broken = {"options": {"session_options": {"session.intra_op_num_threads": "many"}}}
    write(tmp_path / "net", with_weights(FLOAT), a53.model_copy(update=broken))
    with pytest.raises(ValueError, match=r"'session\.intra_op_num_threads' must be a base-10 int32"):
        ModelPackageApi().session(tmp_path / "net")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "model" / "component.json").unlink(), "the package has no component.json"),
        (lambda d: (d / "model" / "component.json").write_text("{"), "the component description is damaged"),
        (lambda d: (d / "model" / "component.json").write_text("{}"), "the component description is damaged"),
        (lambda d: (d / "model" / "cpu" / "model.onnx").unlink(), "the package's model 'model.onnx' is missing"),
        (
            lambda d: (d / "model" / "component.json").write_text(
                (d / "model" / "component.json").read_text().replace('"model.onnx"', '"../../../secret.onnx"')
            ),
            "the package's model 'secret.onnx' is missing",
        ),
    ],
)
def test_a_damaged_package_is_a_sentence(
    tmp_path: Path, a53: Target, packager: OrtPackager, damage: Callable[[Path], object], sentence: str
) -> None:
    (tmp_path / "secret.onnx").write_bytes(b"")
    write(tmp_path / "net", with_weights(FLOAT), a53)
    manifest = open_package(tmp_path / "net").manifest
    damage(tmp_path / "net")
    with pytest.raises(InputError) as caught:
        packager.open(tmp_path / "net", manifest)
    assert caught.value.what == sentence
