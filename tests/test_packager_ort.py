"""The ONNX Runtime packager: the layout it writes, who runs it, and where each node ends up."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import optkit.model.loading
from optkit.errors import InputError, MissingDependencyError
from optkit.model.loading import load_text
from optkit.package.artifact import Provenance, check_hashes, open_package, seal_package
from optkit.package.contract import Artifact, Placement
from optkit.package.write import write_package
from optkit.session import CannotRunError
from optkit.target import Target, load_target
from optkit_targets.ort import constraints, install
from optkit_targets.ort.cpu_files import write_cpu_files
from optkit_targets.ort.packager import OrtPackager
from optkit_targets.ort.sysroot import Sysroot, cache_directory

FLOAT = """<ir_version: 8, opset_import: ["" : 17]> net (float[N,3,8,8] x) => (float[N,5] y)
<float[4,3,3,3] w, float[5,144] v> {
  a = Conv (x, w)
  r = Relu (a)
  f = Flatten (r)
  y = Gemm <transB = 1> (f, v)
}"""

QDQ = """<ir_version: 8, opset_import: ["" : 17]> net (float[N,3,8,8] x) => (float[N,4,6,6] y)
<float s = {0.02}, TYPE z = {ZERO}, TYPE low = {LEAST}, float[4] ws = {0.01, 0.01, 0.01, 0.01},
 int8[4] wz = {0, 0, 0, 0}, int8[4,3,3,3] w, float t = {0.05}> {
  xq = QuantizeLinear (x, s, z)
  xd = DequantizeLinear (xq, s, z)
  wd = DequantizeLinear <axis = 0> (w, ws, wz)
  [conv] a = Conv (xd, wd)
  [relu] r = Relu (a)
  rq = QuantizeLinear (r, t, low)
  rd = DequantizeLinear (rq, t, low)
  [exp] y = Exp (rd)
}"""


def with_weights(text: str) -> ir.Model:
    """Return the model with random values for the initializers that its text only declares."""
    lines = text.split("{\n", 1)
    random = np.random.default_rng(0)
    declared, values = lines[0], {}
    for name, shape in (("w", (4, 3, 3, 3)), ("v", (5, 144))):
        for kind in ("float", "int8"):
            entry = f"{kind}[{','.join(map(str, shape))}] {name}"
            if entry in declared:
                integers = random.integers(-127, 128, int(np.prod(shape)))
                numbers = integers if kind == "int8" else integers / 500
                values[entry] = f"{entry} = {{{', '.join(str(number) for number in numbers)}}}"
    for entry, full in values.items():
        declared = declared.replace(entry, full)
    return load_text(declared + "{\n" + lines[1])


def qdq(kind: str) -> ir.Model:
    zero, least = {"int8": ("-3", "-128"), "uint8": ("120", "0")}[kind]
    return with_weights(QDQ.replace("TYPE", kind).replace("ZERO", zero).replace("LEAST", least))


@pytest.fixture
def packager() -> OrtPackager:
    return OrtPackager()


@pytest.fixture
def a53() -> Target:
    return load_target("cortex-a53")


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


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without tools and with an empty cache; returns the folder that is its PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    return tools


def tool(folder: Path, name: str, script: str = "exit 0") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_host_runs_natively(packager: OrtPackager) -> None:
    native, simulated = packager.executors(load_target("host"))
    assert native.name == f"onnxruntime {ort.__version__} on this machine ({platform.machine()})"
    assert [native.kind, simulated.kind] == ["native", "simulated"]
    assert not native.notice


def test_without_an_emulator_the_machine_simulates_and_says_what_is_missing(
    bare: Path, packager: OrtPackager, a53: Target
) -> None:
    (executor,) = packager.executors(a53)
    assert executor.kind == "simulated"
    assert executor.notice == (
        "not run on an emulated cortex-a53: to have it, "
        "install the Debian package qemu-user-static and run 'optkit setup cortex-a53'"
    )
    tool(bare, "qemu-aarch64")
    (executor,) = packager.executors(a53)
    assert executor.notice == "not run on an emulated cortex-a53: to have it, run 'optkit setup cortex-a53'"
    (executor,) = packager.executors(a53.model_copy(update={"executor": {}}))
    assert "target 'cortex-a53' names no emulator" in executor.notice


def test_a_simulation_never_uses_this_machines_integer_kernels(
    tmp_path: Path, packager: OrtPackager, bare: Path, a53: Target
) -> None:
    (tmp_path / "p").mkdir()
    artifact = packager.package(qdq("int8"), a53, tmp_path / "p")
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    (result,) = packager.executors(a53)[0].load(artifact)([{"x": x}])
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = ort.InferenceSession(tmp_path / "p" / artifact.entry, settings).run(None, {"x": x})[0]
    np.testing.assert_array_equal(result["y"], expected)


def test_an_unknown_emulator_or_cpu_is_a_sentence(packager: OrtPackager, a53: Target) -> None:
    other = a53.model_copy(update={"executor": {"emulator": "qemu-sparc", "cpu": "x"}})
    with pytest.raises(InputError) as caught:
        packager.executors(other)
    assert str(caught.value) == "target 'cortex-a53': the emulator 'qemu-sparc' is not known; use qemu-aarch64"
    other = a53.model_copy(update={"executor": {"emulator": "qemu-aarch64", "cpu": "cortex-a99"}})
    with pytest.raises(InputError, match="the part number and features of the CPU 'cortex-a99' are not known; set"):
        packager.setup(other)


def test_the_host_needs_no_set_up(packager: OrtPackager) -> None:
    with pytest.raises(InputError, match="target 'host' needs no set-up"):
        packager.setup(load_target("host"))


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPTKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "optkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "optkit"
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_set_up_says_its_size_first_and_names_each_missing_tool(
    bare: Path, packager: OrtPackager, a53: Target, tmp_path: Path
) -> None:
    plan = packager.setup(a53)
    assert not plan.installed
    assert plan.download_bytes > 40e6
    assert plan.installed_bytes > 150e6
    assert plan.directory.is_relative_to(tmp_path / "cache")
    assert plan.summary == f"an aarch64 system with Python and onnxruntime {ort.__version__}"
    for name, sentence in (
        ("qemu-aarch64-static", "qemu-aarch64 is not installed; install the Debian package qemu-user-static: "),
        ("apt-get", "apt-get is not installed; install the Debian package apt, or run this on a Debian or Ubuntu"),
        ("dpkg", "dpkg is not installed; install the Debian package dpkg, or run this on a Debian or Ubuntu machine"),
    ):
        with pytest.raises(MissingDependencyError) as caught:
            plan.install(print)
        assert str(caught.value).startswith(sentence)
        assert caught.value.exit_code == 5
        tool(bare, name)


def test_without_a_network_set_up_says_so_and_leaves_no_sysroot(bare: Path, packager: OrtPackager, a53: Target) -> None:
    for name in ("qemu-aarch64", "dpkg"):
        tool(bare, name)
    offline = "echo \"Err:1 http://deb.debian.org Temporary failure resolving 'deb.debian.org'\"; exit 100"
    tool(bare, "apt-get", offline)
    plan = packager.setup(a53)
    said: list[str] = []
    with pytest.raises(InputError) as caught:
        plan.install(said.append)
    assert str(caught.value) == (
        "the machine's package sources give no arm64 packages: Err:1 http://deb.debian.org Temporary failure "
        "resolving 'deb.debian.org'; connect to the network, or add a Debian mirror that has them, and run it again"
    )
    assert said == ["reading the lists of packages"]
    assert not packager.setup(a53).installed
    assert not plan.directory.exists()


def test_a_failing_download_or_package_is_a_sentence(bare: Path, packager: OrtPackager, a53: Target) -> None:
    for name in ("qemu-aarch64", "dpkg"):
        tool(bare, name)
    listing = "'http://mirror/libc6_2.36_arm64.deb' libc6_2.36_arm64.deb 2324660 MD5Sum:0"
    script = (
        f'case "$*" in *print-uris*) echo "{listing}";; *download-only*) echo "E: Failed to fetch" >&2; exit 100;; esac'
    )
    tool(bare, "apt-get", script)
    said: list[str] = []
    with pytest.raises(InputError) as caught:
        packager.setup(a53).install(said.append)
    assert caught.value.what == "the Debian packages cannot be downloaded: E: Failed to fetch"
    assert said[-1] == "downloading 1 Debian packages, 2.3 MB"


def test_two_set_ups_at_once_do_not_meet(
    bare: Path, packager: OrtPackager, a53: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("qemu-aarch64", "dpkg", "apt-get"):
        tool(bare, name)
    plan = packager.setup(a53)

    def second(*_: object) -> None:
        with pytest.raises(InputError, match="another process is setting this up; wait for it"):
            plan.install(print)
        raise InputError("enough")

    monkeypatch.setattr(install, "_build", second)
    with pytest.raises(InputError, match="enough"):
        plan.install(print)


def test_a_cache_that_cannot_be_written_is_a_sentence(
    bare: Path, packager: OrtPackager, a53: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("qemu-aarch64", "dpkg", "apt-get"):
        tool(bare, name)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="Not a directory; set OPTKIT_CACHE to a directory that can be written"):
        packager.setup(a53).install(print)


def test_an_installed_sysroot_is_left_alone(bare: Path, packager: OrtPackager, a53: Target) -> None:
    sysroot = Sysroot.of("aarch64")
    sysroot.directory.mkdir(parents=True)
    (sysroot.directory / "sysroot.json").write_text('{"python": "python3.11"}')
    plan = packager.setup(a53)
    assert plan.installed
    plan.install(print)  # asks for no tool
    tool(bare, "qemu-aarch64")
    emulated, simulated = packager.executors(a53)
    assert emulated.name == f"onnxruntime {ort.__version__} aarch64 under qemu -cpu cortex-a53"
    assert [emulated.kind, simulated.kind] == ["emulated", "simulated"]
    assert emulated.slow


def test_each_cpu_shows_its_own_part_features_cores_and_caches(tmp_path: Path, a53: Target) -> None:
    for name in ("cortex-a53", "cortex-a72", "cortex-a76"):
        write_cpu_files(load_target(name), tmp_path / name)
    infos = {name: (tmp_path / name / "proc" / "cpuinfo").read_text() for name in os.listdir(tmp_path)}  # noqa: PTH208
    parts = {"cortex-a53": "0xd03", "cortex-a72": "0xd08", "cortex-a76": "0xd0b"}
    for name, part in parts.items():
        assert infos[name].count(f"CPU part\t: {part}\n") == int(load_target(name).cores.value)
        assert ("asimddp" in infos[name]) == ("atomics" in infos[name]) == (name == "cortex-a76")
    cpu = tmp_path / "cortex-a53" / "sys" / "devices" / "system" / "cpu"
    assert (cpu / "possible").read_text() == "0-3\n"
    assert (cpu / "cpu2" / "cache" / "index0" / "size").read_text() == "16K\n"
    assert (cpu / "cpu2" / "cache" / "index2" / "size").read_text() == "512K\n"
    assert (cpu / "cpu3" / "cpufreq" / "cpuinfo_max_freq").read_text() == "1200000\n"
    own = {**a53.executor, "cpu": "cortex-a99", "part": "0xd99", "features": "fp asimd sve"}
    write_cpu_files(load_target("cortex-a53:cores=1").model_copy(update={"executor": own}), tmp_path / "own")
    assert "CPU part\t: 0xd99" in (tmp_path / "own" / "proc" / "cpuinfo").read_text()
    assert (tmp_path / "own" / "sys" / "devices" / "system" / "cpu" / "online").read_text() == "0\n"


def placed(model: ir.Model, target: Target) -> dict[str, Placement]:
    return {placement.node: placement for placement in OrtPackager().placement(model, target)}


def test_quantized_nodes_end_in_integer_kernels_on_arm(a53: Target) -> None:
    for kind in ("int8", "uint8"):
        found = placed(qdq(kind), a53)
        assert [p.node for p in OrtPackager().placement(qdq(kind), a53)] == list(found)
        assert found["conv"] == Placement("conv", "Conv", "cpu", "int8", True, "part of the kernel QLinearConv")
        assert found["relu"].precision == "int8"
        assert found["exp"].precision == "float32"
        assert found["exp"].reason == "quantized, yet onnxruntime has no integer kernel for it here: Exp in float32"
        conversions = [p for p in found.values() if p.op_type.endswith("Linear")]
        assert {p.precision for p in conversions} == {"-"}
        assert {p.reason for p in conversions} == {"part of the kernel QLinearConv", "converts between element types"}
        assert all(p.supported for p in found.values())


def test_float_and_fused_nodes_name_their_kernel(a53: Target) -> None:
    found = list(placed(with_weights(FLOAT), a53).values())
    assert [(p.op_type, p.precision, p.reason) for p in found] == [
        ("Conv", "float32", "part of the kernel FusedConv"),
        ("Relu", "float32", "part of the kernel FusedConv"),
        ("Flatten", "-", "moves float32 data"),
        ("Gemm", "float32", "the kernel Gemm"),
    ]


def test_float16_is_computed_in_float32(a53: Target) -> None:
    model = load_text(
        """<ir_version: 8, opset_import: ["" : 17]> net (float16[4] x) => (float16[4] y) {
          [exp] a = Exp (x) [sigmoid] y = Sigmoid (a)
        }"""
    )
    found = placed(model, a53)
    assert {p.precision for p in found.values()} == {"float32"}
    assert all(p.supported for p in found.values())


def test_the_targets_instruction_set_decides_not_this_machines(a53: Target) -> None:
    x86 = a53.model_copy(update={"isa": ("x86_64", "avx2")})
    model = load_text(
        """<ir_version: 8, opset_import: ["" : 17]> net (float[4] x) => (float[4] y)
        <float s = {0.1}, int8 z = {-3}, float t = {0.2}, int8 o = {5}> {
          xq = QuantizeLinear (x, s, z)
          a = DequantizeLinear (xq, s, z)
          b = Sigmoid (a)
          bq = QuantizeLinear (b, t, o)
          c = DequantizeLinear (bq, t, o)
          [add] d = Add (a, c)
          dq = QuantizeLinear (d, t, o)
          y = DequantizeLinear (dq, t, o)
        }"""
    )
    assert placed(model, a53)["add"].reason == "part of the kernel QLinearAdd"
    assert placed(model, x86)["add"].reason.endswith("no integer kernel for it here: Add in float32")


def test_bodies_constants_and_dead_nodes_are_placed(a53: Target) -> None:
    model = load_text(
        """<ir_version: 8, opset_import: ["" : 17]> net (bool c, float[4] x) => (float[4] y)
        <float[4] k = {1, 2, 3, 4}> {
          [folded] kk = Neg (k)
          [dead] d = Identity (x)
          [if] y = If (c) <
            then_branch = t () => (float[4] a) { [then] a = Mul (x, kk) },
            else_branch = e () => (float[4] b) {
              [cast] i = Cast <to = 6> (x)
              [else] j = Add (i, i)
              b = Cast <to = 1> (j)
            }
          >
        }"""
    )
    found = placed(model, a53)
    assert found["folded"].reason == "folded into a constant"
    assert found["dead"].reason == "removed: nothing needs it"
    assert found["if"].reason == "the nodes of its body run one by one"
    assert (found["then"].precision, found["then"].reason) == ("float32", "the kernel Mul")
    assert (found["cast"].precision, found["cast"].reason) == ("-", "converts between element types")
    assert (found["else"].precision, found["else"].reason) == ("int32", "the kernel Add")


def test_a_node_without_a_kernel_is_named_with_the_reason(a53: Target) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]> net (TYPE[4] x) => (TYPE[4] y) {
      [known] a = Neg (x)
      [other] y = NODE (a)
    }"""
    found = placed(load_text(text.replace("TYPE", "float").replace("NODE", "com.example.Magic")), a53)
    sentence = "ONNX Runtime's CPU provider must have a kernel for the operator, its opset and its element types"
    assert found["known"].supported
    assert not found["other"].supported
    assert found["other"].precision == "-"
    assert found["other"].reason == f"{sentence} (not a registered function/op)"
    found = placed(load_text(text.replace("TYPE", "bfloat16").replace("NODE", "Sin")), a53)
    assert not found["known"].supported
    assert found["known"].reason.startswith(f"{sentence} (")


def test_an_opset_outside_the_targets_range_places_nothing(a53: Target) -> None:
    old = a53.model_copy(update={"opset": a53.opset.model_copy(update={"max": 15})})
    found = placed(with_weights(FLOAT), old)
    assert not any(p.supported for p in found.values())
    reasons = {p.reason for p in found.values()}
    assert reasons == {
        "The operator's opset must be one that the target's runtime loads (opset 17, the target loads 7 to 15)"
    }


def test_a_refusal_that_lies_in_no_node_is_a_sentence(a53: Target) -> None:
    model = load_text('<ir_version: 8, opset_import: ["" : 17]> net (float[2] x) => (float[3] y) { y = Add (x, x) }')
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.INT64)  # the output says float
    with pytest.raises(CannotRunError, match="cannot load the model"):
        OrtPackager().placement(model, a53)


def test_every_constraint_has_a_sentence() -> None:
    for constraint in constraints.CONSTRAINTS:
        assert constraint.__name__.startswith("constraint_")
        text = constraint.__doc__ or ""
        assert text.endswith(".")
        assert " must " in text
        assert "\n" not in text
