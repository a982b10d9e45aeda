"""The report: everything a compilation found out, as plain data that prints, and that JSON and HTML carry."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

from optkit.evaluate.fidelity import Fidelity

if TYPE_CHECKING:
    from optkit.evaluate.evaluation import Evaluation
    from optkit.package.contract import Fact, Stage
    from optkit.pipeline import Remark, Step
    from optkit.report.inspection import ModelFacts


@dataclass(frozen=True)
class Execution:
    """One way in which the artifact was run here, and how its outputs agree with the original's.

    Attributes:
        executor: What ran, in full.
        kind: ``native``, ``emulated`` or ``simulated``.
        fidelity: Outputs against the original model run by onnxruntime with optimizations off.
        accuracy: The metrics measured there; empty without labelled data and on slow executors.
    """

    executor: str
    kind: str
    fidelity: Fidelity
    accuracy: tuple[Evaluation, ...] = ()


@dataclass(frozen=True)
class CostRow:
    """What one piece of work costs on the target.

    Attributes:
        name: The node.
        op_type: Its operator.
        dtype: The arithmetic it runs in.
        macs: Multiply-accumulates.
        weight_bytes: Bytes of its constants.
        activation_bytes: Bytes of activations read and written.
        intensity: Operations per byte read or written; None where no byte moves.
        seconds: Predicted time; None where the op has no cost model, and ``note`` says why.
        bound: What the time is spent on: ``compute``, ``memory``, ``overhead``, ``free``, or ``unpriced``.
        kernel: The row of the target's kernel table that priced it.
        note: Assumptions.
    """

    name: str
    op_type: str
    dtype: str
    macs: int
    weight_bytes: int
    activation_bytes: int
    intensity: float | None
    seconds: float | None
    bound: str
    kernel: str
    note: str = ""


@dataclass(frozen=True)
class CostSummary:
    """Totals of a model on a target; times are predictions, ``low`` and ``high`` span the target's error band.

    Attributes:
        macs: Multiply-accumulates of one run.
        int8_macs: Those of them done in 8-bit integers.
        weight_bytes: Bytes of weights read, tied tensors once.
        activation_bytes: Bytes of activations read and written.
        seconds: Predicted time of one run.
        low_seconds: Prediction times the 10th centile of measured / predicted; None where no band is known.
        high_seconds: The same with the 90th.
        joules: Predicted energy above idle; None where the target has no figure.
        peak_activation_bytes: High-water mark of the arena plan.
        unpriced: Ops without a cost model and how often they occur.
        tag: ``predicted``, ``emulated`` or ``measured``.
        band_source: What the error band was measured on.
        shapes: The input shapes that were priced.
    """

    macs: int
    int8_macs: int
    weight_bytes: int
    activation_bytes: int
    seconds: float
    low_seconds: float | None
    high_seconds: float | None
    joules: float | None
    peak_activation_bytes: int
    unpriced: Mapping[str, int]
    tag: str
    band_source: str
    shapes: Mapping[str, Sequence[int]]
    nodes: tuple[CostRow, ...] = ()


@dataclass(frozen=True)
class RemarkGroup:
    """Remarks of one pass that say the same; numbers and names in the message are replaced by ``…`` to group them."""

    pass_name: str
    kind: str
    message: str
    count: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """What is not in the precision asked for, for one reason.

    Attributes:
        reason: Why, in the words of the pass that left it.
        weight_bytes: Bytes that the weights would take in float32.
        macs: Multiply-accumulates.
        count: How many nodes.
        nodes: The first of them.
    """

    reason: str
    weight_bytes: int
    macs: int
    count: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """How much of the model is in the precision asked for; see `optkit.report.coverage`.

    Attributes:
        weights: Share of the weights, by element, that are stored in the bits asked for or fewer; 1 without weights.
        macs: Share of the multiply-accumulates computed so; 1 where there are none.
        elements_by_bits: How many weights are stored in how many bits.
        left: What is not covered, the most bytes first.
        tables: Share of the weights in tables that rows are picked from, which have more bits than asked for but are
            integers of 8 bits: those take part in no product, and the limit on coverage counts them.
    """

    weights: float
    macs: float
    elements_by_bits: Mapping[int, int] = field(default_factory=dict)
    left: tuple[Left, ...] = ()
    tables: float = 0.0


@dataclass(frozen=True)
class Deployment:
    """The package as deployed beside the same arithmetic simulated, over the same samples.

    Deployed is the runtime with its optimizations and kernels, on the target or its emulator; simulated is every node
    as written, in float. The difference is what the runtime's kernels cost: saturation, rounding of activations.

    Attributes:
        kind: The executor that stands for the device: ``native`` or ``emulated``; empty where none was run.
        deployed: Its outputs against the original's.
        simulated: The simulated outputs against the original's, on those samples.
        difference_db: SQNR deployed minus SQNR simulated; None where one is not known or both are not finite.
        between: The deployed outputs against the simulated ones, on those samples.
    """

    kind: str = ""
    deployed: Fidelity | None = None
    simulated: Fidelity | None = None
    difference_db: float | None = None
    between: Fidelity | None = None


@dataclass(frozen=True)
class DeviceShare:
    """How much of a model runs on one device: nodes, and their share and that of the multiply-accumulates, 0 to 1."""

    device: str
    nodes: int
    node_share: float
    macs_share: float


@dataclass(frozen=True)
class Disagreement:
    """A node that the toolchain's runtime gave to another device than predicted, and why that was predicted."""

    node: str
    op_type: str
    predicted: str
    observed: str
    reason: str


@dataclass(frozen=True)
class Fallback:
    """Nodes that the target does not take, for one reason: how many, the first of them, and their operators."""

    reason: str
    count: int
    nodes: tuple[str, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True)
class PlacementSummary:
    """Where the nodes of the compiled model run.

    Attributes:
        devices: The devices, the one with the most nodes first; empty where it could not be asked.
        fallback: What the target does not take, the most frequent reason first.
        layers: Convolutions, matrix products and recurrences; None where it could not be asked.
        integer_layers: Those of them that end in integer kernels.
        runtime: The runtime that placed the nodes, with its version; empty: predicted.
        compared: How many nodes it was asked about.
        disagreements: Those that it placed otherwise than predicted.
    """

    devices: tuple[DeviceShare, ...] = ()
    fallback: tuple[Fallback, ...] = ()
    layers: int | None = None
    integer_layers: int | None = None
    runtime: str = ""
    compared: int = 0
    disagreements: tuple[Disagreement, ...] = ()


@dataclass(frozen=True)
class FurtherTarget:
    """Another device that the same package serves: size of what it loads, and what a run costs there."""

    name: str
    summary: str
    artifact_bytes: int
    seconds: float
    low_seconds: float | None
    high_seconds: float | None
    joules: float | None


@dataclass(frozen=True)
class Gate:
    """A limit, what was reached, and whether it is met; a most, but for ``coverage`` and ``agreement`` a least."""

    name: str
    limit: float
    actual: float | None
    met: bool


@dataclass(frozen=True)
class Report:
    """Everything a compilation found out. No wall-clock times, paths or dates: same inputs, same report."""

    optkit: str
    model: str
    model_sha256: str
    target: str
    target_summary: str
    precision: str
    package: str
    source: ModelFacts
    compiled: ModelFacts
    source_bytes: int
    artifact_bytes: int
    steps: tuple[Step, ...]
    remarks: tuple[RemarkGroup, ...]
    coverage: Coverage
    executions: tuple[Execution, ...]
    accuracy: tuple[Evaluation, ...]
    cost_before: CostSummary
    cost: CostSummary
    calibration: str
    gates: tuple[Gate, ...] = ()
    notices: tuple[str, ...] = ()
    deployment: Deployment = Deployment()
    placement: PlacementSummary = PlacementSummary()
    facts: tuple[Fact, ...] = ()
    stages: tuple[Stage, ...] = ()
    also: tuple[FurtherTarget, ...] = ()
    missing: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data; infinite SQNR (bit-equal outputs) becomes None."""
        table: dict[str, Any] = plain(self)
        del table["stages"]
        for step in table["steps"]:
            del step["seconds"]
        return table

    def to_json(self) -> bytes:
        """Return the report as JSON, the same bytes for the same report."""
        return dump_json(self.to_dict())


def plain(value: Any) -> Any:
    """Return dataclasses, mappings and sequences as JSON-ready data; numbers that JSON lacks become None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "item"):  # a NumPy scalar
        return plain(value.item())
    return value


def dump_json(value: Any) -> bytes:
    """Return JSON text, indented, keys in their own order, ending in a newline."""
    return (json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def group_remarks(remarks: Sequence[Remark]) -> tuple[RemarkGroup, ...]:
    """Group remarks that differ only in numbers and quoted names, most frequent first."""
    groups: dict[tuple[str, str, str], list[Remark]] = {}
    for remark in remarks:
        pattern = re.sub(r"'[^']*'|\d+(\.\d+)?(e[+-]?\d+)?", "…", remark.message)
        groups.setdefault((remark.pass_name, remark.kind, pattern), []).append(remark)
    rows = []
    for (name, kind, pattern), members in groups.items():
        message = members[0].message if len({member.message for member in members}) == 1 else pattern
        nodes = tuple(dict.fromkeys(member.node for member in members))[:5]
        rows.append(RemarkGroup(name, kind, message, len(members), nodes))
    return tuple(sorted(rows, key=lambda row: (row.kind, -row.count)))
