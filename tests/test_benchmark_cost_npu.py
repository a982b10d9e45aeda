"""The benchmark that fits the NPUs' cost model: its arithmetic, and that the targets hold what it gives."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from optkit.cost.roofline import price_all
from optkit.target import load_target

NETWORKS = ["resnet18", "resnet50", "squeezenet1_1", "shufflenet_v2", "beit", "levit", "efficientnet_b4"]


@pytest.fixture(scope="module")
def npu() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "cost_npu.py"
    spec = importlib.util.spec_from_file_location("benchmark_cost_npu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_cost_npu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(npu: ModuleType, shared: Path) -> list[Any]:
    return list(npu.read_runs(shared / "reference"))


@pytest.fixture(scope="module")
def found(npu: ModuleType, runs: list[Any]) -> Any:
    return npu.fit(runs)


def precisions(runs: list[Any], name: str) -> list[str]:
    return [run.precision for run in runs if run.target == name]


def test_layers_take_the_bytes_of_their_precision(npu: ModuleType) -> None:
    weights = {p: sum(w.weight_bytes for w in npu.works("resnet50", p)) for p in npu.PRECISIONS}
    assert weights["float"] == 2 * weights["w8a8"] == 2 * weights["w8a16"]
    moved = {p: sum(w.activation_bytes for w in npu.works("resnet50", p)) for p in npu.PRECISIONS}
    assert moved["float"] == moved["w8a16"] == 2 * moved["w8a8"]
    assert {w.dtype for w in npu.works("resnet50", "w8a16")} == {"int16"}


def test_layers_add_up_to_the_published_macs(npu: ModuleType, shared: Path) -> None:
    with (shared / "reference" / "aihub_model_macs.csv").open(encoding="utf-8") as stream:
        published = {row["model"]: row for row in csv.DictReader(stream) if row["gmacs_at_aihub_input"]}
    networks = {row["model"] for row in npu.layer_table()}
    assert len(networks) == 22
    for network in networks:
        macs = sum(work.macs * work.count for work in npu.works(network, "w8a8"))
        assert macs / 1e9 == pytest.approx(float(published[network]["gmacs_at_aihub_input"]), rel=0.025), network


def test_every_kind_of_layer_has_a_row(npu: ModuleType) -> None:
    rows = {npu.row_of(work) for network in NETWORKS for work in npu.works(network, "w8a8")}
    assert rows == set(npu.ROWS)


def test_least_squares_finds_a_minimum(npu: ModuleType) -> None:
    x = np.linspace(0, 1, 20)
    y = 3 * np.exp(-2 * x)
    result = npu.least_squares(lambda p: p[0] * np.exp(p[1] * x) - y, np.array([1.0, 0.0]))
    assert result == pytest.approx([3, -2], abs=1e-4)


def test_a_fit_finds_the_numbers_that_made_the_times(npu: ModuleType) -> None:
    """Times made by the ordinary cost model, one of the networks ten times too slow."""
    truth = load_target("snapdragon-8gen2-npu")
    made = [
        npu.Run(truth.name, network, precision, price_all(npu.works(network, precision), truth).total.seconds)
        for network in sorted({row["model"] for row in npu.layer_table()})
        for precision in npu.PRECISIONS
    ]
    made = [dataclasses.replace(r, seconds=10 * r.seconds) if r.network == "levit" else r for r in made]
    fitted = npu.fit(made)
    for dtype in ("int8", "int16", "float16"):
        rate = truth.macs_per_cycle[dtype].value * 1e9
        assert fitted.rate[truth.name][dtype] == pytest.approx(rate, rel=0.15)
    predicted = npu.as_target(fitted, truth.name)
    ratios = [
        run.seconds / price_all(npu.works(run.network, run.precision), predicted).total.seconds
        for run in made
        if run.network != "levit"
    ]
    assert np.median(ratios) == pytest.approx(1, rel=0.1)


def test_runs_lie_on_the_npu_as_a_whole(npu: ModuleType, runs: list[Any]) -> None:
    assert {run.target for run in runs} == set(npu.CHIPSETS)
    assert {run.precision for run in runs} == set(npu.PRECISIONS)
    assert all(0 < run.seconds < 0.2 for run in runs)


def test_the_fit_predicts_as_the_cost_model_does(npu: ModuleType, runs: list[Any]) -> None:
    some = [run for run in runs if run.target == "snapdragon-8gen3-npu"]
    table = npu.Table(some, ["snapdragon-8gen3-npu"])
    start, _ = table.start
    efficiency, rates, overheads, launches = table.split(start)
    types = [dtype for dtype, _, _ in npu.PRECISIONS.values()]
    name = "snapdragon-8gen3-npu"
    begun = npu.Fit(
        dict(zip(npu.ROWS, efficiency.tolist(), strict=True)),
        {name: dict(zip(types, rates[0].tolist(), strict=True))},
        {name: overheads[0]},
        {name: launches[0]},
    )
    target = npu.as_target(begun, name)
    seconds = [price_all(npu.works(run.network, run.precision), target).total.seconds for run in some]
    assert table.predict(start) == pytest.approx(seconds, rel=1e-9)


def test_the_targets_hold_what_the_fit_gives(npu: ModuleType, runs: list[Any], found: Any) -> None:
    for name in npu.CHIPSETS:
        target, fitted = load_target(name), npu.as_target(found, name, precisions(runs, name))
        assert target.kernel == fitted.kernel, name
        assert target.macs_per_cycle == fitted.macs_per_cycle, name
        assert target.launch_seconds == fitted.launch_seconds, name


def test_what_is_printed_is_read_as_the_same_numbers(npu: ModuleType, runs: list[Any], found: Any) -> None:
    name = "snapdragon-8gen3-npu"
    text = npu.as_toml(found, name, runs, [(run, 1.1 * run.seconds) for run in runs])
    table = tomllib.loads(text)
    target = load_target(name)
    assert [row["name"] for row in table["kernel"]] == [row.name for row in target.kernel]
    assert table["macs_per_cycle"]["int8"]["value"] == target.macs_per_cycle["int8"].value
    assert table["error_band"]["median"] == round(1 / 1.1, 2)
    assert table["error_band"]["samples"] == len(precisions(runs, name))


@pytest.mark.slow
def test_the_error_bands_are_those_of_networks_left_out(npu: ModuleType, runs: list[Any]) -> None:
    pairs = npu.left_out(runs)
    for name in npu.CHIPSETS:
        own = [pair for pair in pairs if pair[0].target == name]
        band = load_target(name).error_band
        assert band is not None
        assert npu.band(own) == (band.low, band.median, band.high), name
        assert len(own) == band.samples
