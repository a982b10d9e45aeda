"""Running a package with onnxruntime's build for the target's instruction set under qemu's model of its CPU."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from optkit.errors import VerificationError
from optkit.package.contract import Artifact, Executor, Run
from optkit.session import CannotRunError
from optkit.target import Target
from optkit_targets.ort.cpu_files import write_cpu_files
from optkit_targets.ort.sysroot import QEMU_PACKAGE, Sysroot, architecture, qemu

DRIVER = Path(__file__).with_name("driver.py")
REFUSED = 3  # the driver's exit code when onnxruntime refuses
MAX_THREADS = 4
TIMEOUT_SECONDS = 1800.0


class Emulated(Executor):
    """The target's instructions, one by one: what an instruction that the CPU lacks does there, it does here.

    All samples run in one process. Its times say nothing about the device.
    """

    kind = "emulated"
    slow = True

    def __init__(self, target: Target, sysroot: Sysroot) -> None:
        self._target, self._sysroot = target, sysroot
        self._cpu = str(target.executor["cpu"])
        self._timeout = float(target.executor.get("timeout_seconds", TIMEOUT_SECONDS))
        self.name = f"onnxruntime {ort.__version__} {sysroot.architecture} under qemu -cpu {self._cpu}"

    def load(self, artifact: Artifact) -> Run:
        """Return what runs samples with all optimizations, in one emulated process a call.

        Calls raise CannotRunError where onnxruntime refuses the model or a sample, and VerificationError where the
        emulated process crashed, met an instruction its CPU lacks, or took too long.
        """
        return functools.partial(self.run_model, artifact.directory / artifact.entry)

    def run_model(self, model: Path, samples: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Run every sample on an ONNX file; see `load`."""
        with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
            scratch = Path(folder)
            overlay, inputs, outputs = scratch / "root", scratch / "inputs.npz", scratch / "outputs.npz"
            self._sysroot.overlay(overlay)
            write_cpu_files(self._target, overlay)
            arrays = {f"{i}.{j}": a for i, sample in enumerate(samples) for j, a in enumerate(sample.values())}
            np.savez(inputs, allow_pickle=False, **arrays)
            options = {"inputs": [list(s) for s in samples], "threads": min(os.cpu_count() or 1, MAX_THREADS)}
            script = [str(DRIVER), str(model.resolve()), str(inputs), str(outputs), json.dumps(options)]
            self._execute([*self._sysroot.command(overlay, self._cpu), *script], scratch)
            with np.load(outputs) as results:
                names = [str(name) for name in results["names"]]
                return [{n: results[f"{i}.{j}"] for j, n in enumerate(names)} for i in range(len(samples))]

    def _execute(self, command: Sequence[str], folder: Path) -> None:
        try:
            done = subprocess.run(
                command,
                cwd=folder,  # where a core file would go
                env={"PATH": os.defpath},  # nothing of the host's Python reaches the emulated one
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            what = f"the package ran longer than {self._timeout:g} s on {self.name} and was stopped"
            hint = "give it fewer samples, or set executor.timeout_seconds in the target"
            raise VerificationError(what, hint=hint) from error
        if done.returncode == REFUSED:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise CannotRunError(f"{self.name} cannot run the model: {_sentence(lines[0])}")
        if done.returncode:
            raise VerificationError(f"the package fails on {self.name}: {self._ending(done)}")

    def _ending(self, done: subprocess.CompletedProcess[str]) -> str:
        number = -done.returncode if done.returncode < 0 else done.returncode - 128
        if number == signal.SIGILL:
            return f"it met an instruction that {self._cpu} does not have"
        if number in set(signal.Signals):
            return f"it was ended by {signal.Signals(number).name}"
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"


def emulation(target: Target) -> Emulated | str:
    """Return the emulator for a target, or why there is none here and what would bring it."""
    if "emulator" not in target.executor:
        return f"target '{target.name}' names no emulator, so the package ran on this machine in float arithmetic"
    name = architecture(target)
    sysroot = Sysroot.of(name)
    if qemu(name) and sysroot.installed:
        return Emulated(target, sysroot)
    steps = [] if qemu(name) else [f"install the Debian package {QEMU_PACKAGE}"]
    steps += [] if sysroot.installed else [f"run 'optkit setup {target.name}'"]
    return f"not run on an emulated {target.executor.get('cpu')}: to have it, {' and '.join(steps)}"


def _sentence(line: str) -> str:
    """Return onnxruntime's message without its status prefix."""
    return line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line
