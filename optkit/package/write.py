"""Directories that appear whole or not at all: built beside the goal, synced, renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from optkit.errors import InputError
from optkit.package.artifact import is_package

T = TypeVar("T")
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # linux/fs.h, fcntl.h


def write_package(goal: Path, build: Callable[[Path], T], *, overwrite: bool = False) -> T:
    """Build a package in a new directory and move it to ``goal`` when ``build`` has returned; return its result.

    Args:
        goal: Where the package shall be.
        build: Fills the empty directory that it is given; whatever it raises leaves nothing at the goal.
        overwrite: Replace a package (and nothing else) that is already at the goal.

    Raises:
        InputError: Something is at the goal, or the place cannot be written.
    """
    with new_directory(goal, replace=is_package if overwrite else None) as directory:
        return build(directory)


@contextmanager
def new_directory(goal: Path, *, replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield an empty directory that becomes ``goal`` when the block ends, and is removed when it fails.

    The directory lies beside the goal under a hidden name and is locked, so that one left by a killed process is
    known as such and removed by the next call for the same goal. At no moment is a part of the result at the goal.

    Args:
        goal: Where the directory shall be; missing parents are made.
        replace: Says whether what is at the goal may be replaced; without it anything there is an error.

    Raises:
        InputError: Something is at the goal, or the place cannot be written.
    """
    goal = goal.absolute()
    with _writing(goal):
        _check_free(goal, replace)
        goal.parent.mkdir(parents=True, exist_ok=True)
        _sweep(goal)
        draft, lock = _locked_draft(goal)
    try:
        with _writing(goal, draft):
            yield draft
            for path in [*draft.rglob("*"), draft]:  # on the disk before the rename, so that it never precedes them
                _sync(path)
            _check_free(goal, replace)  # again: building takes time
            _move(draft, goal)
            _sync(goal.parent)
    finally:
        if draft.exists():  # not yet moved, or what was at the goal before
            shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def _check_free(goal: Path, replace: Callable[[Path], bool] | None) -> None:
    if not os.path.lexists(goal):
        return
    if replace is None:
        raise InputError("already exists", where=str(goal), hint="name another place, or pass --overwrite")
    empty = goal.is_dir() and not any(goal.iterdir())
    if goal.is_symlink() or not (empty or replace(goal)):
        raise InputError("is not a package, so it is not overwritten", where=str(goal), hint="remove it yourself")


@contextmanager
def _writing(goal: Path, draft: Path | None = None) -> Iterator[None]:
    """Turn failures of the file system below the draft into a sentence."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        ours = draft is None or (isinstance(error.filename, str) and Path(error.filename).is_relative_to(draft))
        if not (full or ours):
            raise
        hint = "free some space" if full else "name a directory that can be written"
        a_file = isinstance(error, FileExistsError)  # where a parent directory should be
        reason = os.strerror(errno.ENOTDIR) if a_file else error.strerror
        raise InputError(f"cannot be written: {reason}", where=str(goal), hint=hint) from error


def _prefix(goal: Path) -> str:
    return f".{goal.name}.optkit-"


def _locked_draft(goal: Path) -> tuple[Path, int]:
    """Make a directory and lock it; the kernel drops the lock when the process ends, however it ends."""
    while True:
        draft = goal.parent / (_prefix(goal) + secrets.token_hex(6))
        draft.mkdir()
        lock = os.open(draft, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink:  # 0: swept between mkdir and lock
                return draft, lock
        except BlockingIOError:  # being swept at this moment
            pass
        os.close(lock)


def _sweep(goal: Path) -> None:
    """Remove drafts of this goal whose process is gone: nobody holds their lock."""
    for draft in goal.parent.glob(_prefix(goal).replace("[", "[[]") + "*"):
        with suppress(OSError):
            lock = os.open(draft, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(draft, ignore_errors=True)
            finally:
                os.close(lock)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(draft: Path, goal: Path) -> None:
    """Rename the draft to the goal; what is there changes places with it in one step where the system can."""
    if not goal.exists():
        draft.rename(goal)
    elif not _exchange(draft, goal):
        aside = draft.with_name(draft.name + ".old")
        goal.rename(aside)
        try:
            draft.rename(goal)
        except OSError:
            aside.rename(goal)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return bool(renameat2 and renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0)
