"""How each command's result is laid out in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from optkit.cli.show import console, print_json, table
from optkit.precision import Precision, block_sizes
from optkit.report.units import count, decibel, duration, energy, size

if TYPE_CHECKING:
    from pathlib import Path

    from optkit.authoring.conformance import Result
    from optkit.evaluate.difference import TensorDifference
    from optkit.package.checking import Check
    from optkit.package.running import PackageCheck, RunResult
    from optkit.plugins import BrokenPlugin
    from optkit.report.contents import CostSummary
    from optkit.report.inspection import ModelFacts
    from optkit.target import Target

LONGEST = 12  # rows of a list that a summary shows before it says how many more there are


def shape(dims: Sequence[int | str] | None) -> str:
    """Return a shape as ``[N, 3, 224, 224]``."""
    return "?" if dims is None else escape(f"[{', '.join(str(dim) for dim in dims)}]")


def facts(name: str, found: ModelFacts, macs: int, shapes: Mapping[str, Sequence[int]]) -> None:
    """Print what `optkit inspect` found."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    console.print(f"[bold]{escape(name)}[/bold]  IR {found.ir_version}, opset {opsets}, {found.nodes} nodes")
    rows = [("input", escape(t.name), t.dtype, shape(t.shape)) for t in found.inputs]
    rows += [("output", escape(t.name), t.dtype, shape(t.shape)) for t in found.outputs]
    console.print(table("", ("", "name", "dtype", "shape"), rows))
    if found.dynamic_dims:
        dims = ", ".join(found.dynamic_dims)
        console.print(f"dynamic dimensions: {escape(dims)}  (fix one with --dim NAME=SIZE)")
    at = " at " + ", ".join(f"{escape(key)} {shape(value)}" for key, value in shapes.items()) if shapes else ""
    console.print(
        f"{count(found.parameters)} parameters, {size(found.weight_bytes)} of weights, {count(macs)} MACs{at}"
    )
    for dtype, held in found.bytes_by_dtype.items():
        console.print(f"  {dtype}: {size(held)}")
    for tensor, users in islice(found.tied.items(), LONGEST):
        console.print(f"tied: '{escape(tensor)}' has {users} users")
    for operator in found.custom_domains:
        console.print(f"custom operator: {escape(operator)} (kept untouched)")
    console.print(table("", ("operator", "count"), found.ops.items(), right=(1,)))


def check(result: Check) -> None:
    """Print what `optkit check` found: a row per kind of placement, refused nodes one by one."""
    groups: dict[tuple[bool, str, str, str, str], int] = {}
    for place in result.placements:
        key = (place.supported, place.op_type, place.device, place.precision, place.reason)
        groups[key] = groups.get(key, 0) + 1
    rows = [
        ("" if ok else "[red]no[/red]", escape(op), number, device, precision, escape(reason))
        for (ok, op, device, precision, reason), number in sorted(groups.items(), key=lambda g: (g[0][0], -g[1]))
    ]
    console.print(table("", ("", "operator", "nodes", "runs on", "as", "because"), rows, right=(2,)))
    for place in islice(result.fallback, LONGEST):
        console.print(f"[red]not taken:[/red] {escape(place.node)} ({escape(place.op_type)}): {escape(place.reason)}")
    for problem in result.problems:
        console.print(f"[red]not taken:[/red] {escape(problem)}")
    for each in islice(result.disagreements, LONGEST):
        where = f"{escape(each.node)} ({escape(each.op_type)}): predicted {each.predicted}, placed on {each.observed}"
        console.print(f"[yellow]predicted otherwise:[/yellow] {where}")
    if result.runtime:
        agree = result.compared - len(result.disagreements)
        console.print(f"{escape(result.runtime)} agrees on {agree} of {result.compared} nodes that it was asked about")
    taken = len(result.placements) - len(result.fallback)
    console.print(f"{taken} of {len(result.placements)} nodes of {escape(result.model)} run on {result.target}")


def cost(summary: CostSummary, target: str, *, per_layer: bool) -> None:
    """Print a cost summary."""
    console.print(f"[bold]{target}[/bold]  {cost_line(summary)}")
    at = ", ".join(f"{escape(name)} {shape(dims)}" for name, dims in summary.shapes.items())
    console.print(
        f"{count(summary.macs)} MACs, {size(summary.weight_bytes)} of weights, {size(summary.activation_bytes)} of "
        f"activations moved, {size(summary.peak_activation_bytes)} at once, at {at}"
    )
    ranked = sorted(summary.nodes, key=lambda node: -(node.seconds or 0.0))
    rows = [
        (
            escape(node.name),
            escape(node.op_type),
            node.dtype,
            count(node.macs),
            size(node.weight_bytes),
            size(node.activation_bytes),
            "-" if node.intensity is None else f"{node.intensity:.1f}",
            duration(node.seconds),
            node.bound if not per_layer else f"{node.bound}, {escape(node.kernel)}",
        )
        for node in (ranked if per_layer else ranked[:LONGEST])
    ]
    columns = ("node", "op", "in", "MACs", "weights", "moved", "ops/byte", "time", "bound by")
    console.print(table("", columns, rows, right=(3, 4, 5, 6, 7)))
    if not per_layer and len(ranked) > LONGEST:
        console.print(f"and {len(ranked) - LONGEST} more (--per-layer lists them)")
    for operator, number in summary.unpriced.items():
        console.print(f"not priced: {escape(operator)} ({number}x), which no cost model knows")
    if summary.band_source:
        console.print(f"[dim]error band: {escape(summary.band_source)}[/dim]")


def cost_line(summary: CostSummary) -> str:
    """Return the time of one run with its band, and the energy, in one line."""
    band = ", error band unknown"
    if summary.low_seconds is not None:
        band = f" ({duration(summary.low_seconds)} to {duration(summary.high_seconds)})"
    spent = "" if summary.joules is None else f", {energy(summary.joules)}"
    return f"{duration(summary.seconds)}{band}{spent}, {summary.tag}"


def run(result: RunResult) -> None:
    """Print what `optkit run` did."""
    console.print(f"{result.samples} samples on {escape(result.executor)} ({result.kind})")
    if result.notice:
        console.print(f"[yellow]{escape(result.notice)}[/yellow]")
    rows = [
        (escape(output.name), output.dtype, shape(output.shape), f"{output.minimum:.6g}", f"{output.maximum:.6g}")
        for output in result.outputs
    ]
    console.print(table("", ("output", "dtype", "shape", "min", "max"), rows, right=(3, 4)))
    if result.written:
        console.print(f"written: {escape(result.written)}")


def diff(rows: Sequence[TensorDifference], limit: int) -> None:
    """Print the worst tensors of `optkit diff`."""
    cells = [
        (escape(row.name), escape(row.op_type), decibel(row.sqnr_db), f"{row.cosine:.6f}", f"{row.max_error:.4g}")
        for row in rows[:limit]
    ]
    console.print(table("", ("tensor", "op", "SQNR", "cosine", "max error"), cells, right=(2, 3, 4)))
    equal = sum(row.sqnr_db == float("inf") for row in rows)
    console.print(
        f"{len(rows)} tensors compared, {equal} equal" + (f", {limit} worst shown" if len(rows) > limit else "")
    )


def checks(found: Iterable[PackageCheck]) -> None:
    """Print the checks of `optkit verify`."""
    rows = [("[green]ok[/green]" if c.passed else "[red]failed[/red]", c.name, escape(c.detail)) for c in found]
    console.print(table("", ("", "check", ""), rows))


def written(paths: Sequence[Path], json: bool) -> None:
    """Print the files a scaffold wrote."""
    if json:
        print_json({"written": [path.as_posix() for path in paths]})
    else:
        for path in paths:
            console.print(escape(path.as_posix()))


def conformance(name: str, results: Sequence[Result], json: bool) -> None:
    """Print the results of the conformance kit."""
    if json:
        print_json({"pass": name, "checks": results})
        return
    rows = [
        ("[red]failed[/red]" if r.problem else "[green]ok[/green]", escape(r.check), escape(r.problem or r.detail))
        for r in results
    ]
    console.print(table(f"pass '{name}'", ("", "check", ""), rows))


def describe_pass(found: Mapping[str, Any], json: bool) -> None:
    """Print a pass's help."""
    if json:
        print_json(found)
        return
    effect = found["effect"]["kind"] + (f" within {found['effect']['rtol']:g}" if found["effect"]["rtol"] else "")
    console.print(f"[bold]{found['name']}[/bold]  ({effect})\n\n{escape(found['help'])}\n")
    rows = [(o["name"], o["type"], o["default"], escape(o["help"])) for o in found["options"]]
    if rows:
        console.print(table("Options", ("name", "type", "default", ""), rows))
    else:
        console.print("no options")


def describe_target(target: Target, json: bool) -> None:
    """Print a target, every number with its source."""
    if json:
        print_json(target.model_dump(mode="json", by_alias=True))
        return
    console.print(f"[bold]{target.name}[/bold]  {escape(target.summary)}, packager {target.packager}")
    isa = list(target.isa)
    more = f" and {len(isa) - LONGEST} more" if len(isa) > LONGEST else ""
    console.print(f"isa: {', '.join(isa[:LONGEST])}{more}; dtypes: {', '.join(target.dtypes)}")
    console.print(table("\nPrecisions", ("name", "", "block sizes", "passes"), _precisions(target)))
    rows = [(key, f"{q['value']:g}", q["status"], escape(q["source"])) for key, q in quantities(target.model_dump())]
    console.print(table("", ("number", "value", "status", "source"), rows, right=(1,)))


def _precisions(target: Target) -> Iterable[tuple[str, str, str, str]]:
    """Yield what a request may name: base name, whether it is the default, sizes for ``-b``, passes with options."""
    for name in target.precisions:
        passes = []
        for spec in target.recipe_for(name)[len(target.cleanup) :]:
            options = ", ".join(f"{key} = {value}" for key, value in spec.options.items())
            passes.append(f"{spec.pass_} ({options})" if options else spec.pass_)
        default = "default" if target.precision(None).base == name else ""
        sizes = ", ".join(str(size) for size in block_sizes(Precision.parse(name), target))
        yield name, default, sizes, escape(", ".join(passes)) or "nothing is quantized"


def quantities(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield every number with a source in a target's data, with its key."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            if "source" in value and "value" in value:
                yield prefix + key, value
            else:
                yield from quantities(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, Mapping):
                    yield from quantities(item, f"{prefix}{key}.{item.get('name', '')}.")


def broken(plugins: Sequence[BrokenPlugin]) -> None:
    """Print plugins that do not load, with their tracebacks."""
    for plugin in plugins:
        console.print(f"\n[red]broken:[/red] {escape(plugin.name)} of {escape(plugin.origin)} ({plugin.group})")
        console.print(escape(plugin.traceback.rstrip()), style="dim")
