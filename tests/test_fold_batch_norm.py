"""Batch normalization folded into linear operators of any form, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.model.loading import load_text
from optkit.pass_check import fingerprint
from pass_runs import create, messages, node, op_types, run

NORM = "float[2] g = {2.0, 4.0}, float[2] o = {1.0, 1.0}, float[2] m = {1.0, 0.5}, float[2] v = {0.25, 0.25}"


def norm_model(nodes: str, inputs: str, outputs: str, constants: str = "", opset: int = 17) -> ir.Model:
    comma = ", " if constants else ""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> main ({inputs}) => ({outputs}) <{NORM}{comma}{constants}>'
    return load_text(f"{text} {{ {nodes} }}")


def test_the_folded_node_keeps_its_name_and_metadata_and_takes_the_norms_output() -> None:
    model = norm_model(
        "[first] c = Conv (x, w) [norm] y = BatchNormalization (c, g, o, m, v)",
        "float[1,1,3,3] x",
        "float[1,2,3,3] y",
        "float[2,1,1,1] w = {1.0, 3.0}",
    )
    node(model, "first").metadata_props["optkit.precision"] = "float"
    node(model, "norm").outputs[0].metadata_props["source"] = "layer 1"
    run(model, create("fold-batch-norm"))
    (conv,) = model.graph
    assert (conv.name, conv.metadata_props) == ("first", {"optkit.precision": "float"})
    assert (conv.outputs[0].name, conv.outputs[0].metadata_props) == ("y", {"source": "layer 1"})
    assert list(model.graph.initializers) == ["w", "first/bias"]


def test_a_tied_weight_is_not_changed_under_its_other_name() -> None:
    model = norm_model(
        "c = Conv (x, w) n = BatchNormalization (c, g, o, m, v) d = Conv (x, u) y = Add (n, d)",
        "float[1,1,3,3] x",
        "float[1,2,3,3] y",
        "float[2,1,1,1] w = {1.0, 3.0}, float[2,1,1,1] u = {0.0, 0.0}",
    )
    tied = model.graph.initializers["w"].const_value
    model.graph.initializers["u"].const_value = tied
    run(model, create("fold-batch-norm"))
    assert model.graph.initializers["u"].const_value is tied
    assert tied is not None
    assert tied.numpy().ravel().tolist() == [1.0, 3.0]


def float16_model(gamma: float) -> ir.Model:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    main (float16[1,1,4,4] x) => (float16[1,1,2,2] y)
    <float[1,1,3,3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0}, float[1] g = {1.0}, float[1] o = {1.0},
     float[1] m = {1.0}, float[1] v = {0.25}>
    { c = Conv (x, w) y = BatchNormalization <epsilon: float = 0.75> (c, g, o, m, v) }"""
    model = ir.from_onnx_text(text)
    for name, value in model.graph.initializers.items():
        array = np.array([gamma]) if name == "g" else value.const_value.numpy()
        value.const_value = ir.tensor(array.astype(np.float16), name=name)
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    return model


def test_float16_weights_are_folded_in_float64_and_rounded_once() -> None:
    model = float16_model(gamma=1 / 3)
    gamma = np.float64(np.float16(1 / 3))
    model.graph[0].inputs[0].shape, model.graph[0].outputs[0].shape = ir.Shape([1, 1, 4, 4]), ir.Shape([1, 1, 2, 2])
    model.graph[0].name, model.graph[1].name = "conv", "norm"
    run(model, create("fold-batch-norm"))
    (conv,) = model.graph
    weight, bias = (value.const_value.numpy() for value in conv.inputs[1:])
    assert weight.dtype == bias.dtype == np.float16
    np.testing.assert_array_equal(weight.ravel(), (np.arange(1, 10) * gamma).astype(np.float16))
    np.testing.assert_array_equal(bias, np.array([1 - gamma]).astype(np.float16))


def test_an_overflow_of_float16_is_refused() -> None:
    model = float16_model(gamma=60000.0)
    model.graph[0].outputs[0].shape, model.graph[0].name = ir.Shape([1, 1, 2, 2]), "conv"
    (reason,) = messages(model, create("fold-batch-norm"))
    assert reason.startswith("the folded weights of Conv 'conv' would not be finite in float16; ")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            norm_model(
                "y = BatchNormalization <spatial: int = 0> (x, g, o, m, v)", "float[1,2] x", "float[1,2] y", opset=8
            ),
            "it normalizes every position for itself (spatial=0)",
        ),
        (
            norm_model(
                "s = Reshape (x, n) y = BatchNormalization (s, g, o, m, v)", "float[4] x, int64[r] n", "float[a] y"
            ),
            "the rank of its input is not known",
        ),
        (
            norm_model(
                "n = BatchNormalization (x, g, o, m, v) y = MatMul (n, w)",
                "float[3,2] x",
                "float[3] y",
                "float[2] w = {1.0, 2.0}",
            ),
            "its input is not computed by an operator with weights; the weight of MatMul 'MatMul_0' is a vector",
        ),
        (
            norm_model(
                "n = BatchNormalization (x, g, o, m, v) y = MatMul (n, w)",
                "float[3,2] x",
                "float[2,3,1] y",
                "float[2,2,1] w = {1.0, 2.0, 3.0, 4.0}",
            ),
            "its input is not computed by an operator with weights; MatMul 'MatMul_0' has a stack of weights",
        ),
        (
            norm_model(
                "n = BatchNormalization (x, g, o, m, v) y = Conv (z, n)",
                "float[2,2,1] x, float[1,2,4] z",
                "float[1,2,4] y",
            ),
            "its input is not computed by an operator with weights; the weight of Conv 'Conv_0' is not constant",
        ),
        (
            norm_model(
                "n = BatchNormalization (x, g, o, m, v) y = Gemm (z, w, n)",
                "float[2,2] x, float[2,1] z",
                "float[2,2] y",
                "float[1,2] w = {1.0, 2.0}",
            ),
            "its input is not computed by an operator with weights; Gemm 'Gemm_0' takes its result as a weight",
        ),
        (
            norm_model(
                "n = BatchNormalization (x, g, o, m, v) f = Flatten <axis: int = 2> (n) y = Gemm (f, w)",
                "float[1,2,2] x",
                "float[2,1] y",
                "float[2,1] w = {1.0, 2.0}",
            ),
            "its input is not computed by an operator with weights; "
            "a Flatten in between mixes the channels with an axis of unknown length",
        ),
    ],
)
def test_refusals_of_batch_norm(model: ir.Model, reason: str) -> None:
    before = fingerprint(model)
    assert messages(model, create("fold-batch-norm")) == [reason]
    assert fingerprint(model) == before


def constants(model: ir.Model, arrays: dict[str, np.ndarray]) -> ir.Model:
    """Turn the named inputs of a model into initializers."""
    for value in [value for value in model.graph.inputs if value.name in arrays]:
        assert value.name is not None
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[value.name], name=value.name)
        model.graph.register_initializer(value)
    return model


def norm_arrays(rng: np.random.Generator, channels: int) -> dict[str, np.ndarray]:
    one = lambda low, high: rng.uniform(low, high, channels).astype(np.float32)  # noqa: E731
    return {"g": one(-2, 2), "o": one(-1, 1), "m": one(-1, 1), "v": one(0.1, 2)}


@settings(max_examples=30, deadline=None)
@given(
    op=st.sampled_from(["Conv", "ConvTranspose"]),
    group=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    pad=st.integers(0, 1),
    bias=st.booleans(),
    before=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions_of_any_geometry(
    op: str,
    group: int,
    per_group: tuple[int, int],
    kernel: int,
    stride: int,
    pad: int,
    bias: bool,
    before: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    inputs, outputs = (group * count for count in per_group)
    shape = (outputs, inputs // group) if op == "Conv" else (inputs, outputs // group)
    arrays = {
        "w": rng.standard_normal((*shape, kernel, kernel)).astype(np.float32),
        "b": rng.standard_normal(outputs).astype(np.float32),
        **norm_arrays(rng, inputs if before else outputs),
    }
    setting = f"<group: int = {group}, strides: ints = [{stride}, {stride}], pads: ints = [{pad}, {pad}, {pad}, {pad}]>"
    rest = ", b" if bias else ""
    norm = "BatchNormalization ({}, g, o, m, v)"
    nodes = (
        f"n = {norm.format('x')} y = {op} {setting} (n, w{rest})"
        if before
        else f"c = {op} {setting} (x, w{rest}) y = {norm.format('c')}"
    )
    declared = ", ".join(f"float[{','.join(map(str, array.shape))}] {name}" for name, array in arrays.items())
    signature = f"main (float[1,{inputs},5,5] x, {declared}) => (float[1,{outputs},h,k] y)"
    model = constants(load_text(f'<ir_version: 8, opset_import: ["" : 17]> {signature} {{ {nodes} }}'), arrays)
    context = run(model, create("fold-batch-norm"))  # the pipeline compares the outputs
    foldable = not before or (op == "Conv" and pad == 0)
    assert [remark.kind for remark in context.remarks] == ["applied" if foldable else "missed"]
    assert ("BatchNormalization" in op_types(model)) != foldable


@settings(max_examples=30, deadline=None)
@given(
    trans_a=st.booleans(),
    trans_b=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5, -2.0]),
    beta=st.sampled_from([1.0, 0.0, 3.0]),
    bias=st.sampled_from([None, (), (1,), (4,), (1, 4), (1, 1), (3, 4), (3, 1)]),
    before=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gemm_of_any_form(
    trans_a: bool,
    trans_b: bool,
    alpha: float,
    beta: float,
    bias: tuple[int, ...] | None,
    before: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {"w": rng.standard_normal((4, 2) if trans_b else (2, 4)).astype(np.float32)}
    channels = 4 if not before else 3 if trans_a else 2
    arrays |= norm_arrays(rng, channels)
    if bias is not None:
        arrays["b"] = np.asarray(rng.standard_normal(bias), np.float32)
    setting = (
        f"<alpha: float = {alpha}, beta: float = {beta}, transA: int = {int(trans_a)}, transB: int = {int(trans_b)}>"
    )
    rest = "" if bias is None else ", b"
    nodes = (
        f"n = BatchNormalization (x, g, o, m, v) y = Gemm {setting} (n, w{rest})"
        if before
        else f"c = Gemm {setting} (x, w{rest}) y = BatchNormalization (c, g, o, m, v)"
    )
    declared = ", ".join(
        f"float{list(array.shape) if array.ndim else ''} {name}".replace(" ,", ",") for name, array in arrays.items()
    )
    rows = "2,3" if trans_a else "3,2"
    text = f'<ir_version: 8, opset_import: ["" : 17]> main (float[{rows}] x, {declared}) => (float[3,4] y)'
    model = constants(load_text(f"{text} {{ {nodes} }}"), arrays)
    run(model, create("fold-batch-norm"))
    refused = bias == (3, 1) or (before and trans_a)
    assert ("BatchNormalization" in op_types(model)) == refused
