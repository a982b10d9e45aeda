"""What every peer's script shares: its command line, and the calibration samples; needs NumPy alone.

    python PEER.py MODEL CALIBRATION OUTPUT [NAME=VALUE ...]

CALIBRATION is a folder with a sub-folder for each input of the model, each with one ``.npy`` file for each sample.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Job:
    """What a peer is asked to do.

    Attributes:
        model: The ONNX file to quantize.
        calibration: The folder of samples.
        output: The ONNX file to write; its folder is empty.
        options: What else stood on the command line.
    """

    model: str
    calibration: Path
    output: str
    options: dict[str, str]

    def flag(self, name: str) -> bool:
        """Return whether an option is set to 1."""
        return self.options.get(name, "0") == "1"

    @property
    def scratch(self) -> Path:
        """Return an existing folder for intermediate files, which does not count as output."""
        folder = Path(self.output).parent.parent / "scratch"
        folder.mkdir(exist_ok=True)
        return folder


def read_job() -> Job:
    """Return the job that the command line describes."""
    model, calibration, output, *options = sys.argv[1:]
    return Job(model, Path(calibration), output, dict(option.split("=", 1) for option in options))


def read_samples(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """Read samples one at a time."""
    inputs = sorted(item for item in folder.iterdir() if item.is_dir())
    for file in sorted(inputs[0].iterdir()):
        yield {item.name: np.load(item / file.name) for item in inputs}


class Reader:
    """The samples as onnxruntime's calibrators (and those made after them) ask for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rewind()

    def rewind(self) -> None:
        """Begin again."""
        self.items = read_samples(self.folder)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next sample, or None after the last one."""
        return next(self.items, None)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return read_samples(self.folder)
