"""The passes that fold, merge and lower: real models, padding of any geometry, chains of activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.dataset.samples import random_samples
from optkit.evaluate.fidelity import relative_error
from optkit.model.loading import load, load_text
from optkit.pass_check import fingerprint
from optkit.pipeline import Context, Pipeline
from optkit.session import Session
from pass_runs import create, messages, node, op_types, run, silero_sample

FOLDING = ("lower-experimental-ops", "fold-pad", "fold-batch-norm", "simplify-activations")


@pytest.mark.parametrize(
    ("path", "gone"),
    [
        ("resnet20_cifar10/resnet20_cifar10.onnx", {"BatchNormalization": 19}),
        ("resnet56_cifar10/resnet56_cifar10.onnx", {"BatchNormalization": 55}),
        ("mobilenet_v1_075/mobilenet_v1_075.onnx", {"BatchNormalization": 27}),
        ("mnist/mnist_burn_cnn.onnx", {"BatchNormalization": 2}),
        ("mnist/mnist_cntk8.onnx", {}),
        ("ad_autoencoder/ad_autoencoder.onnx", {"BatchNormalization": 9}),
        ("ultraface_rfb320/ultraface_rfb320.onnx", {"BatchNormalization": 35}),
        pytest.param("fns_candy/fns_candy.onnx", {"ImageScaler": 1, "Crop": 7, "Affine": 1}, marks=pytest.mark.slow),
        ("squeezenet1_1/squeezenet1_1.onnx", {}),
        ("squeezenet1_1/squeezenet1_1_fp16_original.onnx", {}),
        ("silero_vad/silero_vad.onnx", {}),
        ("silero_vad/silero_vad_half.onnx", {}),
        ("silero_vad/silero_vad_op18_ifless.onnx", {}),
        ("magika_v3_3/magika_v3_3.onnx", {"Max": 3}),
    ],
)
def test_real_models_stay_what_they_are(shared: Path, path: str, gone: dict[str, int]) -> None:
    model = load(shared / "data" / path)
    samples = [silero_sample()] if "silero" in path else list(random_samples(model, 1 if "candy" in path else 2))
    before, outputs = op_types(model), [Session(model).run(sample) for sample in samples]
    context = Context()
    result = Pipeline([create(name) for name in FOLDING], strict=True).run(model, context, samples)
    assert not result.unverified
    session = Session(model)
    for sample, reference in zip(samples, outputs, strict=True):
        got = session.run(sample)
        assert max(relative_error(reference[name], got[name]) for name in reference) <= 1e-5
    after = op_types(model)
    assert {name: before[name] - after[name] for name in gone} == gone
    assert not any(after[name] for name in gone)


@settings(max_examples=30, deadline=None)
@given(
    op=st.sampled_from(["Conv", "AveragePool", "MaxPool"]),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    own=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    kernel=st.integers(2, 4),
    stride=st.integers(1, 2),
    auto_pad=st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]),
    group=st.sampled_from([1, 4]),
)
def test_padding_of_any_geometry_is_bit_equal(
    op: str, pads: list[int], own: list[int], kernel: int, stride: int, auto_pad: str, group: int
) -> None:
    setting = f"kernel_shape: ints = [{kernel}, {kernel}], strides: ints = [{stride}, {stride}]"
    setting += f", pads: ints = {own}" if auto_pad == "NOTSET" else f', auto_pad: string = "{auto_pad}"'
    setting += f", group: int = {group}" if op == "Conv" else ""
    value = "-inf" if op == "MaxPool" else "0.0"
    top, left, bottom, right = pads
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[1,4,7,7] x, float[4,{4 // group},{kernel},{kernel}] w) => (float[1,4,h,k] y)
    <int64[8] p = {{0, 0, {top}, {left}, 0, 0, {bottom}, {right}}}>
    {{ z = Constant <value: tensor = float {{{value}}}> () d = Pad (x, p, z)
       y = {op} <{setting}> (d{", w" if op == "Conv" else ""}) }}"""
    model = load_text(text)
    context = run(model, create("fold-pad"))  # exact: the pipeline compares bit by bit
    if op == "Conv":
        assert [remark.kind for remark in context.remarks] == ["applied"]


SPECIAL = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0, 1e-40, -1e-40, 1.0, -1.0, 2.5, -2.5, 7.0], np.float32)
BOUND = st.sampled_from([-1.0, 0.0, 0.5, 2.0, 6.0])


@settings(max_examples=60, deadline=None)
@given(
    chain=st.lists(
        st.one_of(
            st.just(("Relu", None, None)),
            st.tuples(st.just("Clip"), st.none() | BOUND, st.none() | BOUND).filter(
                lambda clip: clip[1] is None or clip[2] is None or clip[1] <= clip[2]
            ),
            st.tuples(st.sampled_from(["Max", "Min"]), BOUND, st.none()),
        ),
        min_size=1,
        max_size=4,
    ),
    opset=st.sampled_from([8, 10, 11, 17]),
)
def test_activation_chains_are_equal_for_special_values(
    chain: list[tuple[str, float | None, float | None]], opset: int
) -> None:
    nodes, held = [], []
    for number, (op, low, high) in enumerate(chain):
        source, result = f"t{number}", f"t{number + 1}" if number + 1 < len(chain) else "y"
        names = {"a": low, "b": high}
        used = {f"{key}{number}": value for key, value in names.items() if value is not None}
        if op == "Clip" and opset < 11:
            bounds = [f"{key}: float = {value}" for key, value in (("min", low), ("max", high)) if value is not None]
            nodes.append(f"{result} = Clip {'<' + ', '.join(bounds) + '>' if bounds else ''} ({source})")
            continue
        held += [f"float {key} = {{{value}}}" for key, value in used.items()]
        arguments = [f"a{number}" if low is not None else "", f"b{number}" if high is not None else ""]
        tail = "".join(f", {argument}" for argument in arguments).rstrip(", ")
        nodes.append(f"{result} = {op} ({source}{tail})")
    declared = f"<{', '.join(held)}>" if held else ""
    text = f'<ir_version: 5, opset_import: ["" : {opset}]> main (float[13] t0) => (float[13] y) {declared}'
    model = load_text(f"{text} {{ {' '.join(nodes)} }}")
    before = Session(model).run({"t0": SPECIAL})["y"]
    run(model, create("simplify-activations"))
    np.testing.assert_array_equal(Session(model).run({"t0": SPECIAL})["y"], before)
    assert len(list(model.graph)) == 1


def test_leaky_relu_is_equal_for_special_values() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> main (float[13] x) => (float[13] y) <float a = {0.01}>'
    model = load_text(f"{text} {{ t = Mul (a, x) y = Max (t, x) }}")
    before = Session(model).run({"x": SPECIAL})["y"]
    run(model, create("simplify-activations"))
    assert op_types(model) == {"LeakyRelu": 1}
    np.testing.assert_array_equal(Session(model).run({"x": SPECIAL})["y"], before)


@pytest.mark.parametrize(
    ("op", "kept"),
    [("Abs", 0), ("Exp", 0), ("Sigmoid", 0), ("Softplus", 0), ("Sqrt", 0), ("Tanh", 1), ("Neg", 1), ("Identity", 1)],
)
def test_relu_of_what_is_never_negative(op: str, kept: int) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> main (float[1,4] x) => (float[4] y)'
    model = load_text(
        f"{text} {{ a = {op} (x) b = Reshape (a, s) y = Relu (b) }}".replace(
            "=> (float[4] y)", "=> (float[4] y) <int64[1] s = {4}>"
        )
    )
    run(model, create("simplify-activations"))
    assert op_types(model)["Relu"] == kept


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = GRUUnit (x, x, x, x)", "no runtime computes it, so there is nothing to agree with"),
        ("y = ScaledTanh <alpha: float = 1.0> (x)", "its alpha or beta is missing, and there is no default"),
    ],
)
def test_what_cannot_be_lowered_stays(body: str, reason: str) -> None:
    model = load_text(f'<ir_version: 3, opset_import: ["" : 7]> main (float[1,2] x) => (float[1,2] y) {{ {body} }}')
    before = fingerprint(model)
    assert messages(model, create("lower-experimental-ops")) == [reason]
    assert fingerprint(model) == before


def test_lowering_keeps_the_nodes_name_and_metadata() -> None:
    text = '<ir_version: 3, opset_import: ["" : 7]> main (float[1,2] x) => (float[1,2] y)'
    model = load_text(f"{text} {{ [old] y = Affine <alpha: float = 2.0, beta: float = 1.0> (x) }}")
    node(model, "old").metadata_props["optkit.note"] = "kept"
    run(model, create("lower-experimental-ops"))
    assert [(n.name, n.op_type) for n in model.graph] == [("old/Mul_1", "Mul"), ("old", "Add")]
    assert all(n.metadata_props == {"optkit.note": "kept"} for n in model.graph)
