"""Packages for the Hexagon NPU: a context binary for every chip, and the quantized model to compile on the device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optkit.errors import VerificationError
from optkit.model.loading import infer_shapes, save
from optkit.package.contract import Artifact, Executor, Fact, Packager, Placement, Stage
from optkit.report.units import size
from optkit.session import CannotRunError
from optkit.target import Target
from optkit_targets.qnn import runtime
from optkit_targets.qnn.binary import BinaryFacts
from optkit_targets.qnn.executors import Htp, Simulated
from optkit_targets.qnn.interface import interface
from optkit_targets.qnn.layout import COMPONENT, FALLBACK, NO_FALLBACK, Layout
from optkit_targets.qnn.placement import devices, place
from optkit_targets.qnn.readme import ContextFiles, PackageFiles, readme

NPU = "npu"


class QnnPackager(Packager):
    """Writes what ONNX Runtime's QNN execution provider and Qualcomm's own runtime load."""

    name = "qnn"
    shares_packages = True
    options = frozenset({"context_binary"})

    def package(self, model: ir.Model, target: Target, directory: Path, also: Sequence[Target] = ()) -> Artifact:
        """Write the fallback model, and for every target a context binary where the compiler is installed.

        Raises:
            VerificationError: The compiler refuses the model, or takes no node of it.
        """
        (directory / COMPONENT / FALLBACK).mkdir(parents=True)
        saved = save(model, directory / COMPONENT / FALLBACK / "model.onnx")
        fallback = tuple(path.relative_to(directory).as_posix() for path in saved)
        wanted = bool(target.options.get("context_binary"))
        devices = (target, *also)
        made = {each.name: _compile(model, each, directory) for each in devices if wanted and not runtime.missing()}
        whole = all(each.files.whole for each in made.values()) if made else self._whole(model, target)
        contexts = tuple(
            made[each.name].files if each.name in made else _uncompiled(each, fallback[0], whole) for each in devices
        )
        _write_description(model, directory, devices, contexts, fallback[0], whole, made)
        manifest = {"schema_version": "1.0", "layout": "portable", "components": {COMPONENT: COMPONENT}}
        notices, missing = _explain(wanted)
        loaded = {
            each.name: (context.load, *(context.binaries or fallback[1:]))
            for each, context in zip(devices, contexts, strict=True)
        }
        return Artifact(
            directory,
            contexts[0].load,
            loaded.pop(target.name),
            manifest,
            also=loaded,
            facts=tuple(fact for each in made.values() for fact in each.facts),
            stages=tuple(stage for each in made.values() for stage in each.stages),
            notices=notices,
            missing=missing,
            network=fallback[0],
        )

    def _whole(self, model: ir.Model, target: Target) -> bool:
        """Whether the NPU runs the whole model, as its runtime says where it is installed."""
        seen = self.observed(model, target)
        units = seen.values() if seen is not None else [each.device for each in self.placement(model, target)]
        return all(unit == NPU for unit in units)

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
        network = layout.variant(FALLBACK)[0]
        return Artifact(directory, entry, (entry, *(file for file in own if file != entry)), keys, network=network)

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
        return devices(runtime.assignment(model, target))

    @property
    def runtime(self) -> str:
        """The execution provider and its version."""
        return "" if runtime.missing() else runtime.name()


@dataclass(frozen=True)
class _Made:
    files: ContextFiles
    facts: tuple[Fact, ...]
    stages: tuple[Stage, ...]
    sdk: str


def _compile(model: ir.Model, target: Target, directory: Path) -> _Made:
    """Compile a model for one chip into its folder of the package.

    Raises:
        VerificationError: The compiler refuses the model, takes no node of it, or made a binary for another chip.
    """
    folder = directory / COMPONENT / target.name
    folder.mkdir()
    try:
        with runtime.compiled(model, target, fallback=True) as made:
            if runtime.NPU not in made.assignment.values():
                raise CannotRunError(made.complaint or "it takes no node of the model")
            strange = [each for each in made.facts if each.soc_model not in (None, target.options["soc_model"])]
            if strange:
                raise CannotRunError(f"the binary is for soc_model {strange[0].soc_model}")
            for path in (made.wrapper, *made.binaries):
                shutil.copy(path, folder / path.name)
    except CannotRunError as error:
        what = f"{runtime.name()} does not compile the model for '{target.name}': {error.what}"
        hint = "see which nodes it takes with 'optkit check', or pass --no-context-binary"
        raise VerificationError(what, hint=hint) from error
    files = ContextFiles(
        target=target.name,
        chip=target.summary,
        soc_model=int(target.options["soc_model"]),
        htp_arch=int(target.options["htp_arch"]),
        load=f"{COMPONENT}/{target.name}/{made.wrapper.name}",
        binaries=tuple(f"{COMPONENT}/{target.name}/{path.name}" for path in made.binaries),
        whole=set(made.assignment.values()) == {runtime.NPU},
    )
    build = next((each.sdk for each in made.facts if each.sdk), "")
    sdk = ".".join(build.removeprefix("v").split(".")[:3])
    facts = tuple(fact for each in made.facts for fact in _facts(target.name, each))
    if made.cleared:
        facts += (Fact(target.name, "uninitialized words cleared", str(made.cleared)),)
    return _Made(files, facts, tuple(Stage(target.name, each.name, each.seconds) for each in made.stages), sdk)


def _uncompiled(target: Target, model: str, whole: bool) -> ContextFiles:
    soc, arch = int(target.options["soc_model"]), int(target.options["htp_arch"])
    return ContextFiles(target=target.name, chip=target.summary, soc_model=soc, htp_arch=arch, load=model, whole=whole)


def _write_description(
    model: ir.Model,
    directory: Path,
    devices: Sequence[Target],
    contexts: Sequence[ContextFiles],
    fallback: str,
    whole: bool,
    made: Mapping[str, _Made],
) -> None:
    """Write what tells people and runtimes what is in the package."""
    typed = model.clone()
    infer_shapes(typed)  # the last pass may have left types out
    edges = interface(typed)
    variants = {FALLBACK: (fallback, {NO_FALLBACK: str(int(whole))})}
    providers = {FALLBACK: runtime.provider_options(devices[0])}
    for device, context in zip(devices, contexts, strict=True):
        if context.binaries:
            variants[device.name] = context.load, {NO_FALLBACK: str(int(context.whole))}
            providers[device.name] = runtime.provider_options(device)
    Layout(variants).write(directory, providers)
    (directory / "interface.json").write_text(json.dumps(edges, indent=2) + "\n", encoding="utf-8")
    sdk = next((each.sdk for each in made.values()), "")
    described = PackageFiles("Model", tuple(contexts), fallback, edges, sdk)
    (directory / "README.md").write_text(readme(described), encoding="utf-8")


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
