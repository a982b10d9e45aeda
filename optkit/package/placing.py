"""Where the nodes of a model run: as the packager predicts it, and as the toolchain's own runtime decides it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from optkit.cost.arithmetic import COMPUTE
from optkit.package.contract import Packager, Placement
from optkit.report.contents import CostRow, DeviceShare, Disagreement, Fallback, PlacementSummary
from optkit.session import CannotRunError
from optkit.target import Target

NAMED = 5  # nodes that are listed for one reason


@dataclass(frozen=True)
class Placed:
    """The nodes of a model and where they run.

    Attributes:
        placements: One entry per node, as predicted.
        observed: The device that the runtime gave each node to, by node name; None where it was not asked.
        runtime: The runtime, with its version; empty where it was not asked.
    """

    placements: tuple[Placement, ...]
    observed: Mapping[str, str] | None = None
    runtime: str = ""

    @property
    def compared(self) -> int:
        """How many nodes the runtime was asked about."""
        return sum(place.node in (self.observed or {}) for place in self.placements)

    @property
    def disagreements(self) -> tuple[Disagreement, ...]:
        """The nodes that the runtime gave to another device than predicted."""
        seen = self.observed or {}
        return tuple(
            Disagreement(place.node, place.op_type, place.device, seen[place.node], place.reason)
            for place in self.placements
            if seen.get(place.node, place.device) != place.device
        )

    def device(self, place: Placement) -> str:
        """Return where a node runs: what the runtime decided comes before the prediction."""
        return (self.observed or {}).get(place.node, place.device)


def place(model: ir.Model, toolchain: Packager, target: Target) -> Placed:
    """Predict where each node runs, and ask the runtime where it is installed.

    Raises:
        CannotRunError: The toolchain's runtime does not load the model here.
    """
    placements = tuple(toolchain.placement(model, target))
    observed = toolchain.observed(model, target)
    return Placed(placements, observed, toolchain.runtime if observed is not None else "")


def summarize_placement(
    model: ir.Model, toolchain: Packager, target: Target, rows: Iterable[CostRow]
) -> PlacementSummary:
    """Return how a compiled model spreads over the devices of a target, by nodes and by multiply-accumulates.

    Args:
        model: The model as packaged.
        toolchain: The target's packager.
        target: The target.
        rows: What each piece of work costs, with its node's name.
    """
    try:
        placed = place(model, toolchain, target)
    except CannotRunError:
        return PlacementSummary()
    macs = {row.name: row.macs for row in rows}
    every = sum(macs.values())
    nodes: dict[str, int] = {}
    products: dict[str, int] = {}
    left: dict[str, list[Placement]] = {}
    for node in placed.placements:
        device = placed.device(node)
        nodes[device] = nodes.get(device, 0) + 1
        products[device] = products.get(device, 0) + macs.get(node.node, 0)
        if not node.supported or device != node.device:
            reason = (
                node.reason
                if not node.supported
                else f"{placed.runtime} does not take it, though nothing is known against it"
            )
            left.setdefault(reason, []).append(node)
    layers = [node for node in placed.placements if node.op_type in COMPUTE and node.device]
    return PlacementSummary(
        devices=tuple(
            DeviceShare(device, count, count / len(placed.placements), products[device] / every if every else 0.0)
            for device, count in sorted(nodes.items(), key=lambda item: -item[1])
        ),
        fallback=tuple(
            Fallback(
                reason,
                len(group),
                tuple(node.node for node in group[:NAMED]),
                tuple(sorted({node.op_type for node in group})),
            )
            for reason, group in sorted(left.items(), key=lambda item: -len(item[1]))
        ),
        layers=len(layers),
        integer_layers=sum(node.precision.startswith("int") for node in layers),
        runtime=placed.runtime,
        compared=placed.compared,
        disagreements=placed.disagreements,
    )
