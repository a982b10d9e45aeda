"""Static quantization of embeddings and tied tables, its calibration, its targets, and real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.dataset.samples import Samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.graph import constant
from optkit.model.loading import load
from optkit.pipeline import Context, Pipeline
from optkit.session import run_samples
from optkit.target import Target, load_target
from optkit_passes.quantization.quantize_static import QuantizeStatic
from quantizing import (
    FLOAT_KERNELS,
    INTEGER_KERNELS,
    LAYERS,
    TOKENS,
    build,
    deployed,
    find,
    inputs_of,
    missed,
    ops,
    quantized,
    random,
    residual,
    sqnr,
    transformer_block,
)


def test_embedding_is_stored_in_8_bits_and_dequantized_after_the_rows_are_picked() -> None:
    model = build(
        "(int64[N,T] ids) => (float[N,T,4] y) { e = Gather (table, ids)  y = MatMul (e, w) }",
        table=random(50, 16),
        w=random(16, 4),
    )
    result, remarks = quantized(model, TOKENS)
    gather = find(result, "Gather")
    assert gather.inputs[0].name == "table_quantized"
    assert [use.node.op_type for use in gather.outputs[0].uses()] == ["DequantizeLinear"]
    assert "table" not in result.graph.initializers
    assert [r.message for r in remarks if r.op_type == "Gather"] == ["table stored in 8 bits"]
    assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS)).sqnr_db > 33
    kept, _ = quantized(model, TOKENS, embeddings=False)
    assert "table" in kept.graph.initializers


def test_embedding_that_is_a_graph_output_keeps_its_name() -> None:
    model = build("(int64[N,T] ids) => (float[N,T,16] e) { e = Gather (table, ids) }", table=random(50, 16))
    result, _ = quantized(model, TOKENS)
    assert [value.name for value in result.graph.outputs] == ["e"]
    assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS)).sqnr_db > 33


@pytest.mark.parametrize(
    "form", ["t = Transpose <perm=[1,0]> (table)  y = MatMul (h, t)", "y = Gemm <transB=1> (h, table)"]
)
def test_table_tied_to_the_output_layer_is_stored_once(form: str) -> None:
    rows = "h = Reshape (e, flat)"
    model = build(
        f"(int64[1,9] ids) => (float[9,50] y) {{ e = Gather (table, ids)  {rows}  {form} }}",
        table=random(50, 16),
        flat=np.array([9, 16]),
    )
    result, _ = quantized(model, TOKENS)
    stored = [name for name, value in result.graph.initializers.items() if value.const_value.size == 800]
    assert stored == ["table_quantized"]
    assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS)).sqnr_db > 30
    assert set(deployed(result)) & INTEGER_KERNELS


def test_weight_that_is_also_read_in_float_says_that_it_is_stored_twice() -> None:
    model = build(
        "(float[4,16] x) => (float[4,16] y, float[16,16] z) { y = MatMul (x, w)  z = Exp (w) }", w=random(16, 16)
    )
    result, remarks = quantized(model)
    assert {"w", "w_quantized"} <= set(result.graph.initializers)
    assert missed(remarks)["Exp"] == "reads 'w' in float, so that it is stored in both forms"


def test_equal_scales_and_zero_points_are_stored_once() -> None:
    result, _ = quantized(residual())
    scalars = [
        v.const_value.tobytes() + str(v.dtype).encode() for v in result.graph.initializers.values() if v.const_value
    ]
    assert len(scalars) == len(set(scalars))


# calibration


def test_tensor_that_is_always_zero_keeps_its_readers_in_float() -> None:
    model = build(
        "(float[4,16] x, float[4,16] s) => (float[4,5] y) { a = Gemm (x, w)  c = Gemm (s, w)  y = Add (a, c) }",
        w=random(16, 5),
    )
    samples = [{**sample, "s": np.zeros((4, 16), np.float32)} for sample in inputs_of(model)]
    result, remarks = quantized(model, samples)
    assert missed(remarks)["Gemm"] == "tensor 's' is 0 in every calibration sample"
    assert sqnr(model, result) > 30  # on inputs where it is not 0


def test_tensor_without_elements_keeps_its_readers_in_float() -> None:
    model = build(
        "(float[N,16] x, float[M,16] s) => (float[N,5] y, float[M,5] z) { y = Gemm (x, w)  z = Gemm (s, w) }",
        w=random(16, 5),
    )
    samples = [{**sample, "s": np.zeros((0, 16), np.float32)} for sample in inputs_of(model)]
    _, remarks = quantized(model, samples)
    assert missed(remarks)["Gemm"] == "tensor 's' has no elements in every calibration sample"


def test_one_sample_is_remarked() -> None:
    model = LAYERS["conv"]()
    _, remarks = quantized(model, inputs_of(model, 1))
    assert [r.message for r in remarks if r.node == "calibration"] == [
        "one sample only: ranges seen in it may be too narrow for others"
    ]


@pytest.mark.parametrize("calibration", [None, Samples([])])
def test_no_calibration_data_is_an_error_that_says_what_to_pass(calibration: Samples | None) -> None:
    with pytest.raises(InputError, match=r"needs calibration data and .*; pass --calibration DATA"):
        QuantizeStatic().run(LAYERS["conv"](), Context(calibration=calibration))


def test_weight_that_is_not_finite_is_named() -> None:
    weight = random(8, 3, 3, 3)
    weight[3, 1, 0, 0] = np.nan
    model = build("(float[1,3,9,9] x) => (float[1,8,7,7] y) { y = Conv (x, w) }", w=weight)
    with pytest.raises(InputError, match=r"tensor '[xyw]'.* (NaN|not finite)"):
        quantized(model)
    model = build("(float[1,3,6,6] x) => (float[n,m,h,l] y) { a = Conv (x, v)  p = Mul (a, k)  y = Conv (p, v) }",
                  v=random(3, 3, 1, 1), k=np.array([1, np.inf, 1], np.float32).reshape(3, 1, 1))  # fmt: skip
    with pytest.raises(InputError, match=r"tensor '(k|p)'"):
        quantized(model)


def test_activation_that_is_not_finite_names_tensor_and_sample() -> None:
    model = LAYERS["conv"]()
    samples = inputs_of(model)
    samples[5]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"^calibration sample 5: tensor 'x' has NaN values; "):
        quantized(model, samples)


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "entropy", "mse", "auto"])
def test_every_range_method_quantizes_well(method: str) -> None:
    model = residual()
    result, _ = quantized(model, inputs_of(model, 64), range_method=method)
    assert sqnr(model, result) > 22


def test_same_inputs_give_the_same_bytes() -> None:
    first, second = (quantized(transformer_block())[0] for _ in range(2))
    assert ir.to_proto(first).SerializeToString(deterministic=True) == ir.to_proto(second).SerializeToString(
        deterministic=True
    )


# targets


def test_target_decides_the_integers() -> None:
    model = residual()
    result, _ = quantized(model, target=load_target("cortex-a53"))
    types = {node.outputs[0].dtype for node in result.graph if node.op_type == "QuantizeLinear"}
    assert types == {ir.DataType.INT8}
    assert sqnr(model, result) > 25
    assert "Relu" not in ops(result)  # int8 with zero point -128 clamps at 0 as well


def test_symmetric_activations_have_zero_point_0_and_keep_relu() -> None:
    target = load_target("cortex-a53")
    symmetric = target.activations["int8"].model_copy(update={"symmetric": True})
    target = target.model_copy(update={"activations": {"int8": symmetric}})
    model = residual()
    result, _ = quantized(model, target=target)
    zeros = [constant(n.inputs[2]) for n in result.graph if n.op_type == "QuantizeLinear"]
    assert all(zero is not None and zero.dtype == np.int8 and int(zero) == 0 for zero in zeros)
    assert ops(result).count("Relu") == 3
    assert sqnr(model, result) > 24


def avx2() -> Target:
    """The host target as on a machine whose kernels add two products in int16."""
    return load_target("host").model_copy(update={"isa": ("x86_64", "avx2")})


@pytest.mark.parametrize("name", ["conv", "grouped", "gemm", "gemm transposed", "matmul", "matmul transposed constant"])
def test_pairs_of_weights_do_not_saturate_where_the_target_adds_them_in_int16(name: str) -> None:
    model = LAYERS[name]()
    result, _ = quantized(model, target=avx2())
    integers = constant(result.graph.initializers["w_quantized"])
    assert integers is not None
    rows = integers.astype(int)
    if integers.ndim == 4:
        rows = rows.transpose(0, 2, 3, 1).reshape(len(rows), -1)
    elif name in ("gemm", "matmul"):
        rows = rows.T
    rows = np.abs(np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))))
    assert 100 < (rows[:, 0::2] + rows[:, 1::2]).max() <= 128
    assert rows.max() > 64  # less is lost than a whole bit
    assert sqnr(model, result) > 30


def test_depthwise_weights_keep_the_full_range_everywhere() -> None:
    full, limited = (quantized(LAYERS["depthwise"](), target=target)[0] for target in (None, avx2()))
    assert full.graph.initializers["w_scale"].const_value.tobytes() == (
        limited.graph.initializers["w_scale"].const_value.tobytes()
    )


def test_tied_table_is_stored_once_where_pairs_saturate() -> None:
    model = build(
        "(int64[1,9] ids) => (float[9,50] y) { e = Gather (table, ids)  h = Reshape (e, flat) "
        "y = Gemm <transB=1> (h, table) }",
        table=random(50, 16),
        flat=np.array([9, 16]),
    )
    result, _ = quantized(model, TOKENS, target=avx2())
    assert [n for n, v in result.graph.initializers.items() if v.const_value.size == 800] == ["table_quantized"]
    assert compare(run_samples(model, TOKENS), run_samples(result, TOKENS)).sqnr_db > 28


def test_target_without_channel_scales_gets_one_scale_per_tensor() -> None:
    target = load_target("cortex-a53")
    weights = target.weights["int8"].model_copy(update={"granularity": ("tensor",)})
    model = residual()
    result, _ = quantized(model, target=target.model_copy(update={"weights": {"int8": weights}}))
    assert all("axis" not in node.attributes for node in result.graph if node.op_type == "DequantizeLinear")
    assert sqnr(model, result) > 24


def test_target_without_8_bit_weights_is_an_error() -> None:
    target = load_target("cortex-a53").model_copy(update={"weights": {}})
    with pytest.raises(InputError) as error:
        quantized(LAYERS["conv"](), target=target)
    assert str(error.value) == "target 'cortex-a53' takes no 8-bit weights; choose another precision"


# real models


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "channels", "least"),
    [("resnet20_cifar10/resnet20_cifar10.onnx", 3, 25), ("mnist/mnist_burn_cnn.onnx", 1, 25)],
)
def test_real_model_keeps_its_answers(shared: Path, file: str, channels: int, least: float) -> None:
    from optkit.plugins import pass_class

    model = load(shared / "data" / file)
    folder = "cifar10_jpeg" if channels == 3 else "mnist"
    images = np.load(shared / "data" / folder / "calibration.npz")["images"][:192].reshape(
        192, -1, 32 if channels == 3 else 28, channels
    )
    name = model.graph.inputs[0].name or ""
    samples = [
        {name: ((image / np.float32(127.5) - 1).transpose(2, 0, 1)[None]).astype(np.float32)} for image in images
    ]
    context = Context(calibration=Samples(samples[:64]))
    Pipeline([pass_class("fold-batch-norm")()]).run(model, context)
    reference = model.clone()
    Pipeline([QuantizeStatic()], strict=True).run(model, context, samples[:1])
    fidelity = compare(run_samples(reference, samples[64:]), run_samples(model, samples[64:], optimize=True))
    assert fidelity.sqnr_db > least
    assert fidelity.top1_agreement is not None
    assert fidelity.top1_agreement > 0.95
    assert not set(deployed(model)) & FLOAT_KERNELS
