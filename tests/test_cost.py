"""The price of plain work descriptions, without a graph."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.cost.roofline import Cost, Kind, NodeCost, Work, cache_bytes, macs_by_dtype, match_kernel, price, price_all
from optkit.target import Energy, ErrorBand, Kernel, Quantity, Target, load_target


def number(value: float) -> Quantity:
    return Quantity(value=value, source="the test")


@pytest.fixture
def target() -> Target:
    """Peak 2 cores x 1 GHz x 4 = 8e9 MAC/s, 1e9 bytes/s from memory, 1000 bytes of cache, no kernel table."""
    base = load_target("cortex-a53:cores=2,clock_hz=1e9,memory.dram.bytes_per_second=1e9,memory.l2.bytes=1000")
    return base.model_copy(update={"kernel": (), "error_band": None, "energy": Energy()})


def priced(work: Work, target: Target) -> NodeCost:
    result = price(work, target)
    assert isinstance(result, NodeCost)
    return result


GEMM = Work("fc", "Gemm", "gemm", macs=8_000_000, weight_bytes=1000, input_bytes=400, output_bytes=400, m=1, n=10, k=20)


def test_time_is_the_larger_of_compute_and_memory(target: Target) -> None:
    compute = priced(GEMM, target)
    assert compute.cost.seconds == pytest.approx(8e6 / (8e9 * 0.5))
    assert compute.bound == "compute"
    memory = priced(replace(GEMM, macs=8), target)
    assert memory.cost.seconds == pytest.approx(1000 / 1e9)
    assert memory.bound == "memory"


def test_overhead_is_added_and_can_be_the_bound(target: Target) -> None:
    row = Kernel(name="slow-call", efficiency=number(1), overhead_seconds=number(1.0))
    node = priced(GEMM, target.model_copy(update={"kernel": (row,)}))
    assert node.cost.seconds == pytest.approx(1.0 + 1e-3)
    assert (node.bound, node.kernel) == ("overhead", "slow-call")


def test_a_missing_kernel_row_is_said(target: Target) -> None:
    node = priced(GEMM, target)
    assert node.kernel == "default"
    assert node.note == "no kernel row matches: efficiency 0.5 assumed"


def test_first_matching_kernel_row_wins() -> None:
    rows = (
        Kernel(name="gemv", kind=("gemm",), max_m=1, efficiency=number(0.1)),
        Kernel(name="deep", op=("Gemm",), min_k=100, efficiency=number(0.2)),
        Kernel(name="int8", dtype="int8", efficiency=number(0.3)),
        Kernel(name="rest", efficiency=number(0.4)),
    )

    def chosen(work: Work) -> str:
        row = match_kernel(work, rows)
        assert row is not None
        return row.name

    assert chosen(GEMM) == "gemv"
    assert chosen(replace(GEMM, m=2, k=100)) == "deep"
    assert chosen(replace(GEMM, m=2, dtype="int8")) == "int8"
    assert chosen(replace(GEMM, m=None, k=None)) == "rest"  # an unknown size satisfies no condition on it
    assert match_kernel(GEMM, rows[1:3]) is None


def test_activations_go_to_memory_only_where_they_do_not_fit_in_the_cache(target: Target) -> None:
    assert cache_bytes(target) == 1000
    assert priced(GEMM, target).cost.memory_bytes == 1000  # 800 bytes of activations stay in 1000 bytes of cache
    assert priced(replace(GEMM, input_bytes=601), target).cost.memory_bytes == 1000 + 1001


def test_a_target_without_cache_moves_everything(target: Target) -> None:
    bare = target.model_copy(update={"memory": {"dram": target.main_memory}})
    assert priced(GEMM, bare).cost.memory_bytes == 1800


def test_repeated_work_reads_its_weights_again_but_stores_them_once(target: Target) -> None:
    once, thrice = priced(GEMM, target).cost, priced(replace(GEMM, count=3), target).cost
    assert (thrice.macs, thrice.memory_bytes, thrice.weight_bytes) == (3 * once.macs, 3 * once.memory_bytes, 1000)
    assert thrice.seconds == pytest.approx(3 * once.seconds)


def test_a_table_lookup_reads_its_rows_only(target: Target) -> None:
    node = priced(Work("embed", "Gather", "movement", weight_bytes=10**9, weight_read_bytes=64), target)
    assert (node.cost.weight_bytes, node.cost.memory_bytes) == (10**9, 64)


def test_a_view_costs_nothing_even_with_an_overhead_for_every_call(target: Target) -> None:
    row = Kernel(name="any", efficiency=number(1), overhead_seconds=number(1))
    node = priced(Work("r", "Reshape", "view"), target.model_copy(update={"kernel": (row,)}))
    assert (node.cost.seconds, node.bound, node.intensity) == (0, "free", None)


def test_intensity_counts_every_byte_wherever_it_lies(target: Target) -> None:
    assert priced(GEMM, target).intensity == pytest.approx(8_000_000 / 1800)


def test_a_width_without_peak_is_priced_as_the_next_one_and_said(target: Target) -> None:
    node = priced(replace(GEMM, dtype="float16"), target)
    assert node.cost.seconds == priced(GEMM, target).cost.seconds
    assert "no peak for float16: priced as float32" in node.note


def test_a_width_that_nothing_stands_in_for_is_unpriced(target: Target) -> None:
    integers = target.model_copy(update={"macs_per_cycle": {"int8": number(8)}})
    result = price(GEMM, integers)
    assert isinstance(result, Work)
    assert result.unpriced == "target 'cortex-a53' gives no peak for float32 arithmetic"


def test_unpriced_work_is_listed_and_not_summed(target: Target) -> None:
    strange = Work("x", "Mystery", "view", unpriced="no cost model for Mystery")
    report = price_all([GEMM, strange], target)
    assert report.unpriced == (strange,)
    assert report.total == priced(GEMM, target).cost
    assert report.range_seconds is None


def test_energy_is_unknown_where_the_target_gives_no_power(target: Target) -> None:
    assert price_all([GEMM], target).total.joules is None
    watts = target.model_copy(update={"energy": Energy(active_watts=number(2), dram_joules_per_byte=number(1e-9))})
    cost = price_all([GEMM], watts).total
    assert cost.joules == pytest.approx(2 * cost.seconds + 1000e-9)


def test_the_error_band_scales_the_total(target: Target) -> None:
    band = ErrorBand(low=0.5, median=1, high=3, samples=9, source="the test")
    report = price_all([GEMM], target.model_copy(update={"error_band": band}))
    assert report.range_seconds == pytest.approx((0.5 * report.total.seconds, 3 * report.total.seconds))


def test_a_sum_is_as_certain_as_its_least_certain_part() -> None:
    assert (Cost(tag="measured") + Cost(tag="emulated")).tag == "emulated"
    assert (Cost(tag="predicted") + Cost(tag="measured")).tag == "predicted"
    assert (Cost(joules=None) + Cost(joules=1.0)).joules is None


def test_macs_by_dtype_counts_runs_and_leaves_out_what_has_none() -> None:
    works = [GEMM, replace(GEMM, dtype="int8", count=3), Work("r", "Reshape", "view")]
    assert macs_by_dtype(works) == {"int8": 24_000_000, "float32": 8_000_000}


@given(
    st.lists(
        st.builds(
            Work,
            name=st.just("w"),
            op_type=st.just("Op"),
            kind=st.sampled_from(get_args(Kind)),
            dtype=st.sampled_from(["float32", "int8", "uint8", "int64", "float16"]),
            macs=st.integers(0, 10**9),
            operations=st.integers(0, 10**6),
            weight_bytes=st.integers(0, 10**7),
            input_bytes=st.integers(0, 10**7),
            output_bytes=st.integers(0, 10**7),
            count=st.integers(0, 5),
        ),
        max_size=6,
    )
)
def test_totals_add_up_and_more_of_anything_never_costs_less(works: list[Work]) -> None:
    target = load_target("cortex-a72")
    report = price_all(works, target)
    assert len(report.nodes) == len(works)
    assert report.total.macs == sum(work.macs * work.count for work in works)
    assert report.total.seconds == pytest.approx(math.fsum(node.cost.seconds for node in report.nodes))
    for work in works:
        before = priced(work, target).cost.seconds
        for more in (replace(work, macs=work.macs + 1), replace(work, input_bytes=work.input_bytes + 1)):
            assert priced(more, target).cost.seconds >= before


def test_a_table_of_layers_can_be_priced(shared: Path) -> None:
    with (shared / "reference" / "ncnn_layers.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["network"] == "mobilenet_v2"]
    works = [
        Work(
            row["layer"],
            row["type"],
            "conv",
            macs=int(row["macs"] or 0),
            weight_bytes=4 * int(row["weights"] or 0),
            input_bytes=4 * int(row["in_elems"]),
            output_bytes=4 * int(row["out_elems"]),
        )
        for row in rows
    ]
    report = price_all(works, load_target("cortex-a53"))
    assert report.total.macs == 313_619_328
    assert not report.unpriced
