"""Time and peak memory of `optkit compile` beside onnxruntime's own pre-processing and static quantization.

    python benchmarks/compile.py SHARED [--runs 5]

Both run as whole processes, in turn, on the same model (mobilenet_v1_075) and the same 100 images with the same
preprocessing; each pair gives a ratio, and the median of the ratios is the figure. optkit's process also verifies every
pass, runs the package, and writes the report; the emulator is left out on both sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MODEL, IMAGES, SAMPLES = "data/mobilenet_v1_075/mobilenet_v1_075.onnx", "data/imagenet_sample", 100
PREPROCESS = Path(__file__).parents[1] / "tests" / "data_specs" / "mobilenet_v1_075.toml"

PEER = """
import sys
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
sys.path.insert(0, sys.argv[4])
from compile_reader import Reader
source, folder = sys.argv[1], sys.argv[2]
quant_pre_process(source, folder + "/prepared.onnx")
quantize_static(folder + "/prepared.onnx", folder + "/int8.onnx", Reader(sys.argv[3], int(sys.argv[5])),
                quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
"""

READER = """
from pathlib import Path
import numpy as np
from PIL import Image

class Reader:
    '''Reads images one at a time: short side 256 bilinear, centre crop 224, x / 127.5 - 1, NCHW.'''

    def __init__(self, folder, count):
        self.files = iter(sorted(Path(folder).rglob("*.jpg"))[:count])

    def get_next(self):
        file = next(self.files, None)
        if file is None:
            return None
        image = Image.open(file).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
        return {"input": (pixels / 127.5 - 1).transpose(2, 0, 1)[None]}
"""


@dataclass(frozen=True)
class Cost:
    """What one process took: wall seconds, CPU seconds, and its peak resident memory in bytes."""

    wall: float
    cpu: float
    memory: int


def measure(command: list[str]) -> Cost:
    """Run a command and return what it took.

    Raises:
        SystemExit: The command failed.
    """
    start = time.perf_counter()
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OPTKIT_CACHE": os.devnull}
    )
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    if status:
        sys.exit(f"{command[0]} failed:\n{child.stderr.read().decode() if child.stderr else ''}")
    child.returncode = status
    if child.stderr:
        child.stderr.close()
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def main() -> None:
    """Print both, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="the folder that holds data/")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    model, images = arguments.shared / MODEL, arguments.shared / IMAGES
    pairs: list[tuple[Cost, Cost]] = []
    for run in range(arguments.runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            scripts = Path(folder) / "scripts"
            scripts.mkdir()
            (scripts / "compile_reader.py").write_text(READER)
            ours = [sys.executable, "-m", "optkit", "compile", str(model), "--target", "cortex-a53"]
            ours += [
                "--calibration",
                f"{images}[:{SAMPLES}]",
                "--preprocess",
                str(PREPROCESS),
                "-o",
                f"{folder}/package",
            ]
            theirs = [sys.executable, "-c", PEER, str(model), folder, str(images), str(scripts), str(SAMPLES)]
            pair = (measure(ours), measure(theirs))
        if run:  # the first warms the disk cache
            pairs.append(pair)
    print(
        f"{'':16}{'optkit':>12}{'onnxruntime':>14}{'ratio':>9}   (medians of {len(pairs)} pairs; ratio: of the pairs)"
    )
    rows = (("wall s", "wall", 1.0), ("CPU s", "cpu", 1.0), ("peak memory MB", "memory", 1e6))
    for label, field, scale in rows:
        a, b = ([getattr(pair[side], field) / scale for pair in pairs] for side in (0, 1))
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        print(f"{label:16}{statistics.median(a):12.2f}{statistics.median(b):14.2f}{ratio:9.2f}")


if __name__ == "__main__":
    main()
