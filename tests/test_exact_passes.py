"""The exact passes on real models, on what ONNX text cannot say, and on random chains of views."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.evaluate.fidelity import relative_error
from optkit.model.loading import load, load_text
from optkit.pipeline import Context, Pass, Pipeline, count_nodes
from optkit.plugins import pass_class
from optkit.session import CannotRunError, run_samples
from optkit_passes.cleanup.collapse_reshapes import CollapseReshapes
from optkit_passes.cleanup.collapse_transposes import CollapseTransposes
from optkit_passes.cleanup.eliminate_dead_code import EliminateDeadCode
from optkit_passes.cleanup.eliminate_duplicates import EliminateDuplicates
from optkit_passes.cleanup.eliminate_no_ops import EliminateNoOps
from optkit_passes.cleanup.fold_constants import FoldConstants

NAMES = (
    "eliminate-no-ops",
    "fold-constants",
    "eliminate-duplicates",
    "collapse-transposes",
    "collapse-reshapes",
    "eliminate-dead-code",
)
# nodes at most, bodies included, after the passes
MODELS = {
    "ad_autoencoder/ad_autoencoder.onnx": 28,
    "fns_candy/fns_candy.onnx": 59,
    "magika_v3_3/magika_v3_3.onnx": 94,
    "mnist/mnist_burn_cnn.onnx": 13,
    "mnist/mnist_cntk8.onnx": 11,
    "mobilenet_v1_075/mobilenet_v1_075.onnx": 85,
    "relu_lm/relu_lm.onnx": 125,
    "resnet20_cifar10/resnet20_cifar10.onnx": 73,
    "resnet56_cifar10/resnet56_cifar10.onnx": 199,
    "silero_vad/silero_vad.onnx": 148,
    "silero_vad/silero_vad_half.onnx": 73,
    "silero_vad/silero_vad_op18_ifless.onnx": 90,
    "squeezenet1_1/squeezenet1_1.onnx": 65,
    "squeezenet1_1/squeezenet1_1_fp16_original.onnx": 65,
    "sst2/sst2_relu_encoder.onnx": 71,
    "stories260k/stories260k.onnx": 384,
    "ultraface_rfb320/ultraface_rfb320.onnx": 160,
}
SLOW = {"fns_candy/fns_candy.onnx", "stories260k/stories260k.onnx"}


def random_inputs(model: ir.Model, batch: int, length: int) -> dict[str, np.ndarray]:
    """Free first dimensions become ``batch``, others ``length``; integers are 0 or 1, which index any table."""
    generator, sample = np.random.default_rng(batch), {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else (batch if i == 0 else length) for i, d in enumerate(value.shape or ())]
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        array = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(0, 2, shape)
        sample[value.name or ""] = array.astype(dtype)
    return sample


def real_inputs(path: Path, model: ir.Model) -> list[dict[str, np.ndarray]]:
    """Two samples of different batch and length: a dimension taken for fixed would show."""
    samples = [random_inputs(model, 1, 16), random_inputs(model, 2, 9)]
    if path.parent.name == "silero_vad":  # window and context at 16 kHz, then at 8 kHz where the model takes it
        audio = np.load(path.parent / "golden.npz")["audio16k"].astype(np.float32) / 32768
        rates = [(1, 16000, 576), (2, 16000, 576)] if "half" in path.name else [(1, 16000, 576), (2, 8000, 288)]
        samples = [
            {
                "input": audio[32000 : 32000 + batch * window].reshape(batch, window),
                "state": np.zeros((2, batch, 128), np.float32),
                "sr": np.array(rate, np.int64),
            }
            for batch, rate, window in rates
        ]
    return samples


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS])
def test_real_models_keep_their_outputs(shared: Path, name: str) -> None:
    path = shared / "data" / name
    model = load(path)
    samples = real_inputs(path, model)
    before, nodes_before = run_samples(model, samples), count_nodes(model)
    node_names = {node.name for node in model.graph.all_nodes()}
    context = Context()
    result = Pipeline([pass_class(name)() for name in NAMES], strict=True).run(model, context, samples)
    assert not result.unverified
    after = run_samples(model, samples)
    # float16 rounds where onnxruntime has kernels for it: fewer nodes, fewer roundings
    rtol = 1e-3 if "fp16" in name else 1e-5
    for a, b in zip(before, after, strict=True):
        assert list(a) == list(b)
        for output in a:
            assert relative_error(a[output], b[output]) <= rtol
    assert count_nodes(model) <= min(MODELS[name], nodes_before)
    kept = [node.name for node in model.graph.all_nodes()]
    assert len(kept) == len(set(kept))
    assert {name for name in kept if name not in node_names} <= {n for n in kept if n and n.endswith("/Identity")}
    assert not [remark for remark in context.remarks if not remark.node]


def test_tied_weights_stay_one_tensor(shared: Path) -> None:
    model = load(shared / "data/stories260k/stories260k.onnx")
    context = Context()
    FoldConstants().run(model, context)
    assert [(r.op_type, r.message) for r in context.remarks if r.kind == "missed"] == [
        ("Transpose", "'tok_embeddings.weight' is used elsewhere too: folding would store it twice")
    ]


def text(body: str, initializers: str = "", inputs: str = "float[2] x") -> str:
    return f'<ir_version: 8, opset_import: ["" : 17]>\nmain ({inputs}) => (float[2] y) {initializers} {{ {body} }}'


def overridable(source: str, name: str, array: np.ndarray) -> ir.Model:
    """Load a model and give its input ``name`` a default, which callers may override."""
    model = load_text(source)
    value = next(value for value in model.graph.inputs if value.name == name)
    value.const_value = ir.tensor(array, name=name)
    model.graph.register_initializer(value)
    return model


def remarks(pass_: Pass, model: ir.Model) -> list[tuple[str, str, str]]:
    context = Context()
    pass_.run(model, context)
    return [(remark.kind, remark.node, remark.message) for remark in context.remarks]


@pytest.mark.parametrize("pass_", [EliminateNoOps(), FoldConstants(), EliminateDuplicates(), EliminateDeadCode()])
def test_a_default_that_a_caller_may_override_is_no_constant(pass_: Pass) -> None:
    body = "a = Mul(x, w) b = Neg(w) c = Sub(a, b) d = Sub(c, one) y = Mul(d, one)"
    source = text(body, "<float[2] one = {2.0, 2.0}>", "float[2] x, float[2] w, float[2] unused")
    model = overridable(source, "w", np.full(2, 2, np.float32))
    value = next(value for value in model.graph.inputs if value.name == "unused")
    value.const_value = ir.tensor(np.ones(2, np.float32), name="unused")
    model.graph.register_initializer(value)
    before = ir.to_onnx_text(model)
    applied = [remark for remark in remarks(pass_, model) if remark[0] == "applied"]
    assert not applied
    assert ir.to_onnx_text(model) == before


def test_an_equal_default_is_not_merged_and_said() -> None:
    source = text("a = Mul(x, w) y = Add(a, v)", "<float[2] v = {2.0, 2.0}>", "float[2] x, float[2] w")
    model = overridable(source, "w", np.full(2, 2, np.float32))
    expected = [("missed", "w", "it equals another initializer, but its name is an input or output of the graph")]
    assert remarks(EliminateDuplicates(), model) == expected


@pytest.mark.parametrize(
    "body",
    [
        "a = RandomUniformLike <seed = 1.0> (x) b = RandomUniformLike <seed = 1.0> (x) y = Sub(a, b)",
        "a = Dropout(x, r, t) b = Dropout(x, r, t) y = Sub(a, b)",
    ],
)
def test_random_nodes_are_not_merged(body: str) -> None:
    assert remarks(EliminateDuplicates(), load_text(text(body, "<float r = {0.5}, bool t = {1}>"))) == []


def custom(body: str, initializers: str = "") -> ir.Model:
    source = text(body, initializers).replace('"" : 17', '"" : 17, "acme" : 1')
    return load_text(source)


def test_nodes_of_an_unknown_domain_stay_and_are_said() -> None:
    model = custom("a = acme.Log(x) y = Neg(x)")
    message = "no result is used, but an operator of domain 'acme' may do more"
    assert remarks(EliminateDeadCode(), model) == [("missed", "Log_0", message)]
    assert [node.op_type for node in model.graph] == ["Log", "Neg"]
    model = custom("a = acme.Noise(x) b = acme.Noise(x) y = Add(a, b)")
    message = "it equals 'Noise_0', but an operator of domain 'acme' may be random"
    assert remarks(EliminateDuplicates(), model) == [("missed", "Noise_1", message)]


def test_what_has_no_kernel_is_not_folded_but_its_neighbours_are() -> None:
    model = custom("a = acme.Weird(w) b = Neg(w) c = Add(a, b) y = Add(x, c)", "<float[2] w = {1.0, 2.0}>")
    given = remarks(FoldConstants(), model)
    assert [(kind, node) for kind, node, _ in given] == [("applied", "Neg_0"), ("missed", "Weird_0")]
    assert given[1][2].startswith("it cannot be evaluated: ")
    assert [node.op_type for node in model.graph] == ["Weird", "Add", "Add"]


def test_unused_functions_and_operator_sets_go() -> None:
    model = custom("y = Neg(x)")
    inner = ir.from_onnx_text('<ir_version: 8, opset_import: ["" : 17]> f (float[2] x) => (float[2] y) { y = Abs(x) }')
    function = ir.Function("acme", "Unused", graph=inner.graph, attributes=[])
    model.functions[function.identifier()] = function
    assert remarks(EliminateDeadCode(), model) == [
        ("applied", "acme::Unused", "no node calls this function"),
        ("applied", "acme", "no node is of this operator set"),
    ]
    assert not model.functions
    assert model.opset_imports == {"": 17}


def test_metadata_and_names_survive() -> None:
    model = load_text(text("a = Neg(x) b = Neg(x) c = Identity(b) y = Add(a, c)"))
    first, second = model.graph[0], model.graph[1]
    first.metadata_props["optkit.precision"] = second.metadata_props["optkit.precision"] = "float"
    second.metadata_props["origin"] = "layer 2"
    for pass_ in (EliminateNoOps(), EliminateDuplicates()):
        pass_.run(model, Context())
    assert [node.name for node in model.graph] == ["Neg_0", "Add_1"]
    assert dict(first.metadata_props) == {"optkit.precision": "float", "origin": "layer 2"}


def test_nodes_that_the_user_treats_differently_are_not_equal() -> None:
    model = load_text(text("a = Neg(x) b = Neg(x) y = Add(a, b)"))
    model.graph[0].metadata_props["optkit.precision"] = "float"
    assert remarks(EliminateDuplicates(), model) == []


def run_both(before: ir.Model, pass_: Pass, samples: Sequence[dict[str, np.ndarray]]) -> int:
    """Return how many nodes are left; the pipeline compares the outputs, here they are compared bit by bit."""
    expected = run_samples(before, samples)
    Pipeline([pass_], strict=True).run(before, Context(), list(samples))
    for a, b in zip(expected, run_samples(before, samples), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    return count_nodes(before)


def factorizations(total: int) -> st.SearchStrategy[list[int]]:
    """Shapes of ``total`` elements."""

    @st.composite
    def draw_shape(draw: st.DrawFn) -> list[int]:
        left, shape = total, []
        for _ in range(draw(st.integers(0, 3))):
            divisor = draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
            shape.append(divisor)
            left //= divisor
        return draw(st.permutations([*shape, left]))

    return draw_shape()


@st.composite
def view_chains(draw: st.DrawFn) -> tuple[list[int], list[int], list[str], list[str]]:
    """A shape, which of its dimensions are free, and views of it that are valid for any of their sizes."""
    total = draw(st.sampled_from([1, 2, 12, 24]))
    shape = draw(factorizations(total))
    free = draw(st.lists(st.integers(0, len(shape) - 1), max_size=2, unique=True))
    current = list(shape)
    lines: list[str] = []
    constants: list[str] = []
    for number in range(draw(st.integers(2, 4))):
        source, result = f"v{number}", f"v{number + 1}"
        kind = draw(st.sampled_from(["Reshape", "Flatten", "Unsqueeze", "Squeeze"]))
        ones = [axis for axis, dim in enumerate(current) if dim == 1 and (number or axis not in free)]
        if kind == "Squeeze" and ones:
            axis = draw(st.sampled_from(ones))
            lines.append(f"{result} = Squeeze <axes = [{axis}]> ({source})")
            current = current[:axis] + current[axis + 1 :]
        elif kind == "Unsqueeze":
            axis = draw(st.integers(0, len(current)))
            lines.append(
                f"{result} = Unsqueeze <axes = [{axis - draw(st.sampled_from([0, len(current) + 1]))}]> ({source})"
            )
            current = [*current[:axis], 1, *current[axis:]]
        elif kind == "Flatten":
            axis = draw(st.integers(0, len(current)))
            lines.append(f"{result} = Flatten <axis = {axis}> ({source})")
            current = [int(np.prod(current[:axis])), int(np.prod(current[axis:]))]
        else:
            target = draw(factorizations(int(np.prod(current))))
            written = [
                0 if axis < len(current) and current[axis] == dim and draw(st.booleans()) else dim
                for axis, dim in enumerate(target)
            ]
            if draw(st.booleans()):
                written[draw(st.integers(0, len(written) - 1))] = -1
            constants.append(f"int64[{len(written)}] s{number} = {{{', '.join(map(str, written))}}}")
            lines.append(f"{result} = Reshape ({source}, s{number})")
            current = target
    return shape, free, [*lines, f"y = Neg (v{len(lines)})"], constants


@settings(max_examples=80, deadline=None)
@given(view_chains())
def test_any_chain_of_views_gives_the_same_elements(case: tuple[list[int], list[int], list[str], list[str]]) -> None:
    shape, free, lines, constants = case
    dims = ",".join(f"D{axis}" if axis in free else str(dim) for axis, dim in enumerate(shape))
    initializers = f"<{', '.join(constants)}>" if constants else ""
    head = '<ir_version: 8, opset_import: ["" : 11]>'
    model = load_text(f"{head} main (float[{dims}] v0) => (float[] y) {initializers} {{ {' '.join(lines)} }}")
    samples = []
    for scale in (1, 2):  # free dimensions of another size, where the chain takes them
        sizes = [dim * scale if axis in free else dim for axis, dim in enumerate(shape)]
        sample = {"v0": np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)}
        with suppress(CannotRunError):
            run_samples(model, [sample])
            samples.append(sample)
    run_both(model, CollapseReshapes(), samples)


@settings(max_examples=60, deadline=None)
@given(
    st.permutations(range(4)),
    st.permutations(range(4)),
    st.lists(st.sampled_from([1, 1, 2, 3]), min_size=4, max_size=4),
    st.sampled_from(["", "Relu", "Neg"]),
)
def test_any_two_transposes_give_the_same_elements(p: list[int], q: list[int], shape: list[int], between: str) -> None:
    middle = f"b = {between} (a)" if between else "b = Identity (a)"
    body = f"a = Transpose <perm = {p}> (x) {middle} c = Transpose <perm = {q}> (b) y = Abs (c)"
    dims, result = ",".join(map(str, shape)), ",".join(str(shape[p[axis]]) for axis in q)
    source = f'<ir_version: 8, opset_import: ["" : 17]> main (float[{dims}] x) => (float[{result}] y) {{ {body} }}'
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert run_both(load_text(source), CollapseTransposes(), [{"x": array}]) <= 3


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-8, 8),
    st.sampled_from([-9, -3, -1, 0, 1, 3, 5, 2**31 - 1, 2**63 - 1]),
    st.sampled_from([-2, -1, 1, 2]),
    st.booleans(),
)
def test_a_slice_goes_only_where_it_takes_everything(start: int, end: int, step: int, known: bool) -> None:
    constants = f"<int64[1] s = {{{start}}}, int64[1] e = {{{end}}}, int64[1] a = {{0}}, int64[1] t = {{{step}}}>"
    dim = "3" if known else "N"
    source = (
        f'<ir_version: 8, opset_import: ["" : 17]> main (float[{dim}] x) => (float[M] y) {constants} '
        "{ b = Slice (x, s, e, a, t) y = Neg (b) }"
    )
    samples = [{"x": np.arange(size, dtype=np.float32)} for size in ((3,) if known else (1, 3, 6))]
    whole = all(np.array_equal(sample["x"][start:end:step], sample["x"]) for sample in samples)
    left = run_both(load_text(source), EliminateNoOps(), samples)
    assert left == 1 + (not whole) or (whole and not known)
