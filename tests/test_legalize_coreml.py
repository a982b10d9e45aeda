"""The passes that shape a model for the Neural Engine: layouts on random shapes, whole transformers, stored weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowering_runs import check, executed, operations
from optkit.dataset.samples import random_samples
from optkit.graph import names, opset
from optkit.model.loading import load, load_text
from optkit.pipeline import Context, Pipeline
from optkit.quant.palette import Palette, palette_of, write_palette
from optkit.session import Session
from optkit.target import load_target
from optkit_targets.coreml import toolkit
from optkit_targets.coreml.legalize.channels_first import carried_array, carried_axis, carried_shape, whole
from optkit_targets.coreml.program import lower, save
from pass_runs import create, messages, op_types, run
from real_models import REAL_MODELS, STATIC_DIMS
from transformer_models import Builder, decoder_step, encoder, layer_norm

FLOAT = ir.DataType.FLOAT
SHAPING = ("avoid-fallbacks", "convert-linear-to-conv", "split-attention-heads", "collapse-transposes")
SHAPING += ("collapse-reshapes", "eliminate-duplicates", "eliminate-dead-code")
CNNS = ("mnist_burn_cnn", "resnet20_cifar10", "squeezenet1_1", "mobilenet_v1_075")


def shape_for_the_engine(model: ir.Model) -> None:
    run(model, *(create(name) for name in SHAPING), samples=1)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.data())
def test_axes_shapes_and_constants_are_carried_alike(shape: list[int], data: st.DataObject) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    moved = carried_array(array, len(shape))
    assert list(moved.shape) == carried_shape(shape)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    assert moved.shape[carried_axis(axis, len(shape))] == shape[axis]
    reduced = carried_array(array.max(axis=axis, keepdims=True), len(shape))
    assert np.array_equal(moved.max(axis=carried_axis(axis, len(shape)), keepdims=True), reduced)
    assert np.array_equal(np.moveaxis(moved, -1, 1), array.reshape(whole(shape)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_layers_and_what_lies_between_keep_their_outputs(
    batch: int, tokens: int, width: int, between: list[int]
) -> None:
    b = Builder(17)
    x = b.input("x", FLOAT, (batch, tokens, width))
    y = b.linear(x, width, width)
    operators: list[Callable[[ir.Value], ir.Value]] = [
        lambda v: b.add("Add", v, b.weight(width)),
        lambda v: b.add("Mul", v, b.weight(tokens, 1)),
        lambda v: b.add("Softmax", v, axis=-1),
        lambda v: b.add("Sub", v, b.add("ReduceMean", v, axes=[1])),
        lambda v: b.add("Add", x, v),
        lambda v: b.add("LayerNormalization", v, b.weight(width), axis=-1, epsilon=0.01),
        lambda v: b.add("Concat", v, v, axis=1) if v.shape == x.shape and len(between) == 1 else b.add("Tanh", v),
    ]
    for place in between:
        y = operators[place](y)
    b.output(b.linear(y, width, 3), "y")
    model = b.model()
    run(model, create("convert-linear-to-conv"))
    assert op_types(model)["Conv"] == 2


@pytest.mark.parametrize("make", [encoder, decoder_step])
def test_transformers_keep_their_outputs_in_a_package(make: Callable[[int], ir.Model]) -> None:
    model, original = make(1), Session(make(1))
    shape_for_the_engine(model)
    sample = random_samples(model, 1)[0]
    wanted, got = original.run(sample), executed(model, sample)
    for name, array in wanted.items():
        assert np.abs(got[name] - array).max() <= 1e-4 * max(np.abs(array).max(), 1), name


@pytest.mark.parametrize("make", [encoder, decoder_step])
def test_attention_becomes_one_operator_of_ios_18(make: Callable[[int], ir.Model]) -> None:
    model, original = make(1), Session(make(1))
    count = op_types(model)["Softmax"]
    run(model, create("raise-opset", opset=23), create("fuse-attention"), samples=1)
    shape_for_the_engine(model)
    assert count > 0
    assert op_types(model)["Attention"] == operations(model).count("scaled_dot_product_attention") == count
    assert op_types(model)["Softmax"] == 0
    sample = random_samples(model, 1)[0]
    wanted, got = original.run(sample), executed(model, sample)
    for name, array in wanted.items():
        assert np.abs(got[name] - array).max() <= 1e-4 * max(np.abs(array).max(), 1), name


@pytest.mark.parametrize(("wanted", "count"), [("", 0), ("iOS17", 0), ("iOS18", 1)])
def test_one_operator_for_attention_must_be_asked_for(wanted: str, count: int) -> None:
    target = load_target("apple-a17-ane")
    target = target.model_copy(update={"options": {**target.options, "deployment_target": wanted}})
    model, context = encoder(1), Context(target=target)
    Pipeline([create("raise-opset", opset=23), create("fuse-attention")]).run(model, context)
    assert op_types(model)["Attention"] == count
    assert any("from iOS 18 on" in remark.message for remark in context.remarks) == (not count)


def test_an_encoder_keeps_a_transpose_at_its_entry_and_one_for_the_keys_of_each_layer() -> None:
    model = encoder()
    shape_for_the_engine(model)
    found = op_types(model)
    assert found["Transpose"] == 3
    assert found["MatMul"] == 0
    assert found["Conv"] == 14
    assert found["Einsum"] == 2 * 2 * 4


def test_normalizations_over_channels_are_saved_as_one_operation(tmp_path: Path) -> None:
    model = encoder(1)
    run(model, create("fuse-layer-norm"), *(create(name) for name in SHAPING), samples=1)
    package = save(lower(model, 17), 17, tmp_path / "model.mlpackage", half=True)
    function = toolkit.coremltools().utils.load_spec(str(package)).mlProgram.functions["main"]
    (block,) = function.block_specializations.values()
    found = Counter(operation.type for operation in block.operations)
    assert (found["layer_norm"], found["rsqrt"], found["sqrt"]) == (3, 0, 0)


def test_half_precision_comes_before_the_layout() -> None:
    model, sample = encoder(1), random_samples(encoder(1), 2)
    wanted = Session(encoder(1)).run(sample[0])["logits"]
    context = Context(calibration=sample)
    Pipeline([create("fuse-layer-norm"), create("convert-float16")]).run(model, context, list(sample))
    shape_for_the_engine(model)
    got = executed(model, sample[0])["logits"]
    assert np.abs(got - wanted).max() <= 0.02 * np.abs(wanted).max()


def test_integers_that_a_lookup_reads_too_are_not_copied() -> None:
    model = load_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1,1,2] x, int64[1] i) => (float[1,1,3] y, int8[1,3] r) '
        "<int8[2,3] q = {1,2,3,4,5,6}, float s = {0.5}> "
        "{ w = DequantizeLinear (q, s) y = MatMul (x, w) r = Gather (q, i) }"
    )
    assert messages(model, create("convert-linear-to-conv")) == [
        f"Gather '{model.graph[2].name}' reads its weight too: a convolution would need a copy"
    ]


def test_one_query_stays_whole() -> None:
    model = decoder_step()
    shape_for_the_engine(model)
    assert op_types(model)["Conv"] == 15
    assert op_types(model)["Einsum"] == 0


def test_shared_keys_are_split_before_they_are_repeated() -> None:
    model = load_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1,4,3,2] q, float[1,2,3,2] k, float[1,2,3,2] v) => '
        "(float[1,4,3,2] y) <int64[1] two = {2}, int64[5] w = {1,2,2,3,2}, int64[4] s = {1,4,3,2}> { "
        "ku = Unsqueeze (k, two) ke = Expand (ku, w) kr = Reshape (ke, s) kt = Transpose <perm = [0, 1, 3, 2]> (kr) "
        "vu = Unsqueeze (v, two) ve = Expand (vu, w) vr = Reshape (ve, s) "
        "a = MatMul (q, kt) e = Softmax <axis = -1> (a) y = MatMul (e, vr) }"
    )
    run(model, create("split-attention-heads"))
    assert op_types(model)["Expand"] == 0
    sizes = [len(node.outputs) for node in model.graph if node.op_type == "Split"]
    assert sizes == [4, 2, 2]


def test_a_palette_is_turned_as_it_is_stored() -> None:
    b = Builder(17)
    x = b.input("x", FLOAT, (1, 1, 6))
    product = b.linear(x, 6, 4)
    b.output(product, "y")
    model = b.model()
    node = product.producer()
    assert node is not None
    random = np.random.default_rng(0)
    palette = Palette(
        random.standard_normal((2, 4)).astype(np.float32), random.integers(0, 4, (6, 4), np.uint8), 2, 1, 2
    )
    weight = write_palette(node, "w", palette, opset(model), names(model))
    node.replace_input_with(1, weight)
    run(model, create("convert-linear-to-conv"))
    conv = next(node for node in model.graph if node.op_type == "Conv")
    found = palette_of(conv.inputs[1].producer())  # type: ignore[union-attr]
    assert found is not None
    assert (found.axis, found.channels_per_lut, found.bits) == (0, 2, 2)
    assert np.array_equal(found.weight[..., 0, 0], palette.weight.T)
    sample = {"x": random.standard_normal((1, 1, 6)).astype(np.float32)}
    check(model, sample)


def test_integers_of_blocks_stay_integers_in_a_package() -> None:
    model = load_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1,1,4] x) => (float[1,1,2] y) '
        "<int8[4,2] q = {1,2,3,4,5,6,7,8}, float[2,2] s = {0.5,0.25,1,2}> "
        "{ w = DequantizeLinear <axis = 0, block_size = 2> (q, s) y = MatMul (x, w) }"
    )
    run(model, create("convert-linear-to-conv"))
    check(model, {"x": np.ones((1, 1, 4), np.float32)})


def test_a_linear_layer_beside_none_on_tokens_says_so() -> None:
    b = Builder(17)
    b.output(b.linear(b.input("x", FLOAT, (5, 4)), 4, 3), "y")
    found = messages(b.model(), create("convert-linear-to-conv"))
    assert found == ["it reads rows, and no layer on batch, tokens and channels is beside it"]


def test_a_bias_that_differs_from_token_to_token_stays_an_addition() -> None:
    b = Builder(17)
    x = b.input("x", FLOAT, (1, 3, 4))
    y = b.add("Add", b.linear(x, 4, 4), b.weight(3, 4))
    b.output(b.linear(y, 4, 4), "y")
    model = b.model()
    run(model, create("convert-linear-to-conv"))
    assert op_types(model)["Add"] == 1


def test_a_value_that_is_read_in_a_body_too_leaves_the_layout() -> None:
    model = load_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (bool c, float[1,3,2] x) => (float[1,3,2] y, float[1,3,2] z) '
        "<float[2,2] v = {1,2,3,4}> { a = MatMul (x, v) b = Relu (a) d = MatMul (b, v) y = MatMul (d, v) "
        "z = If (c) <then_branch = t () => (float[1,3,2] e) { e = Neg (b) }, "
        "else_branch = o () => (float[1,3,2] f) { f = Abs (b) }> }"
    )
    run(model, create("convert-linear-to-conv"))
    assert op_types(model)["Conv"] == 3


def test_attention_as_exporters_write_it_keeps_its_outputs_with_its_layers() -> None:
    b, length = Builder(17), 12
    x = layer_norm(b, b.input("x", FLOAT, (2, length, 32)))
    parts = [heads_of(b, x, length) for _ in range(3)]
    mask = b.input("mask", FLOAT, (2, 1, length, length))
    b.output(attend_in(b, parts, mask, length), "y")
    model = b.model()
    shape_for_the_engine(model)
    assert op_types(model)["Einsum"] == 8


def heads_of(b: Builder, x: ir.Value, length: int) -> ir.Value:
    split = b.add("Reshape", b.linear(x, 32, 32), b.constant([2, length, 4, 8]))
    return b.add("Transpose", split, perm=[0, 2, 1, 3])


def attend_in(b: Builder, parts: list[ir.Value], mask: ir.Value, length: int) -> ir.Value:
    q, k, v = parts
    scores = b.add("Add", b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2])), mask)
    mixed = b.add("Transpose", b.add("MatMul", b.add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    return b.linear(b.add("Reshape", mixed, b.constant([2, length, 32])), 32, 32)


@pytest.mark.parametrize("name", CNNS)
def test_image_networks_stay_as_they_are(name: str) -> None:
    if not REAL_MODELS[name].path.exists():
        pytest.skip(f"no {REAL_MODELS[name].path}")
    model = load(REAL_MODELS[name].path, STATIC_DIMS.get(name))
    before = op_types(model)
    for each in ("avoid-fallbacks", "convert-linear-to-conv", "split-attention-heads"):
        assert messages(model, create(each), "applied") == []
    assert op_types(model) == before
