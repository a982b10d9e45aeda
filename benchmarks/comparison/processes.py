"""Processes that are timed whole: wall seconds and peak memory, and the sentence with which one failed.

Run as a script it is the small process between: what a process holds when it starts another one counts as that one's
peak memory, so that a benchmark which holds a data set must not start them itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NOISE = re.compile(r"^\s*(WARNING|INFO|DEBUG|UserWarning|\d{4}-\d\d-\d\d|\[W|Traceback)")
LONGEST_SENTENCE = 200


@dataclass(frozen=True)
class Cost:
    """What one process took.

    Attributes:
        seconds: From its start to its end.
        cpu_seconds: Of all its threads.
        memory_bytes: Its largest resident memory.
        error: The sentence with which it failed; empty when it did not.
    """

    seconds: float
    cpu_seconds: float
    memory_bytes: int
    error: str = ""


def measure(command: Sequence[str], *, folder: Path, timeout: float = 600) -> Cost:
    """Run a command in ``folder`` and return what it took; it is stopped after ``timeout`` seconds."""
    surroundings = {**os.environ, "OPTKIT_CACHE": os.devnull, "PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}
    between = [sys.executable, "-I", "-S", __file__, str(timeout), *command]
    with tempfile.TemporaryFile() as said:
        answer = subprocess.run(between, cwd=folder, stdout=subprocess.PIPE, stderr=said, env=surroundings, check=True)
        said.seek(0)
        text = said.read().decode(errors="replace")
    taken = json.loads(answer.stdout)
    error = ""
    if taken["code"]:
        stopped = taken["code"] == -signal.SIGKILL and taken["seconds"] >= timeout
        error = f"stopped after {timeout:.0f} s" if stopped else sentence(text) or f"ended with code {taken['code']}"
    return Cost(taken["seconds"], taken["cpu_seconds"], taken["memory_bytes"], error)


def sentence(text: str) -> str:
    """Return the last exception's sentence of what a process said, or its last line."""
    lines = [line for line in text.splitlines() if line.strip() and not NOISE.match(line)]
    raised = [line for line in lines if re.match(r"^[\w.]+(Error|Exception|Fail|Invalid\w*|error)\b", line)]
    found = (raised or lines or [""])[-1].strip()
    return found if len(found) <= LONGEST_SENTENCE else found[: LONGEST_SENTENCE - 3] + "..."


def between(timeout: float, command: Sequence[str]) -> None:
    """Run a command silently and print what it took as JSON."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    alarm = threading.Timer(timeout, os.killpg, (child.pid, signal.SIGKILL))
    alarm.start()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    alarm.cancel()
    child.returncode = os.waitstatus_to_exitcode(status)
    taken = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "code": child.returncode}
    print(json.dumps({**taken, "memory_bytes": usage.ru_maxrss * 1024}))


if __name__ == "__main__":
    between(float(sys.argv[1]), sys.argv[2:])
