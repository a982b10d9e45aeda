"""Packages for Snapdragon: what is in them, what runs them, and what is said where the compiler is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import optkit
from command_line import Cli
from optkit.errors import InputError, VerificationError
from optkit.model.loading import load, load_text, save
from optkit.package.contract import Artifact
from optkit.package.running import open_artifact, run_package, verify_package
from optkit.session import CannotRunError
from optkit.target import load_target
from optkit_targets.qnn import runtime
from optkit_targets.qnn.executors import Htp
from optkit_targets.qnn.packager import QnnPackager

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
MODEL, CALIBRATION, TEST = (str(DIGITS / name) for name in ("digits.onnx", "calibration.npz", "test.npz"))
GEN2, GEN3 = "snapdragon-8gen2-npu", "snapdragon-8gen3-npu"
BATCH = {"batch": 1}

installed = pytest.mark.skipif(bool(runtime.missing()), reason="needs onnxruntime-qnn, the extra [qnn]")

# NonZero has as many outputs as its input has elements that are not 0: nothing that takes static shapes takes it.
MIXED = """
<ir_version: 8, opset_import: ["" : 17]>
mixed (float[1, 4] x) => (float[1, 4] y, int64[2, count] where) {
    half = Constant<value = float {0.5}>()
    y = Mul (x, half)
    where = NonZero (y)
}
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model compiled for two chips, with their context binaries."""
    goal = tmp_path_factory.mktemp("packages") / "digits"
    optkit.compile(
        MODEL, target=[GEN3, GEN2], calibration=CALIBRATION, evaluation=f"{TEST}[:60]", dims=BATCH, output=goal
    )
    return goal


def compiled_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the extra be absent, as on a machine that never installed it."""
    monkeypatch.setattr(runtime, "PACKAGE", "onnxruntime_qnn_that_nobody_installed")


@installed
def test_a_package_holds_a_context_binary_per_chip_and_the_model_to_fall_back_on(package: Path) -> None:
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    contexts = {f"model/{name}/context{end}" for name in (GEN2, GEN3) for end in (".onnx", "_qnn.bin")}
    assert files - contexts == {
        "README.md", "interface.json", "manifest.json", "model/component.json", "model/qdq/model.onnx",
        "recipe.lock.toml", "remarks.jsonl", "report.html", "report.json",
    }  # fmt: skip
    assert contexts <= files
    variants = json.loads((package / "model/component.json").read_text())["variants"]
    assert set(variants) == {"qdq", GEN2, GEN3}
    ort = variants[GEN3]["executor_info"]["ort"]
    assert ort["session_options"] == {"session.disable_cpu_ep_fallback": "1"}
    assert (ort["provider_options"]["soc_model"], ort["provider_options"]["htp_arch"]) == ("57", "75")


@installed
def test_the_report_compares_float_quantized_and_npu(package: Path) -> None:
    report = json.loads((package / "report.json").read_text())
    assert [each["device"] for each in report["placement"]["devices"]] == ["npu"]
    assert report["placement"]["devices"][0]["macs_share"] == 1.0
    assert report["placement"]["runtime"] == runtime.name()
    assert not report["placement"]["disagreements"]
    kinds = [each["kind"] for each in report["executions"]]
    assert kinds == ["emulated", "emulated", "simulated"]
    assert all(each["accuracy"][0]["n"] == 60 for each in report["executions"])
    assert report["deployment"]["between"]["sqnr_db"] > 20
    assert {fact["subject"] for fact in report["facts"]} == {GEN2, GEN3}
    assert any(fact["name"] == "VTCM" for fact in report["facts"])
    assert [each["name"] for each in report["also"]] == [GEN2]


@installed
def test_the_same_inputs_give_the_same_bytes(package: Path, tmp_path: Path) -> None:
    goal = tmp_path / "another" / "place"
    optkit.compile(
        MODEL, target=[GEN3, GEN2], calibration=CALIBRATION, evaluation=f"{TEST}[:60]", dims=BATCH, output=goal
    )
    ours, theirs = (sorted(p for p in root.rglob("*") if p.is_file()) for root in (package, goal))
    assert [p.relative_to(package) for p in ours] == [p.relative_to(goal) for p in theirs]
    differ = [
        a.name for a, b in zip(ours, theirs, strict=True) if a.read_bytes() != b.read_bytes()
    ]  # the package's own name stands in the report
    assert set(differ) <= {"report.json", "report.html", "manifest.json"}
    binaries = [p.read_bytes() for p in ours if p.suffix == ".bin"]
    assert len(set(binaries)) == len(binaries) == 2


@installed
def test_run_and_verify_use_the_emulator_of_the_chip_asked_for(package: Path) -> None:
    first = run_package(package, f"{TEST}[:3]")
    second = run_package(package, f"{TEST}[:3]", target=GEN2)
    assert (first.kind, second.kind) == ("emulated", "emulated")
    assert "soc_model 57, V75" in first.executor
    assert "soc_model 43, V73" in second.executor
    assert all(check.passed for check in verify_package(package))
    with pytest.raises(InputError, match="the package does not serve target 'host'"):
        run_package(package, "random", target="host")


@installed
def test_many_samples_keep_their_order(package: Path) -> None:
    _, artifact, (htp, *_) = open_artifact(package)
    run = htp.load(artifact)
    samples = [{"image": np.full((1, 1, 8, 8), value, np.float32)} for value in range(7)]
    together, alone = run(samples), [run([sample])[0] for sample in samples]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a["scores"], b["scores"])
    assert run([]) == []


@installed
def test_a_wrong_chip_never_runs_on_the_cpu_instead(package: Path, tmp_path: Path) -> None:
    wrong = f"{GEN3}:options.soc_model=9999"
    goal = tmp_path / "wrong"
    with pytest.raises(VerificationError, match=r"does not compile the model for 'snapdragon-8gen3-npu': .*[Dd]evice"):
        optkit.compile(MODEL, target=wrong, calibration=CALIBRATION, dims=BATCH, output=goal)
    assert not goal.exists()
    artifact = QnnPackager().open(package, {})
    empty = Artifact(artifact.directory, artifact.network, artifact.files, {})
    with pytest.raises(CannotRunError, match="fallback to CPU EP has been explicitly disabled"):
        runtime.Emulator(package / empty.entry, load_target(wrong))
    with pytest.raises(CannotRunError, match="has no compiler for target"):
        runtime.assignment(load(package / empty.entry), load_target(wrong))


@installed
def test_a_dead_process_is_a_sentence(package: Path) -> None:
    emulator = runtime.Emulator(package / "model/qdq/model.onnx", load_target(GEN3))
    emulator._child._process.kill()
    with pytest.raises(CannotRunError, match="the process of onnxruntime-qnn was ended by SIGKILL"):
        emulator.run([])


@installed
def test_what_the_npu_does_not_take_is_reported_and_runs_on_the_cpu(tmp_path: Path) -> None:
    save(load_text(MIXED), tmp_path / "mixed.onnx")
    report = optkit.compile(
        tmp_path / "mixed.onnx", target=GEN3, precision="fp16", output=tmp_path / "out", strict=True
    )
    assert {each.device for each in report.placement.devices} == {"npu", "cpu"}
    assert [left.ops for left in report.placement.fallback] == [("NonZero",)]
    variants = json.loads((tmp_path / "out/model/component.json").read_text())["variants"]
    assert variants[GEN3]["executor_info"]["ort"]["session_options"] == {"session.disable_cpu_ep_fallback": "0"}
    assert [each.kind for each in report.executions] == ["emulated", "simulated"]


def test_without_the_compiler_the_model_is_written_and_the_extra_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_without(monkeypatch)
    arguments = ("compile", MODEL, "-t", GEN3, "--calibration", CALIBRATION, "--dim", "batch=1", "-o")
    done = cli(*arguments, str(tmp_path / "d"))
    assert done.code == 5
    assert "is written without a context binary" in done.err
    assert "pip install 'optkit[qnn]'" in done.err
    assert load(tmp_path / "d/model/qdq/model.onnx").graph.name
    assert not list(tmp_path.rglob("*.bin"))
    assert cli("verify", str(tmp_path / "d")).code == 0

    done = cli(*arguments, str(tmp_path / "e"), "--no-context-binary")
    assert done.code == 0
    assert "pip install 'optkit[qnn]'" in done.out.replace("\n", " ")
    assert {kind for kind in ("emulated", "simulated") if kind in done.out} == {"simulated"}


@installed
def test_no_context_binary_still_runs_on_the_emulator(cli: Cli, tmp_path: Path) -> None:
    arguments = ("compile", MODEL, "-t", GEN3, "--calibration", CALIBRATION, "--dim", "batch=1", "-o")
    done = cli(*arguments, str(tmp_path / "d"), "--no-context-binary")
    assert done.code == 0
    assert "the device compiles the model when it loads it" in done.out
    assert not list(tmp_path.rglob("*.bin"))
    assert isinstance(open_artifact(tmp_path / "d")[2][0], Htp)


def test_targets_that_cannot_share(cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"one package cannot serve these targets: packages of 'host' serve one target"
    ):
        optkit.compile(MODEL, target=["host", "cortex-a53"], precision="fp32", output=tmp_path / "x")
    with pytest.raises(InputError, match=f"target '{GEN3}' is named twice"):
        optkit.compile(MODEL, target=[GEN3, GEN3], precision="fp16", dims=BATCH, output=tmp_path / "x")
    with pytest.raises(InputError, match="no target is given"):
        optkit.compile(MODEL, target=[], output=tmp_path / "x")
    done = cli("compile", MODEL, "-t", "host", "--precision", "fp32", "--no-context-binary", "-o", str(tmp_path / "x"))
    assert done.code == 2
    assert "packages for target 'host' have no option 'context_binary'" in done.err


def test_a_dynamic_batch_is_refused_with_what_to_pass(cli: Cli, tmp_path: Path) -> None:
    done = cli("compile", MODEL, "-t", GEN3, "--calibration", CALIBRATION, "-o", str(tmp_path / "d"))
    assert done.code == 2
    assert f"target '{GEN3}' needs static shapes, and these dimensions are dynamic: batch" in done.err
    assert "--dim batch=SIZE" in done.err


def test_a_damaged_description_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the package has no component.json"):
        QnnPackager().open(tmp_path, {})
    (tmp_path / "model").mkdir()
    path = tmp_path / "model/component.json"
    path.write_text('{"variants": []}')
    with pytest.raises(InputError, match="the component description is damaged"):
        QnnPackager().open(tmp_path, {})
    variant = {"variant_directory": "..", "executor_info": {"ort": {"model_file": "x", "session_options": {}}}}
    path.write_text(json.dumps({"variants": {"qdq": variant}}))
    with pytest.raises(InputError, match="the package's model 'x' is missing"):
        QnnPackager().open(tmp_path, {})
    path.write_text('{"variants": {}}')
    with pytest.raises(InputError, match="the package has no variant 'qdq'"):
        QnnPackager().open(tmp_path, {})
