"""Passes, targets and packagers by name: built-in ones come through the same entry points as anybody's."""

from __future__ import annotations

import sys
import tomllib
import traceback
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from optkit.package.contract import Packager
    from optkit.pipeline import Pass

PASSES, TARGETS, PACKAGERS = "optkit.passes", "optkit.targets", "optkit.packagers"


@dataclass(frozen=True)
class BrokenPlugin:
    """An entry point, or a target's file, that cannot be used; listed with the reason, never fatal.

    Attributes:
        group: The entry point group.
        name: Its name, with the distribution in parentheses where another one has that name.
        origin: The distribution that registered it.
        traceback: Why: a traceback, or a sentence.
    """

    group: str
    name: str
    origin: str
    traceback: str


_broken: dict[tuple[str, str], BrokenPlugin] = {}


def _record(group: str, name: str, entry: EntryPoint, reason: str) -> None:
    _broken[group, name] = BrokenPlugin(group, name, _origin(entry), reason)


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    """Return entry points by name, optkit's own first; of two with one name the later is listed as broken."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: (_origin(e) != "optkit", _origin(e), e.name)):
        if entry.name not in found:
            found[entry.name] = entry
        elif found[entry.name].value != entry.value:
            taken = f"the name '{entry.name}' is already taken by '{_origin(found[entry.name])}'"
            _record(group, f"{entry.name} ({_origin(entry)})", entry, taken)
    return found


def _origin(entry: EntryPoint) -> str:
    try:
        return entry.dist.name if entry.dist is not None and entry.dist.name else "?"
    except Exception:  # a distribution without readable metadata
        return "?"


def _load(group: str, name: str, kind: str, base: type[Any]) -> type[Any]:
    """Import the class behind an entry point; what goes wrong is recorded, then raised as a sentence."""
    entries = _entries(group)
    if name not in entries:
        raise InputError(f"no {kind} '{name}'", hint=did_you_mean(name, entries))
    hint = "'optkit passes' shows its traceback" if group == PASSES else "--debug shows its traceback"
    what = f"the {kind} '{name}' of the plugin '{_origin(entries[name])}'"
    try:
        with redirect_stdout(sys.stderr):  # stdout is the result
            loaded = entries[name].load()
    except (Exception, SystemExit) as error:
        _record(group, name, entries[name], traceback.format_exc())
        raise InputError(f"{what} does not load: {type(error).__name__}: {error}", hint=hint) from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        problem = f"is not a subclass of {base.__module__}.{base.__name__}"
    elif missing := sorted(getattr(loaded, "__abstractmethods__", ())):
        problem = f"does not define {' and '.join(map(repr, missing))}"
    else:
        return loaded
    _record(group, name, entries[name], f"{loaded!r} {problem}")
    raise InputError(f"{what} {problem}")


def pass_names() -> list[str]:
    """Return the names of all registered passes, broken ones included."""
    return sorted(_entries(PASSES))


def pass_class(name: str) -> type[Pass]:
    """Return the pass registered under ``name``.

    Raises:
        InputError: There is none, its plugin does not load, or it is no pass of that name.
    """
    from optkit.pipeline import Pass

    loaded: type[Pass] = _load(PASSES, name, "pass", Pass)
    if loaded.name() != name:
        problem = f"calls itself '{loaded.name()}': its class and its entry point need one name"
        _record(PASSES, name, _entries(PASSES)[name], f"{loaded!r} {problem}")
        raise InputError(f"the pass '{name}' of the plugin '{_origin(_entries(PASSES)[name])}' {problem}")
    return loaded


def packager(name: str) -> Packager:
    """Return the packager registered under ``name``.

    Raises:
        InputError: There is none, or its plugin does not load.
    """
    from optkit.package.contract import Packager

    loaded: type[Packager] = _load(PACKAGERS, name, "packager", Packager)
    return loaded()


@cache
def target_files() -> dict[str, Path]:
    """Return the TOML file of every installed target by name (the file's stem); broken files are left out."""
    files: dict[str, Path] = {}
    for name, entry in _entries(TARGETS).items():
        try:
            with redirect_stdout(sys.stderr):
                folder = sorted(resources.files(entry.value).iterdir(), key=lambda item: item.name)
        except (Exception, SystemExit):
            _record(TARGETS, name, entry, traceback.format_exc())
            continue
        for item in (item for item in folder if item.name.endswith(".toml")):
            target = item.name.removesuffix(".toml")
            label = f"{target} ({_origin(entry)})"
            try:
                tomllib.loads(item.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                _record(TARGETS, label, entry, f"{item.name} is not a readable TOML file: {error}")
                continue
            if target in files:
                _record(TARGETS, label, entry, f"the name '{target}' is already taken by another plugin")
            files.setdefault(target, Path(str(item)))
    return files


def broken_plugins(group: str | None = None) -> list[BrokenPlugin]:
    """Load every plugin (of one group) and return those that do not load, by name."""
    for name in _entries(PASSES) if group in (None, PASSES) else ():
        with suppress(InputError):
            pass_class(name)
    for name in _entries(PACKAGERS) if group in (None, PACKAGERS) else ():
        with suppress(InputError):
            packager(name)
    if group in (None, TARGETS):
        target_files()
    return [_broken[key] for key in sorted(_broken) if group in (None, key[0])]
