"""Code of the user's own: ``module:name`` or ``file.py:name``, imported from the current folder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from optkit.errors import InputError, OptkitError, did_you_mean


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def load_object(spec: str) -> Any:
    """Return what ``module:name`` or ``file.py:name`` names; modules in the current folder can be imported.

    Raises:
        InputError: There is no such module or name in it, or importing it fails.
    """
    module_name, _, name = spec.rpartition(":")
    try:
        with _importable(Path.cwd()):
            module = _file_module(Path(module_name)) if module_name.endswith(".py") else None
            module = module or importlib.import_module(module_name)
    except OptkitError:
        raise
    except ModuleNotFoundError as error:
        if error.name not in (module_name, module_name.partition(".")[0]):
            raise InputError(f"importing '{module_name}' raised {type(error).__name__}: {error}") from error
        hint = "modules are looked for in the current folder and among the installed ones"
        raise InputError(f"no module '{module_name}'", hint=hint) from error
    except Exception as error:  # user code
        raise InputError(f"importing '{module_name}' raised {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        known = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
        raise InputError(f"no '{name}' in '{module_name}'", hint=did_you_mean(name, known))
    return getattr(module, name)


def _file_module(file: Path) -> ModuleType:
    if not file.is_file():
        raise InputError("no such file", where=str(file))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise InputError("not a Python file", where=str(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(spec: str) -> Iterator[Mapping[str, Any]]:
    """Call the function that ``module:function`` names and yield what it yields.

    Raises:
        InputError: There is no such function, it raises, or what it returns cannot be iterated over.
    """
    function = load_object(spec)
    try:
        with _importable(Path.cwd()):
            yield from function()
    except OptkitError:
        raise
    except Exception as error:  # user code
        raise InputError(f"the function '{spec}' raised {type(error).__name__}: {error}") from error
