"""What the readers of constants see during calibration, gathered layer by layer on the partly quantized model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from optkit.pipeline import Context
from optkit.quant.walk import Walk

from ._constants import Weights

MOST_COLUMNS = 4096  # whose correlations are gathered together: K^2 numbers, factored in K^3 steps
PIECE = 2048  # columns of each piece that wider inputs are cut into
FEWEST_ROWS = 512  # in one product: one with many rows costs little more than one with few


@dataclass(frozen=True)
class Moments:
    """Second moments of neighbouring columns of a product's inputs.

    They are x [K] in the float model, y [K] in the partly quantized one.

    Attributes:
        columns: Which columns.
        halves: Sums of y y^T over either half of the samples, float64 [2, K, K], so that one can judge the other's fit.
        crossed: Sums of x y^T over the same halves, float64 [2, K, K].
        count: Number of inputs seen.
    """

    columns: slice
    halves: np.ndarray
    crossed: np.ndarray
    count: int

    @property
    def hessian(self) -> np.ndarray:
        """The sum of y y^T over all samples, [K, K]."""
        return np.asarray(self.halves.sum(axis=0))


class Observer:
    """Moments of the inputs of products, asked for in graph order; each is dropped after its last reader.

    Args:
        model: The model, which the caller quantizes in graph order.
        context: Holds the calibration samples.
        order: The constants, in the order in which they will be asked for.
        name: What needs the samples, for errors; empty: nothing does, and nothing is run.

    Raises:
        InputError: There are no samples, or one lacks an input.
    """

    def __init__(self, model: ir.Model, context: Context, order: list[Weights], name: str) -> None:
        self.main = model.graph
        self._walks: tuple[Walk, Walk] | None = None
        self._twins: dict[ir.Node, ir.Node] = {}
        if name:
            original = model.clone()
            self._twins = dict(zip(model.graph, original.graph, strict=True))
            self._walks = Walk(original, context.calibration, name=name), Walk(model, context.calibration, name=name)
        self._held: dict[ir.Value, tuple[Moments, ...]] = {}
        self._left: dict[ir.Value, int] = {}
        for value in filter(None, map(self._read, order)):
            self._left[value] = self._left.get(value, 0) + 1

    def moments(self, weights: Weights) -> tuple[Moments, ...]:
        """Return the moments of what the constant's first reader multiplies it with; nothing where none can be seen.

        Inputs of more than ``MOST_COLUMNS`` come in pieces of ``PIECE``, in order.

        Raises:
            InputError: The model does not run on a sample, or the inputs hold NaN or infinity.
        """
        value = self._read(weights)
        if self._walks is None or value is None:
            return ()
        if value not in self._held:
            self._held[value] = self._gather(self._walks, weights.uses[0].node, value)
        found = self._held[value]
        self._left[value] -= 1
        if not self._left[value]:
            del self._held[value]
        return found

    def _read(self, weights: Weights) -> ir.Value | None:
        """Return the input of a product to observe: of the main graph, and of no table, which is needed before."""
        first = weights.uses[0]
        if first.node.graph is not self.main or weights.is_table or weights.is_convolution:
            return None
        return first.node.inputs[0]

    def _gather(self, walks: tuple[Walk, Walk], node: ir.Node, value: ir.Value) -> tuple[Moments, ...]:
        original, quantized = walks
        twin = self._twins[node]
        original.advance(twin)
        quantized.advance(node)
        pairs = original.values(twin.inputs[0]), quantized.values(value)
        pieces: list[Moments] = []
        for index, x, y in _joined(_turns(*pairs, _summed_axis(node))):
            if not pieces:
                pieces = _empty(y.shape[1])
            for place, piece in enumerate(pieces):
                part = y[:, piece.columns]
                piece.halves[index] += part.T @ part
                piece.crossed[index] += x[:, piece.columns].T @ part
                pieces[place] = replace(piece, count=piece.count + len(y))
        return tuple(pieces)


def _empty(columns: int) -> list[Moments]:
    step = columns if columns <= MOST_COLUMNS else PIECE
    pieces = []
    for first in range(0, columns, step):
        size = min(step, columns - first)
        halves, crossed = np.zeros((2, 2, size, size))
        pieces.append(Moments(slice(first, first + size), halves, crossed, 0))
    return pieces


def _summed_axis(node: ir.Node) -> int:
    return 0 if "transA" in node.attributes and node.attributes["transA"].as_int() else -1


def _turns(
    originals: list[np.ndarray], quantized: list[np.ndarray], axis: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield pairs of inputs, float32 [rows, K], and the half they belong to; one sample's rows take turns."""
    alone = len(quantized) == 1
    for index, pair in enumerate(zip(originals, quantized, strict=True)):
        x, y = (np.moveaxis(np.asarray(array, np.float32), axis, -1).reshape(-1, array.shape[axis]) for array in pair)
        if alone:
            yield from ((turn, x[turn::2], y[turn::2]) for turn in (0, 1) if len(y[turn::2]))
        elif len(y):
            yield index % 2, x, y


def _joined(turns: Iterator[tuple[int, np.ndarray, np.ndarray]]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Join inputs of the same half until there are ``FEWEST_ROWS`` of them."""
    waiting: tuple[list[tuple[np.ndarray, np.ndarray]], ...] = ([], [])
    for index, *pair in turns:
        waiting[index].append((pair[0], pair[1]))
        if sum(len(y) for _, y in waiting[index]) >= FEWEST_ROWS:
            yield index, *_stacked(waiting[index])
            waiting[index].clear()
    yield from ((index, *_stacked(pairs)) for index, pairs in enumerate(waiting) if pairs)


def _stacked(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for arrays in zip(*pairs, strict=True))
    return x, y
