"""What a piece of work costs on a target: one roofline over plain descriptions, with or without a graph behind them.

    seconds = max(operations / (peak * efficiency), bytes / bandwidth) + overhead

peak = cores * clock * MACs per cycle (Williams, Waterman, Patterson: "Roofline", CACM 2009). Every figure made here is
a prediction and is tagged so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from optkit.target import Kernel, Target

Tag = Literal["measured", "emulated", "predicted"]
Bound = Literal["compute", "memory", "overhead", "free"]

# conv1x1: every kernel axis is 1 (a GEMM). conv3x3: 3x3, stride 1, no dilation (what Winograd takes). conv: any other
# with one group. grouped: 1 < groups < channels. gemm: MatMul, Gemm, attention, recurrent cells. view: no byte moves.
Kind = Literal[
    "conv", "conv1x1", "conv3x3", "grouped", "depthwise", "gemm",
    "elementwise", "normalization", "reduction", "pooling", "movement", "view",
]  # fmt: skip

# Share of the peak where no row of the target's kernel table matches: the middle of what tuned CPU kernels reach (0.2
# for depthwise, 0.8 for large GEMM). A node priced with it says so.
DEFAULT_EFFICIENCY = 0.5

# A width that the target gives no peak for is priced at the next one that its vectors can hold.
_STAND_IN = {
    "uint8": "int8", "int4": "int8", "uint4": "int8", "int2": "int8", "uint2": "int8", "bool": "int8",
    "uint16": "int16", "int16": "float32", "bfloat16": "float16", "float16": "float32",
    "int32": "float32", "uint32": "float32", "int64": "float32", "uint64": "float32", "float64": "float32",
}  # fmt: skip

# Where there is no float32 either, floats are computed, and kept, in half the width.
_NARROWER = {"float32": "float16"}


@dataclass(frozen=True)
class Work:
    """One piece of work, described by numbers alone.

    Attributes:
        name: The node or layer.
        op_type: Its operator.
        kind: The class of kernel that runs it.
        dtype: The arithmetic it runs in; 8 and 16 bits are named ``int8`` and ``int16`` whatever the sign.
        macs: Multiply-accumulates of convolutions and matrix products, each run. One MAC is two FLOP.
        operations: All other arithmetic, in operations of one vector lane, each run.
        weight_bytes: Bytes of stored constants, counted at the first work that uses them.
        weight_read_bytes: Bytes of constants read each run; None: ``weight_bytes``.
        integer_read_bytes: Of those, the bytes of integers, which stay as wide where floats are kept in half the width.
        input_bytes: Bytes of activations read.
        output_bytes: Bytes of activations written.
        m: Rows of the matrix product: output pixels or tokens, batch included.
        n: Its columns: output channels of one group.
        k: Its reduction.
        count: How often it runs (the trip count of a loop).
        covers: The nodes this work stands for: itself, and those fused into it.
        unpriced: Why it has no cost model, or empty. All numbers are then 0, and mean nothing.
        note: An assumption that went into the description.
    """

    name: str
    op_type: str
    kind: Kind
    dtype: str = "float32"
    macs: int = 0
    operations: int = 0
    weight_bytes: int = 0
    weight_read_bytes: int | None = None
    integer_read_bytes: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    m: int | None = None
    n: int | None = None
    k: int | None = None
    count: int = 1
    covers: tuple[str, ...] = ()
    unpriced: str = ""
    note: str = ""

    @property
    def activation_bytes(self) -> int:
        """Activations read and written in one run."""
        return self.input_bytes + self.output_bytes

    @property
    def read_bytes(self) -> int:
        """Constants read in one run."""
        return self.weight_bytes if self.weight_read_bytes is None else self.weight_read_bytes


@dataclass(frozen=True)
class Cost:
    """What work costs; costs add up.

    Attributes:
        macs: Multiply-accumulates.
        weight_bytes: Stored constants.
        activation_bytes: Activations read and written, wherever they lie.
        memory_bytes: Bytes moved to and from main memory.
        seconds: Time, the pieces running one after another.
        joules: Energy above idle, or None where the target does not say what it draws.
        tag: Where the figures come from; a sum is as certain as its least certain part.
    """

    macs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0
    joules: float | None = 0.0
    tag: Tag = "measured"

    def __add__(self, other: Cost) -> Cost:
        certainty: tuple[Tag, ...] = ("measured", "emulated", "predicted")
        return Cost(
            self.macs + other.macs,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.memory_bytes + other.memory_bytes,
            self.seconds + other.seconds,
            None if self.joules is None or other.joules is None else self.joules + other.joules,
            max(self.tag, other.tag, key=certainty.index),
        )


@dataclass(frozen=True)
class NodeCost:
    """The cost of one piece of work and how it came about.

    Attributes:
        work: What was priced.
        cost: Its cost over all runs.
        bound: What the time is spent on; ``free`` where there is none.
        intensity: MACs and other operations per byte read or written, wherever it lies; None where no byte moves.
        kernel: The row of the kernel table that matched, or ``default``.
        note: Assumptions of the description and of the price.
    """

    work: Work
    cost: Cost
    bound: Bound
    intensity: float | None
    kernel: str
    note: str = ""


@dataclass(frozen=True)
class CostReport:
    """The prices of a list of work.

    Attributes:
        nodes: Priced work, in the given order.
        unpriced: Work without a cost model; ``total`` does not contain it.
        total: The sum over ``nodes``, and the target's ``launch_seconds`` once.
        range_seconds: 10th and 90th centile of the time, from the target's error band; None without one.
    """

    nodes: tuple[NodeCost, ...]
    unpriced: tuple[Work, ...]
    total: Cost
    range_seconds: tuple[float, float] | None


def price_all(works: Iterable[Work], target: Target) -> CostReport:
    """Price every work on ``target``; what has no cost model is listed apart, never taken as zero."""
    priced: list[NodeCost] = []
    unpriced: list[Work] = []
    for work in works:
        node = price(work, target)
        if isinstance(node, NodeCost):
            priced.append(node)
        else:
            unpriced.append(node)
    total = sum((node.cost for node in priced), Cost())
    if target.launch_seconds is not None and priced:
        seconds = target.launch_seconds.value
        total += Cost(seconds=seconds, joules=_joules(seconds, 0, target), tag="predicted")
    band = target.error_band
    times = (total.seconds * band.low, total.seconds * band.high) if band is not None else None
    return CostReport(tuple(priced), tuple(unpriced), total, times)


def price(work: Work, target: Target) -> NodeCost | Work:
    """Return the cost of one piece of work, or a copy of the work itself with ``unpriced`` set where it has none.

    Weights are read from main memory in every run: all of a model's weights together do not fit in a cache, and each
    is used once before the others evict it. Activations are taken to stay in the last cache, where the work before
    left them, as long as this work's inputs and outputs fit in it together; else both go through main memory.
    """
    if work.unpriced:
        return work
    peak, stand_in = _peak(work.dtype, target)
    operations = work.macs + work.operations
    if operations and not peak:
        return replace(work, unpriced=f"target '{target.name}' gives no peak for {work.dtype} arithmetic")
    row = match_kernel(work, target.kernel)
    efficiency = row.efficiency.value if row is not None else DEFAULT_EFFICIENCY
    overhead = row.overhead_seconds.value if row is not None and row.overhead_seconds is not None else 0.0
    if work.kind == "view":
        overhead = 0.0
    halved = 2 if stand_in and _NARROWER.get(work.dtype) == stand_in else 1
    integers = min(work.integer_read_bytes, work.read_bytes)
    read, moved = integers + (work.read_bytes - integers) // halved, work.activation_bytes // halved
    memory_bytes = read + (0 if moved <= cache_bytes(target) else moved)
    bandwidth = target.main_memory.bytes_per_second
    compute_seconds = operations / (peak * efficiency) if operations else 0.0
    memory_seconds = memory_bytes / bandwidth.value if bandwidth is not None else 0.0
    seconds = (max(compute_seconds, memory_seconds) + overhead) * work.count
    cost = Cost(
        work.macs * work.count,
        work.weight_bytes,
        work.activation_bytes * work.count,
        memory_bytes * work.count,
        seconds,
        _joules(seconds, memory_bytes * work.count, target),
        "predicted",
    )
    notes = [work.note]
    if stand_in:
        notes.append(f"no peak for {work.dtype}: priced as {stand_in}")
    if row is None and operations:
        notes.append(f"no kernel row matches: efficiency {DEFAULT_EFFICIENCY:g} assumed")
    return NodeCost(
        work,
        cost,
        _bound(compute_seconds, memory_seconds, overhead),
        operations / (read + moved) if read + moved else None,
        row.name if row is not None else "default",
        "; ".join(filter(None, notes)),
    )


def integer_bits(target: Target) -> frozenset[int]:
    """Return the widths of integers that the target's operators compute in: those it has a peak for, and biases' 32."""
    return frozenset({32, *(int(name[3:]) for name in target.macs_per_cycle if name.startswith("int"))})


def match_kernel(work: Work, table: Sequence[Kernel]) -> Kernel | None:
    """Return the first row whose every condition holds for ``work``; a condition that is not given always holds."""
    for row in table:
        if (
            (not row.op or work.op_type in row.op)
            and (not row.kind or work.kind in row.kind)
            and (row.dtype is None or row.dtype == work.dtype)
            and (row.max_m is None or (work.m is not None and work.m <= row.max_m))
            and (row.min_k is None or (work.k is not None and work.k >= row.min_k))
        ):
            return row
    return None


def cache_bytes(target: Target) -> float:
    """Return the size of the last cache: the outermost level before main memory that has a size, or 0."""
    sizes = [level.bytes.value for level in list(target.memory.values())[:-1] if level.bytes is not None]
    return sizes[-1] if sizes else 0.0


def _peak(dtype: str, target: Target) -> tuple[float, str]:
    """Return the peak operations per second for ``dtype``, and the width that stood in for it, if one had to."""
    name = dtype
    while name not in target.macs_per_cycle:
        narrower = _NARROWER.get(name, "")
        if narrower in target.macs_per_cycle:
            name = narrower
        elif name in _STAND_IN:
            name = _STAND_IN[name]
        else:
            return 0.0, ""
    per_cycle = target.macs_per_cycle[name].value
    return target.cores.value * target.clock_hz.value * per_cycle, "" if name == dtype else name


def _bound(compute_seconds: float, memory_seconds: float, overhead_seconds: float) -> Bound:
    busy = max(compute_seconds, memory_seconds)
    if busy == overhead_seconds == 0:
        return "free"
    if overhead_seconds > busy:
        return "overhead"
    return "compute" if compute_seconds >= memory_seconds else "memory"


def _joules(seconds: float, memory_bytes: float, target: Target) -> float | None:
    """Return watts x seconds, plus main memory's energy per byte where the target's power does not include it."""
    energy = target.energy
    if energy.active_watts is None:
        return None
    per_byte = energy.dram_joules_per_byte.value if energy.dram_joules_per_byte is not None else 0.0
    return energy.active_watts.value * seconds + per_byte * memory_bytes


def macs_by_dtype(works: Iterable[Work]) -> dict[str, int]:
    """Return the MACs of all runs by the arithmetic they run in, most first: how much of a model is integer."""
    sums: dict[str, int] = {}
    for work in works:
        if work.macs:
            sums[work.dtype] = sums.get(work.dtype, 0) + work.macs * work.count
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
