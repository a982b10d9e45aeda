"""Finds the constants that matrix products, convolutions and table look-ups read: what quantize-weights can store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, is_constant
from optkit.quant.integers import SMALLEST_SCALE
from optkit.recipe import PRECISION_KEY

READERS = frozenset({"Conv", "Gather", "Gemm", "MatMul"})
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True, eq=False)
class Use:
    """A node that reads a constant as weights.

    Attributes:
        node: The MatMul, Gemm, Conv or Gather.
        axis: The constant's axis that the node sums over (a table: the axis along which a row runs). Blocks run along
            it.
        transpose: The node that swaps the constant's two axes for a MatMul, or None.
    """

    node: ir.Node
    axis: int
    transpose: ir.Node | None = None

    @property
    def is_table(self) -> bool:
        """Whether the node picks rows of the constant."""
        return self.node.op_type == "Gather"

    @property
    def is_convolution(self) -> bool:
        """Whether the node is a convolution."""
        return self.node.op_type == "Conv"


@dataclass(eq=False)
class Weights:
    """A constant with everything that reads it; all of them agree on the axis along which blocks run.

    Attributes:
        value: The constant.
        uses: The nodes that read it as weights, in graph order.
        others: The nodes that read it as anything else.
    """

    value: ir.Value
    uses: list[Use] = field(default_factory=list)
    others: list[ir.Node] = field(default_factory=list)

    @property
    def axis(self) -> int:
        """The constant's axis along which blocks run."""
        return self.uses[0].axis

    @property
    def is_table(self) -> bool:
        """Whether any of its readers picks rows of it."""
        return any(use.is_table for use in self.uses)

    @property
    def is_convolution(self) -> bool:
        """Whether its reader is a convolution."""
        return self.uses[0].is_convolution

    @property
    def name(self) -> str:
        """The constant's name."""
        return self.value.name or ""

    @property
    def gain(self) -> float:
        """What a Gemm multiplies the product with."""
        node = self.uses[0].node
        return node.attributes["alpha"].as_float() if node.op_type == "Gemm" and "alpha" in node.attributes else 1.0

    @property
    def array(self) -> np.ndarray:
        """The constant's values."""
        array = constant(self.value)
        assert array is not None
        return array

    @property
    def length(self) -> int:
        """Number of elements along the axis of the blocks."""
        return int(self.array.shape[self.axis])

    def rows(self) -> np.ndarray:
        """Return the constant as float32 [N, K], blocks along K; [M, C, kH, kW] becomes [M kH kW, C]."""
        moved = np.moveaxis(self.array, self.axis, -1)
        return np.ascontiguousarray(moved.reshape(-1, moved.shape[-1]), np.float32)

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """Return an array [N, *], one value per element or per block of ``rows()``, in the constant's layout."""
        shape = [dim for index, dim in enumerate(self.array.shape) if index != self.axis]
        return np.ascontiguousarray(np.moveaxis(rows.reshape(*shape, rows.shape[-1]), -1, self.axis))


def find_weights(model: ir.Model) -> tuple[list[Weights], dict[ir.Node, str]]:
    """Return the constants that can be quantized, in the order of their first use, and why other readers stay float."""
    found: dict[ir.Value, Weights] = {}
    reasons: dict[ir.Node, str] = {}
    for node in _in_order(model.graph):
        if node.op_type not in READERS or node.domain not in ("", "ai.onnx"):
            continue
        use = _use(node)
        if isinstance(use, str):
            if use:
                reasons[node] = use
            continue
        value = (use.transpose or node).inputs[_index(use)]
        assert value is not None
        found.setdefault(value, Weights(value)).uses.append(use)
    fit = []
    for weights in found.values():
        reason = _unfit(weights)
        reasons |= dict.fromkeys((use.node for use in weights.uses), reason) if reason else {}
        if not reason:
            fit.append(weights)
    return fit, reasons


def _in_order(graph: ir.Graph) -> Iterator[ir.Node]:
    yield from graph.all_nodes()


def _index(use: Use) -> int:
    return 0 if use.transpose is not None or use.is_table else 1


def _use(node: ir.Node) -> Use | str:
    """Return how a node reads its weights, or why they stay float; an empty reason where it has none to speak of."""
    if node.op_type == "Gather":
        return _table(node)
    weight = argument(node, 1)
    if node.op_type == "MatMul":
        transpose = _swap(weight)
        if transpose is not None:
            return Use(node, 1, transpose)
    array = constant(weight)
    if array is None:
        left = constant(argument(node, 0))
        if node.op_type == "MatMul" and left is not None and left.ndim > 1:
            return "its constant is on the left, where no runtime takes weights"
        if weight is not None and weight.is_initializer():
            return f"input '{weight.name}' is a default that a caller may override"
        return "its weights are not constant"
    if node.op_type == "Conv":
        return Use(node, 1) if array.ndim > 2 else "its weights are not [M, C, ...]"
    if array.ndim != 2:
        return "its constant is a vector" if array.ndim < 2 else f"its weights are {array.ndim - 1} axes of matrices"
    by_rows = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
    return Use(node, 1 if by_rows else 0)


def _table(node: ir.Node) -> Use | str:
    table = argument(node, 0)
    array = constant(table)
    if array is None or array.ndim != 2 or table is None or table.dtype not in FLOATS:
        return ""  # most Gathers pick from shapes and other computed values
    if is_constant(argument(node, 1)):
        return "it picks the same rows every time: folding constants does more"
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return Use(node, 1) if axis % 2 == 0 else "it picks columns"


def _swap(value: ir.Value | None) -> ir.Node | None:
    """Return the Transpose that makes ``value`` out of a constant matrix, or None."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return None
    matrix = constant(node.inputs[0])
    swaps = "perm" not in node.attributes or list(node.attributes["perm"].as_ints()) == [1, 0]
    return node if swaps and matrix is not None and matrix.ndim == 2 else None


def _unfit(weights: Weights) -> str:
    """Return why a constant cannot become integers; empty if it can."""
    value = weights.value
    for use in weights.uses:
        precision = use.node.metadata_props.get(PRECISION_KEY, "")
        if precision.startswith("fp"):
            return f"kept in float by a rule ({precision})"
    if value.dtype not in FLOATS:
        return f"'{value.name}' is {value.dtype.name.lower() if value.dtype else 'untyped'}, not float32 or float16"
    if value.is_graph_output():
        return f"'{value.name}' is an output of the model, so that it is stored in float anyway"
    array = constant(value)
    assert array is not None
    if not np.isfinite(array).all():
        return f"'{value.name}' holds values that are not finite"
    largest = float(np.abs(array).max(initial=0.0))
    if 0 < largest < 127 * SMALLEST_SCALE:
        return f"'{value.name}' is below {127 * SMALLEST_SCALE:.1g}, too small for a scale"
    if len({use.axis for use in weights.uses}) > 1:
        return f"'{value.name}' is read along both axes, and blocks run along one"
    gains = {use.node.attributes["alpha"].as_float() for use in weights.uses if "alpha" in use.node.attributes}
    if gains - {1.0} and len(weights.uses) > 1:
        return f"'{value.name}' is shared by readers that scale it differently"
    swaps = dict.fromkeys(use.transpose for use in weights.uses if use.transpose is not None)
    known = {use.node for use in weights.uses} | set(swaps)
    readers = [use for each in (value, *(swap.outputs[0] for swap in swaps)) for use in each.uses()]
    weights.others = [use.node for use in readers if use.node not in known]
    return ""
