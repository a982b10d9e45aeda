"""Models with strange features compile, and their packages agree with them: no traceback, no blame on a pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251  # as other tools write models

import optkit
from optkit.errors import InputError
from optkit.report.contents import Report

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Inits = dict[str, np.ndarray]


def weight(*shape: int, scale: float = 0.2, dtype: type = np.float32) -> np.ndarray:
    return (np.random.default_rng(len(shape)).standard_normal(shape) * scale).astype(dtype)


def value(name: str, *shape: int | str | None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(shape))


def node(op: str, reads: str, writes: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, reads.split(), writes.split(), name=f"make_{writes.split()[0]}", **attributes)


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: Inits | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "strange", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def compiled(proto: onnx.ModelProto, folder: Path, precision: str) -> Report:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    data = {"calibration": "random"} if precision != "fp32" else {}
    package = folder / precision
    options = {"precision": precision, "executor": "simulated", "strict": True}
    report = optkit.compile(path, target="cortex-a53", output=package, **options, **data)
    assert (package / "report.html").stat().st_size > 1000
    return report


def dense() -> list[onnx.NodeProto]:
    return [node("MatMul", "x w", "y")]


X, Y, W = value("x", 4, 8), value("y", 4, 8), {"w": weight(8, 8)}


def in_an_if() -> onnx.ModelProto:
    def branch(name: str) -> onnx.GraphProto:
        nodes = [node("MatMul", f"x {name}_w", f"{name}_m"), node("Add", f"{name}_m captured", f"{name}_y")]
        own = [numpy_helper.from_array(weight(8, 8), f"{name}_w")]
        return helper.make_graph(nodes, name, [], [value(f"{name}_y", 4, 8)], own)

    choose = node("If", "positive", "chosen", then_branch=branch("a"), else_branch=branch("b"))
    nodes = [node("ReduceSum", "x", "sum", keepdims=0), node("Greater", "sum zero", "positive"), choose]
    weights = {"zero": np.float32(0), "captured": weight(8), **W}
    return model([*nodes, node("MatMul", "chosen w", "y")], [X], [Y], weights)


def in_a_loop() -> onnx.ModelProto:
    nodes = [node("MatMul", "h own", "m"), node("MatMul", "m w", "next"), node("Identity", "go", "on")]
    inputs, outputs = [value("i", dtype=INT64), value("go", dtype=BOOL), value("h", 4, 8)], [value("on", dtype=BOOL)]
    own = [numpy_helper.from_array(weight(8, 8), "own")]
    body = helper.make_graph(nodes, "body", inputs, [*outputs, value("next", 4, 8)], own)
    loop = helper.make_node("Loop", ["trips", "", "x"], ["looped"], name="loop", body=body)
    return model([loop, node("MatMul", "looped w", "y")], [X], [Y], {"trips": np.int64(3), **W})


def in_sequences() -> onnx.ModelProto:
    nodes = [
        *dense(),
        node("SplitToSequence", "y", "rows", axis=0, keepdims=0),
        node("SequenceAt", "rows one", "row"),
        node("ConcatFromSequence", "rows", "flat", axis=0),
    ]
    return model(nodes, [X], [value("row", 8), value("flat", 32)], {"one": np.int64(1), **W})


def to_a_sequence() -> onnx.ModelProto:
    rows = helper.make_tensor_sequence_value_info("rows", FLOAT, [None])
    return model([*dense(), node("SplitToSequence", "y", "rows", axis=0, keepdims=0)], [X], [rows], W)


def optional() -> onnx.ModelProto:
    nodes = [*dense(), node("Optional", "y", "maybe"), node("OptionalGetElement", "maybe", "z")]
    return model(nodes, [X], [value("z", 4, 8)], W)


def tied() -> onnx.ModelProto:
    nodes = [node("Gather", "table ids", "rows"), node("MatMul", "rows w", "hidden")]
    nodes += [node("Transpose", "table", "head", perm=[1, 0]), node("MatMul", "hidden head", "scores")]
    outputs = [value("scores", "n", "t", 50)]
    return model(nodes, [value("ids", "n", "t", dtype=INT64)], outputs, {"table": weight(50, 8), **W})


def quantized() -> onnx.ModelProto:
    weights = {
        "xs": np.float32(0.03),
        "xz": np.uint8(128),
        "wq": np.arange(8 * 3 * 9).reshape(8, 3, 3, 3).astype(np.int8),
        "ws": np.linspace(0.001, 0.01, 8, dtype=np.float32),
        "ys": np.float32(0.05),
        "yz": np.uint8(0),
    }
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"),
        node("DequantizeLinear", "xq xs xz", "xd"),
        node("DequantizeLinear", "wq ws", "wd", axis=0),
        node("Conv", "xd wd", "c"),
        node("QuantizeLinear", "c ys yz", "cq"),
        node("DequantizeLinear", "cq ys yz", "y"),
    ]
    return model(nodes, [value("x", 1, 3, 8, 8)], [value("y", 1, 8, 6, 6)], weights)


def convolution(op: str, x: tuple[int, ...], w: tuple[int, ...], **attributes: object) -> onnx.ModelProto:
    free = [None] * len(x)
    return model(
        [node(op, "x w", "c", **attributes), node("Relu", "c", "y")],
        [value("x", *x)],
        [value("y", *free)],
        {"w": weight(*w)},
    )


def training() -> onnx.ModelProto:
    normalize = node("BatchNormalization", "x scale shift mean var", "y new_mean new_var", training_mode=1)
    weights = {name: np.ones(8, np.float32) for name in ("scale", "shift", "mean", "var")}
    return model([normalize], [X], [Y], weights)


def gates(op: str, count: int, **attributes: object) -> onnx.ModelProto:
    weights = {"W": weight(1, 6 * count, 4), "R": weight(1, 6 * count, 6)}
    return model(
        [node(op, "x W R", "y", hidden_size=6, **attributes)], [value("x", 5, 2, 4)], [value("y", 5, 1, 2, 6)], weights
    )


MODELS = {
    "if": in_an_if(),
    "loop": in_a_loop(),
    "sequences inside": in_sequences(),
    "sequence output": to_a_sequence(),
    "optional": optional(),
    "tied embedding": tied(),
    "already quantized": quantized(),
    "training batch norm": training(),
    "dynamic everywhere": convolution("Conv", (1, 4, 9, 9), (8, 4, 3, 3), pads=[1] * 4),
    "convolution 1-D": convolution("Conv", (1, 4, 16), (8, 4, 3), dilations=[2], pads=[1, 0]),
    "convolution 3-D": convolution("Conv", (1, 4, 6, 6, 6), (8, 4, 3, 3, 3), pads=[1, 0, 1, 1, 0, 1]),
    "automatic padding": convolution("Conv", (1, 4, 9, 9), (8, 4, 3, 3), auto_pad="SAME_LOWER", strides=[2, 2]),
    "transposed": convolution(
        "ConvTranspose", (1, 4, 5, 5), (4, 3, 3, 3), group=2, strides=[2, 2], output_padding=[1, 1]
    ),
    "gemm factors": model(
        [node("Gemm", "x w b", "y", alpha=0.5, beta=2.0, transA=1)], [value("x", 8, 4)], [Y], {**W, "b": weight(8)}
    ),
    "matmul 5-D": model(dense(), [value("x", 2, 3, 2, 4, 8)], [value("y", 2, 3, 2, 4, 6)], {"w": weight(3, 2, 8, 6)}),
    "matmul of activations": model(
        [node("MatMul", "x z", "y")], [value("x", 2, 4, 8), value("z", 2, 8, 4)], [value("y", 2, 4, 4)]
    ),
    "two batch sizes": model(
        [*dense(), node("MatMul", "z w", "v"), node("Transpose", "v", "t"), node("MatMul", "y t", "o")],
        [value("x", "n", 8), value("z", "m", 8)],
        [value("o", "n", "m")],
        W,
    ),
    "lstm": gates("LSTM", 4),
    "gru": gates("GRU", 3, linear_before_reset=1),
    "einsum": model([node("Einsum", "x w", "y", equation="ij,jk->ik")], [X], [Y], W),
    "contrib operator": model(
        [*dense(), helper.make_node("Gelu", ["y"], ["g"], domain="com.microsoft")], [X], [value("g", 4, 8)], W
    ),
    "float16": model(
        dense(),
        [value("x", 4, 8, dtype=TensorProto.FLOAT16)],
        [value("y", 4, 8, dtype=TensorProto.FLOAT16)],
        {"w": weight(8, 8, dtype=np.float16)},
    ),
    "double": model(
        dense(),
        [value("x", 4, 8, dtype=TensorProto.DOUBLE)],
        [value("y", 4, 8, dtype=TensorProto.DOUBLE)],
        {"w": weight(8, 8, dtype=np.float64)},
    ),
    "input as output": model(dense(), [X], [Y, value("x", 4, 8)], W),
    "constant output": model([*dense(), node("Add", "w w", "k")], [X], [Y, value("k", 8, 8)], W),
    "empty tensor": model(
        [node("Concat", "x e", "c", axis=1), node("MatMul", "c w", "y")],
        [X],
        [Y],
        {"e": np.zeros((4, 0), np.float32), **W},
    ),
    "no sample in a batch": model(dense(), [value("x", 0, 8)], [value("y", 0, 8)], W),
    "no nodes": model([], [X], [X]),
    "no inputs": model([node("MatMul", "w w", "y")], [], [value("y", 8, 8)], W),
    "large weights": model(dense(), [X], [Y], {"w": weight(8, 8, scale=1e30)}),
    "zero weights": model(dense(), [X], [Y], {"w": np.zeros((8, 8), np.float32)}),
    "signed zeros": model(dense(), [X], [Y], {"w": np.where(weight(8, 8) < 0, np.float32(-0.0), np.float32(1))}),
    "long name": model(
        [helper.make_node("MatMul", ["x", "w"], ["y" * 5000], name="/<b>é中&" * 500), node("Relu", "y" * 5000, "r")],
        [X],
        [value("r", 4, 8)],
        W,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_float_package_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    report = compiled(MODELS[name], tmp_path, "fp32")
    assert report.executions, report.notices
    assert report.executions[0].fidelity.sqnr_db > 100


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_package_stays_close(name: str, tmp_path: Path) -> None:
    report = compiled(MODELS[name], tmp_path, "w8a8")
    assert report.executions, report.notices
    assert report.executions[0].fidelity.sqnr_db > 25


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    report = compiled(MODELS["already quantized"], tmp_path, "w8a8")
    assert report.compiled.ops == report.source.ops
    applied = {step.pass_name: step.applied for step in report.steps}
    assert applied["quantize-int8"] == 0


@pytest.mark.parametrize("opset", range(7, 24))
def test_every_opset_compiles(opset: int, tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("Flatten", "r", "f"),
        node("Softmax", "f", "y", axis=1),
    ]
    proto = model(nodes, [value("x", 1, 3, 6, 6)], [value("y", 1, 64)], {"w": weight(4, 3, 3, 3)}, opset)
    assert compiled(proto, tmp_path, "w8a8").executions[0].fidelity.sqnr_db > 20


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    w = weight(8, 8)
    w[2, 3] = np.nan
    with pytest.raises(InputError, match=r"^tensor 'w': it holds values that are not finite"):
        compiled(model(dense(), [X], [Y], {"w": w}), tmp_path, "w8a8")


def test_a_model_without_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m\.onnx: the graph has no output; export it with its results$"):
        compiled(model(dense(), [X], [], W), tmp_path, "fp32")


def test_an_operator_that_onnx_has_defined_anew_is_refused(tmp_path: Path) -> None:
    proto = model([node("GroupNormalization", "x s s", "y", num_groups=2)], [X], [Y], {"s": np.ones(2, np.float32)})
    sentence = r"deprecated: ONNX has defined it anew in opset 21; export it with opset 21 or newer$"
    with pytest.raises(InputError, match=rf"GroupNormalization of opset 18 is {sentence}"):
        compiled(proto, tmp_path, "fp32")


def test_random_data_that_does_not_suit_an_open_dimension_says_which(tmp_path: Path) -> None:
    proto = convolution("Conv", (1, 3, 9, 9), (8, 3, 3, 3))
    proto.graph.input[0].CopyFrom(value("x", "n", "c", 9, 9))
    sentence = r"a size of an open dimension \(n, c\) may not suit it: --dim NAME=SIZE fixes one$"
    with pytest.raises(InputError, match=sentence):
        compiled(proto, tmp_path, "w8a8")
    report = compiled(proto, tmp_path, "fp32")  # not run, and it says so
    assert not report.executions
    assert any("may not suit it" in notice for notice in report.notices)


def test_an_unknown_operator_says_where_to_give_its_library(tmp_path: Path) -> None:
    unknown = helper.make_node("Unknown", ["x"], ["u"], domain="com.microsoft")
    with pytest.raises(InputError, match=r"not a registered function/op; give the library .* in \$OPTKIT_CUSTOM_OPS$"):
        compiled(model([unknown, node("MatMul", "u w", "y")], [X], [Y], W), tmp_path, "w8a8")


def test_a_random_model_is_not_said_to_have_suffered(tmp_path: Path) -> None:
    nodes = [*dense(), node("Dropout", "y ratio training", "d")]
    proto = model(nodes, [X], [value("d", 4, 8)], {"ratio": np.float32(0.5), "training": np.array(True), **W})
    report = compiled(proto, tmp_path, "fp32")
    assert any("two runs of the original differ at output 'd'" in notice for notice in report.notices)
    assert not any("dB from the original's" in notice for notice in report.notices)


def test_weights_in_other_files_with_spaces_in_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "a folder é"
    folder.mkdir()
    proto = model(dense(), [X], [Y], W)
    onnx.save(proto, folder / "m odel.onnx", save_as_external_data=True, location="w eights é.bin", size_threshold=0)
    report = optkit.compile(folder, target="host", precision="fp32", output=tmp_path / "out put")
    assert report.executions[0].fidelity.sqnr_db > 100


def test_what_training_writes_over_is_not_shared(tmp_path: Path) -> None:
    report = compiled(MODELS["training batch norm"], tmp_path, "fp32")
    reasons = [group.message for group in report.remarks if group.pass_name == "eliminate-duplicates"]
    assert reasons == ["it equals another initializer, but a BatchNormalization in training mode writes over it"]


def test_sequences_inside_stay_sequences(tmp_path: Path) -> None:
    report = compiled(MODELS["sequences inside"], tmp_path, "w8a8")
    assert not [notice for notice in report.notices if "cannot load" in notice]
