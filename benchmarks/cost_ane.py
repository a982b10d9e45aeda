"""Fit the cost model of Apple's Neural Engines to the times that Apple publishes, and say how far it is off.

    python benchmarks/cost_ane.py REFERENCE [--target apple-a17-ane] [--toml]

REFERENCE is a folder with apple_latency.csv. Only whole networks are timed, on three chips, so that the model is small.
Fitted for all ANEs together: the share of the peak that Apple states (macs_per_cycle in the targets' files) which
convolutions, depthwise convolutions, matrix products and everything else reach, the overhead of a node, and the share
of the memory's peak at which weights stream: each passes once a run, as it is stored. For each chip that is timed: the
launch of a run. With a rate of its own for each chip the networks left out were predicted worse.

A convolution that sums few products for each of its outputs (k) waits for its activations: its rows fall with k as
70 GB/s within the chip would have it. Through main memory activations do not pass: that what exceeds the working set of
2 MB does, as ane-guide says, contradicts these times (FastViT-MA36 would take 9 ms for that alone, and takes 4.6 in
all). The layers are those of ane_layers.csv, which ane_layers.py writes.

Runs are those that Core ML was asked to put on the ANE ("ALL (ANE preferred)", "ANE"): what it did put there Apple does
not say. Sparse weights and palettes for less than a whole weight are left out. The fit is least squares on logarithms
of time, robust against what fits worst, and pulled toward its starting point where the data leave a number open. Errors
come from leaving out one network at a time on all chips, and, harder, a whole family of networks; the bands in the
targets' files are the former. `--toml` prints what stands there.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fitting import band, least_squares, summarize

from optkit.cost.roofline import Kind, Work, price_all
from optkit.target import Kernel, MemoryLevel, Quantity, Target, load_target

CHIPS = {"apple-a14-ane": "A14", "apple-a16-ane": "A16", "apple-a17-ane": "A17 Pro"}
# Of main memory, bytes a second: hardware_targets.csv ("DRAM peak bandwidth"). That of A17 Pro nobody states.
PEAKS = {"apple-a14-ane": 34.1e9, "apple-a16-ane": 51.2e9, "apple-a17-ane": 51.2e9}
UNITS = ("ALL (ANE preferred)", "ANE", "CPU_AND_NE")
# Networks that share most of their layers: leaving out one of them alone says little.
FAMILIES = {
    "FastViT": re.compile(r"FastViT-|MobileCLIP-S\d image"),
    "ViT": re.compile(r"MobileCLIP-(B|L/14) image"),
    "CLIP text": re.compile(r"MobileCLIP-.* text"),
    "MobileOne": re.compile(r"MobileOne-"),
    "MobileNet": re.compile(r"MobileNetv"),
    "MobileViT": re.compile(r"MobileViTv2"),
    "ResNet": re.compile(r"ResNet"),
}
# Towers that stand in several models, by the name that the table of layers has.
SAME = {
    "MobileCLIP-B text": "MobileCLIP-S1 text",
    "MobileCLIP-S2 text": "MobileCLIP-S1 text",
    "MobileCLIP-S4 text": "MobileCLIP-S3 text",
    "MobileCLIP-L/14 text": "MobileCLIP-S3 text",
}
# Apple's names of precisions: the type of the arithmetic, bits of a weight.
PRECISIONS = {
    "fp16": ("float16", 16),
    "w8a16": ("float16", 8),
    "w8a8": ("int8", 8),
    "w8a8 per-channel": ("int8", 8),
    **{f"lut{bits}": ("float16", bits) for bits in (1, 2, 4, 6, 8)},
    **{f"lut{bits} per-tensor": ("float16", bits) for bits in (1, 2, 4, 6, 8)},
}
# The rows of the kernel table, the first that matches: kinds, the smallest k, the efficiency that a fit starts from.
CONV: tuple[Kind, ...] = ("conv", "conv1x1", "conv3x3", "grouped")
ROWS: dict[str, tuple[tuple[Kind, ...], int, float]] = {
    "conv-k257": (CONV, 257, 0.5),
    "conv-k129": (CONV, 129, 0.4),
    "conv-k65": (CONV, 65, 0.2),
    "conv-k33": (CONV, 33, 0.1),
    "conv": (CONV, 0, 0.05),
    "depthwise": (("depthwise",), 0, 0.1),
    "gemm": (("gemm",), 0, 0.3),
    "other": ((), 0, 0.1),
}
# The share is that of the M1 (Anemll/anemll-bench: 60.87 GB/s of 68.2).
OVERHEAD, SHARE, LAUNCH = 1e-6, 0.89, 2e-4
HOLD, HOLD_SHARE, HOLD_LAUNCH = 0.5, 3.0, 0.1  # how strongly a fit is held to its start: 0.5 pulls like four bad runs
HUBER = 0.25  # where the loss of a logarithmic error turns from square to linear
SOURCE = "Apple's own times (coremltools docs-guides@e0e2f42b0b7c; READMEs of ml-mobileone, ml-fastvit, ml-mobileclip)"


@dataclass(frozen=True)
class Run:
    """One network timed on one chip."""

    target: str
    network: str
    precision: str
    seconds: float

    @property
    def family(self) -> str:
        """The networks that it shares most layers with."""
        return next(name for name, pattern in FAMILIES.items() if pattern.match(self.network))


@dataclass(frozen=True)
class Fit:
    """The numbers that a fit gives.

    Attributes:
        efficiency: What each kernel row reaches of the peak that Apple states.
        overhead: Seconds of a node.
        share: Of the memory's peak, at which weights stream.
        launch: Seconds of a run, by target.
    """

    efficiency: dict[str, float]
    overhead: float
    share: float
    launch: dict[str, float]


def read(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@functools.cache
def layer_table() -> tuple[dict[str, str], ...]:
    """Return the rows of ane_layers.csv."""
    return tuple(read(Path(__file__).with_name("ane_layers.csv")))


@functools.cache
def works(network: str, precision: str) -> tuple[Work, ...]:
    """Return a network's layers in a precision of Apple's."""
    dtype, bits = PRECISIONS[precision]
    return tuple(_work(row, dtype, bits) for row in layer_table() if row["model"] == network)


def _work(row: dict[str, str], dtype: str, bits: int) -> Work:
    number = {key: int(row[key] or 0) for key in ("macs", "operations", "weights", "inputs", "outputs", "count")}
    integer = dtype == "int8" and number["macs"] > 0
    return Work(
        name=row["op"],
        op_type=row["op"],
        kind=row["kind"],  # type: ignore[arg-type]
        dtype="int8" if integer else "float16",
        macs=number["macs"],
        operations=number["operations"],
        weight_bytes=number["weights"] * bits // 8,
        input_bytes=number["inputs"] * (1 if integer else 2),
        output_bytes=number["outputs"] * (1 if integer else 2),
        k=int(row["k"]) if row["k"] else None,
        count=number["count"],
    )


def read_runs(folder: Path, names: Collection[str] = tuple(CHIPS)) -> list[Run]:
    """Return every run of a network in the table of layers; equal ones, of models that share a tower, once."""
    networks = {row["model"] for row in layer_table()}
    targets = {CHIPS[name]: name for name in names}
    found: dict[Run, None] = {}
    for row in read(folder / "apple_latency.csv"):
        network = row["model"].replace("MobileCLIP2", "MobileCLIP").replace(" (LT)", "")
        network, precision = SAME.get(network, network), row["weight_precision"]
        if row["chip"] in targets and row["compute_unit"] in UNITS and precision in PRECISIONS and network in networks:
            found[Run(targets[row["chip"]], network, precision, float(row["latency_ms"]) / 1e3)] = None
    return list(found)


class Table:
    """Layers of many runs as arrays, and the model over them.

    Its parameters, as logarithms: the efficiencies, the overhead, the share of memory's peak, each target's launch.
    """

    def __init__(self, runs: Sequence[Run], names: Sequence[str]) -> None:
        self.names = list(names)
        columns: list[tuple[float, ...]] = []
        first: list[int] = []
        targets = {name: load_target(name) for name in names}
        for run in runs:
            first.append(len(columns))
            peaks = targets[run.target].macs_per_cycle
            for work in works(run.network, run.precision):
                peak = peaks[work.dtype].value * targets[run.target].clock_hz.value
                place = (self.names.index(run.target), list(ROWS).index(row_of(work)))
                seconds = ((work.macs + work.operations) / peak, work.weight_bytes / PEAKS[run.target])
                columns.append((*place, *seconds, work.count))
        table = np.array(columns, dtype=float).T
        self.target, self.row = table[:2].astype(int)
        self.compute, self.memory, self.count = table[2:]
        self.first = np.array(first)
        self.measured = np.array([run.seconds for run in runs])

    @property
    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where a fit starts, and how strongly it is held there."""
        hold = [HOLD] * len(ROWS) + [HOLD, HOLD_SHARE] + [HOLD_LAUNCH] * len(self.names)
        return np.log(
            [*(start for _, _, start in ROWS.values()), OVERHEAD, SHARE, *[LAUNCH] * len(self.names)]
        ), np.array(hold)

    def predict(self, logs: np.ndarray) -> np.ndarray:
        """Return the seconds of each run."""
        values, rows = np.exp(logs), len(ROWS)
        busy = np.maximum(self.compute / values[self.row], self.memory / values[rows + 1])
        seconds = (busy + values[rows]) * self.count
        return np.asarray(np.add.reduceat(seconds, self.first) + values[rows + 2 + self.target[self.first]])


def row_of(work: Work) -> str:
    """Return the kernel row that a layer belongs to."""
    return next(row for row, (kinds, k, _) in ROWS.items() if not kinds or (work.kind in kinds and (work.k or 0) >= k))


def fit(runs: Sequence[Run]) -> Fit:
    """Fit all numbers to all runs."""
    names = [name for name in CHIPS if any(run.target == name for run in runs)]
    table = Table(runs, names)
    start, hold = table.start
    held = hold * math.sqrt(len(runs) / 100)

    def errors(logs: np.ndarray) -> np.ndarray:
        off = np.log(table.predict(logs) / table.measured) / HUBER
        robust = HUBER * np.sign(off) * np.sqrt(2 * (np.sqrt(1 + off**2) - 1))  # its square is the pseudo-Huber loss
        return np.concatenate([robust, held * (logs - start)])

    values = np.exp(least_squares(errors, start)).tolist()
    rows = len(ROWS)
    launches = dict(zip(names, values[rows + 2 :], strict=True))
    return Fit(dict(zip(ROWS, values[:rows], strict=True)), values[rows], values[rows + 1], launches)


def number(value: float) -> Quantity:
    """Round a fitted number to what it is worth."""
    return Quantity(value=float(f"{value:.2g}"), source=f"fit of benchmarks/cost_ane.py to {SOURCE}", status="derived")


def bandwidth(found: Fit, name: str) -> Quantity:
    """Return the rate at which a target's weights stream."""
    fitted, unstated = number(found.share * PEAKS[name]), name == "apple-a17-ane"
    peak = f"{PEAKS[name] / 1e9:g} GB/s{', which are unverified' if unstated else ''}"
    source = f"{found.share:.2f} of {peak}: {fitted.source}"
    return Quantity(value=fitted.value, source=source, status="unverified" if unstated else "derived")


def kernels(found: Fit) -> tuple[Kernel, ...]:
    """Return the kernel table of all ANEs."""
    overhead = number(found.overhead)
    indices = Quantity(value=1, source="a few scalars: the time is nothing", status="derived")
    rows = [Kernel(name="indices", dtype="int64", efficiency=indices)]
    for row, (kinds, k, _) in ROWS.items():
        share = number(found.efficiency[row])
        rows.append(Kernel(name=row, kind=kinds, min_k=k or None, efficiency=share, overhead_seconds=overhead))
    return tuple(rows)


def as_target(found: Fit, name: str) -> Target:
    """Return a target with the numbers of a fit, as `--toml` prints them."""
    target = load_target(name)
    speed = MemoryLevel(bytes_per_second=bandwidth(found, name))
    return target.model_copy(
        update={
            "kernel": kernels(found),
            "launch_seconds": number(found.launch[name]),
            "memory": {**target.memory, "dram": speed},
        }
    )


def left_out(runs: Sequence[Run], part: Callable[[Run], str]) -> list[tuple[Run, float]]:
    """Predict every run, through the ordinary cost model, from a fit to the runs of other parts."""
    result = []
    for name in sorted({part(run) for run in runs}):
        found = fit([run for run in runs if part(run) != name])
        for run in runs:
            if part(run) == name and run.target in found.launch:
                result.append((run, price_all(works(run.network, run.precision), as_target(found, run.target))))
    return [(run, report.total.seconds) for run, report in result]


def text(quantity: Quantity | None) -> str:
    """Return a number as it stands in a target's file."""
    assert quantity is not None
    return f'{{ value = {quantity.value:g}, source = "{quantity.source}", status = "{quantity.status}" }}'


def shared_toml(found: Fit) -> str:
    """Return what a fit says of all ANEs as it stands in coreml-ane.toml."""
    lines: list[str] = []
    for row in kernels(found):
        kinds = ", ".join(f'"{kind}"' for kind in row.kind)
        lines += ["", "[[kernel]]", f'name = "{row.name}"', *([f"kind = [{kinds}]"] if kinds else [])]
        lines += [f'dtype = "{row.dtype}"'] if row.dtype else []
        lines += [f"min_k = {row.min_k}"] if row.min_k else []
        lines.append(f"efficiency = {text(row.efficiency)}")
        lines += [f"overhead_seconds = {text(row.overhead_seconds)}"] if row.overhead_seconds else []
    return "\n".join(lines)


def own_toml(
    found: Fit, name: str, networks: Sequence[tuple[Run, float]], families: Sequence[tuple[Run, float]]
) -> str:
    """Return what a fit says of one target as it stands in its file."""
    target = as_target(found, name)
    own = [pair for pair in networks if pair[0].target == name]
    low, median, high = band(own)
    outer = band([pair for pair in families if pair[0].target == name])
    how = f"leaving one network out at a time (a family: {outer[0]} to {outer[2]})"
    return "\n".join(
        [
            f"launch_seconds = {text(target.launch_seconds)}",
            "",
            "[memory.dram]",
            f"bytes_per_second = {text(target.main_memory.bytes_per_second)}",
            "",
            "[error_band]                      # measured / predicted time",
            f"low = {low}",
            f"median = {median}",
            f"high = {high}",
            f"samples = {len(own)}",
            f'source = "python benchmarks/cost_ane.py, {how}, on {SOURCE}"',
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, validate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--target", choices=list(CHIPS), action="append")
    parser.add_argument("--toml", action="store_true", help="print what stands in the targets' files")
    options = parser.parse_args(arguments)
    runs = read_runs(options.reference)
    found = fit(runs)
    networks, families = left_out(runs, lambda run: run.network), left_out(runs, lambda run: run.family)
    print(f"{len(runs)} runs of {len({run.network for run in runs})} networks; measured / predicted")
    print("efficiencies: " + ", ".join(f"{row} {value:.2g}" for row, value in found.efficiency.items()))
    print(f"{found.overhead * 1e6:.2g} us a node; weights stream at {found.share:.2f} of the memory's peak")
    for label, pairs in (("one network left out", networks), ("one family left out", families)):
        summarize(label, pairs)
        for family in FAMILIES:
            summarize(f"  {family}", [pair for pair in pairs if pair[0].family == family])
    if options.toml:
        print(shared_toml(found))
    for name in options.target or found.launch:
        print(f"{name}: {found.launch[name] * 1e6:.2g} us a run")
        summarize("one network left out", [pair for pair in networks if pair[0].target == name])
        summarize("one family left out", [pair for pair in families if pair[0].target == name])
        if options.toml:
            print(own_toml(found, name, networks, families))
    return 0


if __name__ == "__main__":
    sys.exit(main())
