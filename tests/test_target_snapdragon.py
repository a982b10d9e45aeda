"""Qualcomm's NPUs as targets: their numbers, what tells them apart, and that Qualcomm's compiler takes them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.cost.roofline import Work, price, price_all
from optkit.cost.summary import cost_summary
from optkit.errors import InputError
from optkit.model.loading import load
from optkit.target import Target, load_target, target_names
from test_target import quantities

NPUS = sorted(name for name in target_names() if name.endswith("-npu"))
PHONES = ["snapdragon-8gen1-npu", "snapdragon-8gen2-npu", "snapdragon-8gen3-npu", "snapdragon-8-elite-npu"]
INTEGERS_ONLY = {"qcm6490-npu", "qcm6690-npu", "qcs6490-npu", "snapdragon-7gen4-npu"}
INFERRED = {"qcs6490-npu", "qcs8450-npu", "sa7255p-npu", "sa8775p-npu"}
ARCHITECTURES = {68, 69, 73, 75, 79, 81}


@pytest.fixture(scope="module")
def phone() -> Target:
    return load_target("snapdragon-8gen3-npu")


@pytest.mark.parametrize("name", NPUS)
def test_every_npu_says_what_it_is(name: str) -> None:
    target = load_target(name)
    assert target.packager == "qnn"
    assert target.static_shapes
    assert target.options["htp_arch"] in ARCHITECTURES
    assert target.isa == (f"hexagon-v{target.options['htp_arch']}",)
    assert target.options["soc_source"]
    assert target.options["context_binary"]
    assert target.options.get("soc_model_inferred", False) == (name in INFERRED)
    vtcm = target.memory["vtcm"].bytes
    assert vtcm is not None
    assert vtcm.value == target.options["vtcm_bytes"]
    assert list(target.memory) == ["vtcm", "tiled", "dram"]
    assert all(len(number.source) > 3 for number in quantities(target))


@pytest.mark.parametrize("name", NPUS)
def test_every_npu_takes_8_and_16_bit_activations_and_4_and_8_bit_weights(name: str) -> None:
    target = load_target(name)
    assert target.default_precision == "w8a8"
    assert {"w8a8", "w8a16", "w4a16", "w4a8"} <= target.precisions.keys()
    assert {key: (f.dtype, f.symmetric) for key, f in target.activations.items()} == {
        "int8": ("uint8", False),
        "int16": ("uint16", False),
    }
    assert {key: (f.dtype, f.symmetric, f.operators) for key, f in target.weights.items()} == {
        "int8": ("int8", True, ("QDQ",)),
        "int4": ("int4", True, ("QDQ",)),
    }


@pytest.mark.parametrize("name", NPUS)
def test_floats_are_offered_where_there_are_floats(name: str) -> None:
    target = load_target(name)
    floats = name not in INTEGERS_ONLY
    assert ({"float32", "float16"} <= set(target.dtypes)) == floats
    assert ("fp16" in target.precisions) == floats


def test_an_integer_npu_refuses_fp16() -> None:
    with pytest.raises(InputError, match="target 'qcm6490-npu' has no precision 'fp16'"):
        load_target("qcm6490").recipe_for("fp16")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("snapdragon-npu", "snapdragon-8gen3-npu"),
        ("qcs8550", "qcs8550-npu"),
        ("qcs6490", "qcs6490-npu"),
        ("qcs9100", "qcs9075-npu"),
        ("qcs8300", "qcs8275-npu"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert load_target(alias) == load_target(name)


def test_bases_are_no_devices() -> None:
    for base in ("hexagon-htp", "hexagon-htp-fp16"):
        assert base not in target_names()
        with pytest.raises(InputError, match="is a base for other targets"):
            load_target(base)


def test_a_soc_model_has_one_architecture_and_one_vtcm() -> None:
    parts: dict[int, set[tuple[int, int]]] = {}
    for name in NPUS:
        options = load_target(name).options
        parts.setdefault(options["soc_model"], set()).add((options["htp_arch"], options["vtcm_bytes"]))
    assert all(len(found) == 1 for found in parts.values())
    numbers = [load_target(name).options["soc_model"] for name in PHONES]
    assert numbers == [36, 43, 57, 69]


@pytest.mark.parametrize(
    ("name", "silicon"),
    [("qcs8450-npu", "snapdragon-8gen1-npu"), ("qcs8550-npu", "snapdragon-8gen2-npu"), ("qcs6490", "qcm6490")],
)
def test_parts_of_one_silicon_cost_the_same(name: str, silicon: str) -> None:
    part, other = load_target(name), load_target(silicon)
    assert part.name != other.name
    assert part.kernel == other.kernel
    assert part.macs_per_cycle == other.macs_per_cycle
    assert part.error_band == other.error_band


@pytest.mark.parametrize("name", NPUS)
def test_every_npu_has_a_kernel_for_everything_and_an_error_band(name: str) -> None:
    target = load_target(name)
    last = target.kernel[-1]
    assert (last.op, last.kind, last.dtype, last.max_m, last.min_k) == ((), (), None, None, None)
    rates = [target.macs_per_cycle[dtype].value for dtype in ("int8", "int16", "float16")]
    assert rates == sorted(rates, reverse=True)
    assert target.launch_seconds is not None
    band = target.error_band
    assert band is not None
    assert band.low < band.median < band.high
    assert band.samples >= 10


def test_newer_phones_are_faster() -> None:
    layer = Work("c", "Conv", "conv", dtype="int8", macs=10**9, weight_bytes=10**5, m=10**4, n=10**3, k=100)
    seconds = [price_all([layer], load_target(name)).total.seconds for name in PHONES]
    assert seconds == sorted(seconds, reverse=True)


def test_floats_are_computed_and_read_in_half_width(phone: Target) -> None:
    table = {"kind": "gemm", "macs": 10**6, "m": 1, "n": 1000, "k": 1000}
    single = price(Work("g", "Gemm", dtype="float32", weight_bytes=4 * 10**6, **table), phone)  # type: ignore[arg-type]
    half = price(Work("g", "Gemm", dtype="float16", weight_bytes=2 * 10**6, **table), phone)  # type: ignore[arg-type]
    assert not isinstance(single, Work)
    assert not isinstance(half, Work)
    assert single.cost.seconds == half.cost.seconds
    assert single.cost.memory_bytes == 2 * 10**6
    assert "priced as float16" in single.note


QUANTIZED = """
<ir_version: 10, opset_import: ["": 21]>
net ({activation}[1, 16, 8, 8] x) => ({activation}[1, 16, 8, 8] y) {{
    a = DequantizeLinear(x, s, z)
    w = DequantizeLinear(wq, s, wz)
    c = Conv(a, w)
    r = Relu(c)
    y = QuantizeLinear(r, s, z)
}}
"""


def quantized(activation: str, weight: str) -> ir.Model:
    model = ir.from_onnx_text(QUANTIZED.format(activation=activation))
    values = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    types = {"s": ir.DataType.FLOAT, "z": ir.DataType[activation.upper()]}
    constants = {"s": np.float32(0.1), "z": np.array(0)}
    types |= dict.fromkeys(("wq", "wz"), ir.DataType[weight.upper()])
    constants |= {"wq": np.ones((16, 16, 1, 1)), "wz": np.array(0)}
    for name, array in constants.items():
        tensor = ir.Tensor(np.asarray(array).astype(types[name].numpy()), dtype=types[name], name=name)
        value = values[name]
        value.const_value, value.dtype, value.shape = tensor, types[name], ir.Shape(tensor.shape)
        model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize(
    ("activation", "weight", "dtype"),
    [("uint8", "int8", "int8"), ("uint16", "int8", "int16"), ("uint8", "int4", "int8"), ("uint16", "int4", "int16")],
)
def test_units_of_every_width_are_priced_as_integers(phone: Target, activation: str, weight: str, dtype: str) -> None:
    rows = cost_summary(quantized(activation, weight), phone).nodes
    assert [(row.op_type, row.dtype) for row in rows] == [("Conv", dtype)]


def test_a_cpu_still_computes_16_bit_activations_in_float(a53: Target) -> None:
    rows = cost_summary(quantized("uint16", "int8"), a53).nodes
    assert [row.dtype for row in rows if row.op_type == "Conv"] == ["float32"]


def test_a_run_costs_its_launch_once(phone: Target) -> None:
    layer = Work("r", "Add", "elementwise", dtype="int8", operations=1000, count=2)
    bare = phone.model_copy(update={"launch_seconds": None})
    assert phone.launch_seconds is not None
    extra = price_all([layer, layer], phone).total.seconds - price_all([layer, layer], bare).total.seconds
    assert extra == pytest.approx(phone.launch_seconds.value)
    assert price_all([], phone).total.seconds == 0


def test_squeezenet_costs_what_is_published(shared: Path, phone: Target) -> None:
    """AI Hub: 0.281 ms by onnxruntime and 0.448 ms by a DLC, both in fp16, on 8 Gen 3."""
    summary = cost_summary(load(shared / "data" / "squeezenet1_1" / "squeezenet1_1.onnx"), phone)
    assert summary.low_seconds is not None
    assert summary.high_seconds is not None
    assert not summary.unpriced
    assert 0.7 * summary.low_seconds < 0.281e-3 < 0.448e-3 < 1.3 * summary.high_seconds


ACCEPT = """
import sys
import numpy as np
import onnxruntime
import onnxruntime_qnn
onnxruntime.register_execution_provider_library(onnxruntime_qnn.get_ep_name(), onnxruntime_qnn.get_library_path())
name = onnxruntime_qnn.get_ep_name()
devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name][:1]
for pair in sys.argv[2:]:
    soc_model, htp_arch = pair.split(",")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices, {"backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "soc_model": soc_model, "htp_arch": htp_arch, "offload_graph_io_quantization": "0"})
    onnxruntime.InferenceSession(sys.argv[1], options)
    print("accepted", pair)
"""


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None, reason="needs the extra 'qnn'")
def test_the_compiler_takes_every_soc_model(tmp_path: Path) -> None:
    path = tmp_path / "conv.onnx"
    ir.save(quantized("uint8", "int8"), path)
    options = [load_target(name).options for name in NPUS]
    pairs = sorted({f"{o['soc_model']},{o['htp_arch']}" for o in options})
    command = [sys.executable, "-c", ACCEPT, str(path), *pairs]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("accepted")] == pairs, done.stderr
