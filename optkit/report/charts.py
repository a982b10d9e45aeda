"""What the report draws: bars over time and bytes, error bars on a logarithmic scale, confidence intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optkit.evaluate.evaluation import Evaluation
    from optkit.report.contents import CostRow, CostSummary

TOP_NODES = 25


TOP_OPS = 16


BOUNDS = ("compute", "memory", "overhead")


@dataclass(frozen=True)
class Row:
    """One bar of a chart over time."""

    label: str
    seconds: float
    nodes: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class Interval:
    """A confidence interval as it is drawn: positions in percent of the axis (worse left), ticks with their labels."""

    low: float
    high: float
    point: float
    zero: float
    ticks: tuple[tuple[float, str], ...]
    words: str


def slowest(cost: CostSummary) -> tuple[list[CostRow], Row | None]:
    """Return the slowest priced nodes, and the sum of all others."""
    priced = sorted((node for node in cost.nodes if node.seconds is not None), key=lambda n: -(n.seconds or 0.0))
    rest = priced[TOP_NODES:]
    return priced[:TOP_NODES], _sum("all others", rest) if rest else None


def by_op_type(cost: CostSummary) -> list[Row]:
    """Return time by operator, slowest first, what is left over summed in the last row."""
    groups: dict[str, list[CostRow]] = {}
    for node in cost.nodes:
        if node.seconds is not None:
            groups.setdefault(node.op_type, []).append(node)
    rows = sorted((_sum(op_type, nodes) for op_type, nodes in groups.items()), key=lambda row: -row.seconds)
    rest = {row.label for row in rows[TOP_OPS:]}
    return rows[:TOP_OPS] + (
        [_sum(f"{len(rest)} others", [node for op in sorted(rest) for node in groups[op]])] if rest else []
    )


def by_bound(cost: CostSummary) -> list[tuple[str, float]]:
    """Return the share of the time that is bound by compute, memory and overhead."""
    total = sum(node.seconds or 0.0 for node in cost.nodes)
    sums = [(bound, sum(n.seconds or 0.0 for n in cost.nodes if n.bound == bound)) for bound in BOUNDS]
    return [(bound, seconds / total) for bound, seconds in sums if seconds]


def _sum(label: str, nodes: Sequence[CostRow]) -> Row:
    return Row(
        label,
        sum(node.seconds or 0.0 for node in nodes),
        len(nodes),
        sum(node.macs for node in nodes),
        sum(node.weight_bytes + node.activation_bytes for node in nodes),
    )


def dtypes(before: Mapping[str, int], after: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Return (dtype, bytes before, bytes after), the largest first."""
    names = sorted({*before, *after}, key=lambda name: (-before.get(name, 0) - after.get(name, 0), name))
    return [(name, before.get(name, 0), after.get(name, 0)) for name in names]


def log_width(change: float | None) -> float:
    """Return the length of an error's bar in percent: one tenth of the width per power of ten, from 1e-9 to 10."""
    if not change:
        return 0.0
    return 100.0 if math.isinf(change) else min(100.0, max(1.0, 10 * (math.log10(change) + 9)))


def is_share(evaluation: Evaluation) -> bool:
    """Whether the metric is a share, of samples or of labels, by the names that `optkit.evaluate.metrics` gives."""
    return re.match(r"top\d|f1", evaluation.metric) is not None


def interval(evaluation: Evaluation) -> Interval | None:
    """Return the gain or loss with its interval as it is drawn, zero always on the axis; None if it is not finite."""
    scale, unit = (100.0, " points") if is_share(evaluation) else (1.0, "")
    gain, low, high = (
        -scale * number + 0.0 for number in (evaluation.drop, evaluation.interval[1], evaluation.interval[0])
    )
    if not all(math.isfinite(number) for number in (gain, low, high)):
        return None
    left, right = min(low, gain, 0.0), max(high, gain, 0.0)
    margin = 0.12 * (right - left) or abs(scale * evaluation.reference) / 100 or 1.0
    left, right = left - margin, right + margin

    def place(number: float) -> float:
        return 100 * (number - left) / (right - left)

    marks = tuple(
        (place(number), signed(number if abs(number) > 1e-9 * margin else 0.0)) for number in ticks(left, right)
    )
    loss = f"{abs(gain):.3g}{unit} {'worse' if gain < 0 else 'better'}" if gain else "No difference"
    span = f"95 % interval from {signed(low)} to {signed(high)}{unit}" if high > low else "in every resample as well"
    words = f"{loss}, {span}. Worse is to the left, better to the right."
    return Interval(place(low), place(high), place(gain), place(0.0), marks, words)


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers within [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [number * step for number in range(first, last + 1)]


def signed(number: float) -> str:
    """Return a number with its sign, and zero without one."""
    return f"{number:+.3g}" if number else "0"
