"""What layers read, in the float model and in the one that a pass is changing, as the moments of their inputs' rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.pipeline import Context
from optkit.quant.gptq import refit
from optkit.quant.walk import Walk, require_samples, spread_samples

from ._layers import describe
from ._rows import MatrixLayer, matrix_layer
from ._weight_uses import WeightUse

SAMPLES = 32  # that walk along
ROWS_PER_COLUMN = 8  # inputs gathered for every weight of a row
FEWEST_ROWS = 4096  # and at least so many, where there are
MOST_COLUMNS = 1024  # whose correlations are gathered together; those of wider inputs are cut into such pieces


@dataclass(frozen=True)
class Piece:
    """Moments of neighbouring columns of a layer's inputs: x [K] in the float model, y [K] in the changed one.

    Attributes:
        columns: Which columns.
        hessian: The sum of y y^T, float64 [K', K'].
        cross: The sum of x y^T.
    """

    columns: slice
    hessian: np.ndarray
    cross: np.ndarray


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

    @property
    def importance(self) -> np.ndarray:
        """The mean of y^2, float64 in the weight's shape: what errors at each weight cost."""
        diagonal = np.concatenate([np.diag(piece.hessian) for piece in self.pieces]) / max(self.count, 1)
        matrix = np.broadcast_to(diagonal, (self.form.matrix(np.empty(self.form.shape)).shape[0], diagonal.size))
        return np.asarray(self.form.restore(matrix))

    def refitted(self, weight: np.ndarray, damping: float, name: str) -> np.ndarray:
        """Return a weight that makes up for what earlier layers lost, in its own shape (see `optkit.quant.gptq.refit`).

        The fewer inputs there are for each weight of a row, the stronger it is held to the given one.
        """
        matrix = self.form.matrix(weight).astype(np.float32)
        damping = max(damping, self.form.columns / max(self.count, 1))
        for piece in self.pieces:
            part = matrix[:, piece.columns]
            matrix = matrix.copy()
            matrix[:, piece.columns] = refit(part, piece.cross, piece.hessian, damping=damping, name=name)
        return np.ascontiguousarray(self.form.restore(matrix)).astype(weight.dtype)

    def error(self, given: np.ndarray, found: np.ndarray) -> float:
        """Return ``||X W^T - Y V^T||^2`` less ``||X W^T||^2`` for the given weight W and another one, V."""
        total = 0.0
        wanted, other = (self.form.matrix(array).astype(np.float64) for array in (given, found))
        for piece in self.pieces:
            part = other[:, piece.columns]
            total += float(((part @ piece.hessian - 2 * wanted[:, piece.columns] @ piece.cross) * part).sum())
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
        samples = spread_samples(require_samples(context.calibration, name), SAMPLES)
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
        found = list(_gathered(form, pairs))
        if not found:
            return "no calibration sample reaches it"
        count = sum(len(form.rows(x, _most(form.columns, len(pairs)), turn)) for turn, (x, _) in enumerate(pairs))
        return LayerMoments(form, tuple(found), count) if count else "no calibration sample reaches it"


def _most(columns: int, inputs: int) -> int:
    """Return how many rows are taken of each input."""
    return -(-max(ROWS_PER_COLUMN * min(columns, MOST_COLUMNS), FEWEST_ROWS) // inputs)


def _gathered(form: MatrixLayer, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Piece]:
    for first in range(0, form.columns if pairs else 0, MOST_COLUMNS):
        columns = slice(first, min(first + MOST_COLUMNS, form.columns))
        size = columns.stop - first
        hessian, cross = np.zeros((size, size)), np.zeros((size, size))
        for turn, pair in enumerate(pairs):
            x, y = (form.rows(array, _most(form.columns, len(pairs)), turn)[:, columns] for array in pair)
            hessian += y.T @ y
            cross += x.T @ y
        yield Piece(columns, hessian, cross)
