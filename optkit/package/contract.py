"""What a toolchain adds to the core: a packager that writes artifacts and an executor that runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from optkit.errors import InputError
from optkit.evaluate.fidelity import Outputs
from optkit.target import Target

Run = Callable[[Sequence[Mapping[str, np.ndarray]]], Sequence[Outputs]]
"""Runs samples (arrays by input name) and returns the outputs of each by name."""


@dataclass(frozen=True)
class Placement:
    """Where one node runs on the target, and why.

    Attributes:
        node: The node's name.
        op_type: Its operator.
        device: Where it runs, in the packager's words (``cpu``, ``npu``).
        precision: The arithmetic it runs in there (``int8``, ``float32``), or ``-`` for data movement.
        supported: False where the target does not take the node and something else must.
        reason: The rule that decided.
    """

    node: str
    op_type: str
    device: str
    precision: str
    supported: bool
    reason: str


@dataclass(frozen=True)
class Fact:
    """One thing that a toolchain's compiler says of what it made; the same for the same inputs.

    Attributes:
        subject: What it is about, as ``snapdragon-8gen3-npu``.
        name: As ``VTCM`` or ``spilled``.
        value: In words, with its unit.
    """

    subject: str
    name: str
    value: str


@dataclass(frozen=True)
class Stage:
    """What a toolchain's compiler spent wall time on. Never written into a package."""

    subject: str
    name: str
    seconds: float


@dataclass(frozen=True)
class Artifact:
    """What the device loads.

    Attributes:
        directory: Folder of the package.
        entry: The file to load, relative to it.
        files: Every file that the device needs, relative to it, the entry included; their sum is the reported size.
        manifest: Keys for the package's ``manifest.json`` that the artifact's own loader wants.
        also: The files that each further target of the package needs, by its name.
        facts: What the toolchain's compiler says of the artifact.
        stages: What that compiler spent its time on.
        notices: What the user should know of how it was made.
        missing: What is not in the package because something optional is not installed, and how to install it.
        network: An ONNX file of the package with every node as written, where ``entry`` hides them.
    """

    directory: Path
    entry: str
    files: tuple[str, ...]
    manifest: Mapping[str, Any]
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()
    stages: tuple[Stage, ...] = ()
    notices: tuple[str, ...] = ()
    missing: str = ""
    network: str = ""

    @property
    def plain(self) -> str:
        """The ONNX file to look into: `network`, or the entry itself."""
        return self.network or self.entry


class Executor(ABC):
    """Runs an artifact here.

    Attributes:
        name: What ran, in full (``onnxruntime 1.31.1 aarch64 under qemu -cpu cortex-a53``). Reports print it.
        kind: ``native`` (this machine is the target), ``emulated`` (the target's instructions or the vendor's
            emulator), or ``simulated`` (another machine, the same arithmetic in float).
        notice: Why a better executor was not used and what would make it available, or empty.
        slow: Whether a report should run only a few samples on it; known when an artifact is loaded.
    """

    name: str
    kind: Literal["native", "emulated", "simulated"]
    notice: str = ""
    slow: bool = False

    @abstractmethod
    def load(self, artifact: Artifact) -> Run:
        """Load the artifact once; the function returned runs samples on it, as often as it is called."""


@dataclass(frozen=True)
class Setup:
    """What ``optkit setup TARGET`` would install, where, and how large it is; ``install`` does it.

    ``install`` takes a function that reports progress as one line of text.
    """

    summary: str
    directory: Path
    download_bytes: int
    installed_bytes: int
    installed: bool
    install: Callable[[Callable[[str], None]], None]


class Packager(ABC):
    """Writes a model in the form that a device's runtime loads, and runs it as close to the device as can be here.

    Attributes:
        name: What targets call it by.
        shares_packages: Whether one package can serve several targets whose pipelines are the same.
        options: The keys of a target's ``options`` that a user may set for one compilation.
    """

    name: ClassVar[str]
    shares_packages: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def package(self, model: ir.Model, target: Target, directory: Path, also: Sequence[Target] = ()) -> Artifact:
        """Write the artifact into the existing, empty ``directory``.

        Args:
            model: The model, as the passes left it.
            target: The target.
            directory: The package's folder.
            also: Further targets that the package is to serve, where ``shares_packages`` says that it can.
        """

    @abstractmethod
    def open(self, directory: Path, manifest: Mapping[str, Any]) -> Artifact:
        """Return the artifact in a package's directory, from its parsed manifest."""

    @abstractmethod
    def executors(self, target: Target) -> list[Executor]:
        """Return what can run the artifact here, closest to the device first; never empty."""

    @abstractmethod
    def placement(self, model: ir.Model, target: Target) -> list[Placement]:
        """Return where each node of the model would run."""

    def observed(self, model: ir.Model, target: Target) -> Mapping[str, str] | None:
        """Return the device that the toolchain's own runtime gives each node to, by node name.

        `placement` is held against it. Nodes that the runtime folds away are left out. None where `placement` asks the
        runtime itself, or where it is not installed here.

        Raises:
            CannotRunError: The runtime refuses the model.
        """
        return None

    @property
    def runtime(self) -> str:
        """The runtime that `observed` asks, with its version, as reports name it."""
        return ""

    def setup(self, target: Target) -> Setup:
        """Return what must be installed once to emulate ``target`` here.

        Raises:
            InputError: Nothing has to be.
        """
        raise InputError(f"target '{target.name}' needs no set-up")
