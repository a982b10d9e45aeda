"""Every example runs: the digits model, the device that is one TOML file, and the pass from outside."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optkit
from optkit.model.loading import dynamic_dims, load
from optkit.session import Session
from optkit.target import load_target

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS = EXAMPLES / "digits"
BOARD = EXAMPLES / "custom_device" / "allwinner-h616.toml"
PLUGIN = EXAMPLES / "third_party_pass"


def accuracy(session: Session, images: np.ndarray, labels: np.ndarray) -> float:
    scores = session.run({"image": images})["scores"]
    return float((scores.argmax(1) == labels).mean())


def test_the_digits_model_is_as_accurate_as_its_readme_says() -> None:
    model = load(DIGITS / "digits.onnx")
    assert model.opset_imports == {"": 17}
    assert list(dynamic_dims(model)) == ["batch"]
    kinds = {node.op_type for node in model.graph}
    assert {"Conv", "BatchNormalization", "Relu", "Add", "MaxPool", "GlobalAveragePool", "Gemm"} <= kinds
    test = np.load(DIGITS / "test.npz")
    assert len(test["labels"]) == 450
    correct = accuracy(Session(model), test["image"], test["labels"])
    assert f"{correct:.2%}".replace("%", " %") in (DIGITS / "README.md").read_text(encoding="utf-8")
    assert correct >= 0.975


def test_calibration_holds_unlabelled_images_that_are_not_in_the_test_set() -> None:
    calibration, test = np.load(DIGITS / "calibration.npz"), np.load(DIGITS / "test.npz")
    assert calibration.files == ["image"]
    assert calibration["image"].shape == (100, 1, 8, 8)
    seen = {image.tobytes() for image in test["image"]}
    assert not [image for image in calibration["image"] if image.tobytes() in seen]


def test_the_digits_example_is_small() -> None:
    sizes = {name: (DIGITS / name).stat().st_size for name in ("digits.onnx", "calibration.npz", "test.npz")}
    assert sum(sizes.values()) < 1_000_000
    assert 50_000 < sizes["digits.onnx"] < 300_000


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("sklearn")),
    reason="needs torch and scikit-learn: pip install -e '.[train]'",
)
def test_training_again_gives_the_same_accuracy(tmp_path: Path) -> None:
    command = [sys.executable, str(DIGITS / "train.py"), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "held-out accuracy: " in result.stdout
    for name in ("calibration.npz", "test.npz"):
        assert (tmp_path / name).read_bytes() == (DIGITS / name).read_bytes()
    test = np.load(DIGITS / "test.npz")
    accuracies = [accuracy(Session(f / "digits.onnx"), test["image"], test["labels"]) for f in (tmp_path, DIGITS)]
    assert abs(accuracies[0] - accuracies[1]) <= 0.01


def test_the_custom_device_is_the_inherited_one_but_for_what_it_says() -> None:
    board, base = load_target(str(BOARD)), load_target("cortex-a53")
    assert (board.name, board.aliases) == ("allwinner-h616", ("orangepi-zero2",))
    assert (board.clock_hz.value, base.clock_hz.value) == (1.5e9, 1.2e9)
    assert board.main_memory.bytes_per_second is not None
    assert board.main_memory.bytes_per_second.value == 2.38e9
    assert (board.kernel, board.isa, board.packager) == (base.kernel, base.isa, base.packager)
    assert load_target(f"{BOARD}").recipe_for(None) == base.recipe_for(None)


def test_every_number_that_the_custom_device_adds_has_a_source() -> None:
    table = tomllib.loads(BOARD.read_text(encoding="utf-8"))
    assert table["clock_hz"].keys() == {"value", "source"}
    assert "ncnn" in table["clock_hz"]["source"]
    assert "sbc-bench" in table["memory"]["dram"]["bytes_per_second"]["source"]


def test_the_sentence_that_the_readme_quotes(tmp_path: Path) -> None:
    text = re.sub(r"\[clock_hz\]\nvalue = (\S+)\nsource = .*\n", "", BOARD.read_text(encoding="utf-8"))
    path = tmp_path / "board.toml"
    path.write_text("clock_hz = 1.5e9\n" + text, encoding="utf-8")
    with pytest.raises(Exception, match="has no source") as caught:
        load_target(str(path))
    sentence = re.search(r"the number 'clock_hz'.*", (BOARD.parent / "README.md").read_text(encoding="utf-8"))
    assert sentence is not None
    assert sentence[0] in str(caught.value)


@pytest.mark.slow
def test_the_digits_model_compiles_for_the_custom_device(tmp_path: Path) -> None:
    words = ["compile", str(DIGITS / "digits.onnx"), "--target", str(BOARD), "--output", str(tmp_path / "out")]
    words += ["--calibration", str(DIGITS / "calibration.npz"), "--eval", str(DIGITS / "test.npz"), "--json"]
    command = [sys.executable, "-c", "from optkit.cli import main; main()", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "allwinner-h616" in result.stdout
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.slow
def test_the_pass_from_outside_installs_and_passes_its_own_tests(tmp_path: Path) -> None:
    pytest.importorskip("pip", reason="needs pip in this environment")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(tmp_path), str(PLUGIN)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PLUGIN)]
    result = subprocess.run(tests, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout
    assert re.search(r"\b9 passed", result.stdout)
    listing = [sys.executable, "-c", "from optkit.cli import main; main()", "passes", "--json"]
    answer = json.loads(subprocess.run(listing, capture_output=True, text=True, check=True, env=env).stdout)
    assert ("div-to-mul", "reassociate") in [(row["name"], row["effect"]) for row in answer["passes"]]


def test_the_recipe_for_one_scale_per_tensor_runs(tmp_path: Path) -> None:
    report = optkit.compile(
        DIGITS / "digits.onnx",
        target="cortex-a53",
        recipe=EXAMPLES / "per_tensor" / "recipe.toml",
        calibration=DIGITS / "calibration.npz",
        executor="simulated",
        output=tmp_path / "digits",
    )
    weights = [
        value.const_value for value in load(tmp_path / "digits/model/cpu/model.onnx").graph.initializers.values()
    ]
    scales = [tensor for tensor in weights if tensor is not None and (tensor.name or "").endswith("_scale")]
    assert len(scales) > 10
    assert all(tensor.size == 1 for tensor in scales)
    assert {step.pass_name for step in report.steps} >= {"equalize-channels", "quantize-static"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "form"),
    [
        ({"precision": "w4a16-lut", "options": {"palettize-weights.average_bits": "3.5"}}, "constexpr_lut_to_dense"),
        ({"recipe": EXAMPLES / "small_for_apple" / "pruned.toml"}, "constexpr_sparse_to_dense"),
    ],
    ids=["average", "pruned"],
)
def test_the_ways_to_small_apple_packages_run(choice: dict[str, Any], form: str, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    from optkit_targets.coreml import interpreter

    report = optkit.compile(
        DIGITS / "digits.onnx",
        target="apple-a17-ane",
        **choice,
        calibration=DIGITS / "calibration.npz",
        dims={"batch": 1},
        output=tmp_path / "digits",
    )
    assert "palettize-weights" in {step.pass_name for step in report.steps}
    weights = interpreter.load(tmp_path / "digits/model.mlpackage").weights()
    assert form in {weight.op_type for weight in weights}
    large = [weight for weight in weights if weight.elements > 100]
    bits = 8 * sum(weight.stored_bytes for weight in large) / sum(weight.elements for weight in large)
    assert bits < 3.7  # 3.5 on average, but for padding to whole bytes and headers
