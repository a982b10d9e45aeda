"""Operators on integers in the place of quantize / dequantize pairs: they run, and equal onnxruntime's own fusion."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.dataset.samples import Samples
from optkit.pipeline import Context, Pipeline
from optkit.plugins import pass_class
from optkit.session import Session, run_samples
from optkit.target import load_target
from optkit_passes.quantization.fuse_integer_operators import FuseIntegerOperators
from pass_runs import messages, op_types
from quantizing import LAYERS, TOKENS, build, inputs_of, quantized, random, residual, transformer_block

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
Params = tuple[float, int]


def between(
    op: str,
    *shapes: list[int],
    dtype: str = "uint8",
    result: str = "",
    scales: tuple[Params, ...] = ((0.02, 3), (0.03, 7), (0.05, 5)),
    **constants: np.ndarray,
) -> ir.Model:
    """Return a model with ``op`` between dequantized inputs a, b, ... and a quantized result r."""
    names = "abcd"[: len(shapes)]
    inputs = ", ".join(f"{dtype}{shape} q{name}" for name, shape in zip(names, shapes, strict=True))
    text = f"({inputs}) => ({result or dtype}[n] y) {{ "
    for name, (scale, zero) in zip([*names, "r"], [*scales[: len(names)], scales[-1]], strict=True):
        kind = (result if name == "r" else "") or dtype
        constants |= {f"s{name}": np.array(scale, np.float32), f"z{name}": np.array(zero, kind)}
    text += " ".join(f"{name} = DequantizeLinear (q{name}, s{name}, z{name})" for name in names)
    rank = {"Gemm": 2, "MatMul": 2}.get(op.split()[2], len(shapes[0]))
    text = text.replace("[n]", "[" + ", ".join("mnop"[:rank]) + "]")
    return build(f"{text} {op} y = QuantizeLinear (r, sr, zr) }}", HEADER, **constants)


def fused(model: ir.Model) -> tuple[ir.Model, Context]:
    result, context = model.clone(), Context(pass_name="fuse-integer-operators")
    FuseIntegerOperators().run(result, context)
    onnx.checker.check_model(ir.to_proto(result))
    return result, context


def integers(model: ir.Model, count: int = 3) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        sample = {}
        for value in model.graph.inputs:
            assert value.dtype is not None
            kind = value.dtype.numpy()
            limits = np.iinfo(kind)
            shape = [dim if isinstance(dim, int) else 3 for dim in value.shape or ()]
            sample[value.name or ""] = generator.integers(limits.min, limits.max + 1, shape).astype(kind)
        samples.append(sample)
    return samples


def agree(model: ir.Model, other: ir.Model, samples: list[dict[str, np.ndarray]], *, steps: int = 0) -> None:
    """Assert that what onnxruntime makes of the QDQ form equals the other model, optimized or not."""
    want = run_samples(model, samples, optimize=True)
    for optimize in (False, True):
        for a, b in zip(want, run_samples(other, samples, optimize=optimize), strict=True):
            for name in a:
                assert a[name].dtype == b[name].dtype
                difference = np.abs(a[name].astype(float) - b[name].astype(float))
                assert difference.max(initial=0) <= steps


SAME = ((0.02, 3), (0.02, 3), (0.02, 3))
W = {"w": random(8, 3, 3, 3)}
POOLED = [1, 4, 9, 9]
OPERATORS: dict[str, tuple[str, list[list[int]], dict[str, Any], str]] = {
    "add": ("r = Add (a, b)", [[2, 3, 4, 4], [2, 3, 4, 4]], {}, "QLinearAdd"),
    "add that broadcasts": ("r = Add (a, b)", [[2, 3, 4, 4], [1, 3, 1, 1]], {}, "QLinearAdd"),
    "mul": ("r = Mul (a, b)", [[2, 3, 4], [2, 3, 4]], {}, "QLinearMul"),
    "matmul": ("r = MatMul (a, b)", [[4, 8], [8, 5]], {}, "QLinearMatMul"),
    "gemm": ("r = Gemm <transB=1> (a, b)", [[4, 8], [5, 8]], {}, "QGemm"),
    "average pool": (
        "r = AveragePool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (a)", [POOLED], {}, "QLinearAveragePool"
    ),
    "average pool, pads counted": (
        "r = AveragePool <kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1> (a)",
        [POOLED],
        {},
        "QLinearAveragePool",
    ),
    "global average pool": ("r = GlobalAveragePool (a)", [POOLED], {}, "QLinearGlobalAveragePool"),
    "leaky relu": ("r = LeakyRelu <alpha=0.3> (a)", [[3, 5]], {}, "QLinearLeakyRelu"),
    "sigmoid": ("r = Sigmoid (a)", [[3, 5]], {}, "QLinearSigmoid"),
    "softmax": ("r = Softmax <axis=1> (a)", [[3, 5, 4]], {}, "QLinearSoftmax"),
    "softmax, last axis": ("r = Softmax (a)", [[3, 5, 4]], {}, "QLinearSoftmax"),
    "concat": ("r = Concat <axis=1> (a, b)", [[2, 3], [2, 4]], {}, "QLinearConcat"),
    "concat, one scale": ("r = Concat <axis=1> (a, b)", [[2, 3], [2, 4]], {"scales": SAME}, "Concat"),
    "max pool": (
        "r = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (a)", [POOLED], {"scales": SAME}, "MaxPool"
    ),
    "reshape": ("r = Reshape (a, c)", [[4, 6]], {"scales": SAME, "c": np.array([3, 8])}, "Reshape"),
    "transpose": ("r = Transpose (a)", [[4, 6]], {"scales": SAME}, "Transpose"),
    "flatten": ("r = Flatten (a)", [[2, 3, 4]], {"scales": SAME}, "Flatten"),
    "squeeze": ("r = Squeeze (a, c)", [[2, 1, 4]], {"scales": SAME, "c": np.array([1])}, "Squeeze"),
    "unsqueeze": ("r = Unsqueeze (a, c)", [[2, 4]], {"scales": SAME, "c": np.array([1])}, "Unsqueeze"),
    "gather": ("r = Gather <axis=1> (a, c)", [[2, 4]], {"scales": SAME, "c": np.array([3, 0])}, "Gather"),
    "slice": (
        "r = Slice (a, c, d)", [[6, 4]], {"scales": SAME, "c": np.array([1, 0]), "d": np.array([5, 3])}, "Slice"
    ),
    "expand": ("r = Expand (a, c)", [[1, 4]], {"scales": SAME, "c": np.array([3, 4])}, "Expand"),
    "tile": ("r = Tile (a, c)", [[2, 4]], {"scales": SAME, "c": np.array([2, 1])}, "Tile"),
    "depth to space": ("r = DepthToSpace <blocksize=2> (a)", [[1, 8, 3, 3]], {"scales": SAME}, "DepthToSpace"),
    "space to depth": ("r = SpaceToDepth <blocksize=2> (a)", [[1, 2, 4, 4]], {"scales": SAME}, "SpaceToDepth"),
    "resize": (
        "r = Resize (a, , c)", [[1, 2, 3, 3]], {"scales": SAME, "c": np.array([1, 1, 2, 2], np.float32)}, "Resize"
    ),
    "pad": ("r = Pad (a, c)", [[3, 4]], {"scales": SAME, "c": np.array([1, 0, 0, 2])}, "Pad"),
    "pad by its edge": ('r = Pad <mode="edge"> (a, c)', [[3, 4]], {"scales": SAME, "c": np.array([1, 0, 0, 2])}, "Pad"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_runs_on_integers_and_equals_the_fusion_of_onnxruntime(name: str, dtype: str) -> None:
    op, shapes, options, goal = OPERATORS[name]
    model = between(op, *shapes, dtype=dtype, **options)
    result, context = fused(model)
    assert op_types(result) == {goal: 1}
    assert [r.kind for r in context.remarks] == ["applied"]
    agree(model, result, integers(model), steps=1 if name.startswith("matmul") and dtype == "int8" else 0)


def test_split_is_fused_where_all_its_results_are_quantized() -> None:
    text = (
        "(uint8[4,6] q) => (uint8[4,m] y, uint8[4,n] x) { a = DequantizeLinear (q, s, z)  "
        "f, g = Split <axis=1, num_outputs=2> (a)  y = QuantizeLinear (f, s, z)  x = QuantizeLinear (g, s, z) }"
    )
    model = build(text, HEADER, s=np.array(0.1, np.float32), z=np.array(9, np.uint8))
    result, _ = fused(model)
    assert op_types(result) == {"Split": 1}
    agree(model, result, integers(model))


# what quantize-static writes


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("target", [None, "cortex-a53"])
def test_every_layer_of_quantize_static_is_fused(name: str, target: str | None) -> None:
    reference, device = LAYERS[name](), target and load_target(target)
    model, _ = quantized(reference, target=device or None)
    result, context = fused(model)
    assert [r.kind for r in context.remarks] == ["applied"]
    samples = inputs_of(model, 4)
    if device is None:
        scale = max(float(np.abs(v).max()) for v in run_samples(model, samples)[0].values())
        for a, b in zip(
            run_samples(model, samples, optimize=True), run_samples(result, samples, optimize=False), strict=True
        ):
            for key in a:
                assert np.abs(a[key] - b[key]).max() <= 1e-6 * scale
    else:
        Session(result)  # x86 fuses no signed activations; their kernels run


@pytest.mark.parametrize("model", [residual, transformer_block])
def test_whole_networks_equal_the_fusion_of_onnxruntime(model: Any) -> None:
    qdq, _ = quantized(model())
    result, context = fused(qdq)
    left = op_types(result)
    assert left["Conv"] == left["Gemm"] == left["MatMul"] == 0
    samples = inputs_of(qdq, 4)
    for a, b in zip(run_samples(qdq, samples, optimize=True), run_samples(result, samples, optimize=True), strict=True):
        for key in a:
            assert np.abs(a[key] - b[key]).max() <= 1e-5 * np.abs(a[key]).max()
    assert not [r for r in context.remarks if r.kind == "missed"]


def test_pipeline_accepts_it_and_a_second_run_changes_nothing() -> None:
    model, _ = quantized(residual())
    samples = inputs_of(model, 2)
    context = Context(calibration=Samples(samples))
    passes = [FuseIntegerOperators(), FuseIntegerOperators()]
    result = Pipeline(passes, strict=True).run(model, context, samples)
    assert [bool(step.applied) for step in result.steps] == [True, False]
    assert not result.unverified


def test_embedding_tied_to_the_output_layer_is_fused() -> None:
    model = build(
        "(int64[1,9] ids) => (float[9,50] y) { e = Gather (table, ids)  h = Reshape (e, flat)  "
        "y = Gemm <transB=1> (h, table) }",
        table=random(50, 16),
        flat=np.array([9, 16]),
    )
    qdq, _ = quantized(model, TOKENS)
    result, _ = fused(qdq)
    assert op_types(result)["QGemm"] == 1
    assert run_samples(result, TOKENS[:2])[0]["y"].shape == (9, 50)


# refusals


def refusal(model: ir.Model) -> list[str]:
    return messages(model, FuseIntegerOperators())


REFUSED: dict[str, tuple[ir.Model, str]] = {
    "16 bits": (
        between("r = Add (a, b)", [2, 3], [2, 3], dtype="uint16"),
        "'qa' is uint16: only 8-bit integers have such operators",
    ),
    "different scales": (
        between("r = Transpose (a)", [2, 3]),
        "its input and its result have different scales",
    ),
    "different types": (
        between("r = Add (a, b)", [2, 3], [2, 3], result="int8"),
        "its input and its result have different integer types",
    ),
    "interpolation": (
        between('r = Resize <mode="linear"> (a, , c)', [1, 2, 3, 3], scales=SAME,
                c=np.array([1, 1, 2, 2], np.float32)),
        "it interpolates, and would cut what is between two integers",
    ),
    "gaps": (
        between("r = AveragePool <kernel_shape=[2,2], dilations=[2,2]> (a)", [1, 4, 9, 9]),
        "its window has gaps",
    ),
    "no such operator": (between("r = Exp (a)", [2, 3]), "no operator computes it on integers"),
    "scaled bias": (
        build(
            "(uint8[4,8] q, float[5] c) => (uint8[m,n] y) { a = DequantizeLinear (q, s, z)  "
            "b = DequantizeLinear (w, s)  r = Gemm <transB=1, beta=2.0> (a, b, c)  y = QuantizeLinear (r, s, z) }",
            HEADER, s=np.array(0.1, np.float32), z=np.array(9, np.uint8), w=np.ones((5, 8), np.int8)),
        "beta is 2, not 1",
    ),
    "float bias": (
        build(
            "(uint8[4,8] q, float[5] c) => (uint8[m,n] y) { a = DequantizeLinear (q, s, z)  "
            "b = DequantizeLinear (w, s)  r = Gemm <transB=1> (a, b, c)  y = QuantizeLinear (r, s, z) }",
            HEADER, s=np.array(0.1, np.float32), z=np.array(9, np.uint8), w=np.ones((5, 8), np.int8)),
        "its bias 'c' is not int32 at the scale of the accumulator",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_why(name: str) -> None:
    model, reason = REFUSED[name]
    assert refusal(model) == [reason]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight_bits": 4}, "'w_quantized' is int4: only 8-bit integers have such operators"),
        ({"activation_bits": 16}, "'x_QuantizeLinear_Output' is uint16: only 8-bit integers have such operators"),
        ({"block_size": 4}, "'w_quantized' has one scale per block"),
    ],
)
def test_other_forms_of_quantize_static_are_refused(options: dict[str, int], reason: str) -> None:
    model = LAYERS["gemm"]()
    pass_class("raise-opset").model_validate({"opset": 21}).run(model, Context())
    assert refusal(quantized(model, **options)[0]) == [reason]


def test_old_opset_is_refused() -> None:
    text = "{ a = DequantizeLinear (q, s, z)  r = Add (a, a)  y = QuantizeLinear (r, s, z) }"
    header = '<ir_version: 6, opset_import: ["" : 11]>'
    model = build(
        f"(uint8[4,8] q) => (uint8[m,n] y) {text}", header, s=np.array(0.1, np.float32), z=np.array(9, np.uint8)
    )
    assert refusal(model) == ["opset 11: operators on 8-bit integers need opset 13"]
