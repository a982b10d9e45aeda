"""The report of a compilation in a terminal: what a person wants to know, in the order in which they ask."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from rich.markup import escape

from optkit.cli.render import LONGEST, cost_line
from optkit.cli.show import console, table
from optkit.report.contents import Left, Report
from optkit.report.units import count, decibel, difference, duration, share, size, small

SLOWEST = 5
REASONS = 3  # of what is not covered, in one line


def report(found: Report, goal: Path, *, first: bool = True) -> None:
    """Print a report.

    Args:
        found: The report.
        goal: Where the package is.
        first: False sets a rule before it, for the second and later targets of one call.
    """
    if not first:
        console.rule()
    console.print(f"[bold]{escape(found.model)}[/bold] for [bold]{found.target}[/bold], {found.precision}")
    for notice in found.notices:
        console.print(f"[yellow]{escape(notice)}[/yellow]")
    before, after = found.cost_before, found.cost
    memory = [c.weight_bytes + c.peak_activation_bytes for c in (before, after)]
    rows = [
        (
            "size",
            size(found.source_bytes),
            size(found.artifact_bytes),
            _ratio(found.source_bytes, found.artifact_bytes),
        ),
        ("time of one run", duration(before.seconds), cost_line(after), _ratio(before.seconds, after.seconds)),
        ("weights and activations", size(memory[0]), size(memory[1]), _ratio(memory[0], memory[1])),
        (
            "activations moved",
            size(before.activation_bytes),
            size(after.activation_bytes),
            _ratio(before.activation_bytes, after.activation_bytes),
        ),
        ("nodes", str(found.source.nodes), str(found.compiled.nodes), ""),
    ]
    console.print(table("", ("", "before", "after", ""), rows, right=(1,)))
    console.print(f"\n{escape(coverage(found))}; {count(after.macs)} MACs")
    _placement(found)
    _accuracy(found)
    _deployment(found)
    _also(found)
    _passes(found)
    _slowest(found)
    _remarks(found)
    for gate in found.gates:
        state = "[green]met[/green]" if gate.met else "[red]not met[/red]"
        show = {"coverage": share, "agreement": decibel}.get(gate.name, "{:g}".format)
        actual = "unknown" if gate.actual is None else show(gate.actual)
        console.print(f"limit on {gate.name}: {show(gate.limit)}, reached {actual}: {state}")
    console.print(f"\nwritten: [bold]{escape(str(goal))}[/bold]  (report.html for the whole story)")


def coverage(found: Report) -> str:
    """Return in one line how much of the model is in the precision asked for, and what is not and why."""
    shares = found.coverage
    tables = f" ({share(shares.tables)} more in tables of 8 bits)" if shares.tables else ""
    line = f"covered {share(shares.weights)} of weights{tables} and {share(shares.macs)} of MACs at {found.precision}"
    left = [f"{_left(entry)} ({entry.reason})" for entry in shares.left[:REASONS]]
    if len(shares.left) > REASONS:
        left.append(f"{len(shares.left) - REASONS} more reasons")
    return f"{line}; left: {', '.join(left)}" if left else line


def _left(entry: Left) -> str:
    return size(entry.weight_bytes) if entry.weight_bytes else f"{count(entry.macs)} MACs"


def _ratio(before: float, after: float) -> str:
    return (
        f"{before / after:.2f}x less" if after and before > after else (f"{after / before:.2f}x more" if before else "")
    )


def _accuracy(found: Report) -> None:
    rows = []
    for run in found.executions:
        fidelity = run.fidelity
        agreement = "-" if fidelity.top1_agreement is None else share(fidelity.top1_agreement)
        rows.append(
            (
                escape(run.executor),
                run.kind,
                decibel(fidelity.sqnr_db),
                f"{fidelity.cosine:.5f}",
                agreement,
                fidelity.samples,
            )
        )
    if rows:
        columns = ("ran on", "", "SQNR", "cosine", "top-1 agrees", "samples")
        console.print(table("\nAgainst the original", columns, rows, right=(2, 3, 4, 5)))
    for run in found.executions:
        for measured in run.accuracy:
            low, high = measured.interval
            verdict = "" if measured.distinguishable else ": not distinguishable from no change"
            values = f"{measured.metric} {measured.reference:.4f} -> {measured.candidate:.4f}"
            interval = f"drop {measured.drop:.4f}, 95 % interval {low:.4f} to {high:.4f}"
            console.print(f"{values} ({run.kind}, n = {measured.n}), {interval}{verdict}")


def _placement(found: Report) -> None:
    """Print where the nodes run where that is on more than one device or was checked, and what the compiler said."""
    where = found.placement
    if where.runtime or len(where.devices) > 1:
        shares = [
            f"{each.device.upper()} {share(each.node_share)} of nodes and {share(each.macs_share)} of MACs"
            for each in where.devices
        ]
        who = f"as {where.runtime} placed them" if where.runtime else "predicted"
        console.print(f"{', '.join(shares)}, {who}")
        for left in where.fallback[:REASONS]:
            ops = f"{left.count} {', '.join(left.ops)}"
            console.print(f"[yellow]not on the target's own unit:[/yellow] {escape(ops)}: {escape(left.reason)}")
        if where.disagreements:
            names = ", ".join(f"{each.node} ({each.op_type})" for each in where.disagreements[:REASONS])
            wrong = f"{len(where.disagreements)} of {where.compared} nodes"
            console.print(f"[yellow]placed otherwise than predicted:[/yellow] {wrong}: {escape(names)}")
    subjects: dict[str, list[str]] = {}
    for fact in found.facts:
        subjects.setdefault(fact.subject, []).append(f"{fact.name} {fact.value}")
    for subject, facts in subjects.items():
        console.print(f"{escape(subject)}: {escape(', '.join(facts))}")
    for subject in dict.fromkeys(stage.subject for stage in found.stages):
        stages = [stage for stage in found.stages if stage.subject == subject]
        total = sum(stage.seconds for stage in stages)
        longest = sorted(stages, key=lambda stage: -stage.seconds)[:REASONS]
        parts = ", ".join(f"{stage.name} {share(stage.seconds / total)}" for stage in longest if total)
        console.print(f"{escape(subject)}: compiled in {duration(total)} ({escape(parts)})")


def _also(found: Report) -> None:
    """Print what the package's further targets load, and what a run costs there."""
    rows = [
        (
            escape(each.name),
            size(each.artifact_bytes),
            duration(each.seconds),
            f"{duration(each.low_seconds)} to {duration(each.high_seconds)}" if each.low_seconds is not None else "-",
        )
        for each in found.also
    ]
    if rows:
        console.print(
            table("\nIn the same package", ("target", "size", "time of one run", "error band"), rows, right=(1, 2))
        )


def _deployment(found: Report) -> None:
    """Print SQNR as deployed and as simulated, on the same samples, and how many layers run in integers."""
    both = found.deployment
    parts = []
    if both.deployed is not None:
        parts.append(f"deployed ({both.kind}) {decibel(both.deployed.sqnr_db)}")
    elif both.simulated is not None:
        parts.append("deployed: not run here")
    if both.simulated is not None:
        parts.append(f"simulated {decibel(both.simulated.sqnr_db)}")
    if both.difference_db is not None and both.deployed is not None:
        parts.append(f"difference {difference(both.difference_db)} on {both.deployed.samples} samples")
    if both.between is not None:
        parts.append(f"to each other {decibel(both.between.sqnr_db)}")
    if found.placement.layers:
        parts.append(f"{found.placement.integer_layers} of {found.placement.layers} layers in integer kernels")
    if parts:
        console.print(", ".join(parts))


def _passes(found: Report) -> None:
    rows = [
        (
            step.pass_name,
            step.effect.kind,
            step.applied,
            step.missed,
            f"{step.nodes_before} -> {step.nodes_after}",
            "-" if step.change is None else small(step.change),
            "-" if step.fidelity is None else decibel(step.fidelity.sqnr_db),
        )
        for step in found.steps
        if step.applied or step.missed
    ]
    columns = ("pass", "effect", "applied", "missed", "nodes", "change", "SQNR after")
    console.print(table("\nPasses", columns, rows, right=(2, 3, 4, 5, 6)))


def _slowest(found: Report) -> None:
    ranked = sorted((n for n in found.cost.nodes if n.seconds), key=lambda node: -(node.seconds or 0.0))
    rows = [
        (
            escape(n.name),
            escape(n.op_type),
            n.dtype,
            duration(n.seconds),
            share((n.seconds or 0) / found.cost.seconds),
            n.bound,
        )
        for n in ranked[:SLOWEST]
    ]
    if rows:
        console.print(
            table("\nWhere the time goes", ("node", "op", "in", "time", "share", "bound"), rows, right=(3, 4))
        )
    for operator, number in found.cost.unpriced.items():
        console.print(f"not priced: {escape(operator)} ({number}x)")


def _remarks(found: Report) -> None:
    missed = [group for group in found.remarks if group.kind == "missed"]
    rows = [(group.count, group.pass_name, escape(group.message)) for group in islice(missed, LONGEST)]
    if rows:
        console.print(table("\nLeft alone, and why", ("nodes", "pass", "reason"), rows, right=(0,)))
    if len(missed) > LONGEST:
        console.print(f"and {len(missed) - LONGEST} more reasons ('optkit explain' and report.html have all)")
