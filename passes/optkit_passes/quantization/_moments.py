"""What the readers of constants see during calibration, gathered layer by layer on the partly quantized model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.pipeline import Context
from optkit.quant.walk import Walk

from ._constants import Weights


@dataclass(frozen=True)
class Moments:
    """Second moments of a product's inputs: x [K] in the float model, y [K] in the partly quantized one.

    Attributes:
        halves: Sums of y y^T over either half of the samples, float64 [2, K, K], so that one can judge the other's fit.
        crossed: Sums of x y^T over the same halves, float64 [2, K, K].
        count: Number of inputs seen.
    """

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
        self._held: dict[ir.Value, Moments | None] = {}
        self._left: dict[ir.Value, int] = {}
        for value in filter(None, map(self._read, order)):
            self._left[value] = self._left.get(value, 0) + 1

    def moments(self, weights: Weights) -> Moments | None:
        """Return the moments of what the constant's first reader multiplies it with; None where none can be seen.

        Raises:
            InputError: The model does not run on a sample, or the inputs hold NaN or infinity.
        """
        value = self._read(weights)
        if self._walks is None or value is None:
            return None
        if value not in self._held:
            self._held[value] = self._gather(self._walks, weights.uses[0].node, value)
        found = self._held[value]
        self._left[value] -= 1
        if not self._left[value]:
            del self._held[value]
        return found

    def _read(self, weights: Weights) -> ir.Value | None:
        """Return the input to observe: of the main graph, and of no table, whose integers are needed before."""
        first = weights.uses[0]
        if first.node.graph is not self.main or weights.is_table:
            return None
        if weights.is_convolution and not is_pointwise(weights):
            return None
        return first.node.inputs[0]

    def _gather(self, walks: tuple[Walk, Walk], node: ir.Node, value: ir.Value) -> Moments | None:
        original, quantized = walks
        twin = self._twins[node]
        original.advance(twin)
        quantized.advance(node)
        axis = _summed_axis(node)
        halves: np.ndarray | None = None
        crossed: np.ndarray | None = None
        count = 0
        for index, x, y in _turns(original.values(twin.inputs[0]), quantized.values(value), axis):
            if halves is None or crossed is None:
                halves, crossed = np.zeros((2, 2, y.shape[1], y.shape[1]))
            halves[index % 2] += y.T @ y
            crossed[index % 2] += x.T @ y
            count += len(y)
        return None if halves is None or crossed is None else Moments(halves, crossed, count)


def is_pointwise(weights: Weights) -> bool:
    """Whether a convolution is a matrix product: a kernel of one element, one group, no padding, every position."""
    attributes = weights.uses[0].node.attributes
    ones = all(dim == 1 for dim in weights.array.shape[2:])
    plain = ("group" not in attributes or attributes["group"].as_int() == 1) and "auto_pad" not in attributes
    still = all(not any(attributes[name].as_ints()) for name in ("pads",) if name in attributes)
    return ones and plain and still


def _summed_axis(node: ir.Node) -> int:
    if node.op_type == "Conv":
        return 1
    return 0 if "transA" in node.attributes and node.attributes["transA"].as_int() else -1


def _turns(
    originals: list[np.ndarray], quantized: list[np.ndarray], axis: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield pairs of inputs, float32 [rows, K], numbered; one sample's rows take turns."""
    alone = len(quantized) == 1
    for index, pair in enumerate(zip(originals, quantized, strict=True)):
        x, y = (np.moveaxis(np.asarray(array, np.float32), axis, -1).reshape(-1, array.shape[axis]) for array in pair)
        if alone:
            yield from ((turn, x[turn::2], y[turn::2]) for turn in (0, 1) if len(y[turn::2]))
        elif len(y):
            yield index, x, y
