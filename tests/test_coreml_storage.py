"""What Core ML packages store: in which forms, in how many bytes, and that they compute what the network does."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("coremltools")

from optkit.dataset.samples import Samples
from optkit.evaluate.fidelity import compare
from optkit.pipeline import Context, Pipeline
from optkit.plugins import pass_class
from optkit.quant.sparsity import keep_largest
from optkit.session import run_samples
from optkit.target import load_target
from optkit_passes.quantization.palettize_weights import PalettizeWeights
from optkit_targets.coreml import interpreter, program
from optkit_targets.coreml.deployment import NEWEST, OLDEST
from optkit_targets.coreml.interpreter import Weight
from optkit_targets.coreml.packager import lowered
from quantizing import build, inputs_of, random

HALF = 2e-3  # relative: rounding to float16 on the way
TARGET = "apple-a17-ane"
NETWORK = """(int64[1,12] t) => (float[1,12,24] y) {
  e = Gather (table, t)  m = MatMul (e, u)  r = Relu (m)  s = MatMul (r, v)
  a = Transpose <perm: ints = [0, 2, 1]> (s)  c = Conv <kernel_shape: ints = [1]> (a, w)
  y = Transpose <perm: ints = [0, 2, 1]> (c)
}"""
WEIGHTS = {"table": random(100, 64), "u": random(64, 96), "v": random(96, 64), "w": random(24, 64, 1)}
SIZE = sum(array.size for array in WEIGHTS.values())


def network() -> ir.Model:
    return build(NETWORK, **WEIGHTS)


def samples_of(model: ir.Model, count: int = 8) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    if model.graph.inputs[0].name == "t":
        return [{"t": generator.integers(0, 100, (1, 12))} for _ in range(count)]
    return inputs_of(model, count)


def stored(model: ir.Model, tried: Sequence[int] = range(OLDEST, NEWEST + 1)) -> tuple[int, list[Weight], float, int]:
    """Return the deployment target, the weights, the largest relative error against onnxruntime, and the bytes."""
    samples = samples_of(model, 2)
    expected = run_samples(model, samples)
    deployment, made = lowered(model, tried, ())
    with tempfile.TemporaryDirectory() as folder:
        package = program.save(made, deployment, Path(folder) / "model.mlpackage", half=True)
        loaded = interpreter.load(package)
        found = [loaded.run(sample) for sample in samples]
        size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    errors = [np.abs(a["y"] - b["y"]).max() / np.abs(a["y"]).max() for a, b in zip(expected, found, strict=True)]
    return deployment, [each for each in loaded.weights() if each.elements > 100], max(errors), size


def at(precision: str, model: ir.Model) -> ir.Model:
    """Return a model at one of the target's precisions."""
    target = load_target(TARGET)
    passes = [pass_class(spec.pass_).model_validate(dict(spec.options)) for spec in target.recipe_for(precision)]
    Pipeline(passes).run(model, Context(target=target, calibration=Samples(samples_of(model))))
    return model


LUT, SCALED, BLOCKS, SPARSE = (
    f"constexpr_{name}" for name in ("lut_to_dense", "affine_dequantize", "blockwise_shift_scale", "sparse_to_dense")
)


@pytest.mark.parametrize(
    ("precision", "form", "bits", "deployment"),
    [
        ("w8a16-c", SCALED, 8, 16),
        ("w8a16-b32", BLOCKS, 8, 18),
        ("w4a16-c", BLOCKS, 4, 18),
        ("w4a16-b16", BLOCKS, 4, 18),
        *((f"w{bits}a16-lut", LUT, bits, 18 if bits == 3 else 16) for bits in (1, 2, 3, 4, 6)),
        *((f"w{bits}a16-lut-b16", LUT, bits, 18) for bits in (1, 2, 3, 4, 6)),
    ],
)
def test_every_precision_is_stored_in_its_own_form(precision: str, form: str, bits: int, deployment: int) -> None:
    model = at(precision, network())
    found, weights, error, size = stored(model)
    assert found == deployment
    assert error < HALF
    forms = {each.op_type: each for each in weights}
    assert form in forms
    narrow = [each for each in weights if each.op_type == form and each.bits == bits]
    tables = [each for each in weights if each.elements == WEIGHTS["table"].size]
    assert tables[0].op_type.startswith("constexpr_")
    elements, taken = sum(each.elements for each in narrow), sum(each.stored_bytes for each in narrow)
    assert elements >= SIZE - WEIGHTS["table"].size  # quantize-weights keeps tables in 8 bits
    overhead = elements / 8 * {"c": 0.4, "b32": 0.5, "b16": 1.0}.get(precision.split("-")[-1], 0)  # scales of 16 bits
    if "lut" in precision:
        assert elements == SIZE
        overhead = (18 if "b16" in precision else 4) * (2 << bits) + 64  # LUTs of 16 bits, and shapes
    assert elements * bits / 8 <= taken <= elements * bits / 8 + overhead
    assert size < 4 * SIZE


def test_activations_are_quantized_by_core_mls_own_operations() -> None:
    model = at("w8a8", build("(float[4,64] x) => (float[4,64] y) { m = MatMul (x, u) r = Relu (m) y = MatMul (r, v) }",
                             u=WEIGHTS["u"], v=WEIGHTS["v"]))  # fmt: skip
    deployment, made = lowered(model, range(OLDEST, NEWEST + 1), ())
    types = [operation.op_type for operation in made.functions["main"].operations]
    assert deployment == 17
    assert types.count("quantize") == types.count("dequantize") >= 2
    _, weights, error, _ = stored(model)
    assert [(each.op_type, each.bits) for each in weights if each.elements > 1000] == [(SCALED, 8)] * 2
    assert error < 0.02  # a value on the border of two steps may take the other one


def sparse_matrix(share: float, rows: int = 96, columns: int = 64) -> np.ndarray:
    array = random(rows, columns)
    return np.where(keep_largest(np.abs(array), share), array, np.float32(0))


PRODUCT = "(float[3,96] x) => (float[3,64] y) { y = MatMul (x, w) }"
CONVOLUTION = "(float[1,96,5] x) => (float[1,64,5] y) { y = Conv <kernel_shape: ints = [1]> (x, w) }"


@pytest.mark.parametrize("deployment", [16, 17, 18])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("convolution", [False, True])
def test_pruned_weights_are_stored_apart_where_that_is_smaller(
    deployment: int, share: float, convolution: bool
) -> None:
    w = sparse_matrix(share)
    model = build(CONVOLUTION, w=w.T[..., None]) if convolution else build(PRODUCT, w=w)
    _, weights, error, _ = stored(model, [deployment])
    (found,) = [each for each in weights if each.elements == w.size]
    assert error < HALF
    assert found.op_type == (SPARSE if share > 0.1 else "const")
    kept = np.count_nonzero(w)
    dense = 2 * w.size
    assert found.stored_bytes <= (w.size / 8 + 2 * kept + 16 if share > 0.1 else dense)


def test_a_pruned_model_needs_ios_16_unless_ios_15_is_asked_for() -> None:
    model = build(PRODUCT, w=sparse_matrix(0.5))
    assert stored(model)[0] == 16
    deployment, weights, error, _ = stored(model, [15])
    assert (deployment, weights[0].op_type) == (15, "const")
    assert error < HALF


def test_what_is_no_weight_is_stored_as_it_is() -> None:
    mask = np.triu(np.full((96, 96), -1000.0, np.float32))
    model = build("(float[96,96] x) => (float[96,96] y) { y = Add (x, m) }", m=mask)
    assert {each.op_type for each in stored(model)[1]} == {"const"}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("channels", [0, 16])
def test_pruned_palettes_have_a_mask_and_indices_of_the_others(bits: int, channels: int) -> None:
    w = sparse_matrix(0.75)
    model = build(PRODUCT, w=w)
    PalettizeWeights(bits=bits, channels_per_lut=channels).run(model, Context())
    deployment, weights, error, _ = stored(model)
    (found,) = [each for each in weights if each.elements == w.size]
    assert (deployment, found.op_type, found.bits) == (18, SPARSE, bits)
    assert error < HALF
    luts = 2 * (4 if channels else 1) << bits
    assert found.stored_bytes <= w.size / 8 + np.count_nonzero(w) * bits / 8 + luts + 16


@pytest.mark.parametrize(("bits", "wider"), [(2, 3), (3, 4), (4, 6)])
def test_before_ios_18_pruned_palettes_take_the_next_width(bits: int, wider: int) -> None:
    model = build(PRODUCT, w=sparse_matrix(0.75))
    PalettizeWeights(bits=bits).run(model, Context())
    _, weights, error, _ = stored(model, [17])
    assert (weights[0].op_type, weights[0].bits) == (LUT, 4 if wider == 3 else wider)
    assert error < HALF


def test_the_whole_chain_of_pruning_and_palettes() -> None:
    model = network()
    reference, samples = network(), samples_of(network())
    context = Context(calibration=Samples(samples))
    passes = [("prune-weights", {"sparsity": 0.6, "min_elements": 0}), ("palettize-weights", {"bits": 4})]
    Pipeline([pass_class(name).model_validate(options) for name, options in passes]).run(model, context, samples[:1])
    deployment, weights, error, _ = stored(model)
    assert deployment == 18
    assert error < HALF
    assert sorted(each.op_type for each in weights) == [LUT, LUT, SPARSE, SPARSE]
    assert compare(run_samples(reference, samples), run_samples(model, samples)).sqnr_db > 6
