"""What a target takes of a model and what it does not, without compiling it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from optkit import plugins
from optkit.errors import InputError
from optkit.model.loading import dynamic_dims, load
from optkit.package.contract import Placement
from optkit.package.placing import Placed, place
from optkit.report.contents import Disagreement
from optkit.target import Target


@dataclass(frozen=True)
class Check:
    """Where each node of a model would run on a target.

    Attributes:
        model: The model's file name.
        target: The target's name.
        placements: One entry per node.
        problems: What stands against the model as a whole (dynamic dimensions, opset).
        runtime: The toolchain's runtime, which was asked too; empty where it was not.
        compared: How many nodes it was asked about.
        disagreements: Those that it placed otherwise.
    """

    model: str
    target: str
    placements: tuple[Placement, ...]
    problems: tuple[str, ...]
    runtime: str = ""
    compared: int = 0
    disagreements: tuple[Disagreement, ...] = ()

    @property
    def fallback(self) -> tuple[Placement, ...]:
        """The nodes that the target does not take."""
        return tuple(place for place in self.placements if not place.supported)


def check_model(
    path: Path, target: Target, dims: Mapping[str, int] | None = None, fixed: Mapping[str, float] | None = None
) -> Check:
    """Ask the target's packager about every node of a model.

    Raises:
        InputError: The model cannot be read.
    """
    model = load(path, dims, fixed)
    problems = []
    opset = model.opset_imports.get("", 0)
    if opset > target.opset.max:
        problems.append(f"opset {opset} is newer than {target.opset.max}, the newest that '{target.name}' loads")
    try:
        require_static(model, target)
    except InputError as error:
        problems.append(str(error))
    toolchain = plugins.packager(target.packager)
    placed = Placed(tuple(toolchain.placement(model, target))) if problems else place(model, toolchain, target)
    return Check(
        path.name,
        target.name,
        placed.placements,
        tuple(problems),
        placed.runtime,
        placed.compared,
        placed.disagreements,
    )


def require_static(model: ir.Model, target: Target) -> None:
    """Refuse a model with dynamic dimensions for a target that takes static shapes only.

    Raises:
        InputError: A dimension is open; the message says which, and how to fix it.
    """
    flexible = {str(text).rpartition("=")[0] for text in target.options.get("flexible", ())}
    dims = (
        {name: at for name, at in dynamic_dims(model).items() if name not in flexible} if target.static_shapes else {}
    )
    if dims:
        flags = " ".join(f"--dim {name}=SIZE" for name in dims)
        what = f"target '{target.name}' needs static shapes, and these dimensions are dynamic: {', '.join(dims)}"
        raise InputError(what, hint=f"set {flags}")
