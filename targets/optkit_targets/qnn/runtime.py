"""Qualcomm's compiler and HTP emulator, asked through a child process (`optkit_targets.qnn.worker`)."""

from __future__ import annotations

import importlib.util
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.errors import MissingDependencyError
from optkit.model.loading import save
from optkit.session import CannotRunError
from optkit.target import Target
from optkit_targets.qnn.binary import BinaryFacts, CompileStage, compile_stages
from optkit_targets.qnn.repeatable import settle

PACKAGE = "onnxruntime_qnn"
INSTALL = "run: pip install 'optkit[qnn]' (Linux on x86-64)"
MODEL, WRAPPER, PROFILE, LOG = "model.onnx", "context.onnx", "profile.csv", "stderr.txt"
NPU = "QNNExecutionProvider"
STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
LOGGED = re.compile(r"\[E:onnxruntime:[^\]]*\]\s*(.*?)(?:\x1b\[m)?$")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a model, and said of it.

    Attributes:
        wrapper: The ONNX file that runs the context binaries.
        binaries: The context binaries, beside it; one per partition... of the graph on the NPU.
        facts: What each binary says of itself.
        assignment: The provider that took each node, after onnxruntime's own fusions.
        seconds: Wall time within onnxruntime and the compiler. Never written into a package.
        stages: What the compiler spent its time on; empty where it wrote no profile.
        complaint: The first error that the compiler logged; empty where it logged none.
        cleared: Words that the compiler left uninitialized in the binaries, and that are 0 now.
    """

    wrapper: Path
    binaries: tuple[Path, ...]
    facts: tuple[BinaryFacts, ...]
    assignment: Mapping[str, str]
    seconds: float
    stages: tuple[CompileStage, ...]
    complaint: str
    cleared: int


def missing() -> str:
    """Return what to install to have the compiler and the emulator, or nothing where they are here."""
    return "" if importlib.util.find_spec(PACKAGE) else INSTALL


def name() -> str:
    """Return the compiler's name and version.

    Raises:
        MissingDependencyError: It is not installed.
    """
    _require()
    return f"onnxruntime-qnn {version('onnxruntime-qnn')}"


def provider_options(target: Target) -> dict[str, str]:
    """Return the execution provider's options for a target's chip.

    All of the chip's tightly coupled memory is used. Graph inputs and outputs are quantized on the NPU, not on the CPU
    beside it.
    """
    return {
        "soc_model": str(target.options["soc_model"]),
        "htp_arch": str(target.options["htp_arch"]),
        "vtcm_mb": str(int(target.options["vtcm_bytes"]) >> 20),
        "htp_graph_finalization_optimization_mode": "3",
        "offload_graph_io_quantization": "0",
    }


def assignment(model: ir.Model, target: Target) -> dict[str, str]:
    """Return the provider that takes each node of a model's main graph, by node name, as onnxruntime decides it.

    Nodes that the vendor's provider adds (transposes of layouts) are among them.

    Raises:
        MissingDependencyError: The compiler is not installed.
        CannotRunError: onnxruntime refuses the model, or the compiler crashes on it.
    """
    with tempfile.TemporaryDirectory(prefix="optkit-") as folder, Child(Path(folder)) as child:
        save(model, Path(folder) / MODEL)
        found = child.ask("assign", folder=folder, provider=provider_options(target))
        assert isinstance(found, dict)
        if NPU not in found.values() and child.logged():  # not the model's doing: a chip that it does not know
            raise CannotRunError(f"{name()} has no compiler for target '{target.name}': {child.logged()}")
    return found


@contextmanager
def compiled(model: Path | ir.Model, target: Target, *, fallback: bool = False) -> Iterator[Compiled]:
    """Compile a model for a target's chip; the files exist within the block.

    Args:
        model: The model.
        target: The target.
        fallback: Whether nodes that the NPU does not take may run on the CPU.

    Raises:
        MissingDependencyError: The compiler is not installed.
        CannotRunError: It refuses the model, or would leave nodes to the CPU though ``fallback`` is off.
    """
    original = ir.load(model) if isinstance(model, Path) else model
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:

        def compile_once(_: int) -> tuple[Path, dict[str, Any], str]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optkit-")))
            save(original, folder / MODEL)
            with Child(folder) as child:
                options = provider_options(target)
                made: dict[str, Any] = child.ask("compile", folder=str(folder), provider=options, fallback=fallback)
                return folder, made, child.logged()

        (folder, made, complaint), (twin, *_) = threads.map(compile_once, range(2))
        cleared = 0
        binaries = [folder / binary for binary in made["binaries"]]
        if any(path.read_bytes() != (twin / path.name).read_bytes() for path in binaries):
            third, *_ = compile_once(2)
            cleared = sum(settle(path, twin / path.name, third / path.name) for path in binaries)
        profile = folder / PROFILE
        yield Compiled(
            folder / WRAPPER,
            tuple(binaries),
            tuple(made["facts"]),
            made["assignment"],
            made["seconds"],
            compile_stages(profile) if profile.is_file() else (),
            complaint,
            cleared,
        )


class Emulator:
    """A model or a context loaded on the HTP emulator; its child process ends with this object.

    Args:
        model: The ONNX file, or the wrapper of a context binary.
        target: The target.
        fallback: Whether nodes that the NPU does not take may run on the CPU.

    Raises:
        MissingDependencyError: The emulator is not installed.
        CannotRunError: It refuses the model, or would leave nodes to the CPU though ``fallback`` is off.
    """

    def __init__(self, model: Path, target: Target, *, fallback: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="optkit-")
        self._child = Child(Path(self._folder.name))
        try:
            arguments = {"model": str(model.resolve()), "provider": provider_options(target), "fallback": fallback}
            self._names = self._child.ask("load", **arguments)
        except Exception:
            self.close()
            raise

    def run(self, samples: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Run samples and return the outputs of each by name."""
        results = self._child.ask("run", samples=[dict(sample) for sample in samples])
        return [dict(zip(self._names, arrays, strict=True)) for arrays in results]

    def close(self) -> None:
        """End the child process."""
        self._child.close()
        self._folder.cleanup()

    def __del__(self) -> None:
        """End the child process with the object."""
        if hasattr(self, "_child"):
            self.close()


class Child:
    """The child process; what its libraries print goes to a file in ``folder``.

    Raises:
        MissingDependencyError: onnxruntime-qnn is not installed.
    """

    def __init__(self, folder: Path) -> None:
        _require()
        self._log = folder / LOG
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "optkit_targets.qnn.worker"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def ask(self, method: str, **arguments: Any) -> Any:
        """Send a request and return its answer.

        Raises:
            CannotRunError: The request was refused, or the process died of it.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((method, arguments), process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            kind, result = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            process.wait()
            what = f"the process of onnxruntime-qnn {_ending(process.returncode)}: {self._said()}"
            raise CannotRunError(what) from error
        if kind == "refused":
            sentence = STATUS.sub("", result.strip().splitlines()[0] if result.strip() else "no reason given")
            logged = self.logged()
            raise CannotRunError(f"{sentence} ({logged})" if logged and logged not in sentence else sentence)
        return result

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def __enter__(self) -> Child:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def logged(self) -> str:
        """Return the first error that onnxruntime logged: it is the cause, what it raised a consequence."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((found.group(1) for line in lines if (found := LOGGED.search(line))), "")

    def _said(self) -> str:
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return self.logged() or (lines[-1] if lines else "it said nothing")


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _require() -> None:
    if missing():
        raise MissingDependencyError(
            "the Qualcomm compiler and emulator (onnxruntime-qnn) are not installed", hint=missing()
        )
