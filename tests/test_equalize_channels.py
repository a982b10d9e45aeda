"""Equalization: the float model stays the same, the quantized one gets better, and what cannot be scaled says why."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.dataset.samples import Samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.pipeline import Context, Remark
from optkit.session import run_samples
from optkit_passes.quantization.equalize_channels import EqualizeChannels
from quantizing import HEADER, build, inputs_of, quantized, random, sqnr

SPREAD = np.logspace(-2, 2, 8, base=4, dtype=np.float32)  # 8 channels, 256 times apart


def equalized(
    model: ir.Model, samples: list[dict[str, np.ndarray]] | None = None, **options: object
) -> tuple[ir.Model, list[Remark]]:
    result = model.clone()
    context = Context(calibration=Samples(inputs_of(model) if samples is None else samples))
    EqualizeChannels.model_validate(options).run(result, context)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    return result, context.remarks


def told(remarks: list[Remark], kind: str) -> dict[str, str]:
    return {remark.node: remark.message for remark in remarks if remark.kind == kind}


def convolutions(between: str, shape: str = "1,4,9,9", group: int = 1) -> ir.Model:
    depthwise = group == 8
    back = SPREAD.reshape(8, 1, 1, 1) if depthwise else SPREAD[: 8 // group].reshape(-1, 1, 1)
    return build(
        f"(float[1,3,9,9] x) => (float[{shape}] y) {{ h = Conv <pads=[1,1,1,1]> (x, w, b)  {between} "
        f"y = Conv <group={group}, pads=[1,1,1,1]> (r, v, c) }}",
        w=random(8, 3, 3, 3) * SPREAD.reshape(8, 1, 1, 1),
        b=random(8) * SPREAD,
        v=random(8 if depthwise else 4, 8 // group, 3, 3) / back,
        c=random(8 if depthwise else 4),
    )


SEAMS: dict[str, Callable[[], ir.Model]] = {
    "relu": lambda: convolutions("r = Relu (h)"),
    "leaky relu": lambda: convolutions("r = LeakyRelu (h)"),
    "pooling": lambda: convolutions("m = MaxPool <kernel_shape=[3,3], strides=[2,2]> (h)  r = Relu (m)", "1,4,4,4"),
    "groups": lambda: convolutions("r = Relu (h)", group=2),
    "depthwise": lambda: convolutions("r = Relu (h)", "1,8,9,9", group=8),
    "transposed convolution": lambda: build(
        "(float[1,3,9,9] x) => (float[1,4,10,10] y) { h = ConvTranspose (x, w, b)  r = Relu (h)  y = Conv (r, v) }",
        w=random(3, 8, 3, 3) * SPREAD.reshape(8, 1, 1),
        b=random(8) * SPREAD,
        v=random(4, 8, 2, 2) / SPREAD.reshape(8, 1, 1),
    ),
    "flattened": lambda: build(
        "(float[1,3,4,4] x) => (float[1,5] y) { h = Conv <pads=[1,1,1,1]> (x, w)  r = Relu (h)  f = Flatten (r) "
        "y = Gemm <transB=1> (f, v, c) }",
        w=random(8, 3, 3, 3) * SPREAD.reshape(8, 1, 1, 1),
        v=random(5, 128) / np.repeat(SPREAD, 16),
        c=random(5),
    ),
    "mean of positions": lambda: build(
        "(float[1,3,4,4] x) => (float[1,5] y) { h = Conv <pads=[1,1,1,1]> (x, w)  r = Relu (h) "
        "p = GlobalAveragePool (r)  f = Flatten (p)  y = Gemm (f, v) }",
        w=random(8, 3, 3, 3) * SPREAD.reshape(8, 1, 1, 1),
        v=random(8, 5) / SPREAD.reshape(8, 1),
    ),
    "normalization": lambda: build(
        "(float[2,7,8] x) => (float[2,7,5] y, float[2,7,4] z) { n = LayerNormalization (x, g, b)  y = MatMul (n, v) "
        "z = MatMul (n, u) }",
        g=SPREAD,
        b=random(8) * SPREAD,
        v=random(8, 5) / SPREAD.reshape(8, 1),
        u=random(8, 4) / SPREAD.reshape(8, 1),
    ),
    "gain": lambda: build(
        "(float[2,7,8] x) => (float[2,7,5] y) { e = Tanh (x)  n = Mul (g, e)  m = Add (n, b)  y = MatMul (m, v) }",
        g=SPREAD,
        b=random(8) * SPREAD,
        v=random(8, 5) / SPREAD.reshape(8, 1),
    ),
    "product and bias": lambda: build(
        "(float[2,7,16] x) => (float[2,7,5] y) { h = MatMul (x, w)  s = Add (b, h)  r = Relu (s)  y = MatMul (r, v) }",
        w=random(16, 8) * SPREAD,
        b=random(8) * SPREAD,
        v=random(8, 5) / SPREAD.reshape(8, 1),
    ),
    "constants on the left": lambda: build(
        "(float[16,5] x) => (float[3,5] y) { h = MatMul (w, x)  r = Relu (h)  y = MatMul (v, r) }",
        w=random(8, 16) * SPREAD.reshape(8, 1),
        v=random(3, 8) / SPREAD,
    ),
}


@pytest.mark.parametrize("name", SEAMS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_float_model_stays_the_same_and_the_quantized_one_gets_better(name: str, per_channel: bool) -> None:
    model = SEAMS[name]()
    result, remarks = equalized(model, per_channel=per_channel)
    assert told(remarks, "applied")
    fresh = inputs_of(model, 4, seed=2)
    assert compare(run_samples(model, fresh), run_samples(result, fresh)).sqnr_db > 120
    if name != "gain":  # its products read what is no layer's result
        before, after = (quantized(each, per_channel=per_channel)[0] for each in (model, result))
        assert sqnr(model, after) > sqnr(model, before) + 3


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-12, 12), min_size=8, max_size=8), st.booleans())
def test_any_magnitudes_leave_the_float_model_as_it_is(exponents: list[int], per_channel: bool) -> None:
    spread = np.exp2(np.array(exponents, np.float32))
    model = build(
        "(float[4,6] x) => (float[4,3] y) { h = Gemm (x, w, b)  r = Relu (h)  y = Gemm (r, v) }",
        w=random(6, 8) * spread,
        b=random(8) * spread,
        v=random(8, 3),
    )
    result, _ = equalized(model, per_channel=per_channel)
    fresh = inputs_of(model, 4, seed=2)
    # powers of 2 round nothing; only the order of sums may differ
    assert compare(run_samples(model, fresh), run_samples(result, fresh)).sqnr_db > 120
    for old, new in zip(model.graph.initializers.values(), result.graph.initializers.values(), strict=True):
        ratio = new.const_value.numpy() / old.const_value.numpy()  # type: ignore[union-attr]
        assert (np.log2(ratio) % 1 == 0).all()


REFUSED = {
    "output": ("y = Gemm (x, w)", "'y' is an output of the model"),
    "other reader": ("h = Gemm (x, w)  y = Add (h, x)", "Add 'Add_0' reads 'h'"),
    "shared weight": ("h = Gemm (x, w)  y = Gemm (h, w)", "its weights 'w' have other readers"),
    "no homogeneous operator": ("h = Gemm (x, w)  t = Tanh (h)  y = Gemm (t, v)", "Tanh 'Tanh_0' reads 'h'"),
    "clamp": ("h = Gemm (x, w)  t = Clip (h, lo, hi)  y = Gemm (t, v)", "Clip 'Clip_0' reads 'h'"),
    "other axis": (
        "h = Gemm (x, w)  y = Gemm <transA=1> (h, v)",
        "Gemm 'Gemm_1' reads 'h': it reads them along another axis",
    ),
    "computed weight": (
        "h = Gemm (x, w)  y = Gemm (h, x)",
        "Gemm 'Gemm_1' reads 'h': its weights are not constant",
    ),
    "shared bias": (
        "h = Gemm (x, w, b)  g = Gemm (h, v, b)  y = Relu (g)",
        "its bias is not constant, is shared, or has another shape",
    ),
    "body": (
        "h = Gemm (x, w)  y = If (yes) <then_branch = one () => (float[4,4] t) { t = Relu (h) }, "
        "else_branch = two () => (float[4,4] e) { e = Identity (h) }>",
        "the body of a control-flow node reads 'h'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_says_why(name: str) -> None:
    nodes, reason = REFUSED[name]
    constants = {
        "w": random(4, 4),
        "v": random(4, 4, seed=3),
        "b": random(4),
        "lo": np.float32(0),
        "hi": np.float32(6),
        "yes": np.array(True),
    }
    constants = {key: array for key, array in constants.items() if re.search(rf"\b{key}\b", nodes)}
    model = build(f"(float[4,4] x) => (float[4,4] y) {{ {nodes} }}", **constants)
    result, remarks = equalized(model)
    assert told(remarks, "missed")["Gemm_0"] == f"its channels keep their scales: {reason}"
    assert not told(remarks, "applied")
    for name_, array in constants.items():
        np.testing.assert_array_equal(result.graph.initializers[name_].const_value.numpy(), array)  # type: ignore[union-attr]


def test_even_channels_keep_their_scales_with_a_reason() -> None:
    model = build(
        "(float[4,6] x) => (float[4,3] y) { h = Gemm (x, w)  r = Relu (h)  y = Gemm (r, v) }",
        w=random(6, 8),
        v=random(8, 3),
    )
    _, remarks = equalized(model, smallest_gain=6.0)
    assert told(remarks, "missed")["Gemm_0"].startswith("its channels keep their scales: the best others gain ")


def test_a_clamped_channel_keeps_its_scale() -> None:
    model = build(
        "(float[4,6] x) => (float[4,3] y) { h = Gemm (x, w)  r = Clip (h, lo, hi)  y = Gemm (r, v) }",
        w=random(6, 8) * SPREAD,
        v=random(8, 3) / SPREAD.reshape(8, 1),
        lo=np.float32(0),
        hi=np.float32(6),
    )
    result, remarks = equalized(model, clamps=True)
    assert told(remarks, "applied")
    # no channel that the samples saw below the bound is scaled up to it
    assert compare(run_samples(model, inputs_of(model)), run_samples(result, inputs_of(model))).sqnr_db > 120
    before, after = (each.graph.initializers["w"].const_value.numpy() for each in (model, result))  # type: ignore[union-attr]
    np.testing.assert_array_equal(after[:, -1], before[:, -1])


def test_calibration_that_says_nothing_is_refused() -> None:
    model = SEAMS["product and bias"]()
    with pytest.raises(InputError, match="equalization needs calibration data and none was given"):
        EqualizeChannels().run(model.clone(), Context())
    with pytest.raises(InputError, match="the data given holds no samples"):
        EqualizeChannels().run(model.clone(), Context(calibration=Samples([])))
    with pytest.raises(InputError, match="NaN"):
        equalized(model, [{"x": np.full((2, 7, 16), np.nan, np.float32)}])
    with pytest.raises(InputError, match="the model does not run on the given inputs") as refusal:
        equalized(model, [{"x": np.ones((2, 7, 5), np.float32)}])
    assert refusal.value.where == "node 'MatMul_0' on calibration data"
    _, remarks = equalized(model, inputs_of(model, 1))
    assert told(remarks, "missed")["calibration"].startswith("one sample only")


def test_no_sample_that_reaches_the_seam() -> None:
    model = build(
        "(float[N,6] x) => (float[N,3] y) { h = MatMul (x, w)  r = Relu (h)  y = MatMul (r, v) }",
        header=HEADER,
        w=random(6, 8),
        v=random(8, 3),
    )
    _, remarks = equalized(model, [{"x": np.zeros((0, 6), np.float32)}] * 2)
    assert told(remarks, "missed")["MatMul_0"] == "its channels keep their scales: no calibration sample reaches it"


def test_products_only_leaves_convolutions_alone() -> None:
    _, remarks = equalized(SEAMS["relu"](), products_only=True)
    assert told(remarks, "missed")["Conv_0"] == "its channels keep their scales: a convolution reads them"
    assert not told(remarks, "applied")
    _, remarks = equalized(SEAMS["flattened"](), products_only=True)
    assert "Conv_0" in told(remarks, "applied")
