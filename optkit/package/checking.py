"""What a target takes of a model and what it does not, without compiling it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from optkit import plugins
from optkit.cost.arithmetic import COMPUTE
from optkit.errors import InputError
from optkit.model.loading import dynamic_dims, load
from optkit.package.contract import Packager, Placement
from optkit.session import CannotRunError
from optkit.target import Target


@dataclass(frozen=True)
class Check:
    """Where each node of a model would run on a target.

    Attributes:
        model: The model's file name.
        target: The target's name.
        placements: One entry per node.
        problems: What stands against the model as a whole (dynamic dimensions, opset).
    """

    model: str
    target: str
    placements: tuple[Placement, ...]
    problems: tuple[str, ...]

    @property
    def fallback(self) -> tuple[Placement, ...]:
        """The nodes that the target does not take."""
        return tuple(place for place in self.placements if not place.supported)


def check_model(path: Path, target: Target, dims: Mapping[str, int] | None = None) -> Check:
    """Ask the target's packager about every node of a model.

    Raises:
        InputError: The model cannot be read.
    """
    model = load(path, dims)
    problems = []
    opset = model.opset_imports.get("", 0)
    if opset > target.opset.max:
        problems.append(f"opset {opset} is newer than {target.opset.max}, the newest that '{target.name}' loads")
    try:
        require_static(model, target)
    except InputError as error:
        problems.append(str(error))
    placements = plugins.packager(target.packager).placement(model, target)
    return Check(path.name, target.name, tuple(placements), tuple(problems))


def integer_layers(model: ir.Model, toolchain: Packager, target: Target) -> tuple[int, int] | None:
    """Return how many convolutions, matrix products and recurrences a model has, and how many end in integer kernels.

    None where the toolchain cannot tell, because its runtime does not load the model here.
    """
    try:
        places = toolchain.placement(model, target)
    except CannotRunError:
        return None
    layers = [place for place in places if place.op_type in COMPUTE and place.device]
    return len(layers), sum(place.precision.startswith("int") for place in layers)


def require_static(model: ir.Model, target: Target) -> None:
    """Refuse a model with dynamic dimensions for a target that takes static shapes only.

    Raises:
        InputError: A dimension is open; the message says which, and how to fix it.
    """
    dims = dynamic_dims(model) if target.static_shapes else {}
    if dims:
        flags = " ".join(f"--dim {name}=SIZE" for name in dims)
        what = f"target '{target.name}' needs static shapes, and these dimensions are dynamic: {', '.join(dims)}"
        raise InputError(what, hint=f"set {flags}")
