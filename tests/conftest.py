"""Fixtures that several test files share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from command_line import Cli, Result
from optkit.target import Target, load_target
from optkit_targets.ort.packager import OrtPackager

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models, labelled data and reference measurements, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder 'shared' with real models and data beside the checkout")
    return SHARED


@pytest.fixture
def a53() -> Target:
    return load_target("cortex-a53")


@pytest.fixture
def packager() -> OrtPackager:
    return OrtPackager()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command as a user would, in this process."""
    from optkit.cli import main

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["optkit", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run
