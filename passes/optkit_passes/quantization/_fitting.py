"""Chooses the integers of one constant by a named method, with or without what its readers' inputs looked like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from optkit.quant.clipping import search_qparams
from optkit.quant.gptq import fit_scales, gptq, refit
from optkit.quant.hqq import hqq_qparams
from optkit.quant.integers import (
    IntegerGrid,
    PerBlock,
    PerChannel,
    QuantParams,
    dequantize,
    integer_grid,
    quantize,
    spread,
    weight_qparams,
)

from ._blocks import Integers
from ._moments import Moments

Method = Literal["minmax", "rtn", "hqq", "gptq"]

# How much smaller the error must be for zero points to be stored, in dB: they cost bits / 32 of a bit per weight.
WORTH_DB = 0.1
# Shares of the Hessian's off-diagonals that are tried as too uncertain to follow; 1 is rounding to nearest.
SHARES = (0.0, 0.1, 0.3, 1.0)
MANY_STEPS = 2  # above so many bits it hardly matters which scales GPTQ starts from
JUDGED = 64  # rows that choose the share for all
PLENTY = 8  # inputs for every element of a row: then nothing is uncertain


@dataclass(frozen=True)
class Fitting:
    """How rows [N, K] become integers.

    Attributes:
        method: How integers and scales are chosen.
        bits: 2, 4 or 8.
        block_size: Elements of a row that share a scale; 0: the whole row.
        symmetric: Whether zero points are fixed; None: whichever has the smaller error.
        signed: Whether integers with fixed zero points are signed; they are unsigned where the zero point is free.
        float16: Whether scales are stored as float16.
        act_order: GPTQ: columns with the largest inputs first.
        damping: GPTQ: share of the mean of the Hessian's diagonal that is added to it.
        compensation: GPTQ: how strongly the weight is held to the given one while it makes up for earlier errors, in
            means of the diagonal; 0: it is not changed.
    """

    method: Method
    bits: int
    block_size: int
    symmetric: bool | None
    signed: bool
    float16: bool = False
    act_order: bool = True
    damping: float = 0.01
    compensation: float = 0.0

    def fit(self, rows: np.ndarray, moments: Sequence[Moments], name: str) -> Integers:
        """Return the integers of rows float32 [N, K].

        Args:
            rows: The weights.
            moments: Of the inputs they are multiplied with, in pieces; none: every element counts alike, and GPTQ is
                nearest rounding.
            name: The constant, for errors.

        Raises:
            InputError: A weight is NaN or infinite.
        """
        importance = np.concatenate([np.diag(piece.hessian) for piece in moments]) if moments else None
        if self.method != "gptq" or not moments:
            return self.nearest(rows, importance, name)
        if len(moments) == 1:
            return self._together(rows, moments[0], name)
        params = self.nearest(rows, importance, name).params
        if self.block_size and not any(piece.columns.start % self.block_size for piece in moments):
            alike = replace(self, symmetric=params.grid.symmetric)
            return _beside([alike._together(rows[:, piece.columns], piece, name) for piece in moments])
        return Integers(np.hstack([self._piece(rows, params, piece, name) for piece in moments]), params)

    def _together(self, rows: np.ndarray, moments: Moments, name: str) -> Integers:
        """Return the integers of rows all of whose inputs were seen together."""
        hessian = moments.hessian
        few = moments.count < PLENTY * rows.shape[1]
        if self.compensation:
            rows = self._compensated(rows, moments, name, doubt=few)
        params = self.nearest(rows, np.diag(hessian), name).params
        if few:
            hessian = _without(hessian, self._uncertain(rows, params, moments))
        fitted = self._fitted(rows, hessian, params, name)
        if self.bits > MANY_STEPS or few:
            return fitted
        wide = replace(self, method="minmax").nearest(rows, np.diag(hessian), name).params
        return min(fitted, self._fitted(rows, hessian, wide, name), key=lambda each: _error(rows, hessian, each))

    def _piece(self, rows: np.ndarray, params: QuantParams, moments: Moments, name: str) -> np.ndarray:
        """Return the integers of some columns of rows, with scales that other columns share."""
        part = rows[:, moments.columns]
        scale, zero = (
            np.broadcast_to(spread(values, rows.shape, params.granularity), rows.shape)[:, moments.columns]
            for values in (params.scale, params.zero_point)
        )
        params = replace(params, scale=scale, zero_point=zero, granularity=PerBlock(1, 1))
        if self.compensation:
            part = self._compensated(part, moments, name, doubt=True)
        share = self._uncertain(part, params, moments) if moments.count < PLENTY * rows.shape[1] else 0.0
        return self.gptq(part, _without(moments.hessian, share), params)

    def _fitted(self, rows: np.ndarray, hessian: np.ndarray, params: QuantParams, name: str) -> Integers:
        """Return what GPTQ finds from given scales, and the scales that suit it."""
        values = self.gptq(rows, hessian, params)
        params = fit_scales(rows, hessian, values, params, damping=self.damping, name=name)
        return Integers(values, self._stored(params))

    def rounded(self, rows: np.ndarray) -> np.ndarray:
        """Return rows float32 [N, K] as they are after rounding to nearest."""
        found = self.nearest(rows, None, "")
        return dequantize(found.values, found.params)

    def _compensated(self, rows: np.ndarray, moments: Moments, name: str, *, doubt: bool) -> np.ndarray:
        """Return weights that make up for what earlier layers lost.

        The fewer inputs there are for each element of a row, the stronger they are held. Where in ``doubt``, one half
        of the samples must agree that the change fitted to the other is for the better, or there is none.
        """
        damping = max(self.compensation, rows.shape[1] / moments.count)
        gain = 0.0
        for fit, judge in ((0, 1), (1, 0)) if doubt else ():
            inputs, crossed = moments.halves, moments.crossed
            change = refit(rows, crossed[fit], inputs[fit], damping=damping, name=name).astype(np.float64) - rows
            wanted = rows @ (crossed[judge] - inputs[judge])
            gain += float(((2 * wanted - change @ inputs[judge]) * change).sum())
        if gain < 0 or (doubt and gain == 0):
            return rows
        return refit(rows, moments.crossed.sum(axis=0), moments.hessian, damping=damping, name=name)

    def nearest(self, rows: np.ndarray, importance: np.ndarray | None, name: str) -> Integers:
        """Round to nearest with the zero points that the options ask for, or whose error is smaller.

        Args:
            rows: The weights, [N, K].
            importance: What a squared error counts in each column, [K]; None: the same.
            name: The constant, for errors.
        """
        choices = (True, False) if self.symmetric is None else (self.symmetric,)
        found = [self._rounded(rows, importance, name, symmetric=symmetric) for symmetric in choices]
        if len(found) == 1:
            return found[0]
        weight = np.ones(rows.shape[1]) if importance is None else importance
        fixed, free = (
            float((np.square(dequantize(each.values, each.params) - rows, dtype=np.float64) @ weight).sum())
            for each in found
        )
        return found[1] if fixed > free * 10 ** (WORTH_DB / 10) else found[0]

    def _rounded(self, rows: np.ndarray, importance: np.ndarray | None, name: str, *, symmetric: bool) -> Integers:
        grid = self._grid(symmetric=symmetric)
        granularity = PerBlock(1, self.block_size) if self.block_size else PerChannel(0)
        if self.method == "hqq":
            values, params = hqq_qparams(rows, grid, granularity, name=name)
            stored = self._stored(params)
            return Integers(values if stored is params else quantize(rows, stored, name=name), stored)
        if self.method == "minmax":
            params = weight_qparams(rows, grid, granularity, name=name)
        else:
            weight = None if importance is None else importance[None]
            params = search_qparams(rows, grid, granularity, importance=weight, name=name)
        params = self._stored(params)
        return Integers(quantize(rows, params, name=name), params)

    def _grid(self, *, symmetric: bool) -> IntegerGrid:
        kind = "int" if self.signed and symmetric else "uint"
        return integer_grid(f"{kind}{self.bits}", symmetric=symmetric, full_range=symmetric and self.bits < 8)

    def _stored(self, params: QuantParams) -> QuantParams:
        """Return the parameters with scales as they will be stored; what float16 rounds to 0 becomes its smallest."""
        if not self.float16:
            return params
        half = params.scale.astype(np.float16)
        smallest = np.copysign(np.finfo(np.float16).smallest_subnormal, params.scale)
        return replace(params, scale=np.where(half == 0, smallest, half).astype(np.float32))

    def gptq(self, rows: np.ndarray, hessian: np.ndarray, params: QuantParams) -> np.ndarray:
        """Return integers chosen together, the columns with the largest inputs first where that is asked for."""
        return gptq(rows, hessian, params, act_order=self.act_order, damping=self.damping)

    def _uncertain(self, rows: np.ndarray, params: QuantParams, moments: Moments) -> float:
        """Return the share of the off-diagonals without which GPTQ does best on inputs that it was not fitted to.

        Few inputs leave most directions of a long row unseen, and GPTQ moves its errors there. Some rows are rounded
        with the moments of one half of the samples and judged by those of the other.
        """
        step = max(len(rows) // JUDGED, 1)
        some = replace(params, scale=params.scale[::step], zero_point=params.zero_point[::step])
        errors = dict.fromkeys(SHARES, 0.0)
        for share in SHARES:
            for fit, judge in (moments.halves, moments.halves[::-1]):
                alone = share == 1.0  # without correlations, GPTQ is rounding to nearest
                values = quantize(rows[::step], some) if alone else self.gptq(rows[::step], _without(fit, share), some)
                error = dequantize(values, some).astype(np.float64) - rows[::step]
                errors[share] += float(((error @ judge) * error).sum())
        return min(SHARES, key=errors.__getitem__)


def _beside(parts: list[Integers]) -> Integers:
    """Return one matrix of several whose rows are cut between blocks."""
    params = [part.params for part in parts]
    scale, zero = (np.hstack(each) for each in zip(*((one.scale, one.zero_point) for one in params), strict=True))
    return Integers(np.hstack([part.values for part in parts]), replace(params[0], scale=scale, zero_point=zero))


def _error(rows: np.ndarray, hessian: np.ndarray, found: Integers) -> float:
    """Return the squared error of the outputs, ``tr(D H D^T)``."""
    error = dequantize(found.values, found.params).astype(np.float64) - rows
    return float(((error @ hessian) * error).sum())


def _without(hessian: np.ndarray, share: float) -> np.ndarray:
    """Return the matrix with a share of its off-diagonals taken away."""
    result = hessian * (1 - share)
    np.fill_diagonal(result, np.diag(hessian))
    return np.asarray(result)
