"""The report as one HTML page: no network, readable without a script, the same bytes for the same report.

Everything that comes from a model (names, operators, messages) is untrusted: it is escaped, rid of characters that do
not print, and cut; every list is bounded, so that a model of any size gives a page of bounded size.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from optkit.report import units
from optkit.report.charts import by_bound, by_op_type, dtypes, interval, is_share, log_width, slowest

if TYPE_CHECKING:
    from optkit.evaluate.evaluation import Evaluation
    from optkit.evaluate.fidelity import Fidelity
    from optkit.report.contents import CostSummary, Execution, Report

MOST_GROUPS = 150
MOST_ROWS = 60  # of every other list
LONGEST_TEXT = 160
UNBROKEN_SPACE = "\N{NO-BREAK SPACE}"
TIMES, TO = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Card:
    """One headline figure; ``share`` is after / before, where both are known and comparable by length."""

    label: str
    after: str
    before: str
    change: str
    note: str
    share: float | None = None
    tone: str = ""  # better | worse | ""


def render_html(report: Report) -> bytes:
    """Return the report as one self-contained UTF-8 page, below 1.5 MB for a model of any size."""
    folder = resources.files("optkit.report") / "templates"
    style = (folder / "style.css").read_text(encoding="utf-8")
    script = (folder / "table.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("optkit.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=visible,
    )
    environment.filters.update(
        size=units.size,
        count=units.count,
        duration=units.duration,
        energy=units.energy,
        decibel=units.decibel,
        share=units.share,
        small=units.small,
        log_width=log_width,
        clip=clip,
        tail=tail,
        unbroken=unbroken,
    )
    page = environment.get_template("report.html.j2").render(
        report=report,
        style=Markup(style),
        script=Markup(script),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headline=headline(report),
        cards=cards(report),
        measured=measured(report),
        interval=interval,
        metric_label=metric_label,
        nodes=slowest(report.cost),
        ops=by_op_type(report.cost),
        bounds=by_bound(report.cost),
        dtypes=dtypes(report.source.bytes_by_dtype, report.compiled.bytes_by_dtype),
        remarks={kind: [g for g in report.remarks if g.kind == kind] for kind in ("missed", "applied")},
        most_groups=MOST_GROUPS,
        most_rows=MOST_ROWS,
        precise=precise,
        gate_figure=gate_figure,
        difference=units.difference,
    )
    return page.encode("utf-8")


def visible(value: Any) -> Any:
    """Return text with every character replaced that does not print: controls, bidirectional overrides, surrogates."""
    if type(value) is not str or value.isprintable():  # markup is the template's own
        return value
    return "".join(c if c.isprintable() or c == UNBROKEN_SPACE else "\N{REPLACEMENT CHARACTER}" for c in value)


def clip(text: object, limit: int = LONGEST_TEXT) -> str:
    """Return untrusted text with its middle left out where it is too long."""
    text = str(text)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit // 2 - 1) :]}"


def tail(text: object, limit: int) -> str:
    """Return untrusted text like `clip`, its end kept: the end of a node's path tells it from its neighbours."""
    text = str(text)
    if len(text) <= limit:
        return clip(text)
    end = text[1 - limit :]
    whole = re.search(r"[/.].{16,}", end)  # begin at a part of the path, where that leaves enough
    return clip(f"…{whole.group() if whole else end}")


def unbroken(text: str) -> str:
    """Return text in which a number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=(%|[KMG]?B|[mµ]?[sJ]|dB|[kMG])(?![\w]))", UNBROKEN_SPACE, text)


def headline(report: Report) -> tuple[str, ...]:
    """Return the result in plain words: size, predicted time, accuracy, one clause each."""
    before, after = units.size(report.source_bytes), units.size(report.artifact_bytes)
    change = ratio(report.source_bytes, report.artifact_bytes, "smaller", "larger") or "the same size"
    clauses = [f"{change} ({before} → {after})", f"{report.cost.tag} {units.duration(report.cost.seconds)}"]
    if report.cost.low_seconds is not None and report.cost.high_seconds is not None:
        clauses[1] += f" ({spread(report.cost)})"
    if report.accuracy:
        clauses.append(in_words(report.accuracy[0]))
    elif report.executions:
        fidelity, samples = largest(report.executions), f"on {largest(report.executions).samples} samples"
        if fidelity.top1_agreement is not None:
            clauses.append(
                f"same top-1 as the original in {units.share(fidelity.top1_agreement)} of the rows {samples}"
            )
        else:
            clauses.append(f"SQNR against the original {units.decibel(fidelity.sqnr_db)} {samples}")
        clauses.append("accuracy not measured")
    return tuple(clauses)


def cards(report: Report) -> list[Card]:
    """Return size, accuracy (or agreement), latency, memory and energy, before and after."""
    old, new = report.cost_before, report.cost
    rows = [
        _card(
            "Size", report.source_bytes, report.artifact_bytes, units.size, "smaller", "larger", "what the device loads"
        ),
        _accuracy_card(report),
        _card("Latency", old.seconds, new.seconds, units.duration, "faster", "slower", _time_note(new)),
        _card(
            "Peak activations",
            old.peak_activation_bytes,
            new.peak_activation_bytes,
            units.size,
            "less",
            "more",
            "planned arena, without weights",
        ),
    ]
    if new.joules is not None:
        rows.append(_card("Energy", old.joules, new.joules, units.energy, "less", "more", f"per run, {new.tag}"))
    return rows


def _card(label: str, before: float | None, after: float, show: Any, less: str, more: str, note: str) -> Card:
    if not before or not after:
        return Card(label, show(after), show(before), "", note)
    tone = "better" if after < 0.95 * before else "worse" if after > 1.05 * before else ""
    change = ratio(before, after, less, more) or "unchanged"
    return Card(label, show(after), show(before), change, note, after / before, tone)


def _accuracy_card(report: Report) -> Card:
    if report.accuracy:
        first = report.accuracy[0]
        after, before = metric(first, first.candidate), metric(first, first.reference)
        return Card(f"Accuracy, {metric_label(first)}", after, before, verdict(first), f"on {first.n} samples")
    if not report.executions:
        return Card("Accuracy", "unknown", "", "", "the package was not run")
    fidelity = largest(report.executions)
    note = f"on {fidelity.samples} samples, no labels given"
    if fidelity.top1_agreement is not None:
        return Card("Top-1 agreement", units.share(fidelity.top1_agreement), "", "with the original", note)
    return Card("SQNR", units.decibel(fidelity.sqnr_db), "", "against the original", note)


def _time_note(cost: CostSummary) -> str:
    return cost.tag if cost.low_seconds is None else f"{cost.tag}, {spread(cost)}"


def ratio(before: float, after: float, less: str, more: str) -> str:
    """Return how many times ``less`` or ``more`` the later figure is; empty within 5 %."""
    if not before or not after or 0.95 <= after / before <= 1.05:
        return ""
    return f"{before / after:.1f}{TIMES} {less}" if after < before else f"{after / before:.1f}{TIMES} {more}"


def spread(cost: CostSummary) -> str:
    """Return the error band of a predicted time, the unit once where it is the same."""
    low, high = units.duration(cost.low_seconds), units.duration(cost.high_seconds)
    return f"{low.split()[0]}{TO}{high}" if low.split()[-1] == high.split()[-1] else f"{low} {TO} {high}"


def largest(executions: Sequence[Execution]) -> Fidelity:
    """Return the fidelity over the most samples, the first of equals: an emulator runs only a few."""
    return max((execution.fidelity for execution in executions), key=lambda fidelity: fidelity.samples)


def measured(report: Report) -> list[tuple[Evaluation, str, str, Execution]]:
    """Return every evaluation with its values before and after, and the execution it comes from."""
    return [
        (item, metric(item, item.reference), metric(item, item.candidate), execution)
        for execution in report.executions
        for item in execution.accuracy
    ]


def in_words(evaluation: Evaluation) -> str:
    """Return a metric before and after, on how many samples, and whether the difference can be told from chance."""
    before, after = metric(evaluation, evaluation.reference), metric(evaluation, evaluation.candidate)
    return f"{metric_label(evaluation)} {before} → {after} on {evaluation.n} samples, {verdict(evaluation)}"


def verdict(evaluation: Evaluation) -> str:
    """Say whether the difference of two metrics can be told from chance at this sample size."""
    return "a distinguishable difference" if evaluation.distinguishable else "not distinguishable"


def precise(items: Iterable[tuple[str, object]]) -> str:
    """Return options as ``name = value``, in one line, the values as JSON writes them."""
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in items)


def metric(evaluation: Evaluation, value: float) -> str:
    """Return a metric's value: in percent where it is a share."""
    return units.share(value) if is_share(evaluation) else f"{value:.4g}"


def metric_label(evaluation: Evaluation) -> str:
    """Return ``top-1`` for ``top1``; other metrics are called what they are called."""
    return re.sub(r"^top(\d+)", r"top-\1", clip(evaluation.metric, 60))


def gate_figure(name: str, value: float | None) -> str:
    """Return a gate's limit or what was reached, in the unit of that gate."""
    if value is None:
        return "not known"
    if name == "agreement":
        return units.decibel(value)
    if name == "coverage":
        return units.share(value)
    if name == "drop":
        return f"{value:.4g}"
    return units.duration(value) if name == "latency" else units.size(value)
