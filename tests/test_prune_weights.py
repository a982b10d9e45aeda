"""Pruned weights: which become zero, what the others become, what is left alone and why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from optkit.dataset.samples import Samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import compare
from optkit.graph import constant
from optkit.pipeline import Context, Pipeline
from optkit.quant.palette import palette_of
from optkit.quant.sparsity import keep_largest, keep_pattern, refit_kept
from optkit.recipe import PRECISION_KEY
from optkit.session import run_samples
from optkit_passes.pruning.prune_weights import PruneWeights
from optkit_passes.quantization.palettize_weights import PalettizeWeights
from quantizing import LAYERS, build, inputs_of, random

CHAIN = "(float[8,32] x) => (float[8,32] y) { a = MatMul (x, u) b = Relu (a) c = MatMul (b, v) y = MatMul (c, w) }"
MATRICES = {name: random(32, 32, seed=number) for number, name in enumerate("uvw")}
FINITE = st.floats(-100, 100, width=32)


def pruned(
    model: ir.Model, samples: list[dict[str, np.ndarray]] | None = None, **options: object
) -> tuple[ir.Model, list[str], list[str]]:
    """Return the result, what was applied and what was missed."""
    result = model.clone()
    context = Context(calibration=None if samples is None else Samples(samples))
    pass_ = PruneWeights.model_validate({"min_elements": 0, "ends": True, **options})
    assert not Pipeline([pass_], strict=True).run(result, context, inputs_of(model, 2)).unverified
    kinds = [[r.message for r in context.remarks if r.kind == kind] for kind in ("applied", "missed")]
    return result, kinds[0], kinds[1]


def weight(model: ir.Model, name: str = "w") -> np.ndarray:
    found = constant(model.graph.initializers[name])
    assert found is not None
    return found


def share(array: np.ndarray) -> float:
    return 1 - np.count_nonzero(array) / array.size


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=FINITE), st.floats(0, 1))
def test_exactly_the_share_asked_for_is_left_out(saliency: np.ndarray, sparsity: float) -> None:
    keep = keep_largest(saliency, sparsity)
    assert (~keep).sum() == int(sparsity * saliency.size + 1e-9)
    assert saliency[keep].min(initial=np.inf) >= saliency[~keep].max(initial=-np.inf)
    rows = keep_largest(saliency, sparsity, axis=0)
    assert set((~rows).sum(axis=1)) == {int(sparsity * saliency.shape[1] + 1e-9)}
    assert np.array_equal(keep_largest(saliency.T, sparsity, axis=1).T, rows)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 11), st.integers(1, 3)), elements=FINITE),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_a_pattern_keeps_the_largest_of_every_block(saliency: np.ndarray, kept: int, more: int) -> None:
    block = kept + more
    keep = keep_pattern(saliency, kept, block, axis=1)
    for first in range(0, saliency.shape[1], block):
        part, values = keep[:, first : first + block], saliency[:, first : first + block]
        assert (part.sum(axis=1) == min(kept, part.shape[1])).all()
        kept_least = np.where(part, values, np.inf).min(axis=1)
        assert (kept_least >= np.where(part, -np.inf, values).max(axis=1)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 12))
def test_kept_weights_are_the_least_squares(seed: int, rows: int, columns: int) -> None:
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((rows, columns)).astype(np.float32)
    x, y = generator.standard_normal((2, 40, columns))
    keep = generator.random((rows, columns)) < 0.6
    found = refit_kept(w, x.T @ y, y.T @ y, keep, damping=0.05)
    assert not found[~keep].any()
    ridge = 0.05 * np.diag(y.T @ y).mean()
    for row, mask, result in zip(w.astype(np.float64), keep, found, strict=True):
        system = (y.T @ y + ridge * np.eye(columns))[np.ix_(mask, mask)]
        exact = np.linalg.solve(system, (row @ (x.T @ y) + ridge * row)[mask])
        assert np.allclose(result[mask], exact, rtol=1e-3, atol=1e-3)


def test_impossible_requests_are_refused() -> None:
    ones = np.ones((2, 2), np.float32)
    with pytest.raises(InputError, match=r"a sparsity of 1.5 is not possible"):
        keep_largest(ones, 1.5)
    with pytest.raises(InputError, match="a pattern of 3:2 is not possible"):
        keep_pattern(ones, 3, 2, axis=0)
    with pytest.raises(InputError, match="not finite cannot be pruned"):
        keep_largest(ones * np.nan, 0.5)
    with pytest.raises(InputError, match=r"moments of \[3, 3\] do not suit a weight of \[2, 2\]"):
        refit_kept(ones, np.eye(3), np.eye(3), ones > 0)
    with pytest.raises(InputError, match="damping of 0 holds"):
        refit_kept(ones, np.eye(2), np.eye(2), ones > 0, damping=0)
    with pytest.raises(InputError, match="moments hold values that are not finite"):
        refit_kept(ones, np.eye(2), np.full((2, 2), np.inf), ones > 0)


def test_inputs_that_were_always_zero_change_nothing() -> None:
    keep = np.array([[True, False]])
    assert np.array_equal(refit_kept(np.array([[2.0, 3.0]]), np.zeros((2, 2)), np.zeros((2, 2)), keep), [[2, 0]])


@pytest.mark.parametrize("options", [{"pattern": "2:4", "sparsity": 0.5}, {"pattern": "4:2"}, {"pattern": "half"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="a pattern is"):
        PruneWeights.model_validate(options)


@pytest.mark.parametrize("name", [name for name in LAYERS if "activations" not in name])
@pytest.mark.parametrize(
    "options", [{"sparsity": 0.7}, {"pattern": "2:4"}, {"compared": "row", "saliency": "activation"}]
)
def test_every_layer_is_pruned(name: str, options: dict[str, object]) -> None:
    model = LAYERS[name]()
    result, applied, missed = pruned(model, inputs_of(model, 6), **options)
    if "pattern" in options and (few := min(weight(model).shape[1], 4)) < 4 and name.startswith(("conv", "depthwise")):
        assert (applied, missed) == ([], [f"{few} input channels a group are too few for 2:4"])
        return
    assert missed == []
    assert len(applied) == 1
    before, after = weight(model), weight(result)
    assert after.dtype == before.dtype
    assert 0.25 <= share(after) <= 0.75
    assert not np.array_equal(before, after)


def test_two_of_four_neighbours_along_the_summed_axis_stay() -> None:
    result, applied, _ = pruned(build(CHAIN, **MATRICES), pattern="2:4", refit=False)
    for name in "uvw":
        blocks = (weight(result, name) != 0).reshape(8, 4, 32)
        assert (blocks.sum(axis=1) == 2).all()
    assert applied == ["50 % of 1024 weights are 0, by magnitude"] * 3


def test_refitted_weights_lose_less_on_other_samples() -> None:
    model = build(CHAIN, **MATRICES)
    mixing = random(32, 32, seed=9) @ np.diag(np.geomspace(3, 0.05, 32).astype(np.float32))
    calibration, fresh = ([{"x": each["x"] @ mixing} for each in inputs_of(model, 24, seed=seed)] for seed in (1, 2))
    expected = run_samples(model, fresh)
    quality = []
    for options in ({"refit": False}, {}, {"saliency": "activation"}):
        result, applied, _ = pruned(model, calibration, **options)
        quality.append(compare(expected, run_samples(result, fresh)).sqnr_db)
        assert all(("others refitted" in message) == (options != {"refit": False}) for message in applied)
    assert min(quality[1:]) > quality[0] + 3


def test_the_first_and_the_last_layer_stay() -> None:
    result, applied, missed = pruned(build(CHAIN, **MATRICES), ends=False, refit=False)
    assert [share(weight(result, name)) for name in "uvw"] == [0, 0.5, 0]
    assert len(applied) == 1
    assert missed == [
        "the first layer, whose errors pass through all others (ends = false)",
        "the last layer, whose errors no other makes up for (ends = false)",
    ]


def test_what_is_sparse_already_stays() -> None:
    model = build("(float[2,8] x) => (float[2,8] y) { y = MatMul (x, w) }", w=np.eye(8, dtype=np.float32))
    _, applied, missed = pruned(model, refit=False)
    assert (applied, missed) == ([], ["87.5 % of its weights are 0 already"])


def test_layers_kept_in_float_and_shared_weights() -> None:
    text = "(float[2,32] x) => (float[2,32] y) { a = MatMul (x, u) b = MatMul (a, u) y = MatMul (b, v) }"
    model = build(text, u=MATRICES["u"], v=MATRICES["v"])
    model.graph[2].metadata_props[PRECISION_KEY] = "fp16"
    result, applied, missed = pruned(model, inputs_of(model, 4))
    assert missed == ["kept in float by a rule (fp16)"]
    assert "none refitted: 'u' has several readers" in applied[0]
    assert applied[1].startswith("shares 'u' with")
    assert share(weight(result, "u")) == 0.5


def test_calibration_is_asked_for_where_it_is_needed() -> None:
    model = build(CHAIN, **MATRICES)
    with pytest.raises(InputError, match="'activation' needs calibration data"):
        PruneWeights(saliency="activation").run(model, Context())
    with pytest.raises(InputError, match="the data given holds no samples"):
        PruneWeights().run(model, Context(calibration=Samples([])))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = random(32, 32)
    w[3, 4] = bad
    model = build("(float[2,32] x) => (float[2,32] y) { y = MatMul (x, w) }", w=w)
    with pytest.raises(InputError, match="not finite and cannot be pruned") as caught:
        PruneWeights(ends=True).run(model, Context())
    assert caught.value.where == "tensor 'w'"


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = build("(float[2,32] x) => (float[2,32] y) { y = MatMul (x, w) }", w=random(32, 32))
    samples = [{"x": np.full((2, 32), np.nan, np.float32)}]
    with pytest.raises(InputError, match="NaN"):
        PruneWeights(ends=True).run(model, Context(calibration=Samples(samples)))


@pytest.mark.parametrize(
    ("bits", "share_", "entries"), [(1, 0.3, 3), (2, 0.75, 5), (4, 0.5, 17), (4, 0.2, 16), (8, 0.5, 256)]
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_zeros_of_a_pruned_weight_stay_zeros_in_its_palette(
    bits: int, share_: float, entries: int, calibrated: bool
) -> None:
    w = random(64, 48)
    w[keep_largest(np.abs(w), share_) == 0] = 0
    model = build("(float[16,64] x) => (float[16,48] y) { y = MatMul (x, w) }", w=w)
    context = Context(calibration=Samples(inputs_of(model, 8)) if calibrated else None)
    PalettizeWeights(bits=bits, channels_per_lut=0 if bits == 8 else 16).run(model, context)
    (palette,) = [each for each in map(palette_of, model.graph.all_nodes()) if each is not None]
    assert palette.lut.shape[1] == entries
    assert not palette.weight[w == 0].any()
    if entries > 1 << bits or bits == 8:
        assert palette.sparse
        assert np.array_equal(palette.indices == 0, w == 0)
        assert "that are 0 stay so" in context.remarks[-1].message
