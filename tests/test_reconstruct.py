"""Bias correction and the rounding of weights inside quantize-static, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optkit.dataset.samples import Samples, read_samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.graph import constant
from optkit.model.loading import load
from optkit.pipeline import Context, Pipeline, Remark
from optkit.session import run_samples
from optkit_passes.quantization import _reconstruct
from optkit_passes.quantization.quantize_static import QuantizeStatic
from quantizing import LAYERS, build, inputs_of, quantized, random, residual, sqnr
from real_models import REAL_MODELS
from reconstructing import (
    EVERYWHERE,
    Data,
    conv_relu_conv,
    corrected,
    digest,
    layer_outputs,
    mixed,
    two_gemms,
    worst_mean,
)


def clipped() -> ir.Model:
    return build(
        "(float[1,3,9,9] x) => (float[1,4,7,7] y) { a = Conv <pads=[1,1,1,1]> (x, v, c)  r = Clip (a, low, high) "
        "y = Conv (r, w, d) }",
        v=random(8, 3, 3, 3),
        c=random(8),
        low=np.array(0, np.float32),
        high=np.array(0.5, np.float32),
        w=random(4, 8, 3, 3),
        d=random(4),
    )


BIASED: dict[str, Callable[[], ir.Model]] = {
    "conv-relu-conv": conv_relu_conv,
    "clip": clipped,
    "gemms": two_gemms,
    **{name: LAYERS[name] for name in ("depthwise", "grouped", "conv one axis", "gemm alpha beta", "matmul with bias")},
}


@pytest.mark.parametrize("name", BIASED)
def test_mean_errors_of_the_layers_vanish(name: str) -> None:
    model = BIASED[name]()
    samples = mixed(model)
    left, _ = quantized(model, samples, bias_correction=False, rounding="nearest")
    result, remarks = quantized(model, samples, rounding="nearest")
    layers = layer_outputs(model) or ["y"]  # a MatMul is joined with the bias that is added to it
    assert len(corrected(remarks)) == len(layers)
    for layer in layers:
        bounds = EVERYWHERE if layer == "y" else (0.0, 0.5) if name == "clip" else (0.0, np.inf)
        before, after = (worst_mean(model, each, layer, samples, bounds) for each in (left, result))
        assert after < before / 8, layer
    assert sqnr(model, result) > sqnr(model, left) - 0.5


def test_errors_beyond_a_bound_do_not_move_the_bias() -> None:
    bias = random(8)
    bias[2], bias[5] = -50, 50  # always below 0, and always above 6
    model = build(
        "(float[16,12] x) => (float[16,8] y) { a = Gemm <transB=1> (x, w, b)  y = Clip (a, low, high) }",
        w=random(8, 12),
        b=bias,
        low=np.array(0, np.float32),
        high=np.array(6, np.float32),
    )
    samples = mixed(model)
    left, right = (
        constant(quantized(model, samples, rounding="nearest", bias_correction=on)[0].graph.initializers["b_quantized"])
        for on in (False, True)
    )
    assert left is not None
    assert right is not None
    moved = left != right
    assert not moved[[2, 5]].any()
    assert moved[[0, 1, 3, 4, 6, 7]].sum() >= 5


def test_layers_that_share_a_bias_get_their_own() -> None:
    weight = random(6, 3, 3, 3)
    model = build(
        "(float[1,3,9,9] x) => (float[1,6,7,7] y, float[1,6,7,7] z) { y = Conv (x, v, b)  z = Conv (x, w, b) }",
        v=weight,
        w=np.ascontiguousarray(weight[..., ::-1]),  # the same scales: what is stored of the bias is the same too
        b=random(6),
    )
    samples = mixed(model)
    left, _ = quantized(model, samples, bias_correction=False, rounding="nearest")
    result, remarks = quantized(model, samples, rounding="nearest")
    for graph, count in ((left.graph, 1), (result.graph, 2)):
        biases = {node.inputs[2].producer().inputs[0].name for node in graph if node.op_type == "Conv"}  # type: ignore[union-attr]
        assert len(biases) == count
    assert len(corrected(remarks)) == 2
    for name in ("y", "z"):
        before, after = (worst_mean(model, each, name, samples, EVERYWHERE) for each in (left, result))
        assert after < before / 8


def test_a_bias_at_the_limit_of_its_integers_stays_within() -> None:
    bias = np.array([1e9, -1e9, 0, 1, 1e9, -1e9], np.float32)
    model = build("(float[8,16] x) => (float[8,6] y) { y = Gemm <transB=1> (x, w, b) }", w=random(6, 16), b=bias)
    result, _ = quantized(model, mixed(model), rounding="nearest")
    stored = constant(result.graph.initializers["b_quantized"])
    assert stored is not None
    assert np.abs(stored.astype(np.int64)).max() <= 2**30


@pytest.mark.parametrize("name", ["conv without bias", "gemm without bias", "matmul", "matmul of activations"])
def test_a_layer_without_bias_is_left_alone(name: str) -> None:
    model = LAYERS[name]()
    left, _ = quantized(model, bias_correction=False, rounding="nearest")
    result, remarks = quantized(model, rounding="nearest")
    assert corrected(remarks) == []
    assert digest(left) == digest(result)


def test_biases_beside_scales_per_block_stay_float() -> None:
    model = two_gemms()
    samples = mixed(model)
    options: dict[str, Any] = {"weight_bits": 4, "block_size": 32, "rounding": "nearest"}
    left, _ = quantized(model, samples, bias_correction=False, **options)
    result, remarks = quantized(model, samples, **options)
    assert len(corrected(remarks)) == 2
    biases = [constant(node.inputs[2]) for node in result.graph if node.op_type == "Gemm"]
    assert all(bias is not None and bias.dtype == np.float32 for bias in biases)
    for name, bounds in (("a", (0.0, np.inf)), ("y", EVERYWHERE)):
        before, after = (worst_mean(model, each, name, samples, bounds) for each in (left, result))
        assert after < before / 20


# calibration data and models of every kind


def fitted(model: ir.Model, samples: Sequence[Mapping[str, np.ndarray]]) -> tuple[ir.Model, list[Remark]]:
    return quantized(model, samples, rounding="gptq")  # type: ignore[arg-type]


@pytest.mark.parametrize("calibration", [None, Samples([])])
def test_no_samples_are_an_error(calibration: Samples | None) -> None:
    with pytest.raises(InputError, match=r"needs calibration data and .*; pass --calibration DATA"):
        QuantizeStatic(rounding="gptq").run(conv_relu_conv(), Context(calibration=calibration))


def test_a_sample_with_nan_is_named() -> None:
    model = conv_relu_conv()
    samples = inputs_of(model, 4)
    samples[2]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="calibration sample 2: tensor 'x' has NaN values"):
        fitted(model, samples)


def test_one_sample_is_enough() -> None:
    model = conv_relu_conv()
    result, remarks = fitted(model, inputs_of(model, 1))
    assert len(corrected(remarks)) == 2
    assert sqnr(model, result) > 15


def test_samples_may_differ_in_size_and_be_empty() -> None:
    model = build(
        "(float[N,T,12] x) => (float[M,4] y) { f = Reshape (x, flat)  a = Gemm (f, v, c)  r = Relu (a) "
        "y = Gemm (r, w, d) }",
        flat=np.array([-1, 12]),
        v=random(12, 8),
        c=random(8),
        w=random(8, 4),
        d=random(4),
    )
    shapes = [(2, 3), (1, 7), (1, 0), (5, 1)]
    samples = [{"x": random(*shape, 12, seed=i) * 5} for i, shape in enumerate(shapes)]
    result, remarks = fitted(model, samples)
    assert len(corrected(remarks)) == 2
    assert compare(run_samples(model, samples[:2]), run_samples(result, samples[:2])).sqnr_db > 30


def test_samples_that_no_layer_reads_anything_of_are_remarked() -> None:
    model = build("(float[N,3,H,W] x) => (float[N,4,h,w] y) { y = Conv (x, v, c) }", v=random(4, 3, 3, 3), c=random(4))
    _, remarks = fitted(model, [{"x": np.empty((0, 3, 5, 5), np.float32)}])
    reasons = [r.message for r in remarks if r.kind == "missed" and r.node != "calibration"]
    assert reasons == ["tensor 'y' has no elements in every calibration sample"]


def test_bodies_omitted_inputs_and_early_outputs_pass() -> None:
    model = build(
        "(float[4,12] x, bool flag) => (float[4,8] a, float[4,3] y) { a = Gemm (x, v, c)  r = Clip (a, , high) "
        "b = If (flag) < then_branch = t () => (float[4,8] p) { p = Add (r, a) }, "
        "else_branch = e () => (float[4,8] q) { q = Sub (r, a) } > y = Gemm (b, w, d) }",
        v=random(12, 8),
        c=random(8),
        high=np.array(0.5, np.float32),
        w=random(8, 3),
        d=random(3),
    )
    samples = [{"x": random(4, 12, seed=i) * 5, "flag": np.array(i % 2 == 0)} for i in range(8)]
    result, remarks = fitted(model, samples)
    assert len(corrected(remarks)) == 2
    assert [value.name for value in result.graph.outputs] == ["a", "y"]
    assert compare(run_samples(model, samples), run_samples(result, samples)).sqnr_db > 30


def test_a_layer_of_constants_is_fitted_or_refused() -> None:
    model = build(
        "(float[1,4,3,3] x) => (float[1,4,3,3] y) { a = Conv (k, v, c)  y = Add (a, x) }",
        k=random(1, 3, 5, 5),
        v=random(4, 3, 3, 3),
        c=random(4),
    )
    result, _ = fitted(model, inputs_of(model, 2))
    assert sqnr(model, result) > 20


def test_half_precision_stays_as_it_is() -> None:
    model = build(
        "(float16[4,12] x) => (float16[4,8] y) { y = Gemm (x, v, c) }",
        v=random(12, 8).astype(np.float16),
        c=random(8).astype(np.float16),
    )
    result, remarks = fitted(model, [{"x": np.ones((4, 12), np.float16)}])
    assert [r.message for r in remarks] == ["input 'x' is float16, not float32"]
    assert digest(result) != ""


def test_a_strict_run_accepts_what_is_fitted() -> None:
    model = residual()
    samples = inputs_of(model, 8)
    context = Context(calibration=Samples(samples))
    result = Pipeline([QuantizeStatic(rounding="gptq")], strict=True).run(model, context, samples[:2])
    assert not result.unverified
    assert len(corrected(context.remarks)) == 4


def test_large_tensors_let_few_samples_walk_along(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    walk = _reconstruct.Walk

    def counted(model: ir.Model, samples: Data, **options: Any) -> Any:
        counts.append(len(samples))
        return walk(model, samples, **options)

    monkeypatch.setattr(_reconstruct, "Walk", counted)
    model = two_gemms()
    quantized(model, mixed(model, 100))
    monkeypatch.setattr(_reconstruct, "HELD_BYTES", 1000)
    quantized(model, mixed(model, 100))
    assert counts == [100, 100, _reconstruct.FEWEST, _reconstruct.FEWEST]


# real models


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("mobilenet_v1_075", 5), ("ad_autoencoder", 3)])
def test_real_models_gain_by_corrected_biases(shared: Path, name: str, least: float) -> None:
    real = REAL_MODELS[name]
    assert shared
    model = load(real.path)
    from optkit.plugins import pass_class

    Pipeline([pass_class("fold-batch-norm")()]).run(model, Context())
    calibration = read_samples(real.calibration_data, model, preprocess=real.spec)[:32]
    fresh = list(real.samples(48))
    wanted = run_samples(model, fresh)
    found = []
    for on in (False, True):
        result = model.clone()
        QuantizeStatic(rounding="nearest", bias_correction=on).run(result, Context(calibration=calibration))
        found.append(compare(wanted, run_samples(result, fresh)).sqnr_db)
    assert found[1] > found[0] + least
