"""Packages for ONNX Runtime on a CPU, in the layout of its model packages.

    manifest.json                 components: {"model": "model"}, and optkit's own keys
    model/component.json          variants: {"cpu": ...}, session options
    model/cpu/model.onnx          loads with plain onnxruntime too
    model/cpu/model.onnx.data     only where the weights exceed 1.5 GB

The schema is that of microsoft/onnxruntime, model_package/README.md; the ``ort`` slot that of
onnxruntime/core/session/model_package/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optkit.errors import InputError
from optkit.model.loading import save
from optkit.package.contract import Artifact, Executor, Packager, Placement, Setup
from optkit.target import Target
from optkit_targets.ort.constraints import check_opset
from optkit_targets.ort.emulator import Emulated, emulation
from optkit_targets.ort.executors import Native, Simulated
from optkit_targets.ort.install import plan
from optkit_targets.ort.placement import place

COMPONENT, VARIANT, MODEL_FILE = "model", "cpu", "model.onnx"
THREADS = "session.intra_op_num_threads"


class OrtPackager(Packager):
    """Writes ONNX files that ONNX Runtime's CPU execution provider loads."""

    name = "ort"

    def package(self, model: ir.Model, target: Target, directory: Path, also: Sequence[Target] = ()) -> Artifact:
        """Write the model and its component description; opset and IR version are those of the model.

        Raises:
            InputError: The model's opset is newer than the target's runtime loads.
        """
        check_opset(model, target)
        folder = directory / COMPONENT / VARIANT
        folder.mkdir(parents=True)
        written = save(model, folder / MODEL_FILE)
        # No "device": onnxruntime 1.31 finds no match for it in a session with default options.
        variant = {
            "variant_directory": VARIANT,
            "ep": "CPUExecutionProvider",
            "executor_info": {"ort": {"model_file": MODEL_FILE, "session_options": session_options(target)}},
        }
        component = {"component_name": COMPONENT, "variants": {VARIANT: variant}}
        description = directory / COMPONENT / "component.json"
        description.write_text(json.dumps(component, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files = sorted(path.relative_to(directory).as_posix() for path in written)
        manifest = {"schema_version": "1.0", "layout": "portable", "components": {COMPONENT: COMPONENT}}
        return Artifact(directory, written[0].relative_to(directory).as_posix(), tuple(files), manifest)

    def open(self, directory: Path, manifest: Mapping[str, Any]) -> Artifact:
        """Find the model of a package.

        Raises:
            InputError: The component description or the model is missing or damaged.
        """
        description = directory / COMPONENT / "component.json"
        try:
            component = json.loads(description.read_text(encoding="utf-8"))
            variant = component["variants"][VARIANT]
            entry = description.parent / variant["variant_directory"] / variant["executor_info"]["ort"]["model_file"]
        except FileNotFoundError as error:
            raise InputError("the package has no component.json", where=str(description)) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError("the component description is damaged", where=str(description)) from error
        if not entry.resolve().is_relative_to(directory.resolve()) or not entry.is_file():
            raise InputError(f"the package's model '{entry.name}' is missing", where=str(description))
        files = sorted(p.relative_to(directory).as_posix() for p in entry.parent.iterdir() if p.is_file())
        keys = {key: value for key, value in manifest.items() if key != "additional_metadata"}
        return Artifact(directory, entry.relative_to(directory).as_posix(), tuple(files), keys)

    def executors(self, target: Target) -> list[Executor]:
        """Return this machine where it is the target, else the emulator if it is set up, and float arithmetic last."""
        if target.executor.get("native"):
            return [Native(), Simulated()]
        found = emulation(target)
        if isinstance(found, Emulated):
            return [found, Simulated()]
        return [Simulated(notice=found)]

    def placement(self, model: ir.Model, target: Target) -> list[Placement]:
        """Return each node's arithmetic as onnxruntime's own graph optimizer decides it."""
        return place(model, target)

    def setup(self, target: Target) -> Setup:
        """Return the aarch64 system that packages for the target run in here.

        Raises:
            InputError: The target needs no emulator, or names one that is not known.
        """
        if "emulator" not in target.executor:
            return super().setup(target)
        return plan(target)


def session_options(target: Target) -> dict[str, str]:
    """Return the session options that go with the model, as onnxruntime's configuration keys.

    Threads are the target's cores, except where the target is whatever machine compiles: a package says the same
    wherever it was written. ``options.session_options`` of the target adds to them.
    """
    threads = {} if target.detect else {THREADS: str(int(target.cores.value))}
    return {**threads, **{key: str(value) for key, value in target.options.get("session_options", {}).items()}}
