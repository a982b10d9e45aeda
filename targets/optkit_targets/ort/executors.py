"""Running a package with the onnxruntime of this machine: as deployed, or in the same arithmetic in float."""

from __future__ import annotations

import platform

import onnxruntime as ort

from optkit.package.contract import Artifact, Executor, Run
from optkit.session import Session


class Native(Executor):
    """This machine is the target: all optimizations, its own integer kernels."""

    kind = "native"

    def __init__(self) -> None:
        self.name = f"onnxruntime {ort.__version__} on this machine ({platform.machine()})"

    def load(self, artifact: Artifact) -> Run:
        """Load the model as plain onnxruntime would."""
        return _load(artifact, optimize=True)


class Simulated(Executor):
    """Another machine: every node as written, quantized values in float, never this machine's integer kernels.

    Integer kernels differ between instruction sets (x86 without VNNI saturates where ARM does not), so that those of
    this machine would say nothing about the target's.
    """

    kind = "simulated"

    def __init__(self, notice: str = "") -> None:
        self.name = f"onnxruntime {ort.__version__} on this machine ({platform.machine()}), quantized values in float"
        self.notice = notice

    def load(self, artifact: Artifact) -> Run:
        """Load the model with graph optimizations off."""
        return _load(artifact, optimize=False)


def _load(artifact: Artifact, *, optimize: bool) -> Run:
    session = Session(artifact.directory / artifact.entry, optimize=optimize)
    return lambda samples: [session.run(sample) for sample in samples]
