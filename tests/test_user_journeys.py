"""What a user meets at the command line, run as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from interruptible import interruptible

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
COMPILE = ("compile", str(DIGITS / "digits.onnx"), "--target", "host", "--precision", "fp32")
OPTKIT = (sys.executable, "-m", "optkit")


def optkit(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*OPTKIT, *arguments], capture_output=True, text=True, check=False, **options)


def test_without_a_command_the_help_is_shown_and_nothing_is_called_an_error() -> None:
    run = optkit()
    assert run.returncode == 2
    assert "Usage: optkit" in run.stdout
    assert not run.stderr


@pytest.mark.parametrize("command", [("targets", "cortex-a53"), ("passes", "--json"), ("compile", "--help")])
def test_a_reader_that_has_had_enough_is_no_failure(command: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody_reads:
        run = subprocess.run([*OPTKIT, *command], stdout=nobody_reads, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_narrow_terminal_does_not_break_words_into_letters() -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": "40", "TERM": "xterm", "NO_COLOR": "1"}
    run = subprocess.Popen([*OPTKIT, "passes"], stdout=child, stderr=child, env=environment)
    os.close(child)
    text = b""
    try:
        while block := os.read(parent, 4096):
            text += block
    except OSError:  # Linux says so when the last writer closes the terminal
        pass
    os.close(parent)
    assert run.wait() == 0
    assert b"eliminate-duplicates" in text
    assert b"lower-experimental-ops" in text


def test_names_with_spaces_and_letters_of_other_scripts(tmp_path: Path) -> None:
    folder = tmp_path / "a folder é中"
    folder.mkdir()
    shutil.copy(DIGITS / "digits.onnx", folder / "mo del é.onnx")
    goal = tmp_path / "out put é" / "x"
    arguments = ("compile", str(folder), "--target", "host", "--precision", "fp32", "--output", str(goal))
    first = optkit(*arguments)
    assert first.returncode == 0, first.stderr
    again = optkit(*arguments)
    assert again.returncode == 2
    assert "already exists; name another place, or pass --overwrite" in again.stderr
    assert optkit(*arguments, "--overwrite").returncode == 0
    verified = optkit("verify", str(goal), "--json")
    assert verified.returncode == 0
    json.loads(verified.stdout)


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    data = ("--calibration", str(DIGITS / "calibration.npz"), "--eval", str(DIGITS / "test.npz"))
    command = [*OPTKIT, "compile", str(DIGITS / "digits.onnx"), "--target", "host", "--precision", "w8a8", *data]
    command = interruptible([*command, "--output", "out"])
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()):  # the hidden folder in which the package grows
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, log = run.communicate(timeout=60)
    assert run.returncode == 130, log
    assert log == "error: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_a_killed_run_is_swept_by_the_next(tmp_path: Path) -> None:
    run = subprocess.Popen([*OPTKIT, *COMPILE, "--output", "out"], stdout=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert optkit(*COMPILE, "--output", "out", "--overwrite", cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
