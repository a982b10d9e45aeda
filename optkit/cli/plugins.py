"""Commands about what is installed: passes, targets, setup, and the scaffolds for new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optkit.cli.app import app
from optkit.cli.options import Json
from optkit.errors import InputError

Words = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME | new NAME | test NAME]", help="What to describe, make or test.")
]
Into = Annotated[Path, typer.Option("--into", metavar="DIR", help="Where 'new' writes its folder.")]
HERE = Path()


def _action(words: list[str] | None, actions: tuple[str, ...], what: str) -> tuple[str, str]:
    """Return (action, name): ``new NAME``, ``test NAME``, ``describe NAME``, or ``list``."""
    words = words or []
    if not words:
        return "list", ""
    if words[0] in actions:
        if len(words) != 2:
            raise InputError(f"'optkit {what} {words[0]}' takes one name")
        return words[0], words[1]
    if len(words) > 1:
        raise InputError(f"'optkit {what}' takes one name, not {len(words)}")
    return "describe", words[0]


@app.command()
def passes(words: Words = None, into: Into = HERE, json: Json = False) -> None:
    """List the passes, describe one, make a plugin with a new one, or run the conformance kit on one."""
    from optkit.cli import render

    action, name = _action(words, ("new", "test"), "passes")
    if action == "new":
        from optkit.authoring.scaffold import new_pass

        render.written(new_pass(name, into), json)
    elif action == "test":
        from optkit.authoring.conformance import check_pass
        from optkit.errors import GateError

        results = check_pass(name)
        render.conformance(name, results, json)
        failed = [result for result in results if result.problem]
        if failed:
            raise GateError(f"pass '{name}' failed {len(failed)} of {len(results)} checks")
    elif action == "describe":
        render.describe_pass(describe_pass(name), json)
    else:
        _list_passes(json)


def describe_pass(name: str) -> dict[str, Any]:
    """Return a pass's help, effect and options with types, defaults and constraints."""
    from optkit.plugins import pass_class

    cls = pass_class(name)
    options = cls.model_json_schema().get("properties", {})
    rows = []
    for key, field in cls.model_fields.items():
        annotation = field.annotation
        rows.append(
            {
                "name": key,
                "type": getattr(annotation, "__name__", str(annotation).replace("typing.", "")),
                "default": None if field.is_required() else field.default,
                "help": options.get(key, {}).get("description", ""),
            }
        )
    effect = {"kind": cls.effect.kind, "rtol": cls.effect.rtol}
    return {"name": name, "help": _help(cls), "effect": effect, "options": rows}


def _help(cls: type[Any]) -> str:
    import inspect

    return inspect.cleandoc(cls.__doc__ or "")


def _list_passes(json: bool) -> None:
    from optkit.cli import render, show
    from optkit.plugins import PASSES, broken_plugins, pass_class, pass_names

    broken = broken_plugins(PASSES)
    bad = {plugin.name for plugin in broken}
    rows = []
    for name in pass_names():
        if name not in bad:
            cls = pass_class(name)
            rows.append({"name": name, "effect": cls.effect.kind, "summary": _help(cls).partition("\n")[0]})
    if json:
        show.print_json({"passes": rows, "broken": broken})
        return
    show.console.print(show.table("", ("pass", "effect", "what it does"), (list(row.values()) for row in rows)))
    render.broken(broken)


@app.command()
def targets(words: Words = None, into: Into = HERE, json: Json = False) -> None:
    """List the targets, describe one with the source of every number, or make a plugin with a new one."""
    from optkit.cli import render, show

    action, name = _action(words, ("new", "test"), "targets")
    if action == "new":
        from optkit.authoring.scaffold import new_target

        render.written(new_target(name, into), json)
    elif action == "test":
        from optkit.plugins import packager
        from optkit.recipe import build_passes
        from optkit.target import load_target

        target = load_target(name)
        packager(target.packager)
        for precision in target.precisions:
            build_passes(target.recipe_for(precision))
        names = list(target.precisions)
        if json:
            show.print_json({"target": target.name, "packager": target.packager, "precisions": names})
        else:
            show.console.print(f"target '{target.name}' is valid: packager {target.packager}, {', '.join(names)}")
    elif action == "describe":
        from optkit.target import load_target

        render.describe_target(load_target(name), json)
    else:
        from optkit.plugins import TARGETS, broken_plugins
        from optkit.target import target_names

        broken = broken_plugins(TARGETS)
        if json:
            show.print_json({"targets": target_names(), "broken": broken})
        else:
            show.console.print(show.table("", ("target", "device"), target_names().items()))
            render.broken(broken)


@app.command()
def setup(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The target to emulate on this machine.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before downloading.")] = False,
    json: Json = False,
) -> None:
    """Install what running a target's packages on this machine needs, into the user's cache; says its size first."""
    import sys

    from optkit.cli import show
    from optkit.plugins import packager
    from optkit.report.units import size
    from optkit.target import load_target

    device = load_target(target)
    plan = packager(device.packager).setup(device)
    if not plan.installed:
        show.log.print(f"{plan.summary}: downloads about {size(plan.download_bytes)}")
        show.log.print(f"takes about {size(plan.installed_bytes)} in {plan.directory}")
        if not yes and not sys.stdin.isatty():
            raise InputError("nobody is here to confirm the download", hint="pass --yes")
        if not yes:
            typer.confirm("Go on?", abort=True, err=True)
        plan.install(lambda line: show.log.print(line))
    if json:
        show.print_json({"target": device.name, "directory": str(plan.directory), "installed": True})
    else:
        state = "already installed" if plan.installed else "installed"
        show.console.print(f"{plan.summary}: {state} in {plan.directory}")
