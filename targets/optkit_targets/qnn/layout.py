"""Where everything lies in a package for Snapdragon: ONNX Runtime's model package with one variant per chip.

manifest.json                       components: {"model": "model"}, and optkit's own keys
README.md                           how to run it on a phone
interface.json                      inputs and outputs: names, shapes, types, scales
model/component.json                variants, best first in each: its file and its options
model/<target>/context.onnx         an EPContext node for every part on the NPU
model/<target>/context_qnn.bin      the context binary
model/qdq/model.onnx                the same network to compile on the device, or to run on a CPU
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optkit.errors import InputError

COMPONENT, FALLBACK = "model", "qdq"
NO_FALLBACK = "session.disable_cpu_ep_fallback"


@dataclass(frozen=True)
class Layout:
    """The variants of a package: by name the model file, relative to the package, and the options of its session."""

    variants: Mapping[str, tuple[str, Mapping[str, str]]]

    def variant(self, name: str) -> tuple[str, Mapping[str, str]]:
        """Return the model file and session options of a target's variant; the fallback's where it has none."""
        return self.variants.get(name) or self.variants[FALLBACK]

    def write(self, directory: Path, providers: Mapping[str, Mapping[str, str]]) -> None:
        """Write the component's description; ``providers``: options of the execution provider, by variant."""
        variants: dict[str, Any] = {}
        for name, (model, options) in self.variants.items():
            ort = {
                "model_file": Path(model).name,
                "session_options": dict(options),
                "provider_options": providers[name],
            }
            variants[name] = {
                "variant_directory": Path(model).parent.name,
                "ep": "QNNExecutionProvider",
                "executor_info": {"ort": ort},
            }
        component = {"component_name": COMPONENT, "variants": variants}
        text = json.dumps(component, indent=2, sort_keys=True) + "\n"
        (directory / COMPONENT / "component.json").write_text(text, encoding="utf-8")

    @staticmethod
    def read(directory: Path) -> Layout:
        """Read the component's description.

        Raises:
            InputError: It is missing or damaged, or names a file that is not in the package.
        """
        path = directory / COMPONENT / "component.json"
        try:
            variants = json.loads(path.read_text(encoding="utf-8"))["variants"]
            found = {
                str(name): (
                    f"{COMPONENT}/{variant['variant_directory']}/{variant['executor_info']['ort']['model_file']}",
                    {str(k): str(v) for k, v in variant["executor_info"]["ort"]["session_options"].items()},
                )
                for name, variant in variants.items()
            }
        except FileNotFoundError as error:
            raise InputError("the package has no component.json", where=str(path)) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError("the component description is damaged", where=str(path)) from error
        for model, _ in found.values():
            file = directory / model
            if not file.resolve().is_relative_to(directory.resolve()) or not file.is_file():
                raise InputError(f"the package's model '{file.name}' is missing", where=str(path))
        if FALLBACK not in found:
            raise InputError(f"the package has no variant '{FALLBACK}'", where=str(path))
        return Layout(found)
