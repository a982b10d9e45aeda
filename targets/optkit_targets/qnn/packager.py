"""Packages for the Hexagon NPU: a context binary for every chip, and the quantized model to compile on the device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optkit.errors import VerificationError
from optkit.model.loading import save
from optkit.package.contract import Artifact, Executor, Fact, Packager, Placement
from optkit.report.units import size
from optkit.session import CannotRunError
from optkit.target import Target
from optkit_targets.qnn import runtime
from optkit_targets.qnn.binary import BinaryFacts
from optkit_targets.qnn.executors import Htp, Simulated
from optkit_targets.qnn.interface import interface
from optkit_targets.qnn.layout import COMPONENT, FALLBACK, NO_FALLBACK, Layout
from optkit_targets.qnn.placement import place

CPU, NPU = "cpu", "npu"


class QnnPackager(Packager):
    """Writes what ONNX Runtime's QNN execution provider and Qualcomm's own runtime load."""

    name = "qnn"
    shares_packages = True

    def package(self, model: ir.Model, target: Target, directory: Path, also: Sequence[Target] = ()) -> Artifact:
        """Write the fallback model, and for every target a context binary where the compiler is installed.

        Raises:
            VerificationError: The compiler refuses the model, or takes no node of it.
        """
        (directory / COMPONENT / FALLBACK).mkdir(parents=True)
        fallback = [
            path.relative_to(directory).as_posix()
            for path in save(model, directory / COMPONENT / FALLBACK / "model.onnx")
        ]
        whole = all(each.device == NPU for each in self.placement(model, target))
        variants: dict[str, tuple[str, Mapping[str, str]]] = {FALLBACK: (fallback[0], {NO_FALLBACK: str(int(whole))})}
        files: dict[str, tuple[str, ...]] = {}
        facts: list[Fact] = []
        wanted = bool(target.options.get("context_binary"))
        for device in (target, *also) if wanted and not runtime.missing() else ():
            folder = directory / COMPONENT / device.name
            folder.mkdir()
            try:
                with runtime.compiled(model, device, fallback=True) as made:
                    on_npu = set(made.assignment.values()) == {runtime.NPU}
                    if runtime.NPU not in made.assignment.values():
                        raise CannotRunError(made.complaint or "it takes no node of the model")
                    written = [shutil.copy(path, folder / path.name) for path in (made.wrapper, *made.binaries)]
                    facts += [fact for each in made.facts for fact in _facts(device.name, each)]
            except CannotRunError as error:
                what = f"{runtime.name()} does not compile the model for '{device.name}': {error.what}"
                hint = "see which nodes it takes with 'optkit check', or pass --no-context-binary"
                raise VerificationError(what, hint=hint) from error
            files[device.name] = tuple(Path(path).relative_to(directory).as_posix() for path in written)
            variants[device.name] = files[device.name][0], {NO_FALLBACK: str(int(on_npu))}
        options = {device.name: runtime.provider_options(device) for device in (target, *also)}
        Layout(variants).write(directory, {name: options.get(name, options[target.name]) for name in variants})
        (directory / "interface.json").write_text(json.dumps(interface(model), indent=2) + "\n", encoding="utf-8")
        manifest = {"schema_version": "1.0", "layout": "portable", "components": {COMPONENT: COMPONENT}}
        entry, *others = files.get(target.name, tuple(fallback))
        notices, missing = _explain(wanted)
        return Artifact(
            directory,
            entry,
            (entry, *others),
            manifest,
            also={device.name: files.get(device.name, tuple(fallback)) for device in also},
            facts=tuple(facts),
            notices=notices,
            missing=missing,
        )

    def open(self, directory: Path, manifest: Mapping[str, Any]) -> Artifact:
        """Find the variants of a package.

        Raises:
            InputError: The component's description or a model is missing or damaged.
        """
        layout = Layout.read(directory)
        named = manifest.get("additional_metadata", {}).get("optkit", {})
        files = {
            name: tuple(
                sorted(p.relative_to(directory).as_posix() for p in (directory / model).parent.iterdir() if p.is_file())
            )
            for name, (model, _) in layout.variants.items()
        }
        target = str(named.get("target"))
        entry = layout.variant(target)[0]
        keys = {key: value for key, value in manifest.items() if key != "additional_metadata"}
        own = files.get(target) or files[FALLBACK]
        return Artifact(directory, entry, (entry, *(file for file in own if file != entry)), keys)

    def executors(self, target: Target) -> list[Executor]:
        """Return the emulator where it is installed, and float arithmetic last."""
        if runtime.missing():
            return [Simulated(notice=f"not run on the NPU's emulator: to have it, {runtime.INSTALL}")]
        return [Htp(target), Simulated()]

    def placement(self, model: ir.Model, target: Target) -> list[Placement]:
        """Return each node's unit as the constraints predict it."""
        return place(model, target)

    def observed(self, model: ir.Model, target: Target) -> Mapping[str, str] | None:
        """Return each node's unit as onnxruntime's QNN execution provider decides it, where that is installed.

        Raises:
            CannotRunError: It refuses the model.
        """
        if runtime.missing():
            return None
        taken = runtime.assignment(model, target)
        return {node: NPU if provider == runtime.NPU else CPU for node, provider in taken.items()}

    @property
    def runtime(self) -> str:
        """The execution provider and its version."""
        return "" if runtime.missing() else runtime.name()


def _explain(wanted: bool) -> tuple[tuple[str, ...], str]:
    """Return what to say where no context binary was made: a notice where none was asked for, else what is missing."""
    adds = "a context binary, which loads on the phone at once, and runs on Qualcomm's emulator here"
    if not runtime.missing():
        return () if wanted else (
            "written without a context binary: the device compiles the model when it loads it",
        ), ""
    if wanted:
        return (), f"a context binary: the compiler (onnxruntime-qnn) is not installed; {runtime.INSTALL}"
    return (f"written without a context binary; the extra adds {adds}: {runtime.INSTALL}",), ""


def _facts(target: str, found: BinaryFacts) -> list[Fact]:
    """Return what a context binary says of itself that matters to a user."""
    facts = [Fact(target, "compiled by QNN", found.sdk)] if found.sdk else []
    for graph in found.graphs:
        figures = {
            "VTCM": graph.vtcm_bytes,
            "spilled to main memory": graph.spill_fill_bytes,
            "constants": graph.constant_bytes,
            "inputs and outputs": graph.io_bytes,
        }
        facts += [Fact(target, name, size(value)) for name, value in figures.items() if value is not None]
    return facts
