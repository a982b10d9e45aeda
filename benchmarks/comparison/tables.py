"""The results as tables: for a terminal, as Markdown, and as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from comparison.methods import OURS, Method
from comparison.models import Prepared
from comparison.processes import Cost
from comparison.scoring import Accuracy, Score

SAME_SIZE = 1.05  # a peer's file this much larger than ours still counts as no larger

SMALL_METRIC = 0.01  # below it four decimals say nothing

LEGEND = """\
drop        how much worse the metric is than the float model's, as it runs on this machine, with its 95 % interval
            (paired bootstrap); 'same' where the interval contains 0
dB float    signal over error of the worst output, every value computed in float: higher is better, 20 is usually enough
dB here     the same with the kernels that run on this machine
agree, KL   share of equal decisions with the float model; Kullback-Leibler divergence of the scores
int         layers that really run in integer kernels here, of all convolutions and matrix products
s, CPU s    wall time and processor time of the whole process that quantized; MB: its peak memory
^           the tool refused the model as it is; it was given a newer opset by onnx's own converter"""

HEADER = ("tool", "way", "bytes", "of fp32", "drop", "dB float", "dB here", "agree", "KL", "int", "s", "CPU s", "MB")


@dataclass(frozen=True)
class Result:
    """What one method made of one model; ``score`` is None where it failed, and ``cost.error`` says why.

    Attributes:
        model: The model's name.
        method: The method.
        cost: What its process took.
        score: How good its file is.
        raised: Whether the tool was given the model in a newer opset, because it refused it as it is.
    """

    model: str
    method: Method
    cost: Cost
    score: Score | None
    raised: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {**asdict(self), "method": {**asdict(self.method), "options": list(self.method.options)}}


def row(result: Result, subject: Prepared) -> list[str]:
    """Return the result as cells of `HEADER`; of a failure only the sentence."""
    mark = " ^" if result.raised else ""
    name = [result.method.tool, result.method.name + mark]
    score = result.score
    if score is None:
        return [*name, f"failed: {result.cost.error}"]
    accuracy = score.accuracy
    decides = accuracy is None or accuracy.metric not in {"mse", "psnr"}  # else what looks like scores is none
    agreement, divergence = (score.deployed.top1_agreement, score.kl) if decides else (None, None)
    return [
        *name,
        str(score.bytes),
        f"{score.bytes / subject.bytes:.1%}",
        "-" if accuracy is None else _drop(accuracy),
        decibels(score.simulated.sqnr_db),
        decibels(score.deployed.sqnr_db),
        "-" if agreement is None else f"{agreement:.1%}",
        "-" if divergence is None else f"{divergence:.1e}",
        f"{score.integer_layers}/{subject.layers}",
        f"{result.cost.seconds:.1f}",
        f"{result.cost.cpu_seconds:.1f}",
        f"{result.cost.memory_bytes / 1e6:.0f}",
    ]


def _drop(accuracy: Accuracy) -> str:
    digits = "+.4f" if abs(accuracy.reference) > SMALL_METRIC else "+.1e"
    drop, low, high = (f"{number + 0.0:{digits}}" for number in (accuracy.drop, accuracy.low, accuracy.high))
    same = " same" if accuracy.low <= 0 <= accuracy.high else ""
    return f"{drop} [{low}, {high}]{same}"


def decibels(value: float) -> str:
    """Return a ratio in dB with one digit."""
    return f"{value:.1f}" if math.isfinite(value) else ("exact" if value > 0 else "broken")


def heading(subject: Prepared, task: str, results: Sequence[Result]) -> str:
    """Return the line above a model's table."""
    text = f"{subject.name}, {task}: {len(subject.samples)} samples, fp32 {subject.bytes} bytes"
    measured = next((r.score.accuracy for r in results if r.score and r.score.accuracy), None)
    return text + (f", fp32 {measured.metric} {measured.reference:.4g}" if measured else "")


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows in columns; a short row's last cell runs on."""
    rows = list(rows)
    width = [max(len(r[i]) for r in rows if len(r) == len(rows[0])) for i in range(len(rows[0]))]
    width[:2] = [max(len(r[i]) for r in rows) for i in range(2)]
    return "\n".join(
        "  ".join(
            cell if i >= 2 and len(r) < len(rows[0]) else cell.ljust(width[i]) if i < 2 else cell.rjust(width[i])
            for i, cell in enumerate(r)
        ).rstrip()
        for r in rows
    )


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as a Markdown table."""
    rows = list(rows)
    lines = ["| " + " | ".join([*r, *[""] * (len(rows[0]) - len(r))]) + " |" for r in rows]
    return "\n".join([lines[0], "|" + "|".join(["---"] * 2 + ["---:"] * (len(rows[0]) - 2)) + "|", *lines[1:]])


SUMMARY = (
    *("task", "our way", "models", "dB here: mean", "worst", "dB float: mean", "worst"),
    *("wins", "smaller than all", "time: median", "worst"),
)


def summarize(results: Sequence[Result]) -> list[Sequence[str]]:
    """Return one row for each task and way of ours: our dB minus the best peer's of no larger size, and the times."""
    rows: list[Sequence[str]] = [SUMMARY]
    ours = dict.fromkeys(result.method for result in results if result.method.tool == OURS)
    for method in ours:
        here, floats, times, alone = [], [], [], 0
        for mine in (r for r in results if r.method == method and r.score):
            peers = [r for r in results if r.model == mine.model and r.method.task == method.task and r.score]
            peers = [r for r in peers if r.method.tool != OURS]
            if not peers:
                continue
            times.append(mine.cost.seconds / min(peer.cost.seconds for peer in peers))
            small = [r.score for r in peers if r.score and r.score.bytes <= SAME_SIZE * mine.score.bytes]
            alone += not small
            if small:
                here.append(_minus(mine.score.deployed.sqnr_db, [s.deployed.sqnr_db for s in small]))
                floats.append(_minus(mine.score.simulated.sqnr_db, [s.simulated.sqnr_db for s in small]))
        if times:
            wins = f"{sum(difference > 0 for difference in here)} of {len(here)}"
            figures = [str(len(times)), *_mean_worst(here), *_mean_worst(floats), wins, str(alone)]
            spent = [f"{sorted(times)[len(times) // 2]:.1f}x", f"{max(times):.1f}x"]
            rows.append([method.task, method.name, *figures, *spent])
    return rows


def _minus(mine: float, theirs: Sequence[float]) -> float:
    best = max(theirs)
    return 0.0 if mine == best else mine - best


def _mean_worst(differences: Sequence[float]) -> list[str]:
    finite = [difference for difference in differences if math.isfinite(difference)]
    if not finite:
        return ["-", "-"]
    return [f"{sum(finite) / len(finite):+.1f}", f"{min(differences):+.1f}"]
