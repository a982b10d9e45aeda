"""Fit the cost model of the Snapdragon NPUs to the times that Qualcomm's AI Hub publishes, and say how far it is off.

    python benchmarks/cost_npu.py REFERENCE [--target snapdragon-8gen3-npu] [--toml]

REFERENCE is a folder with aihub_perf.csv. Only whole networks are timed there, so that little can be told apart, and
the model is small. For all NPUs together: what depthwise convolutions, matrix products and everything else reach of the
rate at which convolutions run (the efficiencies), and the overhead of a node. For each NPU: that rate in int8, int16
and fp16, a factor on the overhead, and the launch of a run. Not fitted: main memory, which is the memory's peak, and
through which every weight passes once a run; activations stay in VTCM, tiled by Qualcomm's compiler (sending through
memory what exceeds its 8 MiB fits worse). The layers are those of npu_layers.csv, which npu_layers.py writes.

Runs are those that lie on the NPU as a whole, of the runtimes `qnn_dlc` and `qnn_context_binary` (TFLite's delegate and
onnxruntime are noisier and differ by launches). The fit is least squares on logarithms of time, robust against the
network that fits worst (linear attention takes 2.2 times what is predicted), and pulled toward its starting point where
the data leave a number open. Errors come from leaving one network out at a time, on all NPUs. What `--toml` prints
stands in the targets' files.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fitting import band, least_squares, summarize

from optkit.cost.roofline import Kind, Work, price_all
from optkit.target import Kernel, Quantity, Target, load_target

# The NPUs that are timed: our target, AI Hub's chipset: itself, or another name of the same silicon or platform.
CHIPSETS = {
    "snapdragon-8gen1-npu": "qualcomm-qcs8450-proxy",
    "snapdragon-8gen2-npu": "qualcomm-qcs8550-proxy",
    "snapdragon-8gen3-npu": "qualcomm-snapdragon-8gen3",
    "snapdragon-8-elite-npu": "qualcomm-snapdragon-8-elite-for-galaxy",
    "snapdragon-8-elite-gen5-npu": "qualcomm-snapdragon-8-elite-gen5",
    "snapdragon-x-elite-npu": "qualcomm-snapdragon-x-elite",
    "snapdragon-x2-elite-npu": "qualcomm-snapdragon-x2-elite",
    "snapdragon-7gen4-npu": "qualcomm-snapdragon-7gen4",
    "qcm6490-npu": "qualcomm-qcs6490",
    "qcm6690-npu": "qualcomm-qcm6690",
    "qcs8275-npu": "qualcomm-qcs8275-proxy",
    "qcs9075-npu": "qualcomm-qcs9075",
    "sa7255p-npu": "qualcomm-sa7255p",
    "sa8295p-npu": "qualcomm-sa8295p",
    "sa8255p-npu": "qualcomm-sa8775p",
}
RUNTIMES = ("qnn_dlc", "qnn_context_binary")
# The rows of the kernel table; what has no row of its own goes with "other".
ROWS: dict[str, tuple[Kind, ...]] = {
    "conv": ("conv", "conv1x1", "conv3x3", "grouped"),
    "depthwise": ("depthwise",),
    "gemm": ("gemm",),
    "other": (),
}
# Of AI Hub's precisions: the type of the arithmetic, bytes of a weight and of an activation.
PRECISIONS = {"w8a8": ("int8", 1, 1), "w8a16": ("int16", 1, 2), "float": ("float16", 2, 2)}
# Starting points, and how strongly a fit is held to them: 0.5 pulls like four runs that are off as far. A depthwise
# product is slow, and fp16 and int16 take two to four times as long as int8 (all NPUs, all networks, by eye).
EFFICIENCY = {"conv": 1.0, "depthwise": 0.2, "gemm": 0.5, "other": 0.6}
OVERHEAD, LAUNCH, RATE, SLOWER = 3e-6, 1.5e-4, 1e13, 0.4
HOLD, HOLD_RATE, HOLD_LAUNCH = 0.5, 0.02, 0.1
HUBER = 0.25  # where the loss of a logarithmic error turns from square to linear
SOURCE = "qualcomm/ai-hub-models perf.yaml@b61a009028de"


@dataclass(frozen=True)
class Run:
    """One network timed on one NPU."""

    target: str
    network: str
    precision: str
    seconds: float


@dataclass(frozen=True)
class Fit:
    """The numbers that a fit gives.

    Attributes:
        efficiency: What each kernel row reaches of the rate of convolutions.
        rate: MACs per second, by target and type.
        overhead: Seconds of a node, by target.
        launch: Seconds of a run, by target.
    """

    efficiency: dict[str, float]
    rate: dict[str, dict[str, float]]
    overhead: dict[str, float]
    launch: dict[str, float]


@functools.cache
def works(network: str, precision: str) -> tuple[Work, ...]:
    """Return a network's layers at a precision of AI Hub."""
    return tuple(_work(row, precision) for row in layer_table() if row["model"] == network)


@functools.cache
def layer_table() -> tuple[dict[str, str], ...]:
    """Return the rows of npu_layers.csv."""
    return tuple(read(Path(__file__).with_name("npu_layers.csv")))


def read(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _work(row: dict[str, str], precision: str) -> Work:
    dtype, weight, activation = PRECISIONS[precision]
    number = {key: int(row[key] or 0) for key in ("macs", "operations", "weights", "inputs", "outputs", "count")}
    return Work(
        name=row["op"],
        op_type=row["op"],
        kind=row["kind"],  # type: ignore[arg-type]
        dtype=dtype,
        macs=number["macs"],
        operations=number["operations"],
        weight_bytes=number["weights"] * weight,
        input_bytes=number["inputs"] * activation,
        output_bytes=number["outputs"] * activation,
        count=number["count"],
    )


def read_runs(folder: Path, names: Sequence[str] = tuple(CHIPSETS)) -> list[Run]:
    """Return every run that lies on the NPU as a whole, of networks in the table of layers."""
    networks = {row["model"] for row in layer_table()}
    targets = {CHIPSETS[name]: name for name in names}
    return [
        Run(targets[row["chipset"]], row["model"], row["precision"], float(row["inference_ms"]) / 1e3)
        for row in read(folder / "aihub_perf.csv")
        if row["chipset"] in targets
        and row["runtime"] in RUNTIMES
        and row["precision"] in PRECISIONS
        and row["model"] in networks
        and row["primary_compute_unit"] == "NPU"
        and not float(row["layers_cpu"] or 0) + float(row["layers_gpu"] or 0)
    ]


class Table:
    """Layers of many runs as arrays, and the model over them, its parameters as logarithms.

    The parameters: efficiencies of all rows but the first; the overhead; how far int16 and float16 fall short of int8;
    then for each target the rate in int8, int16's and float16's own deviations, the factor on the overhead, the launch.
    """

    def __init__(self, runs: Sequence[Run], names: Sequence[str]) -> None:
        self.names = list(names)
        rows, types = list(ROWS), list(PRECISIONS)
        columns: list[tuple[float, ...]] = []
        first: list[int] = []
        speeds = {name: load_target(name).main_memory.bytes_per_second for name in names}
        for run in runs:
            first.append(len(columns))
            speed = speeds[run.target]
            assert speed is not None
            place = (self.names.index(run.target), types.index(run.precision))
            for work in works(run.network, run.precision):
                row = rows.index(row_of(work))
                columns.append((*place, row, work.macs + work.operations, work.weight_bytes / speed.value, work.count))
        table = np.array(columns, dtype=float).T
        self.target, self.type, self.row = table[:3].astype(int)
        self.operations, self.memory, self.count = table[3:]
        self.first = np.array(first)
        self.measured = np.array([run.seconds for run in runs])

    @property
    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where a fit starts, and how strongly it is held there."""
        shared = [*(EFFICIENCY[row] for row in list(ROWS)[1:]), OVERHEAD, SLOWER, SLOWER]
        own = [RATE, 1.0, 1.0, 1.0, LAUNCH]
        hold = [HOLD] * len(shared) + [HOLD_RATE, HOLD, HOLD, HOLD_LAUNCH, HOLD_LAUNCH] * len(self.names)
        return np.log(shared + own * len(self.names)), np.array(hold)

    def split(self, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return efficiencies [row], rates [target, type], overheads [target] and launches [target]."""
        values, shared = np.exp(logs), len(ROWS) + 2
        own = values[shared:].reshape(-1, 5)
        slower = np.array([1.0, values[shared - 2], values[shared - 1]])
        rates = own[:, :1] * slower * np.column_stack([np.ones(len(own)), own[:, 1:3]])
        return np.array([1.0, *values[: len(ROWS) - 1]]), rates, values[len(ROWS) - 1] * own[:, 3], own[:, 4]

    def predict(self, logs: np.ndarray) -> np.ndarray:
        """Return the seconds of each run."""
        efficiency, rates, overheads, launches = self.split(logs)
        compute = self.operations / (rates[self.target, self.type] * efficiency[self.row])
        seconds = (np.maximum(compute, self.memory) + overheads[self.target]) * self.count
        return np.asarray(np.add.reduceat(seconds, self.first) + launches[self.target[self.first]])


def row_of(work: Work) -> str:
    """Return the kernel row that a layer belongs to."""
    return next((row for row, kinds in ROWS.items() if work.kind in kinds), "other")


def fit(runs: Sequence[Run]) -> Fit:
    """Fit all numbers to all runs."""
    names = [name for name in CHIPSETS if any(run.target == name for run in runs)]
    table = Table(runs, names)
    start, hold = table.start
    held = hold * math.sqrt(len(runs) / 100)

    def errors(logs: np.ndarray) -> np.ndarray:
        off = np.log(table.predict(logs) / table.measured) / HUBER
        robust = HUBER * np.sign(off) * np.sqrt(2 * (np.sqrt(1 + off**2) - 1))  # its square is the pseudo-Huber loss
        return np.concatenate([robust, held * (logs - start)])

    efficiency, rates, overheads, launches = table.split(least_squares(errors, start))
    types = [dtype for dtype, _, _ in PRECISIONS.values()]
    return Fit(
        dict(zip(ROWS, efficiency.tolist(), strict=True)),
        {name: dict(zip(types, row, strict=True)) for name, row in zip(names, rates.tolist(), strict=True)},
        dict(zip(names, overheads.tolist(), strict=True)),
        dict(zip(names, launches.tolist(), strict=True)),
    )


def number(value: float) -> Quantity:
    """Round a fitted number to what it is worth."""
    return Quantity(value=float(f"{value:.2g}"), source=f"fit of benchmarks/cost_npu.py to {SOURCE}", status="derived")


def kernels(found: Fit, name: str) -> tuple[Kernel, ...]:
    """Return a target's kernel table."""
    overhead = number(found.overhead[name])
    indices = Quantity(value=1, source="a few scalars: the time is nothing", status="derived")
    rows = [Kernel(name="indices", dtype="int64", efficiency=indices)]
    for row, kinds in ROWS.items():
        rows.append(Kernel(name=row, kind=kinds, efficiency=number(found.efficiency[row]), overhead_seconds=overhead))
    return tuple(rows)


def peaks(found: Fit, name: str, timed: Sequence[str] = tuple(PRECISIONS)) -> dict[str, Quantity]:
    """Return a target's rates by type; ``timed`` are the precisions that it was timed in."""
    rates = {}
    for precision, (dtype, _, _) in PRECISIONS.items():
        rates[dtype] = number(found.rate[name][dtype] / 1e9)
        if precision not in timed:
            source = f"not timed: as much slower than int8 as on the others, fit of benchmarks/cost_npu.py to {SOURCE}"
            rates[dtype] = rates[dtype].model_copy(update={"source": source, "status": "unverified"})
    source = "int8's, which weights of 4 bits are unpacked to; not timed"
    return {"int4": rates["int8"].model_copy(update={"source": source, "status": "unverified"}), **rates}


def as_target(found: Fit, name: str, timed: Sequence[str] = tuple(PRECISIONS)) -> Target:
    """Return a target with the numbers of a fit, as `--toml` prints them."""
    update = {
        "macs_per_cycle": peaks(found, name, timed),
        "kernel": kernels(found, name),
        "launch_seconds": number(found.launch[name]),
    }
    return load_target(name).model_copy(update=update)


def left_out(runs: Sequence[Run]) -> list[tuple[Run, float]]:
    """Predict every run, through the ordinary cost model, from a fit to the other networks."""
    result = []
    for network in sorted({run.network for run in runs}):
        found = fit([run for run in runs if run.network != network])
        targets = {name: as_target(found, name) for name in found.rate}
        for run in runs:
            if run.network == network:
                report = price_all(works(run.network, run.precision), targets[run.target])
                result.append((run, report.total.seconds))
    return result


def as_toml(found: Fit, name: str, runs: Sequence[Run], pairs: Sequence[tuple[Run, float]]) -> str:
    """Return what a fit says of a target as it stands in its file."""

    def text(quantity: Quantity) -> str:
        return f'{{ value = {quantity.value:g}, source = "{quantity.source}", status = "{quantity.status}" }}'

    target = as_target(found, name, [run.precision for run in runs if run.target == name])
    lines = [f"launch_seconds = {text(target.launch_seconds)}", ""] if target.launch_seconds else []
    lines.append("[macs_per_cycle]                  # at 1 GHz: what convolutions reach, overhead apart")
    lines += [f"{dtype} = {text(peak)}" for dtype, peak in target.macs_per_cycle.items()]
    for row in target.kernel:
        kinds = ", ".join(f'"{kind}"' for kind in row.kind)
        lines += ["", "[[kernel]]", f'name = "{row.name}"', *([f"kind = [{kinds}]"] if kinds else [])]
        lines += [f'dtype = "{row.dtype}"'] if row.dtype else []
        lines.append(f"efficiency = {text(row.efficiency)}")
        lines += [f"overhead_seconds = {text(row.overhead_seconds)}"] if row.overhead_seconds else []
    own = [pair for pair in pairs if pair[0].target == name]
    low, median, high = band(own)
    lines += ["", "[error_band]                      # measured / predicted time"]
    lines += [f"low = {low}", f"median = {median}", f"high = {high}", f"samples = {len(own)}"]
    source = (
        f"python benchmarks/cost_npu.py, leaving one network out at a time, on {SOURCE}: DLCs run by Qualcomm's runtime"
    )
    lines.append(f'source = "{source}"')
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, validate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--target", choices=list(CHIPSETS), action="append")
    parser.add_argument("--toml", action="store_true", help="print what stands in the targets' files")
    options = parser.parse_args(arguments)
    runs = read_runs(options.reference)
    found, pairs = fit(runs), left_out(runs)
    networks = {run.network for run in runs}
    print(f"{len(runs)} runs of {len(networks)} networks; measured / predicted, the network left out")
    print("efficiencies: " + ", ".join(f"{row} {value:.2g}" for row, value in found.efficiency.items()))
    summarize("all", pairs)
    for precision in PRECISIONS:
        summarize(precision, [pair for pair in pairs if pair[0].precision == precision])
    for network in sorted(networks):
        summarize(network, [pair for pair in pairs if pair[0].network == network])
    for name in options.target or CHIPSETS:
        rates = ", ".join(f"{dtype} {rate / 1e12:.2g}" for dtype, rate in found.rate[name].items())
        print(
            f"{name}: TMAC/s {rates}; {found.overhead[name] * 1e6:.2g} us a node, {found.launch[name] * 1e6:.2g} a run"
        )
        for precision in ("", *PRECISIONS):
            own = [pair for pair in pairs if pair[0].target == name and precision in ("", pair[0].precision)]
            if own:
                summarize(precision or "all", own)
        if options.toml:
            print(as_toml(found, name, runs, pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
