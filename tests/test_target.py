"""Targets: their numbers, the table of peaks by ISA, and the kernel tables that the benchmark printed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from optkit.errors import InputError
from optkit.target import Quantity, Target, load_target, target_names

DEVICES = ["cortex-a53", "cortex-a72", "cortex-a76", "host"]


def quantities(value: object) -> list[Quantity]:
    if isinstance(value, Quantity):
        return [value]
    if hasattr(value, "model_fields_set"):
        return [q for name in type(value).model_fields for q in quantities(getattr(value, name))]
    if isinstance(value, dict):
        return [q for item in value.values() for q in quantities(item)]
    return [q for item in value for q in quantities(item)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("name", DEVICES)
def test_every_number_says_where_it_comes_from(name: str) -> None:
    numbers = quantities(load_target(name))
    assert len(numbers) > 5
    assert all(len(number.source) > 3 for number in numbers)


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_can_price_floats_and_bytes(name: str) -> None:
    target = load_target(name)
    assert {"float32", "int8"} <= target.macs_per_cycle.keys()
    assert target.main_memory.bytes_per_second is not None
    assert not target.static_shapes


@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a72", "cortex-a76"])
def test_boards_have_a_kernel_for_everything_and_an_error_band(name: str) -> None:
    target = load_target(name)
    last = target.kernel[-1]
    assert (last.op, last.kind, last.dtype, last.max_m, last.min_k) == ((), (), None, None, None)
    band = target.error_band
    assert band is not None
    assert band.low < band.median < band.high
    assert "not onnxruntime" in band.source


def test_aliases_name_the_same_device() -> None:
    assert load_target("raspberry-pi-4") == load_target("cortex-a72")
    assert {"cortex-a53", "host"} <= set(target_names())


def test_the_base_of_other_targets_is_no_device() -> None:
    with pytest.raises(InputError, match="'onnxruntime-cpu' is a base for other targets, not a device"):
        load_target("onnxruntime-cpu")


def peaky(tmp_path: Path, isa: str, extra: str = "") -> Target:
    text = f"""
inherits = "host"
name = "peaky"
detect = false
isa = {isa}
cores = {{ value = 1, source = "the test" }}
{extra}
[[peak]]
isa = "wide"
macs_per_cycle.int8 = {{ value = 64, source = "the test" }}
[[peak]]
isa = "narrow"
macs_per_cycle.int8 = {{ value = 16, source = "the test" }}
"""
    path = tmp_path / "peaky.toml"
    path.write_text(text, encoding="utf-8")
    return load_target(str(path))


def test_the_first_peak_that_the_isa_allows_wins(tmp_path: Path) -> None:
    assert peaky(tmp_path, '["narrow", "wide"]').macs_per_cycle["int8"].value == 64
    assert peaky(tmp_path, '["narrow"]').macs_per_cycle["int8"].value == 16
    base = peaky(tmp_path, '["other"]')
    assert base.macs_per_cycle["int8"].value == 8
    assert peaky(tmp_path, '["wide"]').macs_per_cycle["float32"] == base.macs_per_cycle["float32"]  # not in the row


def test_what_the_user_sets_stays() -> None:
    target = load_target("host:macs_per_cycle.int8=7,cores=3")
    assert (target.macs_per_cycle["int8"].value, target.macs_per_cycle["int8"].status) == (7, "user")
    assert target.cores.value == 3


def test_the_host_is_detected() -> None:
    target = load_target("host")
    assert target.cores.value >= 1
    assert target.isa


def test_a_number_without_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('inherits = "cortex-a53"\n[memory.l2]\nbytes = 5\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"the number 'memory\.l2\.bytes' has no source; write"):
        load_target(str(path))


def test_a_peak_without_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('inherits = "host"\n[[peak]]\nisa = "x"\nmacs_per_cycle.int8 = 5\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"the number 'peak\.0\.macs_per_cycle\.int8' has no source"):
        load_target(str(path))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("cortex-a35", "no target 'cortex-a35'; did you mean"),
        ("nowhere.toml", "nowhere.toml: no such target file"),
        ("cortex-a53:cors=2", "target 'cortex-a53' has no key 'cors'; did you mean 'cores'"),
        ("cortex-a53:memory.l9=2", "target 'cortex-a53' has no key 'memory.l9'"),
    ],
)
def test_what_cannot_be_found_is_said_in_a_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        load_target(spec)
    assert sentence in str(error.value)


def test_an_unknown_precision_is_said() -> None:
    with pytest.raises(InputError, match="target 'cortex-a53' has no precision 'w9a9'"):
        load_target("cortex-a53").recipe_for("w9a9")


def test_targets_that_inherit_from_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('inherits = "b.toml"\n', encoding="utf-8")
    (tmp_path / "b.toml").write_text('inherits = "a.toml"\n', encoding="utf-8")
    with pytest.raises(InputError, match="inherit from each other in a circle"):
        load_target(str(tmp_path / "a.toml"))


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "cost.py"
    spec = importlib.util.spec_from_file_location("benchmark_cost", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_cost"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a72", "cortex-a76"])
def test_the_kernel_table_is_what_the_fit_gives(name: str, benchmark: ModuleType, shared: Path) -> None:
    runs = benchmark.runs_for(name, shared / "reference")
    assert len({run.family for run in runs}) == 16
    assert benchmark.kernels(*benchmark.fit(runs)) == load_target(name).kernel


def test_the_error_band_is_that_of_networks_left_out(benchmark: ModuleType, shared: Path) -> None:
    band = load_target("cortex-a72").error_band
    assert band is not None
    pairs = benchmark.left_out(benchmark.runs_for("cortex-a72", shared / "reference"))
    assert benchmark.band(pairs) == (band.low, band.median, band.high)
    assert len(pairs) == band.samples
