"""Chooses the integers of a convolution's weight together, and makes its bias up for what they lose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from optkit.quant.integers import PerBlock, PerChannel, QuantParams, dequantize, spread

from ._blocks import Integers
from ._constants import Weights
from ._fitting import Fitting
from ._layer_moments import LayerMoments


def fit_convolution(weights: Weights, fitting: Fitting, moments: LayerMoments, *, centered: bool) -> Integers:
    """Return the integers of a convolution's weight that give its outputs the smallest error, or the nearest ones.

    Args:
        weights: The weight.
        fitting: How it becomes integers.
        moments: Of what the convolution reads.
        centered: Whether a bias will make up for the mean error of each output.
    """
    moments = moments.centered() if centered else moments
    given = weights.array.astype(np.float32)
    goal = moments.refitted(given, fitting.compensation, weights.name) if fitting.compensation else given
    nearest = fitting.nearest(_rows(weights, goal, fitting), None, weights.name)
    scale, zero = (_elements(weights, nearest, values) for values in (nearest.params.scale, nearest.params.zero_point))
    form = moments.form
    matrix, scales, zeros = form.matrix(goal), form.matrix(scale), form.matrix(zero)
    found = np.empty(matrix.shape, nearest.params.grid.dtype)
    for own, _, hessian in moments.parts(len(matrix)):
        alone = replace(nearest.params, scale=scales[own], zero_point=zeros[own], granularity=PerBlock(1, 1))
        found[own] = fitting.gptq(matrix[own], hessian, alone)
    values = _rows(weights, form.restore(found), fitting)
    together = Integers(np.ascontiguousarray(values, nearest.values.dtype), nearest.params)
    return min(nearest, together, key=lambda each: moments.error(given, dequantized(weights, each)))


def dequantized(weights: Weights, integers: Integers) -> np.ndarray:
    """Return what the integers of a weight mean, float32 in its own shape."""
    values = dequantize(integers.values, integers.params)
    return weights.stored(values) if _by_block(integers.params) else values.reshape(weights.array.shape)


def _by_block(params: QuantParams) -> bool:
    return not isinstance(params.granularity, PerChannel)


def _rows(weights: Weights, array: np.ndarray, fitting: Fitting) -> np.ndarray:
    """Return an array of a weight's shape as the rows that its scales belong to."""
    if not fitting.block_size:
        return array.reshape(len(array), -1)
    return np.moveaxis(array, weights.axis, -1).reshape(-1, array.shape[weights.axis])


def _elements(weights: Weights, integers: Integers, values: np.ndarray) -> np.ndarray:
    """Return scales or zero points for every element of a weight, in its shape."""
    shape = integers.values.shape
    every = np.broadcast_to(spread(values, shape, integers.params.granularity), shape)
    return weights.stored(every) if _by_block(integers.params) else every.reshape(weights.array.shape)
