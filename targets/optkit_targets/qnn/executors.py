"""Running a package on the emulator of the Hexagon NPU, and its quantized values in float on this machine's CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort

from optkit.cost.work import describe
from optkit.model.loading import load
from optkit.package.contract import Artifact, Executor, Run
from optkit.session import Session
from optkit.target import Target
from optkit_targets.qnn import runtime
from optkit_targets.qnn.layout import FALLBACK, NO_FALLBACK, Layout

MOST_PROCESSES = 4
SLOW_MACS = 4e9  # a run takes a second for every 1e9 of them, about
Samples = Sequence[Mapping[str, np.ndarray]]


class Htp(Executor):
    """Qualcomm's own emulator of the NPU runs the context binary, or compiles the fallback model where there is none.

    What the package says runs on the NPU runs there, or the session is refused. Its times say nothing about the device.
    """

    kind = "emulated"

    def __init__(self, target: Target) -> None:
        self._target = target
        soc, arch = target.options["soc_model"], target.options["htp_arch"]
        self.name = f"HTP emulator of {runtime.name()} (soc_model {soc}, V{arch}), on this machine"

    def load(self, artifact: Artifact) -> Run:
        """Load the artifact in one process per core of this machine, the second and later ones when they are needed."""
        layout = Layout.read(artifact.directory)
        model, settings = layout.variant(self._target.name)
        plain = artifact.directory / layout.variant(FALLBACK)[0]
        self.slow = sum(work.macs * work.count for work in describe(load(plain))) > SLOW_MACS
        pool = _Pool(artifact.directory / model, self._target, fallback=settings.get(NO_FALLBACK) != "1")
        return pool.run


class _Pool:
    """Emulators of one model, each with a share of the samples."""

    def __init__(self, model: Path, target: Target, *, fallback: bool) -> None:
        self._arguments = model, target
        self._fallback = fallback
        self._emulators = [self._start()]  # at once: what is wrong with the model is to be said on loading

    def run(self, samples: Samples) -> list[dict[str, np.ndarray]]:
        """Run samples and return the outputs of each by name, in their order."""
        count = min(len(samples), MOST_PROCESSES, len(os.sched_getaffinity(0)))
        while len(self._emulators) < count:
            self._emulators.append(self._start())
        shares = [samples[number::count] for number in range(count)]
        with ThreadPoolExecutor(max(1, count)) as threads:
            results = list(threads.map(lambda pair: pair[0].run(pair[1]), zip(self._emulators, shares, strict=False)))
        return [results[number % count][number // count] for number in range(len(samples))]

    def _start(self) -> runtime.Emulator:
        return runtime.Emulator(*self._arguments, fallback=self._fallback)


class Simulated(Executor):
    """The fallback model on this machine's CPU, every node as written: quantized values in float."""

    kind = "simulated"

    def __init__(self, notice: str = "") -> None:
        self.name = f"onnxruntime {ort.__version__} on this machine's CPU, quantized values in float"
        self.notice = notice

    def load(self, artifact: Artifact) -> Run:
        """Load the fallback model with graph optimizations off."""
        model, _ = Layout.read(artifact.directory).variant(FALLBACK)
        session = Session(artifact.directory / model, optimize=False)
        return lambda samples: [session.run(sample) for sample in samples]
