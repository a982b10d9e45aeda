"""The main command: compile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optkit.cli.app import app
from optkit.cli.options import (
    Dims,
    Executor,
    Fixed,
    Json,
    ModelPath,
    Precision,
    Preprocess,
    parse_bytes,
    parse_dims,
    parse_fixed,
    parse_seconds,
    parse_set,
    parse_share,
)
from optkit.errors import GateError, InputError, MissingDependencyError


@app.command()
def compile(  # noqa: A001  # the command's name
    model: ModelPath,
    target: Annotated[
        list[str], typer.Option("--target", "-t", metavar="TARGET", help="A name, a .toml file, or name:key=value,...")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; MODEL-TARGET by default.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="DATA", help=".npz, folder of .npy or images, module:function, or random; DATA[:100]."),
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", help="Labelled data to measure accuracy on.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="WHERE", help="Labels of --eval: a key, file.csv[:column] or file.npy.")
    ] = None,
    preprocess: Preprocess = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="top1, top5, f1, mse, psnr, nll, perplexity, NAME:next, module:function."),
    ] = None,
    precision: Precision = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="TOML", help="Passes, options and rules to use instead of the target's.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Set an option of a pass; repeatable."),
    ] = None,
    dim: Dims = None,
    fix: Fixed = None,
    max_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Fail above it, for instance 8MB.")] = None,
    max_latency: Annotated[str | None, typer.Option(metavar="TIME", help="Fail above it, for instance 30ms.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Fail above it, for instance 64MB.")] = None,
    max_drop: Annotated[str | None, typer.Option(metavar="SHARE", help="Fail above it, for instance 1%.")] = None,
    min_coverage: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help="Fail where less of the weights is in the precision asked for; 50% by default."
        ),
    ] = None,
    executor: Executor = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a package that is already there.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on a pass that changes the model without saying so.")
    ] = False,
    no_context_binary: Annotated[
        bool,
        typer.Option(
            "--no-context-binary", help="Leave out what a vendor's compiler makes ahead of time for one chip."
        ),
    ] = False,
    deployment_target: Annotated[
        str | None, typer.Option(metavar="iOS17", help="The oldest system that a Core ML package must load on.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT:SCALE,BIAS,RGB", help="Let a Core ML package take images: scale * pixel + bias."),
    ] = None,
    flexible: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LOW..HIGH", help="Leave a dimension of a Core ML package open; or NAME=16,32,64."),
    ] = None,
    class_labels: Annotated[
        Path | None, typer.Option(metavar="TXT", help="Classes, one a line: a Core ML package then names the best one.")
    ] = None,
    json: Json = False,
) -> None:
    """Compile a model for a device: rewrite, quantize, verify, package, and report what it costs there."""
    from optkit.cli import report as printed
    from optkit.cli import show
    from optkit.compiler import compile as run
    from optkit.package.sharing import grouped, load_targets
    from optkit.report.summary import Gates

    gates = Gates(
        parse_bytes(max_size, "--max-size"),
        parse_seconds(max_latency, "--max-latency"),
        parse_bytes(max_memory, "--max-memory"),
        parse_share(max_drop, "--max-drop"),
        parse_share(min_coverage, "--min-coverage"),
    )
    if gates.max_drop is not None and evaluation is None:
        raise InputError("--max-drop needs labelled data", hint="pass --eval DATA")
    packaging = {
        "context_binary": False if no_context_binary else None,
        "deployment_target": deployment_target,
        "image": tuple(image or ()) or None,
        "flexible": tuple(flexible or ()) or None,
        "class_labels": None if class_labels is None else str(class_labels),
    }
    packaging = {key: value for key, value in packaging.items() if value is not None}
    reports = []
    groups = grouped(load_targets(target, packaging), precision)
    for number, group in enumerate(groups):
        goal = output
        if output is not None and len(groups) > 1:
            goal = output / group[0].name
        report = run(
            model,
            target=group,
            output=goal,
            precision=precision,
            recipe=recipe,
            options=parse_set(option),
            calibration=calibration,
            evaluation=evaluation,
            preprocess=preprocess,
            labels=labels,
            metrics=tuple(metric or ()),
            dims=parse_dims(dim),
            fixed=parse_fixed(fix),
            gates=gates,
            executor=executor,
            overwrite=overwrite,
            strict=strict,
            track=show.track,
        )
        reports.append(report)
        if not json:
            printed.report(report, goal or Path(report.package), first=number == 0)
    if json:
        show.print_json(reports[0].to_dict() if len(reports) == 1 else [report.to_dict() for report in reports])
    missed = [(report, gate) for report in reports for gate in report.gates if not gate.met]
    if missed:
        names = ", ".join(f"{report.target}: {gate.name}" for report, gate in missed)
        uncovered = next((report for report, gate in missed if gate.name == "coverage"), None)
        said = f" ({printed.coverage(uncovered)})" if uncovered is not None else ""
        raise GateError(f"not within the limit: {names}{said}", hint="the package is written all the same")
    incomplete = next((report for report in reports if report.missing), None)
    if incomplete is not None:
        raise MissingDependencyError(f"the package for {incomplete.target} is written without {incomplete.missing}")
