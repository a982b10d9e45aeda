"""A precision from its name to the report: what it covers, when that is too little, deployed beside simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optkit
from command_line import Cli
from optkit.dataset.samples import Samples
from optkit.evaluate.assess import compare_deployed
from optkit.evaluate.fidelity import Fidelity
from optkit.model.loading import save
from optkit.recipe import Recipe, read_recipe
from optkit.report.contents import Execution, Gate, Report
from optkit.report.summary import Gates
from quantizing import build, random

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
MODEL, CALIBRATION, TEST = (str(DIGITS / name) for name in ("digits.onnx", "calibration.npz", "test.npz"))
BODY = """(bool c, float[2,16] x) => (y) {
    y = If (c) <then_branch = t () => (a) { a = MatMul(x, w) }, else_branch = e () => (b) { b = MatMul(x, v) }> }"""
STATIC = ("-t", "host", "--set", "quantize-int8.form=static")  # bodies can only be quantized dynamically
REASON = "inside the body of a control-flow node, where activations cannot be observed"


@pytest.fixture
def body(tmp_path: Path) -> str:
    """A model whose weights are all read in bodies."""
    save(build(BODY, w=random(16, 16), v=random(16, 16, seed=1)), tmp_path / "body.onnx")
    return str(tmp_path / "body.onnx")


def test_a_precision_that_covers_nothing_is_exit_1_with_the_reason(cli: Cli, body: str, tmp_path: Path) -> None:
    done = cli("compile", body, *STATIC, "--calibration", "random", "-o", str(tmp_path / "d"))
    assert done.code == 1
    assert "not within the limit: host: coverage (covered 0.0 % of weights and 0.0 % of MACs at w8a8" in done.err
    assert f"left: 2.05 KB ({REASON})" in done.err
    assert "the package is written all the same" in done.err
    assert "limit on coverage: 50.0 %, reached 0.0 %: not met" in done.out
    page = (tmp_path / "d" / "report.html").read_text()
    assert REASON in page
    assert "coverage</th><td" in page
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    assert report["coverage"]["elements_by_bits"] == {"32": 512}
    assert [left["weight_bytes"] for left in report["coverage"]["left"]] == [2048]


def test_less_coverage_may_be_accepted(cli: Cli, body: str, tmp_path: Path) -> None:
    words = ("compile", body, *STATIC, "--calibration", "random", "--overwrite", "-o", str(tmp_path / "d"))
    assert cli(*words, "--min-coverage", "0%").code == 0
    assert cli(*words, "--min-coverage", "1%").code == 1
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("min_coverage = 0.0\n")
    assert cli(*words, "--recipe", str(recipe)).code == 0
    assert read_recipe(tmp_path / "d" / "recipe.lock.toml").min_coverage == 0.0
    assert cli(*words, "--recipe", str(recipe), "--min-coverage", "30%").code == 1


def test_a_share_that_is_none_is_refused(cli: Cli, body: str, tmp_path: Path) -> None:
    done = cli("compile", body, "-t", "host", "--min-coverage", "half")
    assert (done.code, "--min-coverage takes a value such as 1%, not 'half'" in done.err) == (2, True)
    (tmp_path / "recipe.toml").write_text("min_coverage = 30\n")
    done = cli("compile", body, "-t", "host", "--recipe", str(tmp_path / "recipe.toml"))
    assert (done.code, "option 'min_coverage' = 30" in done.err) == (2, True)


def test_a_recipe_with_passes_of_its_own_asks_for_no_precision(body: str, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"passes": [{"pass": "eliminate-no-ops"}]})
    assert optkit.compile(body, target="host", recipe=recipe, output=tmp_path / "a").gates == ()
    named = recipe.model_copy(update={"precision": "w8a8"})
    report = optkit.compile(body, target="host", recipe=named, output=tmp_path / "b")
    assert report.gates == (Gate("coverage", 0.5, 0.0, False),)


def test_enough_coverage_is_a_gate_only_where_one_was_set(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": "cortex-a53", "calibration": CALIBRATION, "executor": "simulated"}
    assert optkit.compile(MODEL, output=tmp_path / "a", **options).gates == ()
    gated = optkit.compile(MODEL, output=tmp_path / "b", gates=Gates(min_coverage=0.9), **options)
    assert gated.gates == (Gate("coverage", 0.9, 1.0, True),)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Report:
    goal = tmp_path_factory.mktemp("native") / "digits"
    return optkit.compile(MODEL, target="host", calibration=CALIBRATION, evaluation=TEST, output=goal)


def test_the_host_reports_deployed_and_simulated(native: Report) -> None:
    both = native.deployment
    assert both.deployed is not None
    assert both.simulated is not None
    assert (both.kind, both.deployed.samples, both.simulated.samples) == ("native", 450, 450)
    assert both.difference_db == both.deployed.sqnr_db - both.simulated.sqnr_db
    assert (native.placement.layers, native.placement.integer_layers) == (7, 7)
    assert both.between is not None
    assert both.between.samples == 8


def test_in_float_no_layer_is_integer(cli: Cli, tmp_path: Path) -> None:
    done = cli("compile", MODEL, "-t", "host", "--precision", "fp32", "-o", str(tmp_path / "d"))
    assert "0 of 7 layers in integer kernels" in " ".join(done.out.split())
    assert "covered 100.0 % of weights and 100.0 % of MACs at fp32; 1.4 M MACs" in done.out


def identity(samples: object) -> list[dict[str, np.ndarray]]:
    return [dict(sample) for sample in samples]  # type: ignore[attr-defined]


def halved(samples: object) -> list[dict[str, np.ndarray]]:
    return [{"x": 0.5 * sample["x"]} for sample in samples]  # type: ignore[attr-defined]


def test_what_an_emulator_ran_is_compared_on_its_few_samples() -> None:
    samples = Samples([{"x": np.full(4, number, np.float32)} for number in range(1, 9)])
    few, many = Fidelity(20.0, 0.9, 1.0, None, 2), Fidelity(30.0, 0.9, 1.0, None, 8)
    executions = [Execution("qemu", "emulated", few), Execution("here", "simulated", many)]
    both = compare_deployed(executions, identity, {"emulated": identity, "simulated": halved}, samples)
    assert both.simulated is not None
    assert both.simulated.samples == 2
    assert both.simulated.sqnr_db == pytest.approx(20 * np.log10(2))
    assert both.difference_db == pytest.approx(20 - 20 * np.log10(2))


def test_without_a_device_only_the_simulation_is_known() -> None:
    samples = Samples([{"x": np.ones(4, np.float32)}])
    many = Fidelity(30.0, 0.9, 1.0, None, 1)
    both = compare_deployed([Execution("here", "simulated", many)], identity, {"simulated": identity}, samples)
    assert (both.kind, both.deployed, both.simulated, both.difference_db) == ("", None, many, None)
    equal = Fidelity(np.inf, 1.0, 0.0, None, 1)
    runs = [Execution("here", "native", equal), Execution("here", "simulated", many)]
    loaded = {"native": identity, "simulated": identity}
    assert compare_deployed(runs, identity, loaded, samples).difference_db is None


PRECISIONS = [
    "fp16",
    "bf16",
    "w8a16",
    "w4a16",
    "w4a8",
    "w8a16-lut",
    "w6a16-lut",
    "w4a16-lut",
    "w4a16-lut-b8",
    "w3a16-lut",
    "w2a16-lut-c",
]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_of_the_cpu_covers_the_digits(precision: str, tmp_path: Path) -> None:
    report = optkit.compile(
        MODEL, target="host", precision=precision, calibration=CALIBRATION, output=tmp_path / "d", strict=True
    )
    assert report.precision == precision
    assert report.coverage.weights > 0.9
    assert report.artifact_bytes < 0.55 * report.source_bytes
    assert not report.cost.unpriced
    assert report.deployment.deployed is not None
    assert report.deployment.deployed.sqnr_db > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_op18_ifless"])
def test_a_real_model_of_bodies_is_not_covered(cli: Cli, shared: Path, tmp_path: Path, name: str) -> None:
    file = shared / "data" / "silero_vad" / f"{name}.onnx"
    done = cli("compile", str(file), "-t", "cortex-a53", "--calibration", "random", "-o", str(tmp_path / "d"))
    assert done.code == 1
    assert f"({REASON})" in done.err
