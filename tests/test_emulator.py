"""Packages under the emulator: the target's own instructions, and every way in which they can fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import VerificationError
from optkit.evaluate.fidelity import compare
from optkit.model.loading import load_text
from optkit.package.contract import Artifact
from optkit.session import CannotRunError
from optkit.target import Target, load_target
from optkit_targets.ort import emulator
from optkit_targets.ort.emulator import Emulated, emulation
from optkit_targets.ort.executors import Simulated
from optkit_targets.ort.packager import OrtPackager
from optkit_targets.ort.placement import optimized

pytestmark = pytest.mark.emulator

CHANNELS = 32
NET = f"""<ir_version: 8, opset_import: ["" : 17]> net (float[1,{CHANNELS},6,6] x) => (float[1,{CHANNELS},6,6] y)
<float s = {{0.02}}, int8 z = {{-3}}, float ws = {{0.01}}, int8 wz = {{0}}, float t = {{0.1}},
 int8[{CHANNELS},{CHANNELS},1,1] w = {{WEIGHTS}}> {{
  xq = QuantizeLinear (x, s, z)
  xd = DequantizeLinear (xq, s, z)
  wd = DequantizeLinear (w, ws, wz)
  a = Conv (xd, wd)
  aq = QuantizeLinear (a, t, z)
  y = DequantizeLinear (aq, t, z)
}}"""


def ready(name: str) -> tuple[Target, Emulated]:
    target = load_target(name)
    found = emulation(target)
    if not isinstance(found, Emulated):
        pytest.skip(found)
    return target, found


@pytest.fixture(scope="module")
def net() -> ir.Model:
    """A pointwise convolution in int8, deep enough for every integer kernel of the instruction set."""
    weights = np.random.default_rng(0).integers(-127, 128, CHANNELS * CHANNELS)
    return load_text(NET.replace("WEIGHTS", ", ".join(map(str, weights))))


@pytest.fixture(scope="module")
def samples() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((1, CHANNELS, 6, 6)).astype(np.float32)} for _ in range(4)]


def packaged(net: ir.Model, target: Target, folder: Path) -> Artifact:
    return OrtPackager().package(net, target, folder)


@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a72", "cortex-a76"])
def test_the_emulated_device_agrees_with_float_arithmetic(
    tmp_path: Path, net: ir.Model, samples: list[dict[str, np.ndarray]], name: str
) -> None:
    target, emulated = ready(name)
    artifact = packaged(net, target, tmp_path)
    starts: list[object] = []
    original = subprocess.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *a, **k: (starts.append(a), original(*a, **k))[1])
        results = emulated.load(artifact)(samples)
    assert len(starts) == 1  # one process for all samples
    fidelity = compare(Simulated().load(artifact)(samples), results)
    assert fidelity.samples == len(samples)
    assert fidelity.sqnr_db > 40
    assert results[0]["y"].dtype == np.float32


def test_the_cpu_files_choose_the_kernels_and_a_missing_instruction_is_a_sentence(
    tmp_path: Path, net: ir.Model, samples: list[dict[str, np.ndarray]]
) -> None:
    target, _ = ready("cortex-a53")
    features = "fp asimd atomics fphp asimdhp asimddp"  # a core that claims dot products and does not have them
    lying = target.model_copy(update={"executor": {**target.executor, "part": "0xd0b", "features": features}})
    emulated = emulation(lying)
    assert isinstance(emulated, Emulated)
    with pytest.raises(VerificationError) as caught:
        emulated.load(packaged(net, lying, tmp_path))(samples)
    assert str(caught.value) == (
        f"the package fails on {emulated.name}: it met an instruction that cortex-a53 does not have"
    )


OPTIMIZE = """
import sys
import numpy as np
import onnxruntime as ort

settings = ort.SessionOptions()
settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
settings.optimized_model_filepath = sys.argv[1] + ".optimized"
settings.intra_op_num_threads = 1
ort.InferenceSession(sys.argv[1], settings)
np.savez(sys.argv[3], names=np.array([], str))
"""


def test_placement_predicts_the_graph_that_the_device_makes(
    tmp_path: Path, net: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, emulated = ready("cortex-a53")
    artifact = packaged(net, target, tmp_path)
    (tmp_path / "optimize.py").write_text(OPTIMIZE)
    monkeypatch.setattr(emulator, "DRIVER", tmp_path / "optimize.py")
    emulated.load(artifact)([])
    there = ir.load(tmp_path / f"{artifact.entry}.optimized")
    here = optimized(net, target)
    assert [node.op_type for node in here.graph] == [node.op_type for node in there.graph]
    assert "QLinearConv" in [node.op_type for node in there.graph]


def test_what_onnxruntime_refuses_is_a_sentence(tmp_path: Path, net: ir.Model) -> None:
    target, emulated = ready("cortex-a53")
    run = emulated.load(packaged(net, target, tmp_path))
    with pytest.raises(CannotRunError) as caught:
        run([{"x": np.zeros((1, CHANNELS, 5, 6), np.float32)}])
    assert str(caught.value).startswith(f"{emulated.name} cannot run the model: Got invalid dimensions for input: x")
    with pytest.raises(CannotRunError, match="cannot run the model: Required inputs"):
        run([{"other": np.zeros(3, np.float32)}])
    (tmp_path / "model" / "cpu" / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(CannotRunError, match=r"cannot run the model: .*model\.onnx"):
        run([])


def test_inputs_that_the_model_does_not_have_are_ignored(
    tmp_path: Path, net: ir.Model, samples: list[dict[str, np.ndarray]]
) -> None:
    target, emulated = ready("cortex-a53")
    run = emulated.load(packaged(net, target, tmp_path))
    more, bare = run([{"label": np.array(3), **samples[0]}, samples[0]])  # one process: each start takes seconds
    np.testing.assert_array_equal(more["y"], bare["y"])


def test_text_goes_in_and_comes_out(tmp_path: Path) -> None:
    target, emulated = ready("cortex-a53")
    model = load_text(
        '<ir_version: 8, opset_import: ["" : 17]> net (string[2] x) => (string[2] y) { y = Identity (x) }'
    )
    (result,) = emulated.load(packaged(model, target, tmp_path))([{"x": np.array(["dög", "cat"])}])
    assert result["y"].tolist() == ["dög", "cat"]


def test_a_run_that_takes_too_long_is_stopped(
    tmp_path: Path, net: ir.Model, samples: list[dict[str, np.ndarray]]
) -> None:
    target, _ = ready("cortex-a53")
    hasty = target.model_copy(update={"executor": {**target.executor, "timeout_seconds": 0.05}})
    emulated = emulation(hasty)
    assert isinstance(emulated, Emulated)
    with pytest.raises(VerificationError) as caught:
        emulated.load(packaged(net, hasty, tmp_path))(samples)
    assert str(caught.value) == (
        f"the package ran longer than 0.05 s on {emulated.name} and was stopped; "
        "give it fewer samples, or set executor.timeout_seconds in the target"
    )


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("import os; os.kill(os.getpid(), 11)", "it was ended by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", "it was ended by SIGKILL"),
        ("import sys; sys.exit('no such luck')", "no such luck"),
        ("import os; os._exit(7)", "exit code 7"),
    ],
)
def test_every_other_end_is_a_sentence(
    tmp_path: Path, net: ir.Model, monkeypatch: pytest.MonkeyPatch, script: str, sentence: str
) -> None:
    target, emulated = ready("cortex-a53")
    (tmp_path / "driver.py").write_text(script)
    monkeypatch.setattr(emulator, "DRIVER", tmp_path / "driver.py")
    with pytest.raises(VerificationError) as caught:
        emulated.load(packaged(net, target, tmp_path))([])
    assert str(caught.value) == f"the package fails on {emulated.name}: {sentence}"


def test_a_cpu_that_qemu_does_not_model_is_a_sentence(tmp_path: Path, net: ir.Model) -> None:
    target, _ = ready("cortex-a53")
    unknown = {**target.executor, "cpu": "cortex-a99", "part": "0xd99", "features": "fp asimd"}
    other = target.model_copy(update={"executor": unknown})
    emulated = emulation(other)
    assert isinstance(emulated, Emulated)
    with pytest.raises(VerificationError, match=r"fails on .*unable to find CPU model 'cortex-a99'"):
        emulated.load(packaged(net, other, tmp_path))([])
