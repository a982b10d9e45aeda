"""coremltools, in the one file that imports it.

On Linux its import tells of parts that only macOS has, on stderr and in the log: nothing of that concerns a user.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

from optkit.errors import MissingDependencyError

PACKAGE = "coremltools"
INSTALL = "run: pip install 'optkit[ane]'"


def missing() -> str:
    """Return what to install to write Core ML packages, or nothing where it is here."""
    return "" if importlib.util.find_spec(PACKAGE) else INSTALL


def name() -> str:
    """Return the toolchain's name and version.

    Raises:
        MissingDependencyError: It is not installed.
    """
    coremltools()
    return f"coremltools {version(PACKAGE)}"


@cache
def coremltools() -> Any:
    """Return coremltools, imported without its messages.

    Raises:
        MissingDependencyError: It is not installed.
    """
    if missing():
        raise MissingDependencyError("coremltools is not installed", hint=INSTALL)
    with quiet():
        import coremltools as ct
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    return ct


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what coremltools prints, logs and warns of: this machine, progress, folders that it leaves to Python."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@cache
def builder() -> Any:
    """Return coremltools' builder of MIL programs (``mb``)."""
    coremltools()
    from coremltools.converters.mil import Builder

    return Builder


@cache
def mil() -> Any:
    """Return coremltools' classes of MIL: ``Program``, ``Function``, ``types``."""
    coremltools()
    from coremltools.converters.mil import mil as module

    return module


@cache
def proto() -> Any:
    """Return the protobuf messages of Core ML's model files."""
    coremltools()
    from coremltools.proto import Model_pb2

    return Model_pb2
