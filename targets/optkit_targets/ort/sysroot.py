"""A small Linux system of another instruction set in the user's cache: a C library, Python, numpy and onnxruntime."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from optkit.errors import InputError, MissingDependencyError
from optkit.target import Target

MARKER = "sysroot.json"  # written last: a sysroot without it is not one
QEMU_PACKAGE = "qemu-user-static"
DEBIAN_ARCHITECTURES = {"aarch64": "arm64"}  # those that onnxruntime publishes wheels for, by qemu's name


def cache_directory() -> Path:
    """Return where downloads stay: ``$OPTKIT_CACHE``, else ``$XDG_CACHE_HOME/optkit``, else ``~/.cache/optkit``."""
    if own := os.environ.get("OPTKIT_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "optkit"


def architecture(target: Target) -> str:
    """Return the instruction set that the target's emulator runs, in qemu's words.

    Raises:
        InputError: The emulator is none that onnxruntime can be run under.
    """
    emulator = str(target.executor.get("emulator", ""))
    found = emulator.removeprefix("qemu-")
    if f"qemu-{found}" != emulator or found not in DEBIAN_ARCHITECTURES:
        known = ", ".join(f"qemu-{name}" for name in DEBIAN_ARCHITECTURES)
        raise InputError(
            f"the emulator '{emulator}' is not known", where=f"target '{target.name}'", hint=f"use {known}"
        )
    return found


def qemu(name: str) -> Path | None:
    """Return the user-mode emulator for an instruction set, or None where it is not installed."""
    found = shutil.which(f"qemu-{name}-static") or shutil.which(f"qemu-{name}")
    return Path(found) if found else None


def required_qemu(name: str) -> Path:
    """Return the user-mode emulator for an instruction set.

    Raises:
        MissingDependencyError: It is not installed.
    """
    if found := qemu(name):
        return found
    hint = f"install the Debian package {QEMU_PACKAGE}: sudo apt-get install {QEMU_PACKAGE}"
    raise MissingDependencyError(f"qemu-{name} is not installed", hint=hint)


@dataclass(frozen=True)
class Sysroot:
    """A sysroot for one instruction set and one version of onnxruntime.

    Attributes:
        architecture: The instruction set, in qemu's words.
        directory: ``root/`` is the system, ``site/`` the Python packages, ``sysroot.json`` the marker.
    """

    architecture: str
    directory: Path

    @staticmethod
    def of(name: str) -> Sysroot:
        """Return the place of the sysroot that goes with the onnxruntime installed here."""
        return Sysroot(name, cache_directory() / "sysroots" / f"{name}-onnxruntime-{ort.__version__}")

    @property
    def installed(self) -> bool:
        """Whether it is complete."""
        return (self.directory / MARKER).is_file()

    @property
    def python(self) -> str:
        """Name of its interpreter, as ``python3.11``."""
        return str(json.loads((self.directory / MARKER).read_text(encoding="utf-8"))["python"])

    def overlay(self, directory: Path) -> None:
        """Link the system's folders into ``directory``, so that files of one CPU can stand beside them.

        qemu's ``-L`` takes one folder for every absolute path; this makes a cheap one for each kind of CPU.
        """
        directory.mkdir()
        for entry in (self.directory / "root").iterdir():
            (directory / entry.name).symlink_to(entry)

    def command(self, overlay: Path, cpu: str) -> list[str]:
        """Return the command line that starts its Python on an emulated CPU, up to the script."""
        root, triplet = self.directory / "root", f"{self.architecture}-linux-gnu"
        settings = {
            "LD_LIBRARY_PATH": f"{root}/lib/{triplet}:{root}/usr/lib/{triplet}",
            "PYTHONHOME": f"{root}/usr",
            "PYTHONPATH": str(self.directory / "site"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        variables = [word for name, value in settings.items() for word in ("-E", f"{name}={value}")]
        interpreter = str(root / "usr" / "bin" / self.python)
        return [str(required_qemu(self.architecture)), "-cpu", cpu, "-L", str(overlay), *variables, interpreter]
