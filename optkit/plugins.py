"""Passes, targets and packagers by name: built-in ones come through the same entry points as anybody's."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from optkit.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from optkit.package import Packager
    from optkit.pipeline import Pass

PASSES, TARGETS, PACKAGERS = "optkit.passes", "optkit.targets", "optkit.packagers"


@dataclass(frozen=True)
class BrokenPlugin:
    """An entry point that does not load; listed with its traceback, never fatal."""

    group: str
    name: str
    origin: str
    traceback: str


_broken: dict[tuple[str, str], BrokenPlugin] = {}


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    """Return entry points by name; of two with one name the first by distribution stays, the other is broken."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: (e.name, _origin(e) != "optkit", _origin(e))):
        if entry.name not in found:
            found[entry.name] = entry
        elif found[entry.name].value != entry.value:
            taken = f"the name '{entry.name}' is already taken by {_origin(found[entry.name])}"
            _broken[group, f"{entry.name} ({_origin(entry)})"] = BrokenPlugin(group, entry.name, _origin(entry), taken)
    return found


def _origin(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "?"


def _load(group: str, name: str, kind: str) -> object:
    entries = _entries(group)
    if name not in entries:
        raise InputError(f"no {kind} '{name}'", hint=did_you_mean(name, entries))
    try:
        return entries[name].load()
    except Exception as error:
        broken = BrokenPlugin(group, name, _origin(entries[name]), traceback.format_exc())
        _broken[group, name] = broken
        message = f"the {kind} '{name}' of the plugin '{broken.origin}' does not load: {type(error).__name__}: {error}"
        raise InputError(
            message, hint=f"'optkit {kind}{'es' if kind.endswith('s') else 's'}' shows its traceback"
        ) from error


def pass_names() -> list[str]:
    """Return the names of all registered passes, broken ones included."""
    return sorted(_entries(PASSES))


def pass_class(name: str) -> type[Pass]:
    """Return the pass registered under ``name``.

    Raises:
        InputError: There is none, or its plugin does not load.
    """
    from optkit.pipeline import Pass

    loaded = _load(PASSES, name, "pass")
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        _broken[PASSES, name] = BrokenPlugin(PASSES, name, _origin(_entries(PASSES)[name]), f"{loaded!r} is not a Pass")
        raise InputError(f"the plugin registered as pass '{name}' is not a subclass of optkit.Pass")
    return loaded


def packager(name: str) -> Packager:
    """Return the packager registered under ``name``.

    Raises:
        InputError: There is none, or its plugin does not load.
    """
    from optkit.package import Packager

    loaded = _load(PACKAGERS, name, "packager")
    if not (isinstance(loaded, type) and issubclass(loaded, Packager)):
        raise InputError(f"the plugin registered as packager '{name}' is not a subclass of optkit.package.Packager")
    return loaded()


@cache
def target_files() -> dict[str, Path]:
    """Return the TOML file of every installed target by name (the file's stem)."""
    files: dict[str, Path] = {}
    for name, entry in _entries(TARGETS).items():
        try:
            folder = resources.files(entry.value)
            for item in sorted(folder.iterdir(), key=lambda item: item.name):
                if item.name.endswith(".toml"):
                    files.setdefault(item.name.removesuffix(".toml"), Path(str(item)))
        except Exception:
            _broken[TARGETS, name] = BrokenPlugin(TARGETS, name, _origin(entry), traceback.format_exc())
    return files


def broken_plugins(group: str | None = None) -> list[BrokenPlugin]:
    """Load every plugin (of one group) and return those that do not load."""
    from contextlib import suppress

    for name in _entries(PASSES):
        with suppress(InputError):
            pass_class(name)
    for name in _entries(PACKAGERS):
        with suppress(InputError):
            packager(name)
    target_files()
    return [broken for broken in _broken.values() if group in (None, broken.group)]
