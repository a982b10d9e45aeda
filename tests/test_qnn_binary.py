"""Context binaries are compiled and read in child processes, as in the product: the libraries print and may crash."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from optkit import InputError, save
from optkit_targets.qnn import binary_layout as layout
from optkit_targets.qnn.binary import compile_stages, facts

QUANTIZED = """<ir_version: 8, opset_import: ["" : 13]>
g (uint8[1,3,16,16] x) => (uint8[1,3,16,16] y)
<float sx = {0.02}, uint8 zx = {128}, float sy = {0.04}, uint8 zy = {7},
 float sw = {0.01}, int8 zw = {0}, int8[3,3,1,1] w = {1, -2, 3, -4, 5, -6, 7, -8, 9}> {
    xf = DequantizeLinear(x, sx, zx)
    wf = DequantizeLinear(w, sw, zw)
    c = Conv<kernel_shape = [1, 1]>(xf, wf)
    y = QuantizeLinear(c, sy, zy)
}"""
FLOAT = """<ir_version: 8, opset_import: ["" : 13]>
g (float[1,24,512,512] x) => (float[1,24,512,512] y)
{
    a = Exp(x)
    b = Softmax<axis = 1>(a)
    c = Add(a, b)
    d = Transpose<perm = [0, 1, 3, 2]>(c)
    y = Add(d, x)
}"""
SPLIT = """<ir_version: 8, opset_import: ["" : 13]>
g (float[1,3,16,16] x) => (float[1,3,16,16] y)
<int64[2] axes = {2, 3}> {
    a = Sigmoid(x)
    b = Det(a)
    c = Unsqueeze(b, axes)
    d = Mul(c, a)
    y = Add(d, x)
}"""
COMPILE = """
import json, sys
import onnxruntime as ort
import onnxruntime_qnn as qnn
ort.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
devices = [device for device in ort.get_ep_devices() if device.ep_name == qnn.get_ep_name()]
for model, goal, provider in json.loads(sys.argv[1]):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    entries = {"ep.context_enable": "1", "ep.context_file_path": goal, "ep.context_embed_mode": "0"}
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices(devices[:1], {"backend_path": qnn.get_qnn_htp_path(), **provider})
    ort.InferenceSession(model, options)
"""
READ = """
import dataclasses, json, sys
from pathlib import Path
from optkit import InputError
from optkit_targets.qnn.binary import read_binary
found = []
for name in sys.argv[2:]:
    try:
        found.append(dataclasses.asdict(read_binary(Path(sys.argv[1]), Path(name))))
    except InputError as error:
        found.append(str(error))
print(json.dumps(found))
"""
PROFILE = """Msg Timestamp,Message,Time,Unit of Measurement,Timing Source,Event Level,Event Identifier
0,FINALIZE,1000,US,BACKEND,ROOT,QNN (finalize) time
0,UNKNOWN,600,US,BACKEND,SUB-EVENT,Graph Optimizations
0,UNKNOWN,200,US,BACKEND,SUB-EVENT,VTCM Allocation
0,UNKNOWN,7,COUNT,BACKEND,SUB-EVENT,Number of something
0,FINALIZE,1000,US,BACKEND,ROOT,QNN (finalize) time
0,UNKNOWN,400,US,BACKEND,SUB-EVENT,Graph Optimizations
0,EXECUTE,500,US,BACKEND,ROOT,QNN (execute) time
0,UNKNOWN,300,US,BACKEND,SUB-EVENT,Accelerator (execute) time
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library() -> Path:
    qnn = pytest.importorskip(
        "onnxruntime_qnn", reason="onnxruntime-qnn, the compiler for Snapdragon, is not installed"
    )
    return Path(qnn.LIB_DIR_FULL_PATH) / "libQnnSystem.so"


@pytest.fixture(scope="module")
def folder(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with context binaries for four SoCs, and a profile of the first compilation."""
    folder = tmp_path_factory.mktemp("binaries")
    save(ir.from_onnx_text(QUANTIZED), folder / "quantized.onnx")
    save(ir.from_onnx_text(FLOAT), folder / "float.onnx")
    save(ir.from_onnx_text(SPLIT), folder / "split.onnx")
    best = {"htp_graph_finalization_optimization_mode": "3"}
    profile = {"profiling_level": "detailed", "profiling_file_path": str(folder / "profile.csv")}
    jobs = [
        ("quantized", "gen3", {"soc_model": "57", "htp_arch": "75", **best, **profile}),
        ("quantized", "elite", {"soc_model": "69", "htp_arch": "79", "vtcm_mb": "8"}),
        ("float", "gen2", {"soc_model": "43", "htp_arch": "73", "vtcm_mb": "2", **best}),
        ("split", "gen1", {"soc_model": "36", "htp_arch": "69"}),
    ]
    paths = [(str(folder / f"{model}.onnx"), str(folder / f"{goal}.onnx"), options) for model, goal, options in jobs]
    run(COMPILE, json.dumps(paths))
    (folder / "cut_qnn.bin").write_bytes((folder / "gen3_qnn.bin").read_bytes()[:500])
    (folder / "empty_qnn.bin").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def found(library: Path, folder: Path) -> dict[str, Any]:
    names = ("gen3", "elite", "gen2", "gen1", "cut", "empty", "missing")
    output = run(READ, str(library), *(str(folder / f"{name}_qnn.bin") for name in names))
    return dict(zip(names, json.loads(output.splitlines()[-1]), strict=True))


def test_a_binary_names_the_chip_it_was_compiled_for(found: dict[str, Any]) -> None:
    chips = {name: (found[name]["soc_model"], found[name]["dsp_arch"]) for name in ("gen3", "elite", "gen2")}
    assert chips == {"gen3": (57, 75), "elite": (69, 79), "gen2": (43, 73)}
    assert all(found[name]["backend"] == layout.HTP_BACKEND and not found[name]["notes"] for name in chips)


def test_a_model_that_the_cpu_splits_has_several_graphs(found: dict[str, Any]) -> None:
    before, behind = found["gen1"]["graphs"]
    assert [edge["name"] for edge in behind["inputs"] + behind["outputs"]][-1] == "y"
    assert len(behind["inputs"]) > len(before["inputs"]) == 1
    assert behind["vtcm_bytes"] == 4 * 2**20
    assert found["gen1"]["soc_model"] == 36


def test_a_binary_names_the_sdk_that_wrote_it(found: dict[str, Any]) -> None:
    assert found["gen3"]["sdk"].startswith("v2.")
    assert found["gen3"]["core_api"].split(".")[0] == "2"
    assert found["gen3"]["blob_bytes"] > 1000


def test_inputs_and_outputs_carry_their_quantization(found: dict[str, Any]) -> None:
    (graph,) = found["gen3"]["graphs"]
    assert graph["inputs"] == [
        {"name": "x", "dtype": "ufixed8", "shape": [1, 3, 16, 16], "scale": pytest.approx(0.02), "zero_point": 128}
    ]
    assert graph["outputs"] == [
        {"name": "y", "dtype": "ufixed8", "shape": [1, 3, 16, 16], "scale": pytest.approx(0.04), "zero_point": 7}
    ]


def test_float_inputs_have_no_quantization(found: dict[str, Any]) -> None:
    (edge,) = found["gen2"]["graphs"][0]["inputs"]
    assert (edge["dtype"], edge["scale"], edge["zero_point"]) == ("float32", None, None)


def test_the_compilers_settings_are_read(found: dict[str, Any]) -> None:
    graphs = {name: found[name]["graphs"][0] for name in ("gen3", "elite", "gen2")}
    assert {name: graph["vtcm_bytes"] for name, graph in graphs.items()} == {
        "gen3": 4 * 2**20,  # what the execution provider asks for by itself
        "elite": 8 * 2**20,
        "gen2": 2 * 2**20,
    }
    assert graphs["gen3"]["optimization_level"] == 3
    assert graphs["gen3"]["hvx_threads"] == 0
    assert graphs["gen3"]["dlbc"] is False


def test_activations_beyond_the_tightly_coupled_memory_spill(found: dict[str, Any]) -> None:
    assert found["gen3"]["graphs"][0]["spill_fill_bytes"] == 0
    assert found["gen2"]["graphs"][0]["spill_fill_bytes"] >= 24 * 512 * 512  # one activation has 24 * 512 * 512 values


def test_memory_of_inputs_and_outputs_holds_them(found: dict[str, Any]) -> None:
    both = 2 * 24 * 512 * 512 * 4
    assert both <= found["gen2"]["graphs"][0]["io_bytes"] <= both + 2**16
    assert found["gen3"]["graphs"][0]["constant_bytes"] > 0


def test_the_same_bytes_give_the_same_facts(library: Path, folder: Path, found: dict[str, Any]) -> None:
    again = json.loads(run(READ, str(library), str(folder / "gen3_qnn.bin")).splitlines()[-1])
    assert again == [found["gen3"]]


def test_what_is_no_context_binary_is_refused(found: dict[str, Any]) -> None:
    for name in ("cut", "empty"):
        assert "the file is no context binary that this QNN SDK reads (error " in found[name]
    assert "the context binary cannot be described" in found["missing"]


def test_the_compilers_stages_are_read_from_a_real_profile(folder: Path) -> None:
    stages = compile_stages(folder / "profile.csv")
    assert "VTCM Allocation" in [stage.name for stage in stages]
    assert 0 < sum(stage.share for stage in stages) <= 1


def test_a_library_that_is_no_libqnnsystem_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.bin").write_bytes(b"some")
    (tmp_path / "some.so").write_bytes(b"some")
    assert "cannot be described" in run(READ, str(tmp_path / "some.so"), str(tmp_path / "some.bin"))


def test_unknown_versions_give_a_note_and_nothing_else() -> None:
    found = facts(layout.Binary(version=4, soc_model=57))
    assert (found.sdk, found.soc_model, found.graphs) == (None, None, ())
    assert found.notes == ("the description has version 4; only version 3 is read",)


def test_a_graph_of_an_unknown_version_ends_the_list() -> None:
    graphs = (layout.Graph * 2)(layout.Graph(version=3, name=b"first"), layout.Graph(version=9))
    found = facts(layout.Binary(version=3, backend=5, graph_count=2, graphs=graphs))
    assert [graph.name for graph in found.graphs] == ["first"]
    assert found.notes == (
        "back end 5 is not the HTP: what it keeps about graphs is not read",
        "graph 1 has version 9; only version 3 is read",
    )


def test_a_blob_of_an_unknown_version_is_not_read() -> None:
    blob = layout.HtpGraph(version=7, vtcm=4)
    graph = layout.Graph(
        version=3, name=b"g", blob=ctypes.addressof(blob), blob_bytes=ctypes.sizeof(blob), input_count=9**9
    )
    found = facts(layout.Binary(version=3, backend=6, graph_count=1, graphs=ctypes.pointer(graph)))
    assert (found.dsp_arch, found.graphs[0].vtcm_bytes, found.graphs[0].inputs) == (None, None, ())
    assert found.notes == (
        "the HTP keeps nothing about the context",
        f"no list of the inputs of 'g' ({9**9} are announced)",
        "what the HTP keeps about 'g' has version 7; only 1 is read",
    )


def test_an_older_blob_counts_its_memory_in_megabytes() -> None:
    blob = layout.HtpGraph(version=1, vtcm=8, spill_fill_bytes=3, dlbc=1)
    graph = layout.Graph(version=3, name=b"g", blob=ctypes.addressof(blob), blob_bytes=ctypes.sizeof(blob))
    (found,) = facts(layout.Binary(version=3, backend=6, graph_count=1, graphs=ctypes.pointer(graph))).graphs
    assert (found.vtcm_bytes, found.spill_fill_bytes, found.dlbc, found.io_bytes) == (8 * 2**20, 3, True, None)


def test_a_tensor_of_an_unknown_version_ends_the_list() -> None:
    tensors = (layout.Tensor * 2)(
        layout.Tensor(version=2, name=b"t", data_type=0x0232, rank=99), layout.Tensor(version=5)
    )
    graph = layout.Graph(version=3, name=b"g", output_count=2, outputs=tensors)
    found = facts(layout.Binary(version=3, backend=1, graph_count=1, graphs=ctypes.pointer(graph)))
    (edge,) = found.graphs[0].outputs
    assert (edge.name, edge.dtype, edge.shape) == ("t", "float32", None)
    assert "tensor 1 of the outputs of 'g' has version 5, which is not read" in found.notes


def test_structures_have_the_sizes_of_the_c_abi() -> None:
    sizes = {
        s.__name__: ctypes.sizeof(s) for s in (layout.Tensor, layout.Graph, layout.HtpGraph, layout.HtpGraphMemory)
    }
    assert sizes == {"Tensor": 144, "Graph": 88, "HtpGraph": 40, "HtpGraphMemory": 72}


def test_stages_of_several_graphs_are_summed(tmp_path: Path) -> None:
    (tmp_path / "profile.csv").write_text(PROFILE)
    stages = [(s.name, round(s.seconds, 7), round(s.share, 3)) for s in compile_stages(tmp_path / "profile.csv")]
    assert stages == [("Graph Optimizations", 0.001, 0.5), ("VTCM Allocation", 0.0002, 0.1)]


def test_a_profile_without_a_compilation_has_no_stages(tmp_path: Path) -> None:
    (tmp_path / "profile.csv").write_text(PROFILE.splitlines()[0] + "\n")
    assert compile_stages(tmp_path / "profile.csv") == ()


@pytest.mark.parametrize("content", [None, b"a,b\n1,2\n", PROFILE.replace("600", "soon").encode(), b"\xff\xfe\x00"])
def test_what_is_no_profile_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "profile.csv").write_bytes(content)
    with pytest.raises(InputError, match="no profile of the QNN execution provider"):
        compile_stages(tmp_path / "profile.csv")
