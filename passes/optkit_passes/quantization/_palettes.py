"""Finds the LUTs and indices of one weight, with or without what its layer's inputs looked like."""

from __future__ import annotations

import numpy as np

from optkit.quant.codebook import Zeros, codebook
from optkit.quant.lut_rounding import fit_entries, round_to_luts
from optkit.quant.palette import Palette

from ._layer_moments import LayerMoments

PRUNED = 0.1  # share of weights that are exactly 0 from which on they are taken for pruned: chance makes fewer
COMPENSATION = 0.1  # how firmly a weight is held while it makes up for earlier layers, as in quantize-weights
MOST_FITTED = 17  # entries: more lie so close that fitting them to the indices gains nothing
FARTHEST = 4  # times the channels asked for that an even share of them may differ
ROUNDS = 2  # of rounding together, each followed by fitting the entries


def zeros_of(weight: np.ndarray, bits: int) -> Zeros:
    """Return what becomes of the zeros of a weight.

    A pruned one's stay zeros: apart from the indices, one bit for each weight says where they are, if that takes less
    than an index for each; with 1 bit always, where two entries cannot hold 0 and either sign.
    """
    share = 1 - np.count_nonzero(weight) / max(weight.size, 1)
    if share < PRUNED:
        return "free"
    return "apart" if bits == 1 or bits * share > 1 else "entry"


def even_channels(count: int, wanted: int) -> int:
    """Return the divisor of a number of channels that is nearest to another one by ratio; 0 if all are far from it.

    Then one LUT serves all: hundreds of LUTs would take more than the indices.
    """
    divisors = [each for each in range(1, min(count, wanted * FARTHEST) + 1) if count % each == 0]
    nearest = min(divisors, key=lambda each: (max(each / wanted, wanted / each), -each), default=0)
    return nearest if nearest * FARTHEST >= wanted else 0


def fit_palette(
    weight: np.ndarray,
    bits: int,
    *,
    axis: int,
    channels: int,
    importance: np.ndarray | None,
    moments: LayerMoments | None,
    centered: bool = False,
    name: str,
) -> Palette:
    """Return the palette of a weight.

    Args:
        weight: The weight.
        bits: Bits of an index.
        axis: The axis of its output channels.
        channels: How many of them share a LUT; 0: all.
        importance: What errors at the weights cost, where nothing better is known.
        moments: Of the layer's inputs: then indices are chosen together, for the smallest error of the layer's outputs.
        centered: Whether a bias will make up for the mean error of each output. Entries are found by importance all the
            same: about the mean they came out 1 dB worse on two of three convolutional models.
        name: The weight, for errors.

    Raises:
        InputError: A weight is NaN or infinite.
    """
    zeros = zeros_of(weight, bits)
    if moments is not None:
        importance = moments.importance
        moments = moments.centered() if centered else moments
    goal = weight if moments is None else _compensated(weight, moments, pruned=zeros != "free", name=name)
    lut, indices = codebook(
        goal, bits, axis=axis, channels_per_lut=channels, importance=importance, zeros=zeros, name=name
    )
    if len(lut) == 1:
        axis = channels = 0
    found = Palette(lut, indices, bits, axis, channels)
    return found if moments is None else _fitted(weight, goal, found, moments, zeros, name)


def _compensated(weight: np.ndarray, moments: LayerMoments, *, pruned: bool, name: str) -> np.ndarray:
    found = moments.refitted(weight, COMPENSATION, name, keep=weight != 0 if pruned else None)
    # a 0 that is new would be taken for a pruned one
    return np.where((found == 0) & (weight != 0), weight, found) if pruned else found


def _fitted(
    weight: np.ndarray, goal: np.ndarray, found: Palette, moments: LayerMoments, zeros: Zeros, name: str
) -> Palette:
    """Return the best of the palette given and what rounding together and fitting entries make of it."""
    form, first = moments.form, int(zeros == "apart")
    given, matrix = form.matrix(weight), form.matrix(goal)
    keep = matrix != 0 if zeros != "free" else None
    block = np.arange(len(matrix)) // (found.channels_per_lut or len(matrix))
    lut, best, least = found.lut, found, moments.error(weight, found.weight)
    for _ in range(ROUNDS):
        indices = np.empty(matrix.shape, np.uint8)
        for piece in moments.pieces:
            kept = None if keep is None else keep[:, piece.columns]
            indices[:, piece.columns] = first + round_to_luts(
                matrix[:, piece.columns], lut[block, first:], piece.hessian, keep=kept, name=name
            )
        if keep is not None:
            at_zero = np.zeros(len(lut), np.uint8) if first else np.argmin(np.abs(lut), axis=1).astype(np.uint8)
            indices = np.where(keep, indices, at_zero[block][:, None])
        for fit in (False, True) if lut.shape[1] <= MOST_FITTED and zeros != "entry" else (False,):
            if fit:
                pieces = [(piece.columns, piece.hessian, piece.cross) for piece in moments.pieces]
                lut, indices = _sorted(
                    fit_entries(given, lut, indices, block, pieces, fixed=first), indices, block, first
                )
                lut = lut.astype(weight.dtype)
            each = Palette(
                lut, np.ascontiguousarray(form.restore(indices)), found.bits, found.axis, found.channels_per_lut
            )
            error = moments.error(weight, each.weight)
            if error < least:
                best, least = each, error
    return best


def _sorted(luts: np.ndarray, indices: np.ndarray, block: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Return LUTs in ascending order from ``first`` on, and the indices that mean the same in them."""
    order = np.argsort(luts[:, first:], axis=1, kind="stable") + first
    order = np.concatenate([np.tile(np.arange(first), (len(luts), 1)), order], axis=1)
    places = np.argsort(order, axis=1).astype(np.uint8)
    return np.take_along_axis(luts, order, axis=1), places[block[:, None], indices]
