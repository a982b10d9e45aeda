"""Fit the kernel tables of the ARM targets to ncnn's published timings, and say how far predictions are off.

    python benchmarks/cost.py REFERENCE [--target cortex-a53] [--toml]

REFERENCE is a folder with ncnn_layers.csv, ncnn_measurements.csv and sbc_memory_bandwidth.csv. One efficiency per kind
of kernel and one overhead per call are fitted, in the logarithm of time, to runs on all cores of the target's core
type. Errors come from leaving one network (and its int8 twin) out at a time: it is predicted by a fit that has not seen
it. What `--toml` prints stands in the targets' files.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from optkit.cost.arithmetic import PER_INPUT, PER_OUTPUT
from optkit.cost.roofline import Kind, NodeCost, Work, price
from optkit.target import Kernel, Quantity, Target, load_target

CORES = {"cortex-a53": "Cortex-A53", "cortex-a72": "Cortex-A72", "cortex-a76": "Cortex-A76"}
# A row of the kernel table each; what has no row of its own goes with "other".
ROWS: dict[str, tuple[Kind, ...]] = {
    "conv1x1": ("conv1x1",),
    "conv3x3": ("conv3x3",),
    "conv": ("conv", "grouped"),
    "depthwise": ("depthwise",),
    "gemm": ("gemm",),
    "other": (),
}
ONNX_NAME = {
    "ReLU": "Relu", "BinaryOp": "Add", "Eltwise": "Add", "Swish": "Swish", "GELU": "Gelu", "Sigmoid": "Sigmoid",
    "Softmax": "Softmax", "BatchNorm": "BatchNormalization", "LayerNorm": "LayerNormalization", "Concat": "Concat",
    "Slice": "Slice", "Crop": "Slice", "Permute": "Transpose", "ShuffleChannel": "Transpose", "Reduction": "ReduceMean",
    "Input": "Identity", "Split": "Identity", "Noop": "Identity", "Reshape": "Reshape", "Flatten": "Reshape",
    "MemoryData": "Constant", "PriorBox": "Constant",
}  # fmt: skip
# A sum of squared log errors leaves kinds that hardly occur undetermined: this pulls them toward the others.
RIDGE = 1.0
COMMIT = "Tencent/ncnn benchmark/README.md@a4d2ea1d4422"


def layer(row: dict[str, str], element_bytes: int, dtype: str) -> Work:
    """Return one line of ncnn_layers.csv as work; its M (channels) is our n, its N (pixels) our m."""
    number = {key: int(row[key] or 0) for key in ("in_elems", "out_elems", "macs", "weights", "bias", "ops", "groups")}
    if row["int8"] == "1":
        element_bytes, dtype = 1, "int8"
    kind, operations = "elementwise", 0
    op = ONNX_NAME.get(row["type"], row["type"])
    if row["type"] in ("Convolution", "ConvolutionDepthWise"):
        kind = "conv"
        if number["groups"] > 1:
            kind = "depthwise" if row["groups"] in (row["cin"], row["cout"]) else "grouped"
        elif row["kh"] == row["kw"] == "1":
            kind = "conv1x1"
        elif (row["kh"], row["kw"], row["sh"], row["sw"], row["dil"]) == ("3", "3", "1", "1", "1"):
            kind = "conv3x3"
    elif number["macs"]:
        kind = "gemm"
    elif op in PER_OUTPUT:
        kind, operations = PER_OUTPUT[op][0], PER_OUTPUT[op][1] * number["out_elems"]
    elif op in PER_INPUT:
        kind, operations = PER_INPUT[op][0], PER_INPUT[op][1] * number["in_elems"]
    else:  # Pooling, Interp, LRN, DetectionOutput: what the table counts, or an operation per output
        operations = number["ops"] or number["out_elems"]
    moves = kind != "view"
    return Work(
        name=row["layer"],
        op_type=row["type"],
        kind=kind,  # type: ignore[arg-type]
        dtype=dtype,
        macs=number["macs"],
        operations=operations,
        weight_bytes=number["weights"] * element_bytes + number["bias"] * 4,
        input_bytes=number["in_elems"] * element_bytes * moves,
        output_bytes=number["out_elems"] * element_bytes * moves,
        m=int(row["N"]) if row["N"] else None,
        n=int(row["M"]) if row["M"] else None,
        k=int(row["K"]) if row["K"] else None,
    )


@dataclass(frozen=True)
class Run:
    """One network timed on one board, and the board as a target."""

    board: str
    network: str
    family: str
    precision: str
    seconds: float
    target: Target
    works: tuple[Work, ...]


def read(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def runs_for(name: str, folder: Path) -> list[Run]:
    """Return every run on all cores of one cluster of the target's core type, networks of the layer table only."""
    base = load_target(name)
    layers = defaultdict(list)
    for row in read(folder / "ncnn_layers.csv"):
        layers[row["network"]].append(row)
    bandwidths = read(folder / "sbc_memory_bandwidth.csv")
    found = []
    for row in read(folder / "ncnn_measurements.csv"):
        whole = row["cpu"] == CORES[name] and row["gpu_device"] == "-1" and row["threads"] == row["cores_on_cluster"]
        if not whole or row["network"] not in layers:
            continue
        floats = "float16" if "float16" in base.macs_per_cycle else "float32"  # ncnn computes in fp16 where it can
        works = tuple(layer(r, 2 if floats == "float16" else 4, floats) for r in layers[row["network"]])
        board = f"{row['soc']} {row['clock_ghz']} GHz {row['run_id']}"
        seconds = float(row["min_ms"]) / 1e3
        target = as_target(base, row, bandwidths)
        found.append(Run(board, row["network"], row["family"], row["precision"], seconds, target, works))
    return found


def as_target(base: Target, row: dict[str, str], bandwidths: Sequence[dict[str, str]]) -> Target:
    """Return the target with one board's clock, cores and, where sbc-bench has the SoC, bandwidth (twice memcpy)."""
    soc = {"BCM2710A1": "RP3A0", "BCM2711B0": "BCM2711", "Allwinner H616": "H616"}.get(row["soc"], row["soc"])
    speeds = [float(b["memcpy_MBps"]) for b in bandwidths if soc in b["device"] and b["memcpy_MBps"].isdigit()]
    update: dict[str, object] = {
        "cores": Quantity(value=float(row["threads"]), source=COMMIT),
        "clock_hz": Quantity(value=float(row["clock_ghz"]) * 1e9, source=COMMIT),
    }
    if speeds:
        last, main = list(base.memory.items())[-1]
        speed = Quantity(value=2e6 * statistics.median(speeds), source="sbc-bench")
        update["memory"] = {**base.memory, last: main.model_copy(update={"bytes_per_second": speed})}
    return base.model_copy(update=update)


@dataclass
class Table:
    """Layers of many runs as arrays, so that a fit can evaluate the roofline thousands of times.

    Attributes:
        row: For each layer, the index of its kernel row; -1 for views, which cost nothing.
        compute: Its seconds at efficiency 1.
        memory: Its seconds of main memory.
        first: Where each run begins.
        measured: Seconds of each run.
    """

    rows: list[tuple[str, str]]
    row: np.ndarray = field(init=False)
    compute: np.ndarray = field(init=False)
    memory: np.ndarray = field(init=False)
    first: np.ndarray = field(init=False)
    measured: np.ndarray = field(init=False)

    def fill(self, runs: Sequence[Run]) -> Table:
        """Price every layer at efficiency 1 and without overhead."""
        unit = (Kernel(name="unit", efficiency=Quantity(value=1, source="unit")),)
        row, compute, memory, first = [], [], [], []
        index = {name: i for i, name in enumerate(self.rows)}
        for run in runs:
            first.append(len(row))
            target = run.target.model_copy(update={"kernel": unit})
            speed = target.main_memory.bytes_per_second
            peaks = {d: q.value * target.cores.value * target.clock_hz.value for d, q in target.macs_per_cycle.items()}
            for work in run.works:
                cost = price(work, target)
                assert isinstance(cost, NodeCost)
                assert speed is not None
                row.append(-1 if work.kind == "view" else index[row_of(work)])
                compute.append((work.macs + work.operations) / peaks[work.dtype])
                memory.append(cost.cost.memory_bytes / speed.value)
        self.row, self.compute, self.memory = np.array(row), np.array(compute), np.array(memory)
        self.first, self.measured = np.array(first), np.array([run.seconds for run in runs])
        return self

    def predict(self, efficiency: np.ndarray, overhead: float) -> np.ndarray:
        """Return the seconds of each run."""
        busy = np.maximum(self.compute / efficiency[self.row], self.memory) + overhead
        return np.add.reduceat(np.where(self.row < 0, 0.0, busy), self.first)


def row_of(work: Work) -> tuple[str, str]:
    """Return the kernel row, (name, dtype), that a layer belongs to."""
    return next((row for row, kinds in ROWS.items() if work.kind in kinds), "other"), work.dtype


def fit(runs: Sequence[Run]) -> tuple[dict[tuple[str, str], float], float]:
    """Return an efficiency per kernel row and the overhead per call, by pattern search over their logarithms."""
    rows = sorted({row_of(work) for run in runs for work in run.works if work.kind != "view"})
    table = Table(rows).fill(runs)
    groups = [np.array([i for i, r in enumerate(rows) if r[1] == dtype]) for dtype in sorted({r[1] for r in rows})]

    def loss(logs: np.ndarray) -> float:
        residual = np.log(table.measured / table.predict(np.exp(logs[:-1]), math.exp(logs[-1])))
        spread = sum(float(((logs[g] - logs[g].mean()) ** 2).sum()) for g in groups)
        return float((residual**2).sum()) + RIDGE * spread

    logs = np.array([math.log(0.3)] * len(rows) + [math.log(1e-5)])
    best, step = loss(logs), 0.5
    while step > 1e-3:
        improved = False
        for axis in range(len(logs)):
            for sign in (step, -step):
                trial = logs.copy()
                trial[axis] += sign
                if (value := loss(trial)) < best:
                    logs, best, improved = trial, value, True
        step = step if improved else step / 2
    return dict(zip(rows, np.exp(logs[:-1]).tolist(), strict=True)), math.exp(logs[-1])


def kernels(efficiency: dict[tuple[str, str], float], overhead: float) -> tuple[Kernel, ...]:
    """Return fitted numbers as rows of a kernel table, rounded to what they are worth."""

    def number(value: float, source: str = f"fit of benchmarks/cost.py to {COMMIT}: ncnn's kernels") -> Quantity:
        return Quantity(value=float(f"{value:.2g}"), source=source, status="derived")

    # Index arithmetic on shapes is not worth a parallel region.
    table = [Kernel(name="indices", dtype="int64", efficiency=number(1, "a few scalars: the time is nothing"))]
    for (row, dtype), value in sorted(efficiency.items(), key=lambda i: (list(ROWS).index(i[0][0]), i[0][1])):
        name, kinds, cost = f"{dtype}-{row}", ROWS[row], number(overhead)
        if row == "other":  # whatever the type: the table of layers times it in floats only
            table.append(Kernel(name=row, efficiency=number(value), overhead_seconds=cost))
            continue
        table.append(Kernel(name=name, kind=kinds, dtype=dtype, efficiency=number(value), overhead_seconds=cost))
        if dtype == "float16":
            same = number(value, f"taken over from {name}: where there is fp16, ncnn's timings are in it")
            table.append(
                Kernel(name=f"float32-{row}", kind=kinds, dtype="float32", efficiency=same, overhead_seconds=cost)
            )
    return tuple(table)


def predicted(run: Run, table: tuple[Kernel, ...]) -> float:
    """Return the seconds that the ordinary cost model gives a run."""
    target = run.target.model_copy(update={"kernel": table})
    costs = [price(work, target) for work in run.works]
    return sum(cost.cost.seconds for cost in costs if isinstance(cost, NodeCost))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def left_out(runs: Sequence[Run]) -> list[tuple[Run, float]]:
    """Predict every run from a fit to the other families of networks."""
    result = []
    for family in sorted({run.family for run in runs}):
        table = kernels(*fit([run for run in runs if run.family != family]))
        result += [(run, predicted(run, table)) for run in runs if run.family == family]
    return result


def band(pairs: Sequence[tuple[Run, float]]) -> tuple[float, float, float]:
    """Return the 10th, 50th and 90th centile of measured / predicted."""
    ratios = [run.seconds / seconds for run, seconds in pairs]
    low, median, high = np.percentile(ratios, [10, 50, 90])
    return round(float(low), 2), round(float(median), 2), round(float(high), 2)


def summarize(label: str, pairs: Sequence[tuple[Run, float]]) -> None:
    """Print error figures of predicted runs."""
    errors = [abs(seconds / run.seconds - 1) for run, seconds in pairs]
    by_board = defaultdict(list)
    for run, seconds in pairs:
        by_board[run.board].append((run.seconds, seconds))
    ranks = [rank_correlation(*zip(*points, strict=True)) for points in by_board.values() if len(points) > 2]
    low, median, high = band(pairs)
    print(
        f"  {label:24s} n={len(pairs):3d}  MAPE {100 * statistics.mean(errors):5.1f} %  "
        f"rank {statistics.mean(ranks):.3f}  measured/predicted 10/50/90 %: {low:.2f} {median:.2f} {high:.2f}"
    )


def as_toml(table: Sequence[Kernel], pairs: Sequence[tuple[Run, float]]) -> str:
    """Return the kernel table and the error band as they stand in a target's file."""
    lines = []
    for row in table:
        kinds = ", ".join(f'"{kind}"' for kind in row.kind)
        lines += ["[[kernel]]", f'name = "{row.name}"', *([f"kind = [{kinds}]"] if kinds else [])]
        lines += [f'dtype = "{row.dtype}"'] if row.dtype else []
        for key, number in (("efficiency", row.efficiency), ("overhead_seconds", row.overhead_seconds)):
            if number is not None:
                lines.append(f'{key} = {{ value = {number.value:g}, source = "{number.source}", status = "derived" }}')
    low, median, high = band(pairs)
    lines += ["", "[error_band]                      # measured / predicted time"]
    lines += [f"low = {low}", f"median = {median}", f"high = {high}", f"samples = {len(pairs)}"]
    lines.append(
        f'source = "python benchmarks/cost.py, leaving one network out at a time, on {COMMIT}: '
        f'the runtime is ncnn, not onnxruntime"'
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, validate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--target", choices=list(CORES), action="append")
    parser.add_argument("--toml", action="store_true", help="print the kernel table and the error band")
    options = parser.parse_args(arguments)
    for name in options.target or CORES:
        runs = runs_for(name, options.reference)
        table = kernels(*fit(runs))
        pairs = left_out(runs)
        boards, networks = len({run.board for run in runs}), len({run.family for run in runs})
        print(f"{name}: {len(runs)} runs of {networks} networks on {boards} boards, all cores")
        summarize("fitted to all", [(run, predicted(run, table)) for run in runs])
        summarize("network left out", pairs)
        for precision in sorted({run.precision for run in runs}):
            summarize(f"  {precision}", [pair for pair in pairs if pair[0].precision == precision])
        for family in sorted({run.family for run in runs}):
            low, median, high = band([pair for pair in pairs if pair[0].family == family])
            print(f"    {family:22s} {low:.2f} {median:.2f} {high:.2f}")
        print("  efficiencies: " + ", ".join(f"{row.name} {row.efficiency.value:g}" for row in table))
        overhead = table[-1].overhead_seconds
        print(f"  overhead per call: {overhead.value * 1e6:.3g} us" if overhead is not None else "")
        if options.toml:
            print(as_toml(table, pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
