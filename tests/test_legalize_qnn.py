"""What the compiler and emulator of HTP do with each form that a pass rewrites, before and after it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.dataset.samples import random_samples
from optkit.evaluate.fidelity import compare
from optkit.model.loading import load_text, save
from optkit.pipeline import Context, Pipeline
from optkit.recipe import build_passes
from optkit.session import CannotRunError, Session
from optkit.target import load_target
from optkit_targets.qnn import runtime
from pass_runs import create, op_types
from transformer_models import decoder_step, encoder

TARGET = load_target("snapdragon-8gen3-npu")

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason="onnxruntime-qnn is not installed")


@pytest.fixture(scope="module")
def child() -> Iterator[runtime.Child]:
    with tempfile.TemporaryDirectory() as folder, runtime.Child(Path(folder)) as started:
        yield started


class Npu:
    """Asks one child process, which all tests share: starting it takes longer than any of them."""

    def __init__(self, child: runtime.Child, folder: Path) -> None:
        self._child, self._folder = child, folder

    def on_cpu(self, model: ir.Model) -> list[str]:
        """Return the operators that fall back."""
        save(model, self._folder / runtime.MODEL)
        found = self._child.ask("assign", folder=str(self._folder), provider=runtime.provider_options(TARGET))
        types = {node.name: node.op_type for node in model.graph}
        return sorted(types.get(name, name) for name, provider in found.items() if provider != runtime.NPU)

    def run(self, model: ir.Model, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        path = self._folder / "run.onnx"
        save(model, path)
        provider = runtime.provider_options(TARGET)
        names = self._child.ask("load", model=str(path), provider=provider, fallback=False)
        return dict(zip(names, self._child.ask("run", samples=[dict(sample)])[0], strict=True))


@pytest.fixture
def npu(child: runtime.Child, tmp_path: Path) -> Npu:
    return Npu(child, tmp_path)


def signal_to_noise(model: ir.Model, got: Mapping[str, np.ndarray], sample: Mapping[str, np.ndarray]) -> float:
    """Return the smallest SQNR of any output in dB, infinite where all are equal; NaN counts as wrong."""
    want = Session(model).run(sample)
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in got.values()):
        return -np.inf
    return min(
        np.inf if np.array_equal(array, got[name]) else float(compare([{"y": array}], [{"y": got[name]}]).sqnr_db)
        for name, array in want.items()
    )


def text(body: str, opset: int = 17) -> str:
    return f'<ir_version: {10 if opset > 20 else 8}, opset_import: ["" : {opset}]>\nmain {body}'


IMAGE = "(float[1,2,6,6] x) => (float[1,2,{0},{0}] y)"
SCALES = "<float[4] s = {1.0, 1.0, 1.5, 1.5}>"
WRONG = {
    "raise-opset: Clip 6": text("(float[1,64] x) => (float[1,64] y) { y = Clip <min = 0.0, max = 0.5> (x) }", 7),
    "lower-pads: edge": text(
        IMAGE.format(8) + ' <int64[8] p = {0,0,1,1,0,0,1,1}> { y = Pad <mode = "edge"> (x, p) }', 19
    ),
    "lower-pools: ceil_mode": text(
        "(float[1,2,10,10] x) => (float[1,2,5,5] y) "
        "{ y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x) }"
    ),
    "lower-resizes: half_pixel": text(IMAGE.format(9) + f' {SCALES} {{ y = Resize <mode = "nearest"> (x, , s) }}'),
    "lower-casts: truncation": text(
        "(float[1,64] x) => (float[1,64] y) { a = Cast <to = 6> (x) y = Cast <to = 1> (a) }"
    ),
    "wrap-indices: GatherElements": text(
        "(float[1,8] x, int64[1,3] i) => (float[1,3] y) { y = GatherElements <axis = 1> (x, i) }"
    ),
    "wrap-indices: ScatterND": text(
        "(float[4,8] x, int64[2,1] i, float[2,8] u) => (float[4,8] y) { y = ScatterND (x, i, u) }"
    ),
    "wrap-indices: ScatterElements": text(
        "(float[1,8] x, int64[1,3] i, float[1,3] u) => (float[1,8] y) { y = ScatterElements <axis = 1> (x, i, u) }"
    ),
    "wrap-indices: OneHot": text(
        "(int64[1,3] i) => (float[1,3,5] y) <int64 d = {5}, float[2] v = {0.0, 1.0}> { y = OneHot (i, d, v) }"
    ),
    "order-operands: HardSigmoid": text(
        "(float[1,64] x) => (float[1,64] y) { a = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) y = Mul (x, a) }", 14
    ),
}
REFUSED = {
    "lower-pads: wrap": text(
        IMAGE.format(8) + ' <int64[8] p = {0,0,1,1,0,0,1,1}> { y = Pad <mode = "wrap"> (x, p) }', 19
    ),
    "lower-pads: axes": text(
        IMAGE.format(8) + " <int64[4] p = {1,1,1,1}, int64[2] a = {2,3}> { y = Pad (x, p, , a) }", 18
    ),
    "lower-pools: three axes": text(
        "(float[1,2,6,6,6] x) => (float[1,2,3,3,3] y) "
        "{ y = MaxPool <kernel_shape = [2, 2, 2], strides = [2, 2, 2]> (x) }"
    ),
    "lower-resizes: ceil": text(
        IMAGE.format(9)
        + f' {SCALES} {{ y = Resize <mode = "nearest", nearest_mode = "ceil",'
        + ' coordinate_transformation_mode = "asymmetric"> (x, , s) }'
    ),
    "narrow-int64: output": text("(float[1,8] x) => (int64[1,8] y) { a = Floor (x) y = Cast <to = 7> (a) }"),
    "narrow-int64: transpose": text("(int64[2,3] x) => (int64[3,2] y) { y = Transpose (x) }"),
    "lower-einsum: layout": text(
        "(float[1,3,2,4] q, float[1,5,2,4] k) => (float[1,2,3,5] y) "
        '{ y = Einsum <equation = "bqhd,bkhd->bhqk"> (q, k) }'
    ),
    "reduce-rank: windows": text(
        "(float[2,4,6,8] x) => (float[8,2,12,2] y) <int64[6] s = {2, 2, 2, 6, 4, 2}, int64[4] t = {8, 2, 12, 2}> "
        "{ a = Reshape (x, s) b = Transpose <perm = [0, 2, 1, 3, 4, 5]> (a) y = Reshape (b, t) }"
    ),
    "lower-operators: Softsign": text("(float[1,8] x) => (float[1,8] y) { y = Softsign (x) }"),
    "lower-operators: Celu": text("(float[1,8] x) => (float[1,8] y) { y = Celu <alpha = 0.5> (x) }"),
    "lower-operators: ReduceL1": text("(float[2,8] x) => (float[2,1] y) { y = ReduceL1 <axes = [1]> (x) }"),
    "lower-operators: ReduceSumSquare": text(
        "(float[2,8] x) => (float[2,1] y) { y = ReduceSumSquare <axes = [1]> (x) }"
    ),
    "lower-operators: Pow": text("(float[2,8] x) => (float[2,8] y) <int64 n = {2}> { y = Pow (x, n) }"),
    "lower-operators: Neg": text("(int64[2,8] x) => (int64[2,8] y) { y = Neg (x) }"),
    "lower-operators: Sign": text("(int64[2,8] x) => (int64[2,8] y) { y = Sign (x) }"),
    "lower-operators: Clip": text("(float[2,8] x, float low) => (float[2,8] y) { y = Clip (x, low) }"),
    "lower-operators: Gemm": text(
        "(float[2,3] x) => (float[2,2] y) <float[3,2] w = {1,2,3,4,5,6}, float[2] b = {1,2}> "
        "{ y = Gemm <alpha = 0.5> (x, w, b) }"
    ),
    "lower-operators: LayerNormalization": text(
        "(float[2,2,3] x) => (float[2,2,3] y) <float[2,3] s = {1,2,3,4,5,6}> "
        "{ y = LayerNormalization <axis = 1> (x, s) }"
    ),
    "lower-operators: InstanceNormalization": text(
        "(float[1,2,2,2,3] x) => (float[1,2,2,2,3] y) <float[2] s = {1,2}, float[2] b = {1,2}> "
        "{ y = InstanceNormalization (x, s, b) }"
    ),
    "lower-operators: Trilu": text("(float[1,3,4] x) => (float[1,3,4] y) { y = Trilu (x) }"),
}
FATAL = {
    "lower-convolutions: strides and dilations": text(
        "(float[1,2,9] x) => (float[1,2,4] y) <float[2,1,2] w = {1,2,3,4}> "
        "{ y = Conv <group = 2, strides = [2], dilations = [2]> (x, w) }"
    ),
    "order-operands: scale of an RMS norm": text(
        "(float[1,1,4] x) => (float[1,1,4] y) <float[4] g = {1,2,3,4}, float e = {0.001}, float two = {2.0}> "
        "{ a = Pow (x, two) b = ReduceMean <axes = [-1]> (a) c = Add (b, e) d = Sqrt (c) "
        "f = Reciprocal (d) h = Mul (x, f) y = Mul (g, h) }"
    ),
}


def rewrite(case: str, model: ir.Model) -> dict[str, np.ndarray]:
    """Run the pass that a case names, and what collects its reshapes; return a sample."""
    sample = dict(random_samples(model, 1)[0])
    if "i" in sample:
        sample["i"].ravel()[:] = -1 - 2 * np.arange(sample["i"].size)
        sample["i"].ravel()[1] = 0
    passes = [create(case.partition(":")[0]), create("collapse-reshapes"), create("eliminate-dead-code")]
    Pipeline(passes, strict=True).run(model, Context(target=TARGET), [sample])
    return sample


@pytest.mark.parametrize("case", WRONG)
def test_forms_that_htp_computes_wrong_are_right_after_the_pass(case: str, npu: Npu) -> None:
    model, original = load_text(WRONG[case]), load_text(WRONG[case])
    sample = rewrite(case, model)
    assert npu.on_cpu(original) == []
    assert signal_to_noise(original, npu.run(original, sample), sample) < 20
    assert npu.on_cpu(model) == []
    assert signal_to_noise(original, npu.run(model, sample), sample) > 50


@pytest.mark.parametrize("case", REFUSED)
def test_forms_that_htp_refuses_are_taken_after_the_pass(case: str, npu: Npu) -> None:
    model, original = load_text(REFUSED[case]), load_text(REFUSED[case])
    sample = rewrite(case, model)
    assert npu.on_cpu(original) != []
    assert npu.on_cpu(model) == []
    assert signal_to_noise(original, npu.run(model, sample), sample) > 50


@pytest.mark.parametrize("case", FATAL)
def test_forms_that_end_the_compilation_compile_after_the_pass(case: str, npu: Npu) -> None:
    model, original = load_text(FATAL[case]), load_text(FATAL[case])
    sample = rewrite(case, model)
    with pytest.raises(CannotRunError, match=r"was not selected by that|MEM_ALLOC"):
        npu.on_cpu(original)
    assert npu.on_cpu(model) == []
    assert signal_to_noise(original, npu.run(model, sample), sample) > 50


@pytest.mark.parametrize(("model", "fused"), [(decoder_step(), "RMSNormalization"), (encoder(), "LayerNormalization")])
def test_a_transformer_is_wholly_on_the_npu(model: ir.Model, fused: str, npu: Npu) -> None:
    original = model.clone()
    sample = dict(random_samples(model, 1)[0])
    sample["attention_mask"] = (np.arange(sample["attention_mask"].size)[None] > 1).astype(np.int64)
    Pipeline(build_passes(TARGET.cleanup), strict=True).run(model, Context(target=TARGET), [sample])
    assert op_types(model)[fused] == 5
    assert npu.on_cpu(model) == []
    assert signal_to_noise(original, npu.run(model, sample), sample) > 35
