"""The benchmark that fits the Neural Engines' cost model: its arithmetic, and that the targets hold what it gives."""

from __future__ import annotations

import csv
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


@pytest.fixture(scope="module")
def ane() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "cost_ane.py"
    spec = importlib.util.spec_from_file_location("benchmark_cost_ane", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_cost_ane"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(ane: ModuleType, shared: Path) -> list[Any]:
    return list(ane.read_runs(shared / "reference"))


@pytest.fixture(scope="module")
def found(ane: ModuleType, runs: list[Any]) -> Any:
    return ane.fit(runs)


def test_layers_take_the_bytes_of_their_precision(ane: ModuleType) -> None:
    weights = {p: sum(w.weight_bytes * w.count for w in ane.works("ResNet50", p)) for p in ane.PRECISIONS}
    assert weights["fp16"] == 2 * weights["w8a16"] == 2 * weights["w8a8"]
    assert weights["lut4 per-tensor"] == pytest.approx(weights["fp16"] / 4, rel=1e-4)
    kinds = {w.dtype for w in ane.works("ResNet50", "w8a8") if w.macs}
    assert kinds == {"int8"}


def test_layers_add_up_to_the_published_macs(ane: ModuleType, shared: Path) -> None:
    """timm counts MobileOne with the branches that exist in training alone, and rounds to 10 million."""
    with (shared / "reference" / "apple_model_macs.csv").open(encoding="utf-8") as stream:
        published = {row["model"]: float(row["gmacs"]) for row in csv.DictReader(stream)}
    networks = {row["model"] for row in ane.layer_table()}
    compared = {name for name in networks & published.keys() if not name.startswith("MobileOne")}
    assert len(networks) == 25
    assert len(compared) == 14
    for name in compared:
        macs = sum(work.macs * work.count for work in ane.works(name, "fp16"))
        assert macs / 1e9 == pytest.approx(published[name], rel=0.03, abs=0.005), name


def test_every_kind_of_layer_has_a_row(ane: ModuleType) -> None:
    networks = {row["model"] for row in ane.layer_table()}
    assert {ane.row_of(work) for name in networks for work in ane.works(name, "fp16")} == set(ane.ROWS)


def test_runs_are_those_that_core_ml_was_asked_to_put_on_the_engine(ane: ModuleType, runs: list[Any]) -> None:
    assert {run.target for run in runs} == set(ane.CHIPS)
    assert len(runs) == len(set(runs)) == 57
    assert {run.family for run in runs} == set(ane.FAMILIES)
    assert all(1e-4 < run.seconds < 0.1 for run in runs)


def test_the_fit_predicts_as_the_cost_model_does(ane: ModuleType, runs: list[Any], found: Any) -> None:
    for name in ane.CHIPS:
        own = [run for run in runs if run.target == name]
        table = ane.Table(own, [name])
        logs = np.log([*found.efficiency.values(), found.overhead, found.share, found.launch[name]])
        target = ane.as_target(found, name)
        seconds = [price_all(ane.works(run.network, run.precision), target).total.seconds for run in own]
        assert table.predict(logs) == pytest.approx(seconds, rel=0.1)  # the target's numbers have two digits


def test_a_fit_finds_the_numbers_that_made_the_times(ane: ModuleType) -> None:
    truth = {name: load_target(name) for name in ane.CHIPS}
    made = [
        ane.Run(name, network, "fp16", price_all(ane.works(network, "fp16"), target).total.seconds)
        for name, target in truth.items()
        for network in sorted({row["model"] for row in ane.layer_table()})
    ]
    fitted = ane.fit(made)
    kernels = {row.name: row.efficiency.value for row in load_target("apple-ane").kernel}
    for row in ("conv-k257", "conv-k129", "gemm"):
        assert fitted.efficiency[row] == pytest.approx(kernels[row], rel=0.25), row
    ratios = [
        run.seconds / price_all(ane.works(run.network, "fp16"), ane.as_target(fitted, run.target)).total.seconds
        for run in made
    ]
    assert np.median(ratios) == pytest.approx(1, rel=0.05)


def test_the_targets_hold_what_the_fit_gives(ane: ModuleType, found: Any) -> None:
    for name in ane.CHIPS:
        target, fitted = load_target(name), ane.as_target(found, name)
        assert target.kernel == fitted.kernel, name
        assert target.launch_seconds == fitted.launch_seconds, name
        assert target.memory == fitted.memory, name


def test_what_is_printed_is_read_as_the_same_numbers(ane: ModuleType, runs: list[Any], found: Any) -> None:
    name = "apple-a17-ane"
    pairs = [(run, 1.1 * run.seconds) for run in runs]
    shared, own = tomllib.loads(ane.shared_toml(found)), tomllib.loads(ane.own_toml(found, name, pairs, pairs))
    target = load_target(name)
    assert [(row["name"], row.get("min_k")) for row in shared["kernel"]] == [(r.name, r.min_k) for r in target.kernel]
    assert target.launch_seconds is not None
    assert own["launch_seconds"]["value"] == target.launch_seconds.value
    assert own["error_band"]["median"] == round(1 / 1.1, 2)
    assert own["error_band"]["samples"] == 14


@pytest.mark.slow
def test_the_bands_are_those_of_networks_left_out(ane: ModuleType, runs: list[Any]) -> None:
    pairs = ane.left_out(runs, lambda run: run.network)
    for name in ane.CHIPS:
        own = [pair for pair in pairs if pair[0].target == name]
        band = load_target(name).error_band
        assert band is not None
        assert (band.low, band.median, band.high, band.samples) == (*ane.band(own), len(own))
