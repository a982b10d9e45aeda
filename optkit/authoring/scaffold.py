"""Plugins to start from: a folder with a pass or a target, its tests and its entry point, complete and installable."""

from __future__ import annotations

import importlib.util
import json
import keyword
import re
import tempfile
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import optkit
from optkit.errors import InputError
from optkit.plugins import pass_names, target_files
from optkit.target import Quantity, Target, load_target, target_names

LONGEST_NAME = 40  # the generated lines stay within 120 columns
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def new_pass(name: str, into: Path) -> list[Path]:
    """Write an installable plugin with one pass.

    The generated pass does something small and real; its golden file, the conformance kit, mypy and ruff accept it.

    Args:
        name: Name of the pass in kebab case, a verb and an object; also that of the folder and the distribution.
        into: Folder to write it into; made where it is missing.

    Returns:
        The files written, sorted.

    Raises:
        InputError: The name is not valid or taken, or the folder exists or cannot be written.
    """
    part = "[a-z][a-z0-9]*"  # every part begins with a letter: the class name must give the name back
    _check_name(name, "pass", rf"{part}(-{part})*", "fuse-swish", pass_names())
    class_name = "".join(word.capitalize() for word in name.split("-"))
    return _write("pass", name, into, {"class_name": class_name})


def new_target(name: str, into: Path) -> list[Path]:
    """Write an installable plugin with one target: a TOML file, its test, and no Python.

    The numbers are those of the first installed target, each marked as unverified.

    Args:
        name: Name of the target in kebab case; also that of the folder and the distribution.
        into: Folder to write it into; made where it is missing.

    Returns:
        The files written, sorted.

    Raises:
        InputError: The name is not valid or taken, no target is installed to start from, or the folder exists or
            cannot be written.
    """
    _check_name(name, "target", r"[a-z][a-z0-9]*(-[a-z0-9]+)*", "my-board", target_files())
    base = _first_target()
    return _write("target", name, into, {"target": base, "base": base.name, "inherits": _base_of(base.name)})


def _check_name(name: str, kind: str, pattern: str, example: str, taken: Collection[str]) -> None:
    package = _package(name)
    if not re.fullmatch(pattern, name) or len(name) > LONGEST_NAME:
        hint = f"write at most {LONGEST_NAME} lower-case letters and digits, words joined by '-', such as '{example}'"
        raise InputError(f"'{name}' is not a name for a {kind}", hint=hint)
    if name in taken:
        plural = {"pass": "passes", "target": "targets"}[kind]
        raise InputError(
            f"the {kind} '{name}' exists already", hint=f"'optkit {plural}' lists the names that are taken"
        )
    if keyword.iskeyword(package) or importlib.util.find_spec(package) is not None:
        what = f"the {kind} '{name}' would be the Python package '{package}', and that name is taken"
        raise InputError(what, hint="choose another name")


def _package(name: str) -> str:
    return name.replace("-", "_")


def _first_target() -> Target:
    """Return the first installed target whose numbers stand in its file."""
    for name in target_names():
        target = load_target(name)
        if not target.detect:
            return target
    raise InputError("no target is installed that a new one could start from", hint="reinstall optkit")


def _base_of(name: str) -> str:
    """Return the base that a target inherits from, or its own name where it has no installed base."""
    inherits = tomllib.loads(target_files()[name].read_text(encoding="utf-8")).get("inherits", name)
    return str(inherits) if inherits in target_files() else name


def _write(kind: str, name: str, into: Path, values: Mapping[str, Any]) -> list[Path]:
    """Render every template of a kind into ``into / name``: all of them, or none."""
    goal = into / name
    if goal.exists():
        raise InputError("it exists already", where=str(goal), hint="remove it, or choose another name or --into")
    loader = PackageLoader("optkit.authoring", f"templates/{kind}")
    environment = Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters.update(toml=_toml, key=_key)
    package = _package(name)
    given = {"name": name, "package": package, "optkit": optkit.__version__, "quantity": _quantity, **values}
    written = []
    try:
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=into) as folder:
            for template in loader.list_templates():
                parts = [
                    {"package": package, "target.toml.j2": f"{name}.toml.j2"}.get(p, p) for p in template.split("/")
                ]
                path = PurePosixPath(*parts).with_suffix("")
                file = Path(folder, name, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(environment.get_template(template).render(given), encoding="utf-8")
                written.append(goal / path)
            Path(folder, name).rename(goal)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", where=str(goal)) from error
    return sorted(written)


def _quantity(quantity: Quantity, base: str) -> str:
    """Return a number as the body of a TOML table, marked as belonging to another device."""
    value = f"{quantity.value:.12g}".replace("e+0", "e").replace("e+", "e")
    source = f"copied from '{base}': {quantity.source}"
    return f'value = {value}\nsource = {_toml(source)}\nstatus = "unverified"'


def _toml(value: object) -> str:
    """Return strings, whole numbers, booleans and lists of them: JSON's form of these is also TOML's."""
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else _toml(name)
