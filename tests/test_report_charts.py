"""The numbers behind the charts of the report, and how numbers are written."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.report import units
from optkit.report.charts import by_bound, by_op_type, interval, log_width, slowest, ticks
from optkit.report.html import clip, ratio, tail, unbroken
from reports import accuracy, costs


def test_bounds_and_operators_sum_up_to_the_whole() -> None:
    cost = costs(100)
    nodes, rest = slowest(cost)
    assert rest is not None
    assert len(nodes) + rest.nodes == 100
    assert sum(node.seconds or 0 for node in nodes) + rest.seconds == pytest.approx(cost.seconds)
    assert sum(row.seconds for row in by_op_type(cost)) == pytest.approx(cost.seconds)
    assert [bound for bound, _ in by_bound(cost)] == ["compute", "memory", "overhead"]


def test_many_operators_end_in_a_sum() -> None:
    cost = costs()
    rows = tuple(dataclasses.replace(row, op_type=f"Op{i}") for i, row in enumerate(cost.nodes))
    summed = by_op_type(dataclasses.replace(cost, nodes=rows))
    assert summed[-1].label == "24 others"
    assert sum(row.nodes for row in summed) == 40


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within(low: float, width: float) -> None:
    if low + width == low:
        return
    marks = ticks(low, low + width)
    slack = 1e-9 * max(abs(low), width)
    assert all(low - slack <= mark <= low + width + slack for mark in marks)
    assert 2 <= len(marks) <= 7


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["top1", "mse"]))
def test_an_interval_lies_on_its_axis(drop: float, below: float, above: float, metric: str) -> None:
    drawn = interval(accuracy(metric=metric, drop=drop, interval=(drop - below, drop + above)))
    assert drawn is not None
    assert 0 <= drawn.low <= drawn.point + 1e-9 <= drawn.high + 2e-9 <= 100 + 1e-6
    assert 0 <= drawn.zero <= 100


@given(st.floats(0, allow_nan=False))
def test_error_bars_stay_within_their_track(change: float) -> None:
    assert 0 <= log_width(change) <= 100


def test_an_error_bar_grows_by_a_tenth_for_a_power_of_ten() -> None:
    assert log_width(1e-3) - log_width(1e-4) == pytest.approx(10)
    assert log_width(None) == log_width(0.0) == 0


def test_long_text_is_cut() -> None:
    assert clip("a" * 1000, 9) == "aaaa…aaa"
    assert tail("Mobilenet/Block_1/Conv2d_12_depthwise/depthwise", 36) == "…/Conv2d_12_depthwise/depthwise"
    assert tail("x" * 100, 10) == "…" + "x" * 9


def test_a_number_keeps_its_unit_on_its_line() -> None:
    assert unbroken("68.4 % of 3 samples in 2 ms, 5 MB") == "68.4\u00a0% of 3 samples in 2\u00a0ms, 5\u00a0MB"


def test_ratios_within_a_twentieth_are_no_change() -> None:
    assert ratio(100, 104, "smaller", "larger") == ""
    assert ratio(0, 104, "smaller", "larger") == ""
    assert ratio(100, 200, "smaller", "larger") == "2.0\N{MULTIPLICATION SIGN} larger"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.energy(None), "-"),
        (units.energy(0.42), "420 mJ"),
        (units.energy(2e-6), "2 µJ"),
        (units.energy(12.0), "12 J"),
        (units.duration(0.0), "0 µs"),
        (units.duration(0.9996e-3), "1 ms"),
        (units.duration(0.0123456), "12.3 ms"),
        (units.duration(0.99949), "999 ms"),
        (units.duration(4321.0), "4321 s"),
        (units.decibel(-math.inf), "not comparable"),
        (units.decibel(math.inf), "equal"),
        (units.small(2.34e-6), "2.3e-06"),
        (units.small(0.5), "0.5"),
        (units.small(0.0), "0"),
        (units.small(None), "-"),
        (units.small(math.inf), "∞"),
    ],
)
def test_units(shown: str, expected: str) -> None:
    assert shown == expected
