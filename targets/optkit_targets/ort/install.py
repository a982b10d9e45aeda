"""``optkit setup``: builds a sysroot from the ordinary registries, without root and without touching the system.

Debian packages come through apt-get with its own state in the build folder (the machine's sources and keys, another
architecture, nothing installed), wheels through pip. Downloads survive a failure, so that a second run goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort

from optkit.errors import InputError, MissingDependencyError, OptkitError
from optkit.model.loading import load_text, save
from optkit.package.contract import Setup
from optkit.target import Target
from optkit_targets.ort.cpu_files import part_and_features
from optkit_targets.ort.emulator import Emulated
from optkit_targets.ort.sysroot import DEBIAN_ARCHITECTURES, MARKER, Sysroot, architecture, required_qemu

PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
# Measured on Debian 12 with onnxruntime 1.31.1 and numpy 2.4.6; other versions differ by some per cent.
DOWNLOAD_BYTES, INSTALLED_BYTES = 62_000_000, 190_000_000
OLDEST_GLIBC_MINOR = 17  # manylinux2014
PROBE = '<ir_version: 8, opset_import: ["" : 13]> probe (float[4] x) => (float[4] y) { y = Add (x, x) }'

Say = Callable[[str], None]


def plan(target: Target) -> Setup:
    """Return what must be installed to run packages for ``target`` in an emulator here.

    Raises:
        InputError: The target names an emulator or a CPU that is not known.
    """
    sysroot = Sysroot.of(architecture(target))
    part_and_features(target)
    summary = f"an {sysroot.architecture} system with Python and onnxruntime {ort.__version__}"
    return Setup(
        summary,
        sysroot.directory,
        DOWNLOAD_BYTES,
        INSTALLED_BYTES,
        sysroot.installed,
        lambda say: install(target, sysroot, say),
    )


def install(target: Target, sysroot: Sysroot, say: Say) -> None:
    """Build the sysroot and put it in its place when a model has run in it; does nothing where it stands already.

    Raises:
        MissingDependencyError: apt-get, dpkg, pip or qemu is not installed.
        InputError: A registry cannot be reached or lacks a package; what was downloaded is kept.
        VerificationError: What was built does not run.
    """
    if sysroot.installed:
        return
    required_qemu(sysroot.architecture)
    _required("apt-get", "apt")
    _required("dpkg", "dpkg")
    partial = Sysroot(sysroot.architecture, sysroot.directory.with_name(f".{sysroot.directory.name}.partial"))
    folder = partial.directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        hint = "set OPTKIT_CACHE to a directory that can be written"
        raise InputError(f"cannot be written: {error.strerror}", where=str(folder), hint=hint) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _build(target, partial, say)
        folder.rename(sysroot.directory)
    except BlockingIOError as error:
        raise InputError("another process is setting this up", where=str(folder), hint="wait for it") from error
    finally:
        os.close(lock)
    say(f"ready: {sysroot.directory}")


def _build(target: Target, partial: Sysroot, say: Say) -> None:
    folder, downloads = partial.directory, partial.directory / "downloads"
    debs = _fetch_debs(DEBIAN_ARCHITECTURES[partial.architecture], downloads, say)
    root, site = folder / "root", folder / "site"
    for stale in (root, site):
        shutil.rmtree(stale, ignore_errors=True)
        stale.mkdir()
    for deb in debs:
        _run(["dpkg", "-x", str(deb), str(root)], f"cannot unpack {deb.name}")
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")  # Debian 13 and later ship everything below /usr
    python = max((p.name for p in (root / "usr" / "bin").glob("python3.*")), key=lambda name: int(name.split(".")[1]))
    wheels = _fetch_wheels(partial.architecture, python, _glibc_minor(debs), downloads / "wheels", say)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    say("checking that a model runs in it")
    built = {"python": python, "packages": [d.name for d in debs], "wheels": [w.name for w in wheels]}
    marker = json.dumps(built, indent=2) + "\n"
    (folder / MARKER).write_text(marker, encoding="utf-8")  # the folder is still under its hidden name
    _check(Emulated(target, partial), folder)
    shutil.rmtree(downloads)


def _fetch_debs(architecture: str, downloads: Path, say: Say) -> list[Path]:
    """Download the packages and all they depend on, as apt resolves them for an empty system."""
    state = downloads / "apt"
    for path in ("lists/partial", "archives/partial"):
        (state / path).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    options = {
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "1",
        "Dir::State": str(state),
        "Dir::State::status": str(state / "status"),
        "Dir::Cache": str(state),
    }
    apt = ["apt-get", "-q", "-y", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    say("reading the lists of packages")
    updated = subprocess.run([*apt, "update"], capture_output=True, text=True, check=False, env=_english())
    listed = subprocess.run(
        [*apt, "--print-uris", "install", *PACKAGES], capture_output=True, text=True, check=False, env=_english()
    )
    if listed.returncode:
        lines = (updated.stdout + updated.stderr + listed.stderr).splitlines()
        reason = next((line for line in lines if line.startswith(("Err:", "E:", "W:"))), "no reason given")
        raise InputError(
            f"the machine's package sources give no {architecture} packages: {reason}",
            hint="connect to the network, or add a Debian mirror that has them, and run it again",
        )
    found = re.findall(r"^'\S+' (\S+\.deb) (\d+)", listed.stdout, re.MULTILINE)
    say(f"downloading {len(found)} Debian packages, {sum(int(size) for _, size in found) / 1e6:.1f} MB")
    _run([*apt, "--download-only", "install", *PACKAGES], "the Debian packages cannot be downloaded")
    return sorted(state / "archives" / name for name, _ in found)


def _fetch_wheels(architecture: str, python: str, glibc_minor: int, folder: Path, say: Say) -> list[Path]:
    """Download onnxruntime and numpy of the versions installed here, or the newest numpy before that."""
    tag = "cp" + python.removeprefix("python").replace(".", "")
    platforms = [f"manylinux_2_{minor}_{architecture}" for minor in range(glibc_minor, OLDEST_GLIBC_MINOR - 1, -1)]
    platforms.append(f"manylinux2014_{architecture}")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    pip += [word for name in platforms for word in ("--platform", name)]
    pip += ["--implementation", "cp", "--python-version", python.removeprefix("python"), "--abi", tag, "--abi", "abi3"]
    if subprocess.run([*pip[:3], "--version"], capture_output=True, check=False).returncode:
        raise MissingDependencyError("pip is not installed in this Python", hint="run python -m ensurepip")
    for requirement in (f"onnxruntime=={version('onnxruntime')}", f"numpy<={version('numpy')}"):
        say(f"downloading {requirement} for {architecture}, {python}")
        _run([*pip, requirement], f"there is no {requirement} for {architecture} and {python} to be had")
    return sorted(folder.glob("*.whl"))


def _glibc_minor(debs: Sequence[Path]) -> int:
    found = re.search(r"\blibc6_2\.(\d+)", " ".join(deb.name for deb in debs))
    return int(found.group(1)) if found else OLDEST_GLIBC_MINOR


def _check(emulated: Emulated, folder: Path) -> None:
    """Run a model of one node in what was built."""
    (model,) = save(load_text(PROBE), folder / "probe.onnx")
    x = np.arange(4, dtype=np.float32)
    try:
        (result,) = emulated.run_model(model, [{"x": x}])
        if not np.array_equal(result["y"], x + x):
            raise InputError(f"a model of one node gives {result['y']} instead of {x + x}", where=emulated.name)
    except OptkitError:
        (folder / MARKER).unlink()
        raise
    finally:
        model.unlink()


def _required(tool: str, package: str) -> None:
    if shutil.which(tool) is None:
        hint = f"install the Debian package {package}, or run this on a Debian or Ubuntu machine"
        raise MissingDependencyError(f"{tool} is not installed", hint=hint)


def _run(command: Sequence[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_english())
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith(("E:", "ERROR:"))), lines[-1] if lines else "")
        raise InputError(f"{failure}: {reason}", hint="connect to the network, or free some space, and run it again")


def _english() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}
