from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from optkit import load, save
from optkit_targets.qnn.interface import interface
from optkit_targets.qnn.readme import (
    ContextFiles,
    PackageFiles,
    generator_config,
    htp_config,
    readme,
    throughput_config,
)

MODEL = """<ir_version: 8, opset_import: ["" : 13]>
g (float[1,3,16,16] image) => (float[1,3,16,16] scores)
<float sx = {0.02}, uint8 zx = {128}, float sy = {0.04}, uint8 zy = {7},
 float sw = {0.01}, int8 zw = {0}, int8[3,3,1,1] w = {1, -2, 3, -4, 5, -6, 7, -8, 9}> {
    q = QuantizeLinear(image, sx, zx)
    xf = DequantizeLinear(q, sx, zx)
    wf = DequantizeLinear(w, sw, zw)
    c = Conv<kernel_shape = [1, 1]>(xf, wf)
    p = QuantizeLinear(c, sy, zy)
    scores = DequantizeLinear(p, sy, zy)
}"""
INPUT = {"dtype": "uint8", "scale": 0.02, "zero_point": 128}
OUTPUT = {"dtype": "uint8", "scale": 0.04, "zero_point": 7}
GEN3 = ContextFiles(
    "snapdragon-8gen3-npu", 57, 75, "model/gen3/context.onnx", ("model/gen3/context_qnn.bin",), "Snapdragon 8 Gen 3"
)
ELITE = ContextFiles("snapdragon-8-elite-npu", 69, 79, "model/elite/context.onnx", ("model/elite/context_qnn.bin",))
ON_DEVICE = ContextFiles("snapdragon-8gen3-npu", 57, 75, "model/fallback/model.onnx")


def described(text: str) -> dict[str, Any]:
    return interface(ir.from_onnx_text(text))


def graph(signature: str, nodes: str, constants: str = "") -> str:
    constants = ", ".join(filter(None, ["float s = {0.5}, uint8 z = {3}, uint8 other = {4}", constants]))
    return f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\ng {signature}\n<{constants}> {{ {nodes} }}'


def package(*contexts: ContextFiles, text: str = MODEL) -> PackageFiles:
    return PackageFiles("classifier", contexts or (GEN3, ELITE), "model/fallback/model.onnx", described(text), "2.51.0")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_an_interface_names_shapes_types_and_grids() -> None:
    assert described(MODEL) == {
        "inputs": [{"name": "image", "dtype": "float32", "shape": [1, 3, 16, 16], "quantization": INPUT}],
        "outputs": [{"name": "scores", "dtype": "float32", "shape": [1, 3, 16, 16], "quantization": OUTPUT}],
    }


def test_an_interface_is_json_and_the_same_every_time() -> None:
    assert json.dumps(described(MODEL)) == json.dumps(described(MODEL))


def test_integer_edges_take_the_grid_of_the_node_beside_them() -> None:
    found = described(
        graph("(uint8[2] x) => (uint8[2] y)", "f = DequantizeLinear(x, s, z) y = QuantizeLinear(f, s, z)")
    )
    grid = {"dtype": "uint8", "scale": 0.5, "zero_point": 3}
    assert [found["inputs"][0]["quantization"], found["outputs"][0]["quantization"]] == [grid, grid]


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ("y = Relu(x)", "no quantization"),
        ("q = QuantizeLinear(x, s, z) p = QuantizeLinear(x, s, other) y = Concat<axis = 0>(q, p)", "readers disagree"),
        ("q = QuantizeLinear(x, s, z) f = DequantizeLinear(q, s, z) y = Add(f, x)", "a reader takes it as it is"),
        ("q = QuantizeLinear(x, vector) f = DequantizeLinear(q, vector) y = Relu(f)", "a scale per channel"),
        ("t = Exp(s) q = QuantizeLinear(x, t, z) y = Cast<to = 1>(q)", "a scale computed at run time"),
        ("q = my.domain.QuantizeLinear(x, s, z) y = Cast<to = 1>(q)", "another operator of that name"),
        ("q = QuantizeLinear(x, endless, z) y = Cast<to = 1>(q)", "a scale that is no number"),
    ],
)
def test_an_input_without_one_grid_has_none(nodes: str, why: str) -> None:
    constants = "float[2] vector = {0.5, 0.25}, float endless = {inf}"
    assert described(graph("(float[2] x) => (float[4] y)", nodes, constants))["inputs"][0]["quantization"] is None, why


def test_readers_that_agree_count() -> None:
    nodes = "q = QuantizeLinear(x, s, z) p = QuantizeLinear(x, s, z) y = Concat<axis = 0>(q, p)"
    found = described(graph("(float[2] x) => (uint8[4] y)", nodes))
    assert found["inputs"][0]["quantization"] == {"dtype": "uint8", "scale": 0.5, "zero_point": 3}


@pytest.mark.parametrize(
    ("nodes", "dtype"),
    [
        ("y = QuantizeLinear(x, s)", "uint8"),
        ("y = QuantizeLinear<output_dtype = 4>(x, s)", "uint16"),
        ("y = com.microsoft.QuantizeLinear(x, s, wide)", "uint16"),
    ],
)
def test_the_integers_type_is_found_without_shape_inference(nodes: str, dtype: str) -> None:
    model = ir.from_onnx_text(graph("(float[2] x) => (uint8[2] y)", nodes, "uint16 wide = {0}"))
    model.graph.outputs[0].type = None
    assert interface(model)["inputs"][0]["quantization"] == {"dtype": dtype, "scale": 0.5, "zero_point": 0}


def test_defaults_are_no_inputs_and_unknown_dimensions_keep_their_names() -> None:
    model = ir.from_onnx_text(graph("(float[batch,?] x) => (y)", "y = Add(x, s)"))
    model.graph.inputs.append(model.graph.initializers["s"])
    found = interface(model)
    assert [(edge["name"], edge["shape"]) for edge in found["inputs"]] == [("x", ["batch", None])]
    assert (found["outputs"][0]["shape"], found["outputs"][0]["dtype"]) == (None, None)


def test_an_input_that_is_also_an_output_is_what_was_fed() -> None:
    model = ir.from_onnx_text(graph("(float[2] x) => (uint8[2] y)", "y = QuantizeLinear(x, s, z)"))
    model.graph.outputs.append(model.graph.inputs[0])
    assert interface(model)["inputs"][0]["quantization"] is None
    assert interface(model)["outputs"][1]["quantization"] is None


def test_a_readme_says_what_is_for_which_chip() -> None:
    text = readme(package())
    assert "| Snapdragon 8 Gen 3 | 57 | v75 | `model/gen3/context.onnx` | `model/gen3/context_qnn.bin` |" in text
    assert "| snapdragon-8-elite-npu | 69 | v79 | `model/elite/context.onnx` | `model/elite/context_qnn.bin` |" in text
    assert "| input | `image` | float32 | 1 x 3 x 16 x 16 | uint8, scale 0.02, zero point 128: -2.56 to 2.54 |" in text
    for library in ("libQnnHtpV75Stub.so", "libQnnHtpV75Skel.so", "libQnnHtpV79Stub.so", "libQnnHtpV79Skel.so"):
        assert f"`{library}`" in text
    assert "2.51.0" in text


def test_a_readme_is_the_same_every_time_and_names_nothing_of_this_machine() -> None:
    text = readme(package())
    assert text == readme(package())
    assert str(Path.cwd()) not in text
    assert not re.search(r"\b20\d\d-\d\d", text)


def test_a_package_without_context_binaries_is_compiled_on_the_device() -> None:
    text = readme(replace(package(ON_DEVICE), sdk=""))
    assert "| snapdragon-8gen3-npu | 57 | v75 | `model/fallback/model.onnx` | compiled on the device |" in text
    assert "--retrieve_context" not in text
    assert "qnn-context-binary-generator" in text


def test_a_model_that_needs_the_cpu_too_may_fall_back() -> None:
    assert "disable_cpu_ep_fallback" in readme(package())
    text = readme(package(replace(GEN3, whole=False)))
    assert "disable_cpu_ep_fallback" not in text
    assert "Part of the model runs on the CPU" in text
    assert "./qnn-net-run" not in text


def test_a_throughput_is_measured_where_inputs_are_float32() -> None:
    assert "./qnn-throughput-net-run --config throughput.json" in readme(package())
    text = graph("(uint8[2] x) => (uint8[2] y)", "f = DequantizeLinear(x, s, z) y = QuantizeLinear(f, s, z)")
    assert "./qnn-throughput-net-run" not in readme(package(text=text))


def test_names_from_a_model_stay_in_their_place() -> None:
    model = ir.from_onnx_text(graph("(float[2] x, bool[1] b) => (float[2] y)", "y = Relu(x)"))
    model.graph.inputs[0].name, model.graph.outputs[0].name = 'a|b`c"\n```', "\u202edone"
    text = readme(PackageFiles("m", (GEN3,), "m.onnx", interface(model), "2.51.0"))
    assert "| input | `a\\|b'c\"\N{REPLACEMENT CHARACTER}'''` | float32 | 2 | not quantized |" in text
    assert '"a|b`c\\"\\n```": np.zeros((2,), np.float32),' in text
    assert '"b": np.zeros((1,), np.bool_),' in text
    assert "\u202e" not in text
    odd = replace(GEN3, chip="one | two")
    assert "| one \\| two | 57 |" in readme(package(odd))
    assert len(blocks(text, "python")) == len(blocks(text, "cpp")) == 1


def test_every_json_file_in_a_readme_is_valid() -> None:
    found = [json.loads(block) for block in blocks(readme(package()), "json")]
    assert [sorted(each)[0] for each in found] == ["backends", "backend_extensions", "devices", "devices"]


def test_the_python_lines_run_the_package_on_the_emulator(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn, the emulator of Snapdragon, is not installed")
    save(ir.from_onnx_text(MODEL), tmp_path / "model.onnx")
    files = ContextFiles("snapdragon-8gen3-npu", 57, 75, "context.onnx", ("context_qnn.bin",))
    description = interface(load(tmp_path / "model.onnx"))
    (lines,) = blocks(readme(PackageFiles("m", (files,), "model.onnx", description, "2.51.0")), "python")
    on_device = ContextFiles(files.target, 57, 75, "model.onnx")
    (compiling,) = blocks(readme(PackageFiles("m", (on_device,), "model.onnx", description)), "python")
    entries = {"ep.context_enable": "1", "ep.context_file_path": "context.onnx", "ep.context_embed_mode": "0"}
    added = "".join(f"options.add_session_config_entry({key!r}, {value!r})\n" for key, value in entries.items())
    compiling = compiling.replace("session = ", f"{added}session = ")
    for script in (compiling, lines):
        shown = f"{script}\nprint('shape', *outputs[0].shape, outputs[0].std() < 1, session.get_providers()[0])"
        done = subprocess.run([sys.executable, "-c", shown], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "shape 1 3 16 16 True QNNExecutionProvider" in done.stdout
    assert (tmp_path / "context_qnn.bin").exists()


def test_the_htp_configuration_names_the_chip() -> None:
    assert json.loads(htp_config(57, 75)) == {"devices": [{"soc_model": 57, "dsp_arch": "v75"}]}


def test_the_htp_configuration_sets_graphs_by_name() -> None:
    found = json.loads(htp_config(69, 79, graph_names=["first", "second"], vtcm_mb=8, optimization_level=3))
    assert found["graphs"] == [{"graph_names": ["first", "second"], "O": 3, "vtcm_mb": 8}]
    assert "graphs" not in json.loads(htp_config(69, 79, vtcm_mb=8))
    assert "graphs" not in json.loads(htp_config(69, 79, graph_names=["first"]))


def test_the_htp_configuration_has_only_keys_that_the_extensions_know() -> None:
    qnn = pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn, with the schema, is not installed")
    schema = (Path(qnn.LIB_DIR_FULL_PATH) / "libQnnHtpNetRunExtensions.so").read_bytes()
    found = json.loads(htp_config(57, 75, graph_names=["g"], vtcm_mb=8, optimization_level=3))
    types = {str: "string", int: "integer"}
    for key in ("graphs", "devices"):
        assert re.search(rf'"{key}": {{\s*"type": "array"'.encode(), schema), key
    for key, value in found["devices"][0].items():
        assert f'"{key}": {{ "type": "{types[type(value)]}" }}'.encode() in schema, key
    assert b'"vtcm_mb": { "type": "integer" }' in schema
    assert b'"O": { "type": "number", "multipleOf": 1 }' in schema


def test_the_tools_configurations_refer_to_their_files() -> None:
    extensions = {"shared_library_path": "libQnnHtpNetRunExtensions.so", "config_file_path": "htp.json"}
    assert json.loads(generator_config("htp.json")) == {"backend_extensions": extensions}
    found = json.loads(throughput_config("context_qnn.bin", "input_list.txt", seconds=3))
    assert (found["models"][0]["modelPath"], found["models"][0]["inputPath"]) == ("context_qnn.bin", "input_list.txt")
    assert found["testCase"]["threads"][0]["loop"] == 3
