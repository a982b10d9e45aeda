"""What layers read, in the float model and in the one that a pass is changing, as the moments of their inputs' rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from optkit.pipeline import Context
from optkit.quant.gptq import refit
from optkit.quant.lut_rounding import times
from optkit.quant.sparsity import refit_kept
from optkit.quant.walk import Walk, require_samples, spread_samples

from ._layers import describe
from ._rows import MatrixLayer, matrix_layer
from ._weight_uses import WeightUse

SAMPLES = 64  # that walk along at most
FEWEST = 8  # and at least, however large they are
HELD_BYTES = 1 << 29  # what they may hold: a layer's input and output, in both models
ROWS_PER_COLUMN = 16  # inputs gathered for every weight of a row
FEWEST_ROWS = 16384  # and at least so many, where there are: small layers fit too well to few of them
ROUNDED = 1e-6  # error of a sum in float32, of the sum
MOST_COLUMNS = 1024  # whose correlations are gathered together; those of wider inputs are cut into such pieces


@dataclass(frozen=True)
class Piece:
    """Moments of neighbouring columns of a layer's inputs: x [K] in the float model, y [K] in the changed one.

    Attributes:
        columns: Which columns of the layer's matrix.
        hessian: The sum of y y^T for each of its groups of rows, float64 [G, K', K'].
        cross: The sum of x y^T.
        wanted: The mean of x, [G, K'].
        mean: The mean of y.
    """

    columns: slice
    hessian: np.ndarray
    cross: np.ndarray
    wanted: np.ndarray
    mean: np.ndarray

    def centered(self, count: int) -> Piece:
        """Return the moments about the means of ``count`` inputs."""
        hessian = self.hessian - count * self.mean[:, :, None] * self.mean[:, None]
        every = np.arange(hessian.shape[1])
        least = ROUNDED * self.hessian[:, every, every]  # what is left of an input that never varied is rounding
        hessian[:, every, every] = np.maximum(hessian[:, every, every], least)
        return replace(self, hessian=hessian, cross=self.cross - count * self.wanted[:, :, None] * self.mean[:, None])


@dataclass(frozen=True)
class LayerMoments:
    """A layer's weight as a matrix [N, K], and the moments of the inputs that it multiplies.

    Attributes:
        form: The matrix.
        pieces: The moments, which cover all columns.
        count: Rows of inputs seen.
    """

    form: MatrixLayer
    pieces: tuple[Piece, ...]
    count: int

    def centered(self) -> LayerMoments:
        """Return the moments about the means: for a layer whose bias makes up for the mean error of its outputs."""
        return replace(self, pieces=tuple(piece.centered(self.count) for piece in self.pieces))

    @property
    def importance(self) -> np.ndarray:
        """The mean of y^2, float64 in the weight's shape: what errors at each weight cost by themselves."""
        diagonals = [np.diagonal(piece.hessian, axis1=1, axis2=2) for piece in self.pieces]
        rows = self.form.matrix(np.empty(self.form.shape)).shape[0] // len(diagonals[0])
        return np.asarray(self.form.restore(np.repeat(np.concatenate(diagonals, axis=1), rows, axis=0) / self.count))

    def refitted(self, weight: np.ndarray, damping: float, name: str, keep: np.ndarray | None = None) -> np.ndarray:
        """Return a weight that makes up for what earlier layers lost, in its own shape (see `optkit.quant.gptq.refit`).

        The fewer inputs there are for each weight of a row, the stronger it is held to the given one.

        Args:
            weight: The weight.
            damping: How strongly it is held at least.
            name: The weight, for errors.
            keep: Which weights are not 0, and may become others (see `optkit.quant.sparsity.refit_kept`); None: all.
        """
        matrix = self.form.matrix(weight).astype(np.float32).copy()
        kept = None if keep is None else self.form.matrix(keep)
        damping = max(damping, self.form.columns / self.count)
        for own, cross, hessian in self.parts(len(matrix)):
            if kept is None:
                matrix[own] = refit(matrix[own], cross, hessian, damping=damping, name=name)
            else:
                matrix[own] = refit_kept(matrix[own], cross, hessian, kept[own], damping=damping)
        return np.ascontiguousarray(self.form.restore(matrix)).astype(weight.dtype)

    def parts(self, rows: int) -> Iterator[tuple[tuple[slice, slice], np.ndarray, np.ndarray]]:
        """Yield the parts of the matrix, of so many rows, whose inputs were seen together: where, cross and Hessian."""
        for piece in self.pieces:
            step = rows // len(piece.hessian)
            for group, (cross, hessian) in enumerate(zip(piece.cross, piece.hessian, strict=True)):
                yield (slice(group * step, (group + 1) * step), piece.columns), cross, hessian

    def error(self, given: np.ndarray, found: np.ndarray) -> float:
        """Return ``||X W^T - Y V^T||^2`` less ``||X W^T||^2`` for the given weight W and another one, V."""
        total = 0.0
        wanted, other = (self.form.matrix(array).astype(np.float64) for array in (given, found))
        for piece in self.pieces:
            part = other[:, piece.columns]
            crossed = times(wanted[:, piece.columns], piece.cross)
            total += float(((times(part, piece.hessian) - 2 * crossed) * part).sum())
        return total

    def lost(self, given: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Return what the mean of each output loses, ``W mean(x) - V mean(y)`` [N]."""
        wanted, other = (self.form.matrix(array).astype(np.float64) for array in (given, found))
        total = np.zeros(len(wanted))
        for piece in self.pieces:
            groups = len(piece.mean)
            for rows, mean, sign in ((wanted, piece.wanted, 1), (other, piece.mean, -1)):
                own = rows[:, piece.columns].reshape(groups, len(rows) // groups, -1)
                total += sign * (own @ mean[..., None]).ravel()
        return total


class LayerInputs:
    """Moments of layers' inputs, asked for in graph order while the model is being changed.

    Args:
        model: The model, of which nodes that were asked for, and those before them, change no more.
        context: Holds the calibration samples, a few of which walk along.
        name: What needs the samples, for errors.

    Raises:
        InputError: There are no samples, or one lacks an input.
    """

    def __init__(self, model: ir.Model, context: Context, name: str) -> None:
        original = model.clone()
        count = min(SAMPLES, max(FEWEST, HELD_BYTES // (4 * 4 * _largest(model))))
        samples = spread_samples(require_samples(context.calibration, name), count)
        self._graph = model.graph
        self._twins = dict(zip(model.graph, original.graph, strict=True))
        self._walks = Walk(original, samples, optimize=True, name=name), Walk(model, samples, optimize=True, name=name)

    def moments(self, uses: list[WeightUse]) -> LayerMoments | str:
        """Return the moments of a weight's only layer, or why none can be seen.

        Raises:
            InputError: The model does not run on a sample, or the inputs hold NaN or infinity.
        """
        node = uses[0].node
        if len(uses) > 1:
            return f"'{uses[0].stored.name}' has several readers"
        if node.graph is not self._graph:
            return "inside the body of a control-flow node, where inputs cannot be observed"
        layer = describe(node)
        if isinstance(layer, str):
            return layer
        if layer.weight is None or layer.stored is not uses[0].stored or uses[0].data is None:
            return "its constant is no weight behind an input"
        assert uses[0].stored.shape is not None
        form = matrix_layer(layer, tuple(uses[0].stored.shape.numpy()))
        if isinstance(form, str):
            return form
        twin = self._twins[node]
        values = []
        for walk, each in zip(self._walks, (twin, node), strict=True):
            walk.advance(each)
            values.append(walk.values(each.inputs[0]))
        pairs = [(x, y) for x, y in zip(*values, strict=True) if x.size]
        count = sum(len(form.rows(x, _most(form.columns, len(pairs)), turn)) for turn, (x, _) in enumerate(pairs))
        if not count:
            return "no calibration sample reaches it"
        return LayerMoments(form, tuple(_gathered(form, pairs, count)), count)


def _largest(model: ir.Model) -> int:
    """Return the number of elements of the largest tensor between nodes, dimensions that are not known taken for 1."""
    shapes = [value.shape for node in model.graph for value in node.outputs if value.shape is not None]
    return max((math.prod(dim for dim in shape if isinstance(dim, int)) for shape in shapes), default=1) or 1


def _most(columns: int, inputs: int) -> int:
    """Return how many rows are taken of each input."""
    return -(-max(ROWS_PER_COLUMN * min(columns, MOST_COLUMNS), FEWEST_ROWS) // inputs)


def _gathered(form: MatrixLayer, pairs: list[tuple[np.ndarray, np.ndarray]], count: int) -> Iterator[Piece]:
    groups, most = form.groups, _most(form.columns, len(pairs))
    for first in range(0, form.columns, MOST_COLUMNS):
        columns = slice(first, min(first + MOST_COLUMNS, form.columns))
        size = columns.stop - first
        hessian, cross = np.zeros((2, groups, size, size))
        wanted, mean = np.zeros((2, groups, size))
        for turn, pair in enumerate(pairs):
            rows = (form.rows(array, most, turn) for array in pair)  # [T, G K]
            x, y = (array.reshape(len(array), groups, -1)[..., columns].swapaxes(0, 1) for array in rows)  # [G, T, K']
            hessian += y.swapaxes(1, 2) @ y
            cross += x.swapaxes(1, 2) @ y
            wanted += x.sum(axis=1, dtype=np.float64) / count
            mean += y.sum(axis=1, dtype=np.float64) / count
        yield Piece(columns, hessian, cross, wanted, mean)
