"""Which channels of activations may be scaled, and which constants take the scales up.

An operator with constant weights (or a gain) makes channels. They are followed through operators that are homogeneous,
``f(x / s) = f(x) / s`` for s > 0, channel by channel, up to the layers that read them. If nothing else reads them, each
channel may be divided by a scale where it is made and multiplied by it in the weights that read it: a seam.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, is_constant
from optkit_passes.fusion import affine

from ._layers import LAYER_OPS, clamp_bounds, why_float

ELEMENTWISE = frozenset({"Abs", "Identity", "LeakyRelu", "Neg", "Relu"})
SPATIAL = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
LAST_AXIS_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})


@dataclass(frozen=True, eq=False)
class Absorption:
    """A constant input of a node that takes up the scales.

    Attributes:
        node: The node.
        index: Which input.
        kind: ``rows`` and ``columns`` of weights make and read channels; a ``vector`` (bias, gain) is made of them.
        axis: Of a vector: the channel axis of the value that it is combined with, counted from the end.
        repeats: Of columns: how many columns in a row read the same channel.
    """

    node: ir.Node
    index: int
    kind: Literal["rows", "columns", "vector"]
    axis: int
    repeats: int = 1

    @property
    def value(self) -> ir.Value:
        """The constant."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    @property
    def array(self) -> np.ndarray:
        """Its elements."""
        array = constant(self.value)
        assert array is not None
        return array

    @property
    def data(self) -> ir.Value:
        """The activation that the node combines with the constant."""
        value = self.node.inputs[1 if self.index == 0 else 0]
        assert value is not None
        return value

    def scaled(self, array: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Return the constant for channels that are divided by ``scale`` [C]."""
        wide = array.astype(np.float64)
        if self.kind == "columns":
            wide = affine.scale_inputs(self.node, wide, self.index, np.repeat(scale, self.repeats))
        elif self.kind == "rows":
            wide = affine.scale_outputs(self.node, wide, self.index, 1 / scale)
        else:
            wide = wide / affine.along(scale, self.axis, max(wide.ndim, -self.axis))
        return np.asarray(wide, array.dtype)

    def sizes(self, array: np.ndarray) -> np.ndarray:
        """Return the largest magnitude of each channel in the weight's rows or columns, [C]."""
        if self.kind == "rows":
            scale, count = affine.scale_outputs, affine.output_channels(self.node, array, self.index)
        else:
            scale, count = affine.scale_inputs, affine.input_channels(self.node, array, self.index)
        # which channel each weight belongs to: ones scaled by 0, 1, 2, ... as the layer's weights would be
        number = scale(self.node, np.ones(array.shape), self.index, np.arange(count, dtype=np.float64))
        found = np.zeros(count)
        np.maximum.at(found, number.astype(np.int64), np.abs(array))
        return np.asarray(found.reshape(-1, self.repeats).max(axis=1))


@dataclass
class Seam:
    """Channels that are scaled together.

    Attributes:
        size: Number of channels, C.
        makers: The constants that make them: of one node, and a bias that is added to its result.
        readers: The weights that read them.
        nodes: The maker and what the channels pass through, in no order.
        values: Every value that carries the channels: their axis counted from the end, and how often each is repeated.
        bounds: Where some of these values were clamped from above, which is not homogeneous.
    """

    size: int
    makers: list[Absorption]
    readers: list[Absorption] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)
    values: dict[ir.Value, tuple[int, int]] = field(default_factory=dict)
    bounds: dict[ir.Value, float] = field(default_factory=dict)

    @property
    def absorptions(self) -> Iterator[Absorption]:
        """All constants that change."""
        yield from self.makers
        yield from self.readers

    @property
    def where(self) -> ir.Node:
        """The node that makes the channels."""
        return self.makers[0].node

    def scaled(self, value: ir.Value, scale: np.ndarray) -> np.ndarray:
        """Return the scales of one value's channels."""
        return np.repeat(scale, self.values[value][1])


def find_seams(graph: ir.Graph, *, clips: bool) -> Iterator[Seam | tuple[ir.Node, str]]:
    """Yield, in graph order, each seam, or the layer whose channels cannot be scaled with the reason.

    Bodies of control-flow nodes are not looked into; what they read is not scaled.

    Args:
        graph: The main graph.
        clips: Follow channels through a clamp at an upper bound, which is then listed in ``Seam.bounds``.
    """
    for node in graph:
        seam = _start(node)
        reason = seam if isinstance(seam, str) else _follow(seam, graph, clips)
        if reason and node.op_type in LAYER_OPS and node.domain == "":
            yield node, reason
        elif not reason and isinstance(seam, Seam):
            yield seam


def _start(node: ir.Node) -> Seam | str:
    """Return the seam of the channels that a node makes, with nothing behind it, or why there is none."""
    if node.domain != "" or not node.outputs:
        return "it is no operator of ONNX"
    if node.op_type in LAYER_OPS:
        return _start_layer(node)
    output = node.outputs[0]
    if why_float(node, (0, 1, 2)) or output.shape is None or not len(output.shape):
        return "it stays in float"
    axis = -1
    if node.op_type in LAST_AXIS_NORMS and node.attributes.get_int("axis", -1) in (-1, len(output.shape) - 1):
        indices = [index for index in (1, 2) if argument(node, index) is not None]
        if any(result.uses() or result.is_graph_output() for result in node.outputs[1:]):
            return "it has further results"
    elif node.op_type == "Mul" and any(is_constant(value) for value in node.inputs):
        indices = [index for index, value in enumerate(node.inputs) if is_constant(value)][:1]
        array = constant(node.inputs[indices[0]])
        wide = [] if array is None else [axis - array.ndim for axis, size in enumerate(array.shape) if size != 1]
        if len(wide) != 1:
            return "it has no gain of one value per channel"
        axis = wide[0]
    else:
        return "it makes no channels"
    size = output.shape[axis]
    vectors = [Absorption(node, index, "vector", axis) for index in indices]
    if not isinstance(size, int) or not all(_fits(vector, size) for vector in vectors) or not vectors:
        return "it has no constant gain of one value per channel"
    return Seam(size, vectors, nodes=[node], values={output: (axis, 1)})


def _start_layer(node: ir.Node) -> Seam | str:
    found = _weight(node)
    if isinstance(found, str):
        return found
    index, weight = found
    size, axis = affine.output_channels(node, weight, index), affine.output_axis(node, weight, index)
    makers = [Absorption(node, index, "rows", axis)]
    if node.op_type != "MatMul" and argument(node, 2) is not None:
        makers.append(Absorption(node, 2, "vector", -1))
        if not _fits(makers[1], size):
            return "its bias is not constant, is shared, or has another shape"
    shape = node.outputs[0].shape
    if shape is None or len(shape) < -axis:
        return "the shape of its result is not known"
    return Seam(size, makers, nodes=[node], values={node.outputs[0]: (axis, 1)})


def _follow(seam: Seam, graph: ir.Graph, clips: bool) -> str:
    """Complete a seam with everything that its channels reach; return why they cannot be scaled, or nothing."""
    ahead = list(seam.values)
    while ahead:
        value = ahead.pop()
        if value.is_graph_output():
            return f"'{value.name}' is an output of the model"
        for use in value.uses():
            node = use.node
            told = f"{node.op_type} '{node.name}' reads '{value.name}'"
            if node.graph is not graph:
                return f"the body of a control-flow node reads '{value.name}'"
            if node.domain == "" and node.op_type in LAYER_OPS:
                reader = _reader(node, use.idx, *seam.values[value], seam.size)
                if isinstance(reader, str):
                    return f"{told}: {reader}"
                seam.readers.append(reader)
                continue
            carried = _through(node, use.idx, seam, clips)
            if carried is None or any(result.uses() for result in node.outputs[1:]):
                return told
            seam.values[node.outputs[0]] = carried
            seam.nodes.append(node)
            ahead.append(node.outputs[0])
    return "" if seam.readers else f"nothing reads '{seam.where.outputs[0].name}'"


def _reader(node: ir.Node, index: int, axis: int, repeats: int, size: int) -> Absorption | str:
    """Return the weight of a layer that reads channels along an axis, or why it cannot take their scales."""
    found = _weight(node)
    if isinstance(found, str):
        return found
    at, weight = found
    inner = {"Gemm": -1, "MatMul": -1 if at == 1 else -2}.get(node.op_type, 1 - weight.ndim)
    across = node.op_type == "Gemm" and node.attributes.get_int("transA", 0) != 0
    if index != (1 if at == 0 else 0) or axis != inner or across:
        return "it reads them along another axis"
    if affine.input_channels(node, weight, at) != size * repeats:
        return "it reads another number of channels"
    return Absorption(node, at, "columns", inner, repeats)


def _through(node: ir.Node, index: int, seam: Seam, clips: bool) -> tuple[int, int] | None:
    """Return where the channels are in a node's result, if its result scales as its input does; note its constants."""
    source, output = node.inputs[index], node.outputs[0]
    assert source is not None
    axis, repeats = seam.values[source]
    bounds = clamp_bounds(node) if node.op_type == "Clip" and node.domain == "" and index == 0 else None
    if node.domain != "" or source.shape is None or output.shape is None:
        return None
    if node.op_type in ELEMENTWISE or (node.op_type in SPATIAL and len(source.shape) == 1 - axis):
        return axis, repeats
    if bounds is not None and bounds[0] in (0.0, -np.inf) and bounds[1] > 0 and (clips or bounds[1] == np.inf):
        if bounds[1] < np.inf:
            seam.bounds[output] = bounds[1]
        return axis, repeats
    if node.op_type == "Add" and repeats == 1:
        vector = Absorption(node, 1 - index, "vector", axis)
        if not _fits(vector, seam.size) or len(output.shape) != len(source.shape):
            return None
        seam.makers.append(vector)
        return axis, repeats
    if node.op_type in RESHAPES and index == 0:
        return _reshaped(source.shape, output.shape, axis, repeats, seam.size)
    return None


def _reshaped(source: ir.Shape, target: ir.Shape, axis: int, repeats: int, size: int) -> tuple[int, int] | None:
    """Row-major order is kept: a channel is the same run of ``repeats`` times ``inner`` elements in both shapes."""
    inner = _product(source, axis)
    for candidate in range(-1, -len(target) - 1, -1) if inner else ():
        after, length = _product(target, candidate), target[candidate]
        if (
            inner
            and after
            and isinstance(length, int)
            and length * after == size * repeats * inner
            and inner % after == 0
        ):
            return candidate, repeats * inner // after
    return None


def _product(shape: ir.Shape, axis: int) -> int | None:
    """Return the number of elements behind an axis, counted from the end; None where it is not known."""
    behind = list(shape)[axis + 1 :] if axis < -1 else []
    known = [dim for dim in behind if isinstance(dim, int)]
    return int(np.prod(known, dtype=np.int64)) if len(known) == len(behind) else None


def _fits(each: Absorption, size: int) -> bool:
    """Whether a constant is a vector of its own, of one float per channel along its axis."""
    value = each.node.inputs[each.index]
    array = constant(value)
    if value is None or array is None or array.dtype != np.float32 or len(value.uses()) > 1 or value.is_graph_output():
        return False
    return (
        not value.is_graph_input()
        and array.size == size
        and array.ndim >= -each.axis
        and array.shape[each.axis] == size
    )


def _weight(node: ir.Node) -> tuple[int, np.ndarray] | str:
    """Return the index and the array of a layer's own weight, or why its channels cannot be scaled."""
    refusal = why_float(node, (0, 1, 2))
    if refusal:
        return refusal
    index = 0 if node.op_type == "MatMul" and constant(node.inputs[1]) is None else 1
    value, weight = node.inputs[index], constant(node.inputs[index])
    if weight is None or value is None or is_constant(node.inputs[1 - index]):
        return "its weights are not constant"
    if weight.ndim < 2 or (node.op_type in ("MatMul", "Gemm") and weight.ndim != 2) or not weight.size:
        return f"its weights have shape {list(weight.shape)}"
    if len(value.uses()) > 1 or value.is_graph_output():
        return f"its weights '{value.name}' have other readers"
    if not np.isfinite(weight).all():
        return "its weights are not finite"
    return index, weight
