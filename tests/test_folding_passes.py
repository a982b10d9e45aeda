"""The passes that fold arithmetic into weights, clean activations, and move models between opsets and types."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.dataset import random_samples
from optkit.model import load, load_text, save
from optkit.pass_check import fingerprint
from optkit.pipeline import Context, Pass, Pipeline
from optkit.plugins import pass_class
from optkit.session import Session
from optkit.target import Target, load_target
from optkit.verify import relative_error

FOLDING = ("lower-experimental-ops", "fold-pad", "fold-batch-norm", "simplify-activations")


def create(name: str, **options: object) -> Pass:
    return pass_class(name).model_validate(options)


def run(model: ir.Model, *passes: Pass, samples: int = 2, target: Target | None = None) -> Context:
    """Run passes strictly, each verified within its effect on random samples."""
    context = Context(target=target)
    result = Pipeline(passes, strict=True).run(model, context, list(random_samples(model, samples)))
    assert not result.unverified
    return context


def messages(model: ir.Model, pass_: Pass, kind: str = "missed", target: Target | None = None) -> list[str]:
    """Run one pass without executing the model, and return its remarks."""
    context = Context(target=target)
    pass_.run(model, context)
    return [remark.message for remark in context.remarks if remark.kind == kind]


def op_types(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph.all_nodes() if node.name == name)


# ---------------------------------------------------------------- real models


def silero_sample() -> dict[str, np.ndarray]:
    audio = np.random.default_rng(0).standard_normal((1, 576)) * 0.1
    return {"input": audio.astype(np.float32), "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}


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


@pytest.mark.parametrize("opset", [13, 18, 21, 23])
@pytest.mark.parametrize(
    "path",
    [
        "squeezenet1_1/squeezenet1_1.onnx",
        "mnist/mnist_cntk8.onnx",
        "ultraface_rfb320/ultraface_rfb320.onnx",
        "magika_v3_3/magika_v3_3.onnx",
        "relu_lm/relu_lm.onnx",
        "stories260k/stories260k.onnx",
        "silero_vad/silero_vad.onnx",
        "silero_vad/silero_vad_op18_ifless.onnx",
    ],
)
def test_real_models_in_newer_opsets(shared: Path, path: str, opset: int) -> None:
    model = load(shared / "data" / path)
    old, others = model.opset_imports[""], {k: v for k, v in model.opset_imports.items() if k}
    names, values = [n.name for n in model.graph.all_nodes()], {v.name for n in model.graph for v in n.outputs}
    tensors = {id(v.const_value) for g in model.graphs() for v in g.initializers.values()}
    samples = [silero_sample()] if "silero" in path else list(random_samples(model, 1))
    context = Context()
    result = Pipeline([create("raise-opset", opset=opset)], strict=True).run(model, context, samples)
    assert result.steps[0].change == 0
    assert model.opset_imports == {"": max(old, opset), **others}
    assert bool(context.remarks) == (old < opset)
    assert set(names) <= {n.name for n in model.graph.all_nodes()}
    assert values <= {v.name for n in model.graph for v in n.outputs}
    assert tensors <= {id(v.const_value) for g in model.graphs() for v in g.initializers.values()}


@pytest.mark.slow
def test_candy_is_lowered_before_it_is_raised(shared: Path) -> None:
    model = load(shared / "data" / "fns_candy" / "fns_candy.onnx")
    refused = messages(model, create("raise-opset", opset=13))
    assert refused == ["opset 7 cannot become 13: ImageScaler is no standard operator of opset 7"]
    context = run(model, create("lower-experimental-ops"), create("raise-opset", opset=13), samples=1)
    assert not [remark for remark in context.remarks if remark.kind == "missed"]
    assert model.opset_imports[""] == 13


# ---------------------------------------------------------------- fold-batch-norm

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
        array = np.array([gamma]) if name == "g" else value.const_value.numpy()  # type: ignore[union-attr]
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
    weight, bias = (value.const_value.numpy() for value in conv.inputs[1:])  # type: ignore[union-attr]
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


# ---------------------------------------------------------------- fold-pad


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


# ---------------------------------------------------------------- simplify-activations

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


# ---------------------------------------------------------------- lower-experimental-ops


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


# ---------------------------------------------------------------- raise-opset

CONVERTED = {
    "clip": (7, 13, "float[2,3] x", "float[2,3] y", "y = Clip <min: float = -0.5, max: float = 0.5> (x)"),
    "pad": (9, 18, "float[2,3] x", "float[3,5] y", "y = Pad <pads: ints = [0, 1, 1, 1], value: float = 2.0> (x)"),
    "slice": (
        9,
        13,
        "float[2,3] x",
        "float[1,3] y",
        "y = Slice <axes: ints = [0], starts: ints = [1], ends: ints = [9]> (x)",
    ),
    "softmax": (9, 13, "float[2,3,4] x", "float[2,3,4] y", "y = Softmax <axis: int = 1> (x)"),
    "log-softmax": (9, 13, "float[2,3,4] x", "float[2,3,4] y", "y = LogSoftmax <axis: int = 1> (x)"),
    "squeeze": (11, 13, "float[1,3] x", "float[3] y", "y = Squeeze <axes: ints = [0]> (x)"),
    "reduce": (
        11,
        18,
        "float[2,3] x",
        "float[2,1] y",
        "a = ReduceMax <axes: ints = [1]> (x) y = ReduceSum <axes: ints = [1]> (a)",
    ),
    "split": (11, 18, "float[4] x", "float[2] y, float[2] z", "y, z = Split (x)"),
    "top-k": (9, 13, "float[4] x", "float[2] y, int64[2] i", "y, i = TopK <k: int = 2> (x)"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_conversion_agrees_with_onnx(name: str) -> None:
    old, new, inputs, outputs, body = CONVERTED[name]
    text = f'<ir_version: 4, opset_import: ["" : {old}]> main ({inputs}) => ({outputs}) {{ {body} }}'
    model = load_text(text)
    theirs = onnx.version_converter.convert_version(onnx.parser.parse_model(text), new)
    run(model, create("raise-opset", opset=new))
    for sample in random_samples(model, 2):
        mine, reference = Session(model).run(sample), Session(ir.from_proto(theirs)).run(sample)
        for key, value in reference.items():
            np.testing.assert_array_equal(mine[key], value)


def test_group_normalization_gets_one_scale_per_channel() -> None:
    text = '<ir_version: 8, opset_import: ["" : 18]> main (float[1,4,2] x) => (float[1,4,2] y)'
    weights = "<float[2] s = {1.0, 2.0}, float[2] b = {3.0, 4.0}>"
    model = ir.from_onnx_text(f"{text} {weights} {{ [norm] y = GroupNormalization <num_groups: int = 2> (x, s, b) }}")
    run(model, create("raise-opset", opset=21))
    scale = model.graph[0].inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    assert scale.const_value.numpy().tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("old", "inputs", "outputs", "body", "reason"),
    [
        (
            9,
            "float[4] x",
            "float[4] y, float[4] z",
            "y, m = Dropout (x) z = Neg (m)",
            "its mask is used, which became boolean",
        ),
        (
            10,
            "float[1,1,4,4] x, float[4] s",
            "float[1,1,h,w] y",
            "y = Resize (x, s)",
            "its scales are computed at run time, which decides how it rounds",
        ),
        (
            8,
            "float[1,3,2] x",
            "float[1,2] y, float[1,3,2] z",
            "y, z = Scan <num_scan_inputs: int = 1, body: graph = body (float[2] e) => (float[2] f, float[2] g) "
            "{ f = Identity (e) g = Neg (e) }> (, x)",
            "Scan took a batch axis until opset 8",
        ),
    ],
)
def test_what_cannot_be_raised_stays(old: int, inputs: str, outputs: str, body: str, reason: str) -> None:
    text = f'<ir_version: 4, opset_import: ["" : {old}]> main ({inputs}) => ({outputs}) {{ {body} }}'
    model = ir.from_onnx_text(text)
    before = fingerprint(model)
    assert messages(model, create("raise-opset", opset=13)) == [f"opset {old} cannot become 13: {reason}"]
    assert fingerprint(model) == before


def test_raising_leaves_other_domains_ties_and_mapped_weights_alone(tmp_path: Path) -> None:
    text = """<ir_version: 4, opset_import: ["" : 9, "mine" : 3]>
    main (float[1,200] x, float[200,200] w, float[200,200] u) => (float[200] y)
    { a = MatMul (x, w) b = mine.Twist <angle: int = 3> (a, u) y = Squeeze <axes: ints = [0]> (b) }"""
    arrays = {name: np.ones((200, 200), np.float32) for name in ("w", "u")}
    proto = ir.to_proto(constants(ir.from_onnx_text(text), arrays))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = load(tmp_path / "m.onnx")
    tied = model.graph.initializers["w"].const_value
    assert isinstance(tied, ir.ExternalTensor)
    model.graph.initializers["u"].const_value = tied
    assert messages(model, create("raise-opset", opset=13), kind="applied")[0] == "adapted to opset 13"
    assert model.graph.initializers["w"].const_value is model.graph.initializers["u"].const_value is tied
    assert dict(model.opset_imports) == {"": 13, "mine": 3}
    assert next(n for n in model.graph if n.domain == "mine").attributes["angle"].as_int() == 3
    save(model, tmp_path / "raised.onnx")
    assert load(tmp_path / "raised.onnx").opset_imports[""] == 13


# ---------------------------------------------------------------- widen-float16

NARROW = "main (float16[2] x) => (float16[2] y) {{ {} }}"


@pytest.fixture(scope="module")
def a53() -> Target:
    return load_target("cortex-a53")


def dtypes(model: ir.Model) -> set[ir.DataType | None]:
    return {value.dtype for n in model.graph.all_nodes() if n.op_type != "Cast" for value in n.outputs}


def test_squeezenet_is_widened_and_keeps_its_interface(shared: Path, a53: Target) -> None:
    model = load(shared / "data" / "squeezenet1_1" / "squeezenet1_1_fp16_original.onnx")
    result = Pipeline([create("widen-float16")], strict=True).run(
        model, Context(target=a53), list(random_samples(model, 2))
    )
    assert ir.DataType.FLOAT16 not in dtypes(model)
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == ["data_0", "softmaxout_1"]
    assert result.steps[0].change is not None
    assert 0 < result.steps[0].change < 1e-2
    assert op_types(model)["Cast"] == 2
    assert not messages(model, create("widen-float16"), kind="applied", target=a53)[1:]


def test_bodies_casts_and_constants_are_widened(a53: Target) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    main (float[2] x, bool c, int64[1] n) => (float[2] y)
    {
      h = Cast <to: int = 10> (x)
      k = ConstantOfShape <value: tensor = float16[1] {16384}> (n)
      z = If (c) <then_branch: graph = then () => (float16[2] a) { a = Add (h, k) },
                  else_branch: graph = else () => (float16[2] b) { b = Neg (h) }>
      y = Cast <to: int = 1> (z)
    }"""
    model = load_text(text)
    sample = {"x": np.array([1.0, -2.0], np.float32), "c": np.array(True), "n": np.array([2])}
    expected = Session(model).run(sample)["y"]
    assert messages(model, create("widen-float16"), kind="applied", target=a53)
    assert ir.DataType.FLOAT16 not in {v.dtype for g in model.graphs() for n in g for v in n.outputs}
    assert "Cast" not in op_types(model) or op_types(model)["Cast"] == 1  # the one that is a graph output may stay
    np.testing.assert_allclose(Session(model).run(sample)["y"], expected, rtol=1e-3)


def test_attributes_that_name_a_type_are_widened(a53: Target) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> main () => (bool y)'
    body = "r = RandomUniform <dtype: int = 10, shape: ints = [2]> () n = Neg (r)"
    body += " o = Optional () y = OptionalHasElement (o)"
    model = ir.from_onnx_text(f"{text} <float16[2] r> {{ {body} }}")
    optional = ir.TypeAndShape(ir.SequenceType(ir.TensorType(ir.DataType.FLOAT16)), None)
    model.graph[2].attributes.add(ir.AttrTypeProto("type", optional))
    assert messages(model, create("widen-float16"), kind="applied", target=a53)
    assert model.graph[0].attributes["dtype"].as_int() == ir.DataType.FLOAT
    assert model.graph[2].attributes["type"].value.type == ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))


def test_tied_float16_weights_stay_tied(a53: Target) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    main (float16[2] x, float16[2] w, float16[2] u) => (float16[2] y, float16[2] w) { a = Add (x, w) y = Mul (a, u) }"""
    model = ir.from_onnx_text(text.replace(", float16[2] w)", ")"))
    tied = ir.tensor(np.array([1.0, 2.0], np.float16))
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = tied
        model.graph.register_initializer(value)
    run(model, create("widen-float16"), target=a53)
    first, second = (model.graph.initializers[name].const_value for name in ("w", "u"))
    assert first is second
    assert first is not None
    assert first.dtype == ir.DataType.FLOAT


def test_a_constant_output_keeps_its_type(a53: Target) -> None:
    signature = "main (float16[2] x, float16[2] w) => (float16[2] y, float16[2] w)"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {signature} {{ y = Add (x, w) }}')
    weight = model.graph.inputs[1]
    model.graph.inputs.remove(weight)
    weight.const_value = ir.tensor(np.array([1.0, 2.0], np.float16), name="w")
    model.graph.register_initializer(weight)
    run(model, create("widen-float16"), target=a53)
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT16] * 2
    assert ir.DataType.FLOAT16 not in dtypes(model)


def test_operators_of_other_domains_keep_float16_between_casts(a53: Target) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> main (float16[2] x) => (float16[2] y)'
    model = ir.from_onnx_text(f"{text} <float16[2] a, float16[2] b> {{ a = Neg (x) b = mine.Twist (a) y = Neg (b) }}")
    assert messages(model, create("widen-float16"), kind="applied", target=a53)
    twist = next(n for n in model.graph if n.domain == "mine")
    assert twist.inputs[0] is not None
    assert twist.inputs[0].dtype == twist.outputs[0].dtype == ir.DataType.FLOAT16
    assert [n.op_type for n in model.graph] == ["Cast", "Neg", "Cast", "Twist", "Cast", "Neg", "Cast"]
    assert {n.outputs[0].dtype for n in model.graph if n.op_type == "Neg"} == {ir.DataType.FLOAT}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            'opset_import: ["" : 17, "mine" : 1]> main (float16[2] x) => (float16[2] y) '
            "{ b = mine.Twist (x) y = Neg (b) }",
            "the type of 'b' at mine::Twist is not known",
        ),
        (
            'opset_import: ["" : 17]> main (seq(float16[2]) x, int64 i) => (float16[2] y) { y = SequenceAt (x, i) }',
            "'x' is not a plain tensor of float16, so no Cast can stand for it",
        ),
    ],
)
def test_what_cannot_be_widened_stays(text: str, reason: str, a53: Target) -> None:
    model = ir.from_onnx_text(f"<ir_version: 8, {text}")
    before = fingerprint(model)
    assert messages(model, create("widen-float16"), target=a53) == [reason]
    assert fingerprint(model) == before


def test_a_target_with_float16_takes_the_model_as_it_is(a53: Target) -> None:
    able = a53.model_copy(update={"name": "able", "dtypes": ("float32", "float16")})
    model = load_text('<ir_version: 8, opset_import: ["" : 17]> main (float16[2] x) => (float16[2] y) { y = Neg (x) }')
    assert messages(model, create("widen-float16"), target=able) == ["target 'able' computes float16"]
