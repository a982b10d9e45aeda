"""K-means in one dimension, and the LUTs that it gives weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optkit.errors import InputError
from optkit.quant.codebook import CELLS, codebook, levels, reconstruct
from optkit.quant.packing import pack, unpack

FLOATS = st.floats(-1e6, 1e6, width=32)
WEIGHTS = hnp.arrays(np.float32, st.integers(1, 120), elements=FLOATS)
BITS = st.integers(1, 8)


def cost(weight: np.ndarray, entries: np.ndarray, importance: np.ndarray | float = 1.0) -> float:
    """Return the squared error when each weight moves to the nearest entry."""
    distance = np.abs(weight.astype(np.float64).ravel()[:, None] - entries.astype(np.float64).ravel()).min(axis=1)
    return float((np.asarray(importance) * distance.reshape(weight.shape) ** 2).sum())


def rounding(weight: np.ndarray) -> float:
    """Return what storing levels in the weight's type may add to the squared error."""
    step = np.finfo(weight.dtype).eps * float(np.abs(weight).max(initial=0.0))
    return weight.size * step**2 * 4


def least_cost(values: np.ndarray, count: int, weights: np.ndarray) -> float:
    """Return the cost of the best of all partitions of the sorted values, tried one by one."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, values.size), count - 1):
        edges = [0, *cuts, values.size]
        total = 0.0
        for i, j in itertools.pairwise(edges):
            mean = np.average(values[i:j], weights=weights[i:j])
            total += float((weights[i:j] * (values[i:j] - mean) ** 2).sum())
        best = min(best, total)
    return best


@given(WEIGHTS, BITS)
def test_never_worse_than_an_even_grid(weight: np.ndarray, bits: int) -> None:
    lut, indices = codebook(weight, bits)
    even = np.linspace(weight.min(), weight.max(), 1 << bits)
    found = float(((reconstruct(lut, indices).astype(np.float64) - weight) ** 2).sum())
    assert found <= cost(weight, even) * (1 + 1e-6) + rounding(weight)


@given(hnp.arrays(np.float32, st.integers(3, 9), elements=st.floats(-8, 8, width=16)), st.data())
def test_few_values_get_the_global_optimum(values: np.ndarray, data: st.DataObject) -> None:
    weights = data.draw(hnp.arrays(np.float64, values.size, elements=st.floats(0.125, 8)))
    found = levels(values.astype(np.float64), 3, weights)
    assert cost(values, found, weights) <= least_cost(values.astype(np.float64), 3, weights) + 1e-9


@given(BITS, st.data())
def test_as_many_values_as_entries_are_exact(bits: int, data: st.DataObject) -> None:
    distinct = data.draw(
        hnp.arrays(
            np.float32, st.integers(1, 1 << bits), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        )
    )
    weight = data.draw(hnp.arrays(np.float32, (5, 7), elements=st.sampled_from(list(distinct))))
    importance = data.draw(hnp.arrays(np.float64, (1, 7), elements=st.floats(0, 10)))
    for given_importance in (None, importance):
        lut, indices = codebook(weight, bits, importance=given_importance)
        assert np.array_equal(reconstruct(lut, indices), weight)


@given(WEIGHTS, BITS, st.randoms(use_true_random=False))
def test_order_does_not_matter(weight: np.ndarray, bits: int, random: object) -> None:
    order = np.random.default_rng(random.randrange(99)).permutation(weight.size)  # type: ignore[attr-defined]
    lut, indices = codebook(weight, bits)
    shuffled_lut, shuffled = codebook(weight[order], bits)
    assert np.array_equal(lut, shuffled_lut)
    assert np.array_equal(indices[order], shuffled)


@given(WEIGHTS)
def test_more_bits_are_never_worse(weight: np.ndarray) -> None:
    errors = [cost(weight, codebook(weight, bits)[0]) for bits in range(1, 9)]
    assert all(after <= before * (1 + 1e-6) + rounding(weight) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tail", [0.0, 1e5])
def test_many_values_come_close_to_the_theory(bits: int, tail: float) -> None:
    weight = np.random.default_rng(bits).standard_normal(60_000).astype(np.float32)
    if tail:
        weight[:2] = tail, -tail
    lut, indices = codebook(weight, bits)
    error = float(np.mean((reconstruct(lut, indices) - weight)[2:].astype(np.float64) ** 2))
    entries = (1 << bits) - 2 * (tail > 0)
    # Max, IRE Trans. Inf. Theory 6/1, 1960, table I; Panter & Dite's limit sqrt(3) pi / 2 / N^2 from 64 levels on
    known = {2: 0.3634, 4: 0.1175, 6: 0.05798, 8: 0.03454, 14: 0.01232, 16: 0.009497, 30: 0.002834, 32: 0.002499}
    if entries > 0:
        assert error <= known.get(entries, np.sqrt(3) * np.pi / 2 / max(entries, 1) ** 2) * 1.05


def test_importance_moves_the_levels() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32) * np.linspace(
        0.1, 2, 40, dtype=np.float32
    )
    importance = np.linspace(4, 0.01, 40) ** 2
    plain, weighted = (codebook(weight, 3, importance=given)[0] for given in (None, importance[None]))
    spread = np.broadcast_to(importance, weight.shape)
    assert cost(weight, weighted, spread) < 0.75 * cost(weight, plain, spread)
    assert np.array_equal(codebook(weight, 3, importance=np.zeros((1, 1)))[0], plain)
    assert np.array_equal(codebook(weight, 3, importance=np.full((64, 1), 1e-300))[0], plain)


def test_values_that_count_nothing_still_get_the_nearest_level() -> None:
    weight = np.arange(2 * CELLS, dtype=np.float32)
    importance = (weight < 2).astype(np.float64)
    lut, indices = codebook(weight, 1, importance=importance)
    assert lut.tolist() == [[0.0, 1.0]]
    assert indices.tolist() == [0] + [1] * (2 * CELLS - 1)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("channels", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_blocks_of_channels_have_their_own_luts(axis: int, channels: int, dtype: str) -> None:
    scales = 10.0 ** np.arange(7)
    weight = (
        np.random.default_rng(0).standard_normal((7, 7, 7))
        * np.moveaxis(np.broadcast_to(scales * 1e-3, (7, 7, 7)), -1, axis)
    ).astype(dtype)
    lut, indices = codebook(weight, 4, axis=axis, channels_per_lut=channels)
    back = reconstruct(lut, indices, axis=axis, channels_per_lut=channels)
    assert lut.shape == (-(-7 // channels) if channels else 1, 16)
    assert lut.dtype == back.dtype == weight.dtype
    assert indices.dtype == np.uint8
    assert (np.diff(lut.astype(np.float64)) >= 0).all()
    for first in range(0, 7, channels or 7):
        part = range(first, min(first + (channels or 7), 7))
        alone, alone_indices = codebook(weight.take(part, axis), 4)
        assert np.array_equal(reconstruct(alone, alone_indices), back.take(part, axis))


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    weight = np.full(shape, 2.5, np.float32)
    lut, indices = codebook(weight, 2, channels_per_lut=2, importance=np.ones((), np.float32))
    assert np.array_equal(reconstruct(lut, indices, channels_per_lut=2), weight)


def test_indices_pack_into_their_bits() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 11)).astype(np.float32)
    for bits in (1, 2, 3, 4, 6, 8):
        _, indices = codebook(weight, bits)
        packed = pack(indices, bits)
        assert packed.shape == (6, -(-11 * bits // 8))
        assert np.array_equal(unpack(packed, bits, 11), indices)


NAN = np.array([1.0, np.nan], np.float32)
FINE = np.array([[1.0, 2.0, 3.0]], np.float32)


@pytest.mark.parametrize(
    ("weight", "options", "sentence"),
    [
        (NAN, {}, "it holds values that are not finite and no LUT has"),
        (NAN * np.float32(np.inf), {}, "it holds values that are not finite and no LUT has"),
        (FINE, {"bits": 9}, "a LUT of 9 bits is not possible"),
        (FINE, {"bits": 0}, "a LUT of 0 bits is not possible"),
        (FINE, {"channels_per_lut": -1}, "-1 channels cannot share a LUT"),
        (FINE, {"importance": np.array([1.0, -1.0, 0.0])}, "an importance is negative or not finite"),
        (FINE, {"importance": np.array([1.0, np.nan, 0.0])}, "an importance is negative or not finite"),
        (FINE, {"importance": np.ones(2)}, r"importance of shape \[2\] does not fit weights of shape \[1, 3\]"),
    ],
)
def test_refusals(weight: np.ndarray, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        codebook(weight, **{"bits": 2, "name": "w"} | options)  # type: ignore[arg-type]
    assert error.value.where == "tensor 'w'"


def test_luts_that_do_not_cover_the_blocks() -> None:
    lut, indices = codebook(FINE.T.copy(), 1, channels_per_lut=2)
    with pytest.raises(InputError, match="2 LUTs cannot serve 3 blocks of channels"):
        reconstruct(lut, indices, channels_per_lut=1)
