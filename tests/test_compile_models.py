"""Real models, end to end: small enough, accurate enough, the same on the device, and whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import optkit
from optkit.evaluate.fidelity import compare, relative_error
from optkit.package.running import run_package
from optkit.report.contents import Report
from optkit.session import Session
from optkit.target import Target
from optkit_targets.ort.packager import OrtPackager
from real_models import REAL_MODELS, RealModel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared")]

PER_TENSOR = Path(__file__).parents[1] / "examples" / "per_tensor" / "recipe.toml"
PROMISED = [name for name, model in REAL_MODELS.items() if model.share]
OTHERS = [name for name in REAL_MODELS if name not in PROMISED]
# max|a - b| / max|a| of one sample's outputs. Folding a batch normalization rounds every weight once more, which its
# pass declares (reassociate, 1e-4): more than 1e-5 on single images for mobilenet, and for the autoencoder, whose own
# float32 outputs are up to 2.6e-5 from those in double precision. float16 has 11 bits; float32 does not round there.
FLOAT_ERROR = {"ad_autoencoder": 5e-5, "mobilenet_v1_075": 2e-5, "squeezenet1_1_fp16_original": 1e-3}


def compiled(model: RealModel, goal: Path, **options: object) -> Report:
    return optkit.compile(
        model.path,
        target="cortex-a53",
        output=goal,
        preprocess=model.spec,
        executor="simulated",
        **{"calibration": model.calibration_data, **options},
    )


def first(data: str, count: int) -> str:
    return data.partition("[")[0] + f"[:{count}]"


def outputs(model: RealModel, package: Path, count: int, executor: str = "simulated") -> dict[str, np.ndarray]:
    """Run a package as `optkit run` does; return the outputs of the first samples along a leading axis."""
    file = package.with_suffix(f".{executor}.npz")
    ran = run_package(
        package, first(model.evaluation_data, count), preprocess=model.spec, executor=executor, output=file
    )
    assert ran.kind == executor
    with np.load(file) as arrays:
        return dict(arrays)


def files(package: Path) -> dict[str, bytes]:
    return {file.relative_to(package).as_posix(): file.read_bytes() for file in package.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", PROMISED)
def test_int8_is_small_and_loses_two_points_at_most(tmp_path: Path, name: str) -> None:
    """Calibrated on 100 or 128 samples; top-1 on 400 (ImageNet), 500 (CIFAR-10) or 1000 (MNIST) others."""
    model, package = REAL_MODELS[name], tmp_path / name
    report = compiled(model, package, evaluation=model.evaluation_data)
    file = package / "model" / "cpu" / "model.onnx"
    assert report.artifact_bytes == file.stat().st_size
    assert file.stat().st_size <= (model.share or 0) * model.path.stat().st_size
    (top1,) = report.accuracy
    assert (top1.metric, top1.n >= 400) == ("top1", True)
    assert top1.drop <= 0.02, str(top1)
    assert report.coverage.macs > 0.99
    assert all(np.isfinite(array).all() for array in outputs(model, package, 2).values())


def test_equalized_weights_with_one_scale_per_tensor_come_within_a_point_of_one_per_channel(tmp_path: Path) -> None:
    """400 images; without equalization a third of the answers are lost (48 % top-1 instead of 83 %)."""
    model, steps = REAL_MODELS["mobilenet_v1_075"], PER_TENSOR.read_text(encoding="utf-8")
    without = "".join(line for line in steps.splitlines(keepends=True) if "equalize-channels" not in line)
    recipes = {"tensor": steps, "channel": without.replace("per_channel = false", "per_channel = true")}
    correct = {}
    for name, text in recipes.items():
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
        report = compiled(model, tmp_path / name, evaluation=model.evaluation_data, recipe=tmp_path / f"{name}.toml")
        (top1,) = report.accuracy
        assert top1.n == 400
        correct[name] = top1.candidate
    assert correct["tensor"] >= correct["channel"] - 0.01


@pytest.mark.parametrize("name", OTHERS)
def test_int8_of_every_other_model_runs(tmp_path: Path, name: str) -> None:
    model, package = REAL_MODELS[name], tmp_path / name
    report = compiled(model, package, calibration=first(model.calibration_data, 16))
    (execution,) = report.executions
    assert execution.kind == "simulated"
    assert execution.fidelity.sqnr_db > 10
    assert report.artifact_bytes <= model.path.stat().st_size * 1.03
    ran = run_package(package, first(model.evaluation_data, 2), preprocess=model.spec, executor="simulated")
    assert all(np.isfinite([output.minimum, output.maximum]).all() for output in ran.outputs)


@pytest.mark.parametrize("name", REAL_MODELS)
def test_in_float_every_model_keeps_its_outputs(tmp_path: Path, name: str) -> None:
    model, package = REAL_MODELS[name], tmp_path / name
    compiled(model, package, precision="fp32")
    original, after = Session(model.path), Session(package / "model" / "cpu" / "model.onnx")
    for sample in model.samples(16):
        expected, given = original.run(sample), after.run(sample)
        assert list(expected) == list(given)
        for output, array in expected.items():
            assert relative_error(array, given[output]) <= FLOAT_ERROR.get(name, 1e-5), output


@pytest.mark.emulator
@pytest.mark.parametrize("name", ["mobilenet_v1_075", "resnet20_cifar10", "mnist_cntk8"])
def test_the_emulated_device_and_this_machine_agree(
    tmp_path: Path, packager: OrtPackager, a53: Target, name: str
) -> None:
    closest = packager.executors(a53)[0]
    if closest.kind != "emulated":
        pytest.skip(closest.notice)
    model, package = REAL_MODELS[name], tmp_path / name
    compiled(model, package, calibration=first(model.calibration_data, 32))
    here, there = (outputs(model, package, 16, kind) for kind in ("simulated", "emulated"))
    fidelity = compare([here], [there])
    assert fidelity.sqnr_db > 30
    (scores,), (others,) = ([array.reshape(16, -1) for array in found.values()] for found in (here, there))
    differs = np.flatnonzero(scores.argmax(1) != others.argmax(1))
    assert len(differs) <= 1
    for sample in differs:  # only where two classes are closer than the two arithmetics are
        mine, theirs = scores[sample], others[sample]
        assert mine.max() - mine[theirs.argmax()] <= 2 * np.abs(mine - theirs).max()


def command(model: RealModel, goal: Path) -> list[str]:
    words = ["compile", model.path, "--target", "cortex-a53", "--executor", "simulated", "--output", goal]
    words += ["--calibration", model.calibration_data, "--eval", model.evaluation_data, "--preprocess", model.spec]
    return [sys.executable, "-m", "optkit", *map(str, words)]


def test_kill_9_leaves_nothing_and_two_more_runs_give_the_same_bytes(tmp_path: Path) -> None:
    model = REAL_MODELS["resnet20_cifar10"]
    goal, other = tmp_path / "first" / "net", tmp_path / "second" / "net"
    goal.parent.mkdir()
    process = subprocess.Popen(command(model, goal), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(goal.parent.rglob("model.onnx")):  # packaged; now it is being evaluated
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    (draft,) = goal.parent.iterdir()
    assert draft != goal
    assert not (draft / "manifest.json").exists()
    for place, seed in ((goal, "1"), (other, "2")):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command(model, place), capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        assert list(place.parent.iterdir()) == [place]
    assert files(goal) == files(other)
