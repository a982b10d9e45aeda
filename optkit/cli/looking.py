"""Commands that look at a model and change nothing: inspect, check, cost."""

from __future__ import annotations

from typing import Annotated

import typer

from optkit.cli.app import app
from optkit.cli.options import Dims, Fixed, Json, ModelPath, TargetSpec, parse_dims, parse_fixed


@app.command()
def inspect(model: ModelPath, dim: Dims = None, fix: Fixed = None, json: Json = False) -> None:
    """Show what a model is made of: inputs, dimensions, opset, operators, parameters, MACs, tied weights."""
    from optkit.cli import render, show
    from optkit.cost.work import describe
    from optkit.dataset.samples import random_samples
    from optkit.model.loading import load, model_file
    from optkit.report.inspection import inspect_model

    loaded = load(model, parse_dims(dim), parse_fixed(fix))
    facts = inspect_model(loaded)
    sample = random_samples(loaded, 1)[0]
    macs = sum(work.macs * work.count for work in describe(loaded, sample=sample))
    if json:
        show.print_json({"model": model_file(model).name, **show.plain(facts), "macs": macs})
    else:
        shapes = {name: array.shape for name, array in sample.items()} if facts.dynamic_dims else {}
        render.facts(model_file(model).name, facts, macs, shapes)


@app.command()
def check(model: ModelPath, target: TargetSpec, dim: Dims = None, fix: Fixed = None, json: Json = False) -> None:
    """Show what the target takes, what falls back, and why; exit code 1 when something falls back."""
    from optkit.cli import render, show
    from optkit.errors import GateError
    from optkit.package.checking import check_model
    from optkit.target import load_target

    result = check_model(model, load_target(target), parse_dims(dim), parse_fixed(fix))
    if json:
        show.print_json(result)
    else:
        render.check(result)
    if result.fallback:
        names = ", ".join(sorted({place.op_type for place in result.fallback}))
        count = f"{len(result.fallback)} of {len(result.placements)} nodes"
        raise GateError(f"{count} do not run on '{result.target}': {names}")
    if result.problems:
        raise GateError(result.problems[0])


@app.command()
def cost(
    model: ModelPath,
    target: TargetSpec,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="List every node, most expensive first.")] = False,
    dim: Dims = None,
    fix: Fixed = None,
    json: Json = False,
) -> None:
    """Predict what a model costs on a target as it stands: time, memory, bytes moved, energy."""
    from optkit.cli import render, show
    from optkit.cost.summary import cost_summary
    from optkit.model.loading import load, model_file
    from optkit.target import load_target

    device = load_target(target)
    summary = cost_summary(load(model, parse_dims(dim), parse_fixed(fix)), device)
    if json:
        show.print_json({"model": model_file(model).name, "target": device.name, **show.plain(summary)})
    else:
        render.cost(summary, device.name, per_layer=per_layer)
