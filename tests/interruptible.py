"""Commands that Ctrl-C reaches, also where a shell started the tests in the background and so made them ignore it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

RESTORE = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


def interruptible(command: Sequence[str]) -> list[str]:
    """Return the command, given with its program's full path, behind one that restores the signal."""
    return [sys.executable, "-c", RESTORE, *command]
