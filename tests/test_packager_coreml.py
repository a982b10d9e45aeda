"""Packages for Core ML: what is in them, what the user may ask of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import optkit
from command_line import Cli
from optkit.errors import InputError
from optkit.model.loading import load_text, save
from optkit.package.running import open_artifact, run_package, verify_package
from optkit_targets.coreml import interpreter, program, toolkit
from optkit_targets.coreml.features import FlexibleDim, ImageInput
from optkit_targets.coreml.lowering import table
from optkit_targets.coreml.lowering.scope import Scope
from optkit_targets.coreml.packager import CoremlPackager

pytestmark = pytest.mark.skipif(bool(toolkit.missing()), reason="needs coremltools, the extra [ane]")

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
MODEL, CALIBRATION, TEST = (str(DIGITS / name) for name in ("digits.onnx", "calibration.npz", "test.npz"))
ANE = "apple-a17-ane"
BATCH = {"batch": 1}
NAMES = """
<ir_version: 8, opset_import: ["" : 17]>
names (float[1, 4] "input.1", int64[1, 4] state) => (float[1, 4] "33", int64[1, 4] more) {
    "33" = Relu ("input.1")
    more = Add (state, state)
}
"""
IMAGE = """
<ir_version: 8, opset_import: ["" : 17]>
image (float[1, 3, 4, 4] picture) => (float[1, 3] scores) {
    mean = GlobalAveragePool (picture)
    scores = Flatten (mean)
}
"""
WIDE = """
<ir_version: 8, opset_import: ["" : 17]>
wide (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}> {
    a = Gemm (x, w)
    y = Relu (a)
}
"""


def spec_of(package: Path) -> object:
    message = toolkit.proto().Model()
    message.ParseFromString((package / "model.mlpackage/Data/com.apple.CoreML/model.mlmodel").read_bytes())
    return message


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    goal = tmp_path_factory.mktemp("packages") / "digits"
    optkit.compile(
        MODEL, target=ANE, precision="fp16", calibration=CALIBRATION, evaluation=f"{TEST}[:60]", dims=BATCH, output=goal
    )
    return goal


def test_a_package_holds_an_ml_program_and_how_to_load_it(package: Path) -> None:
    names = {path.name for path in package.iterdir()}
    assert names == {
        "README.md", "manifest.json", "model.mlpackage", "network", "recipe.lock.toml", "remarks.jsonl", "report.html",
        "report.json",
    }  # fmt: skip
    text = (package / "README.md").read_text()
    assert "MLModelConfiguration" in text
    assert "ct.models.MLModel" in text
    assert "computes floats in float16.\n" in text
    assert "computeUnits = .cpuAndNeuralEngine" in text
    assert "| input | `image` | the same | 1 x 1 x 8 x 8 | float32 |" in text
    report = json.loads((package / "report.json").read_text())
    assert report["executions"][0]["executor"] == "MIL interpreter (not a device)"
    assert report["executions"][0]["fidelity"]["sqnr_db"] > 40
    assert report["executions"][0]["accuracy"][0]["n"] == 60
    assert report["artifact_bytes"] < 0.6 * report["source_bytes"]
    assert {"iOS 15, macOS 12"} <= {fact["value"] for fact in report["facts"]}


def test_the_same_inputs_give_the_same_bytes(package: Path, tmp_path: Path) -> None:
    goal = tmp_path / "digits"
    optkit.compile(
        MODEL, target=ANE, precision="fp16", calibration=CALIBRATION, evaluation=f"{TEST}[:60]", dims=BATCH, output=goal
    )
    for path in sorted(package.rglob("*")):
        if path.is_file():
            assert (goal / path.relative_to(package)).read_bytes() == path.read_bytes(), path.name


def test_run_and_verify(package: Path) -> None:
    assert run_package(package, f"{TEST}[:3]").executor == "MIL interpreter (not a device)"
    assert all(check.passed for check in verify_package(package))


def test_float32_is_close_and_says_that_it_never_runs_on_the_engine(tmp_path: Path) -> None:
    report = optkit.compile(MODEL, target=ANE, precision="fp32", dims=BATCH, output=tmp_path / "d")
    assert report.executions[0].fidelity.sqnr_db > 100
    assert any("never on the Neural Engine" in notice for notice in report.notices)
    text = (tmp_path / "d/README.md").read_text()
    assert "which the Neural Engine does not" in text
    assert "computeUnits = .cpuAndGPU" in text
    assert "float32" in {fact.value for fact in report.facts}


@pytest.mark.parametrize(("precision", "form"), [("w4a16", "blockwise_shift_scale"), ("w8a16", "affine_dequantize")])
def test_weights_keep_their_form_where_types_were_left_out(precision: str, form: str, tmp_path: Path) -> None:
    report = optkit.compile(
        MODEL,
        target=ANE,
        precision=precision,
        calibration=CALIBRATION,
        dims=BATCH,
        options={"prune-metadata.min_share": 0.0, "quantize-weights.min_elements": 0},
        output=tmp_path / "d",
    )
    assert report.executions[0].fidelity.sqnr_db > 10
    weights = interpreter.load(tmp_path / "d/model.mlpackage").weights()
    assert f"constexpr_{form}" in {weight.op_type for weight in weights}


def test_names_that_mil_does_not_allow_are_replaced_and_told(tmp_path: Path) -> None:
    save(load_text(NAMES), tmp_path / "names.onnx")
    goal = tmp_path / "out"
    report = optkit.compile(tmp_path / "names.onnx", target=ANE, precision="fp32", output=goal)
    assert report.executions[0].fidelity.sqnr_db > 100
    text = (goal / "README.md").read_text()
    assert "| `input_1` | `input.1` |" in text
    assert "| `_33` | `33` |" in text
    assert "| `state_` | `state` |" in text
    _, artifact, (executor, *_) = open_artifact(goal)
    sample = {"input.1": np.array([[-1, 0, 1, 2]], np.float32), "state": np.array([[1, 2, 3, 4]], np.int64)}
    (result,) = executor.load(artifact)([sample])
    np.testing.assert_array_equal(result["33"], [[0, 0, 1, 2]])
    assert result["more"].dtype == np.int64
    np.testing.assert_array_equal(result["more"], [[2, 4, 6, 8]])


def test_images_and_class_labels(tmp_path: Path) -> None:
    save(load_text(IMAGE), tmp_path / "image.onnx")
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    goal = tmp_path / "out"
    packaging = {"image": ("picture:0.5,1,RGB",), "class_labels": str(tmp_path / "labels.txt")}
    optkit.compile(tmp_path / "image.onnx", target=ANE, precision="fp32", packaging=packaging, output=goal)
    description = spec_of(goal).description  # type: ignore[attr-defined]  # protobuf
    assert description.input[0].type.WhichOneof("Type") == "imageType"
    assert description.predictedFeatureName == "classLabel"
    assert "pixelBuffer" in (goal / "README.md").read_text()


def test_flexible_sizes(tmp_path: Path) -> None:
    save(load_text(WIDE), tmp_path / "wide.onnx")
    for number, text in enumerate(("n=1..16", "n=1,8")):
        goal = tmp_path / str(number)
        optkit.compile(
            tmp_path / "wide.onnx", target=ANE, precision="fp32", packaging={"flexible": (text,)}, output=goal
        )
        kind = spec_of(goal).description.input[0].type.multiArrayType.WhichOneof("ShapeFlexibility")  # type: ignore[attr-defined]
        assert kind == ("shapeRange", "enumeratedShapes")[number]
        _, artifact, (executor, *_) = open_artifact(goal)
        (result,) = executor.load(artifact)([{"x": np.ones((8, 4), np.float32)}])
        assert result["y"].shape == (8, 4)


@pytest.mark.parametrize(
    ("packaging", "sentence"),
    [
        ({"deployment_target": "iOS12"}, "no deployment target 'iOS12'; known: iOS15, iOS16, iOS17, iOS18"),
        ({"image": ("picture",)}, r"--image takes NAME:SCALE,BIAS,RGB\|BGR\|G, not 'picture'"),
        ({"image": ("x:1,0,RGB",)}, r"'x' is no input of shape \[1, 3, height, width\]"),
        ({"image": ("picture:1,0;0,RGB",)}, "--image gives 2 biases for 3 channels of 'picture'"),
        ({"class_labels": "/nowhere/labels.txt"}, "the class labels cannot be read"),
        ({"flexible": ("picture.0=3",), "image": ("picture:1,0;0,RGB",)}, "--image gives 2 biases"),
        ({"flexible": ("n=9..1",)}, "--flexible takes NAME=LOW..HIGH or NAME=SIZE,SIZE,..., not 'n=9..1'"),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, packaging: dict[str, object], sentence: str) -> None:
    save(load_text(IMAGE), tmp_path / "image.onnx")
    with pytest.raises(InputError, match=sentence):
        optkit.compile(
            tmp_path / "image.onnx", target=ANE, precision="fp32", packaging=packaging, output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_labels_must_fit(tmp_path: Path) -> None:
    save(load_text(IMAGE), tmp_path / "image.onnx")
    for labels, sentence in (("a\nb", "2 class labels are given, and 'scores' has 3"), ("a\na\nb", "is given twice")):
        (tmp_path / "labels.txt").write_text(labels)
        with pytest.raises(InputError, match=sentence):
            optkit.compile(
                tmp_path / "image.onnx",
                target=ANE,
                precision="fp32",
                packaging={"class_labels": str(tmp_path / "labels.txt")},
                output=tmp_path / "out",
            )


def test_metadata_and_a_second_output(tmp_path: Path) -> None:
    model = load_text(NAMES)
    model.metadata_props.update({"author": "A. Turing", "dataset": "digits"})
    save(model, tmp_path / "names.onnx")
    goal = tmp_path / "out"
    optkit.compile(tmp_path / "names.onnx", target=ANE, precision="fp32", output=goal)
    found = spec_of(goal).description.metadata  # type: ignore[attr-defined]  # protobuf
    assert found.author == "A. Turing"
    assert found.userDefined["dataset"] == "digits"
    assert found.userDefined["optkit"] == optkit.__version__
    assert "optkit.float" not in found.userDefined
    (tmp_path / "labels.txt").write_text("a\nb")
    with pytest.raises(
        InputError, match="class labels are for a model with one output, and this one has '_33', 'more'"
    ):
        optkit.compile(
            tmp_path / "names.onnx",
            target=ANE,
            precision="fp32",
            packaging={"class_labels": str(tmp_path / "labels.txt")},
            output=tmp_path / "other",
        )


def test_a_plugin_adds_a_lowering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def double(scope: Scope, node: ir.Node) -> object:
        """Write my.domain::Double: x + x."""
        x = scope.input(node, 0)
        return scope.mb.add(x=x, y=x, name=scope.name(node.name or ""))

    known = {**table.table(), "my.domain::Double": double}
    monkeypatch.setattr(program, "table", lambda: known)
    monkeypatch.setattr(table, "table", lambda: known)
    text = '<ir_version: 8, opset_import: ["" : 17, "my.domain" : 1]> g (float[4] x) => (float[4] y)'
    made = program.lower(load_text(text + " { y = my.domain.Double (x) }"), 17)
    program.save(made, 17, tmp_path / "m.mlpackage", half=False)
    x = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(interpreter.load(tmp_path / "m.mlpackage").run({"x": x})["y"], 2 * x)


def test_an_operator_without_a_lowering_is_named_with_its_nodes(cli: Cli, tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) { [odd] y = Bernoulli (x) }'
    save(load_text(text), tmp_path / "m.onnx")
    done = cli("compile", str(tmp_path / "m.onnx"), "-t", ANE, "--precision", "fp32", "-o", str(tmp_path / "out"))
    assert done.code == 1
    assert "these operators have no lowering to Core ML: Bernoulli (odd)" in done.err
    assert "optkit.lowerings" in done.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_package_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the package lacks a file"):
        CoremlPackager().open(tmp_path, {})


def test_parsing() -> None:
    assert ImageInput.parse("a.b:0.5,1;2;3,bgr") == ImageInput("a.b", 0.5, (1.0, 2.0, 3.0), "BGR")
    assert FlexibleDim.parse("T=16,32") == FlexibleDim("T", 16, 32, (16, 32))
    assert FlexibleDim.parse("T=1..8").default == 1
