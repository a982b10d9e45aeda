"""Who runs a package of the ONNX Runtime packager here, and what setting up an emulator needs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from optkit.errors import InputError, MissingDependencyError
from optkit.target import Target, load_target
from optkit_targets.ort import install
from optkit_targets.ort.cpu_files import write_cpu_files
from optkit_targets.ort.packager import OrtPackager
from optkit_targets.ort.sysroot import Sysroot, cache_directory
from ort_models import qdq


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
