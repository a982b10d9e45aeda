"""The page of the report: bounded, escaped, accessible, deterministic."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from optkit.evaluate.fidelity import Fidelity
from optkit.pipeline import EXACT, Step
from optkit.report.charts import interval
from optkit.report.contents import Execution, Gate, RemarkGroup
from optkit.report.html import headline, render_html
from optkit.report.inspection import TensorFacts
from reports import BITEQUAL, accuracy, costs, facts, report

VOID = {"meta", "input", "line", "rect", "circle", "br"}


class Page(HTMLParser):
    """What a page is made of: its text, every start tag with its attributes, and whether all tags are closed."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page.decode("utf-8"))
        self.close()
        assert not self.open, f"not closed: {self.open}"
        plain = str.maketrans({"\N{NO-BREAK SPACE}": " ", "\N{MULTIPLICATION SIGN}": "x", "\N{EN DASH}": "-"})
        self.text = re.sub(r"\s+", " ", " ".join(self.words).translate(plain))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_headline_says_the_result_in_plain_words() -> None:
    assert headline(report()) == (
        "4.1\N{MULTIPLICATION SIGN} smaller (253.00 KB → 61.90 KB)",
        "predicted 780 µs (585 µs \N{EN DASH} 1.17 ms)",
        "top-1 98.1 % → 97.9 % on 359 samples, not distinguishable",
    )


def test_the_headline_does_without_labels() -> None:
    bare = report(accuracy=(), executions=(Execution("here", "native", BITEQUAL),))
    assert headline(bare)[2:] == (
        "same top-1 as the original in 100.0 % of the rows on 4 samples",
        "accuracy not measured",
    )
    few = Execution("emulator", "emulated", Fidelity(20.0, 0.9, 1.0, 0.5, 2))
    assert headline(report(accuracy=(), executions=(few, *bare.executions))) == headline(bare)
    unranked = dataclasses.replace(BITEQUAL, top1_agreement=None, sqnr_db=41.23)
    bare = report(accuracy=(), executions=(Execution("here", "native", unranked),))
    assert headline(bare)[2] == "SQNR against the original 41.2 dB on 4 samples"
    assert len(headline(report(accuracy=(), executions=()))) == 2


def test_the_page_stands_alone() -> None:
    page = render_html(report())
    parsed = Page(page)
    for _, attributes in parsed.tags:
        assert not attributes.keys() & {"src", "srcset", "onclick", "onload"}
        assert (attributes.get("href") or "#").startswith("#")
    assert not parsed.named("link")
    assert not re.search(rb"https?://|@import|url\(", page)
    assert len(page) < 200_000


def test_the_policy_admits_the_one_script_and_nothing_from_outside() -> None:
    page = render_html(report()).decode()
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = next(meta["content"] for meta in Page(page.encode()).named("meta") if "http-equiv" in meta)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_page_is_accessible() -> None:
    page = render_html(report(gates=(Gate("size", 1e5, 6e4, True),)))
    parsed = Page(page)
    assert len(parsed.named("caption")) == len(parsed.named("table"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in parsed.named("th"))
    assert all("aria-label" in attributes for attributes in parsed.named("svg"))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["aria-labelledby"] for attributes in parsed.named("section")} <= set(ids)
    assert {(link["href"] or "")[1:] for link in parsed.named("a")} <= set(ids)
    assert parsed.named("html")[0]["lang"] == "en"


def test_both_colour_schemes_and_print_are_styled() -> None:
    page = render_html(report())
    assert b"prefers-color-scheme: dark" in page
    assert b"@media print" in page


def test_the_same_report_gives_the_same_bytes() -> None:
    assert render_html(report()) == render_html(report())


def test_wall_clock_times_stay_out() -> None:
    slower = tuple(dataclasses.replace(step, seconds=99.5) for step in report().steps)
    assert render_html(report()) == render_html(report(steps=slower))


def test_every_part_of_the_report_is_on_the_page() -> None:
    gates = (Gate("size", 1e5, 61_900, True), Gate("latency", 5e-4, 7.8e-4, False), Gate("drop", 0.01, None, False))
    cost = costs(unpriced={"custom::Swirl": 2})
    text = Page(render_html(report(gates=gates, cost=cost, notices=("calibrated on RANDOM data",)))).text
    for expected in (
        "calibrated on RANDOM data",
        "it covers 98.0 % of the weights and 99.5 % of the multiply-accumulates",
        "size 100.00 KB 61.90 KB ✓ met",
        "latency 500 µs 780 µs ✗ not met",
        "drop 0.01 not known ✗ not met",
        "top-1 98.1 % → 97.9 %, 359 samples. The interval contains zero",
        "0.2 points worse, 95 % interval from -0.8 to +0.4 points",
        "Measured on runtime 1.0 on this machine (simulated)",
        "The 25 slowest of 40 nodes, 780 µs in all",
        "block39/conv Conv in int8, free",
        "15 other nodes",
        "Not priced, so not in the total: custom::Swirl (2)",
        "Error band: a table of measurements",
        "int8 - 60.00 KB",
        "fold reassociate within 1e-05; limit = 8",
        "round lossy 20 2 38 → 90 0.02 38.5 dB",
        "unrun exact - - 90 not run not run",
        "runtime 1.0 on this machine simulated 38.5 dB 0.999800 0.05 99.5 % 359",
        "the operator has no integer kernel",
        "2 places, 1 reason",
        "Named: 2 of 9",
        "batch x 1 x 8 x 8",
        "ab" * 32,
    ):
        assert expected in text


def test_notices_stand_before_the_figures() -> None:
    text = Page(render_html(report(notices=("calibrated on RANDOM data: it means nothing",)))).text
    assert text.index("RANDOM") < text.index("Peak activations")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"executions": (), "accuracy": ()}, ["unknown the package was not run", "The package was not run."]),
        ({"accuracy": (), "executions": (Execution("here", "native", BITEQUAL),)}, ["No labelled data was given"]),
        ({"remarks": ()}, ["No pass had anything to say."]),
        ({"cost": costs(0)}, ["All 0 nodes, 0 µs in all"]),
        ({"cost": costs(joules=None, low_seconds=None, high_seconds=None)}, ["Latency 780 µs 3.0x faster"]),
        ({"source": facts(0, {}, 13), "compiled": facts(0, {}, 13)}, ["Parameters 60.0 k 60.0 k"]),
        ({"steps": ()}, ["0 passes in the order in which they ran"]),
        ({"artifact_bytes": 400_000}, ["1.6x larger"]),
        ({"artifact_bytes": 250_000}, ["the same size (253.00 KB → 250.00 KB)", "unchanged"]),
    ],
)
def test_what_is_missing_is_said(changes: dict[str, Any], expected: list[str]) -> None:
    text = Page(render_html(report(**changes))).text
    for words in expected:
        assert words in text


def test_energy_has_a_card_only_where_it_is_known() -> None:
    assert "Energy" in Page(render_html(report())).text
    assert "Energy" not in Page(render_html(report(cost=costs(joules=None)))).text


def test_a_distinguishable_difference_is_called_one() -> None:
    worse = accuracy(drop=0.05, interval=(0.02, 0.08), distinguishable=True, candidate=0.931)
    runs = (Execution("here", "native", BITEQUAL, (worse,)),)
    text = Page(render_html(report(accuracy=(worse,), executions=runs))).text
    assert "a distinguishable difference" in text
    assert "larger than chance explains" in text


def test_an_infinite_interval_is_not_drawn() -> None:
    endless = accuracy(metric="perplexity", interval=(0.0, math.inf))
    assert interval(endless) is None
    parsed = Page(render_html(report(executions=(Execution("here", "native", BITEQUAL, (endless,)),))))
    assert not parsed.named("svg")


def test_names_are_escaped_and_made_visible() -> None:
    evil = "</script><script>alert('x')</script>\u202e\x00\ud800"
    row = dataclasses.replace(costs().nodes[0], name=evil, op_type=evil, dtype=evil, bound=evil, kernel=evil, note=evil)
    page = render_html(
        report(
            model=evil,
            target=evil,
            target_summary=evil,
            package=evil,
            precision=evil,
            calibration=evil,
            notices=(evil,),
            cost=costs(unpriced={evil: 1}, nodes=(row,), shapes={evil: (1,)}, band_source=evil),
            executions=(Execution(evil, evil, BITEQUAL, (accuracy(metric=evil, note=evil),)),),
            accuracy=(accuracy(metric=evil),),
            remarks=(RemarkGroup(evil, "missed", evil, 1, (evil,)),),
            gates=(Gate(evil, 1.0, 2.0, False),),
            source=dataclasses.replace(
                facts(1, {evil: 4}, 13), inputs=(TensorFacts(evil, evil, (evil,)),), opsets={evil: 1}
            ),
            steps=(Step(evil, {evil: evil}, EXACT, 1, 0, 1, 1, 0.0, BITEQUAL, 0.0),),
        )
    )
    assert page.count(b"<script>") == 1
    assert "\u202e" not in page.decode()
    assert b"\x00" not in page
    assert Page(page).named("script") == [{}]


def test_a_model_of_any_size_gives_a_page_of_bounded_size() -> None:
    long = "n" * 100_000
    rows = tuple(
        dataclasses.replace(row, name=long, op_type=f"{row.op_type}{i}") for i, row in enumerate(costs(5000).nodes)
    )
    groups = tuple(RemarkGroup(long, kind, long, 9, (long,) * 5) for kind in ("applied", "missed") for _ in range(2000))
    wide = facts(5000, {f"type{i}{long}": 10 for i in range(500)}, 13)
    wide = dataclasses.replace(wide, inputs=tuple(TensorFacts(long, long, (long,) * 500) for _ in range(500)))
    page = render_html(
        report(
            cost=costs(nodes=rows, unpriced={f"op{i}{long}": 1 for i in range(500)}),
            remarks=groups,
            source=wide,
            steps=report().steps * 100,
            notices=(long,) * 500,
            gates=(Gate(long, 1.0, 1.0, True),) * 500,
            executions=report().executions * 500,
        )
    )
    assert len(page) < 1_500_000
    text = Page(page).text
    assert "1850 more reasons in report.json" in text
    assert "4975 other nodes" in text
    assert "340 more passes in report.json" in text
