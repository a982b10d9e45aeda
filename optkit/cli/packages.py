"""Commands about finished packages and about two models side by side: run, diff, explain, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optkit.cli.app import app
from optkit.cli.options import Dims, Executor, Json, PackagePath, Preprocess, parse_dims
from optkit.errors import VerificationError

InputData = Annotated[
    str, typer.Option("--input", "-i", metavar="DATA", help="Samples, in any form that --calibration takes.")
]


@app.command()
def run(
    package: PackagePath,
    data: InputData,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz.")] = None,
    executor: Executor = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", metavar="TARGET", help="Which of the package's targets; the first.")
    ] = None,
    preprocess: Preprocess = None,
    json: Json = False,
) -> None:
    """Run a package on the executor closest to its target that this machine has, and name that executor."""
    from optkit.cli import render, show
    from optkit.package.running import run_package

    result = run_package(package, data, preprocess=preprocess, executor=executor, target=target, output=output)
    if json:
        show.print_json(result)
    else:
        render.run(result)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference: an ONNX file or a package.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other: an ONNX file or a package.")],
    data: InputData,
    limit: Annotated[int, typer.Option(help="Tensors to list.")] = 20,
    preprocess: Preprocess = None,
    dim: Dims = None,
    json: Json = False,
) -> None:
    """Compare two models tensor by tensor on the same inputs, worst first."""
    from optkit.cli import render, show
    from optkit.dataset.samples import read_samples
    from optkit.evaluate.difference import diff_models
    from optkit.package.running import load_model

    dims = parse_dims(dim)
    first, second = load_model(a, dims), load_model(b, dims)
    result = diff_models(first, second, read_samples(data, first, preprocess=preprocess))
    if json:
        show.print_json(result)
    else:
        render.diff(result, limit)


@app.command()
def explain(
    package: PackagePath,
    node: Annotated[str, typer.Argument(metavar="NODE", help="A node's name, or a glob such as '*conv1*'.")],
    json: Json = False,
) -> None:
    """Show every remark about a node: what was done to it, what was not, and why."""
    from optkit.cli import show
    from optkit.package.artifact import read_remarks
    from optkit.package.explaining import remarks_about

    found = remarks_about(read_remarks(package), node)
    if json:
        show.print_json(found)
    else:
        rows = [(r.kind, r.pass_name, r.node, r.op_type, r.message) for r in found]
        show.console.print(show.table("", ("", "pass", "node", "op", "message"), rows))


@app.command()
def verify(package: PackagePath, json: Json = False) -> None:
    """Check a package: hashes of all files, that it loads, and that the recorded checks come out the same."""
    from optkit.cli import render, show
    from optkit.package.running import verify_package

    checks = verify_package(package)
    if json:
        show.print_json({"package": package.name, "checks": checks})
    else:
        render.checks(checks)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerificationError(f"{len(failed)} of {len(checks)} checks failed: {failed[0].name}", where=str(package))
