"""Scales for the channels of a seam, and what they do to the layers that read it once everything is rounded.

The layers of a seam are run on calibration samples, in float and with activations and weights rounded for a candidate
of scales. A channel that fills its range in the samples at hand leaves it in others: so that no candidate is chosen for
fitting a few samples tightly, samples fall into two folds, and each is rounded by the ranges of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import is_constant
from optkit.quant.integers import (
    PerChannel,
    PerTensor,
    QuantParams,
    choose_qparams,
    dequantize,
    quantize,
    weight_qparams,
)
from optkit.session import Session
from optkit_passes.fusion import affine

from ._formats import Formats
from ._layers import Layer, describe
from ._seams import Absorption, Seam

FOLDS = 2
LARGEST_EXPONENT = 8  # scales stay within 2^-8 and 2^8
REACHED = 1 - 2**-10  # of a clamp's bound: a channel that gets there is clamped
HEADROOM = 2  # below a clamp's bound: what is not clamped in the samples at hand is not in others either
FLOAT = ir.TensorType(ir.DataType.FLOAT)

Ranges = dict[ir.Value, np.ndarray]


@dataclass(frozen=True)
class Powers:
    """How scales follow from magnitudes: ``s = made^made_power * activation^activation_power / read^read_power``.

    With powers 0, a, 1 - a: Xiao et al. 2022, "SmoothQuant", equation 4. With 1/2, 0, 1/2: Nagel et al. 2019,
    "Data-free quantization through weight equalization and bias correction", equation 11.

    Attributes:
        made: Of the largest weight in a channel's row where it is made.
        activation: Of the channel's largest activation.
        read: Of the largest weight in a channel's column where it is read.
    """

    made: float
    activation: float
    read: float


SMOOTHING = tuple(Powers(0, share, 1 - share) for share in (0.25, 0.5, 0.75, 1.0))
CROSS_LAYER = (Powers(1 / 2, 0, 1 / 2), Powers(1 / 3, 1 / 3, 1 / 3))  # where a row has no scale of its own


def channel_scales(seam: Seam, powers: Powers, ranges: Ranges, made: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Return the scales [C] that activations are divided by: powers of 2, so that no float is rounded anew.

    The largest activation keeps its size. A channel that is never other than 0 gets a scale that makes neither its row
    nor its column the largest. A channel that is clamped keeps scale 1, and no other gets close to the bound.

    Args:
        seam: The seam.
        powers: How the scales follow from magnitudes.
        ranges: Smallest and largest activation of every channel, [2, C], for each value that is read or clamped.
        made: Largest weight of each channel where it is made, [C].
        read: Largest weight of each channel where it is read, [C].
    """
    sizes = activation_sizes(seam, ranges)
    live = sizes > 0
    if not live.any():
        return np.ones(seam.size)
    scale = _positive(made) ** powers.made * _positive(sizes) ** powers.activation / _positive(read) ** powers.read
    scale *= (sizes[live] / scale[live]).max() / sizes[live].max()
    scale[~live] = 1.0
    known = live & (made > 0) & (read > 0)
    dead = ~live & (made > 0) & (read > 0)
    if known.any() and dead.any():
        row, column = np.median(made[known] / scale[known]), np.median(read[known] * scale[known])
        scale[dead] = np.sqrt(made[dead] / row * column / read[dead])
    exponents = np.rint(np.log2(scale))
    for value, bound in seam.bounds.items():
        highest = _by_channel(seam, value, ranges[value][1])
        with np.errstate(divide="ignore"):
            least = np.ceil(np.log2(np.maximum(highest, 0) * HEADROOM / bound))
        exponents = np.maximum(exponents, np.minimum(least, 0))
        exponents[highest >= bound * REACHED] = 0
    return np.asarray(np.exp2(np.clip(exponents, -LARGEST_EXPONENT, LARGEST_EXPONENT)))


def activation_sizes(seam: Seam, ranges: Ranges) -> np.ndarray:
    """Return the largest magnitude of each channel that a layer reads, [C]."""
    found = np.zeros(seam.size)
    for value in data_values(seam):
        found = np.maximum(found, _by_channel(seam, value, np.abs(ranges[value]).max(axis=0)))
    return found


def data_values(seam: Seam) -> list[ir.Value]:
    """Return the activations that layers read."""
    return list(dict.fromkeys(each.data for each in seam.readers))


class Trial:
    """One seam and what its layers compute in some samples.

    Args:
        seam: The seam.
        model: Its model.
        inputs: What the node that makes the channels reads, in float, for each sample; folds take turns.
        formats: The integers.
        most: The most samples to round; the others are observed only.
    """

    def __init__(
        self, seam: Seam, model: ir.Model, inputs: Sequence[np.ndarray], formats: Formats, *, most: int
    ) -> None:
        self.seam, self.formats = seam, formats
        self.inputs = inputs[:most]
        self.arrays = {each: each.array for each in seam.absorptions}
        self.made, self.read = _weight_sizes(seam, "rows"), _weight_sizes(seam, "columns")
        values = dict.fromkeys([*data_values(seam), *seam.bounds])
        self.makers = Session(_makers_model(seam, values, model))
        self.readers = [(each, Session(_layer_model(each, model))) for each in seam.readers]
        folds = min(FOLDS, len(inputs))
        self.ranges: list[Ranges] = [{} for _ in range(folds)]
        self.wanted: list[list[np.ndarray]] = [[] for _ in self.readers]
        for index, array in enumerate(inputs):
            made = self._make(array, self.arrays)
            self._observe(made, self.ranges[index % folds])
            if index < len(self.inputs):
                for (each, session), wanted in zip(self.readers, self.wanted, strict=True):
                    wanted.append(_run(session, made[each.data], self.arrays[each]))

    def scales(self, powers: Powers) -> np.ndarray:
        """Return the scales [C] for what was observed in all samples."""
        merged = self.ranges[0]
        for ranges in self.ranges[1:]:
            both = {value: np.stack([merged[value], ranges[value]]) for value in merged}
            merged = {value: np.stack([each[:, 0].min(axis=0), each[:, 1].max(axis=0)]) for value, each in both.items()}
        return self._scales(powers, merged)

    def error(self, powers: Powers | None) -> float:
        """Return the squared error of the readers' outputs over their energy, on average over the readers.

        The mean error of a channel does not count where a bias can take it off. None: nothing is scaled.
        """
        lost = [_Loss() for _ in self.readers]
        for fold, ranges in enumerate(reversed(self.ranges)):
            scale = np.ones(self.seam.size) if powers is None else self._scales(powers, ranges)
            arrays = {each: self._rounded(each, scale) for each in self.seam.absorptions}
            params = {value: self._params(value, ranges, scale) for value in data_values(self.seam)}
            for index in range(fold, len(self.inputs), len(self.ranges)):
                read = self._make(self.inputs[index], arrays)
                for (each, session), wanted, loss in zip(self.readers, self.wanted, lost, strict=True):
                    own = params[each.data]
                    output = _run(session, dequantize(quantize(read[each.data], own), own), arrays[each])
                    loss.add(wanted[index], output, affine.output_axis(each.node, arrays[each], each.index))
        errors = [
            loss.relative(centered=_has_bias(each.node)) for loss, (each, _) in zip(lost, self.readers, strict=True)
        ]
        return float(np.mean(errors))

    def _scales(self, powers: Powers, ranges: Ranges) -> np.ndarray:
        return channel_scales(self.seam, powers, ranges, self.made, self.read)

    def _make(self, array: np.ndarray, arrays: Mapping[Absorption, np.ndarray]) -> dict[ir.Value, np.ndarray]:
        """Return what the layers read, for one input of the maker and the maker's constants."""
        feeds = {_name(each): arrays[each] for each in self.seam.makers}
        outputs = self.makers.run(feeds | {"data": array})
        return {value: outputs[f"{value.name}#"] for value in [*data_values(self.seam), *self.seam.bounds]}

    def _observe(self, made: Mapping[ir.Value, np.ndarray], ranges: Ranges) -> None:
        """Widen the ranges by one sample; 0 is in every range."""
        for value, array in made.items():
            others = _others(array.ndim, self.seam.values[value][0])
            low, high = array.min(axis=others, initial=0), array.max(axis=others, initial=0)
            known = ranges.get(value, np.zeros((2, 1), np.float32))
            ranges[value] = np.stack([np.minimum(low, known[0]), np.maximum(high, known[1])])

    def _params(self, value: ir.Value, ranges: Ranges, scale: np.ndarray) -> QuantParams:
        low, high = ranges[value] / self.seam.scaled(value, scale)
        return choose_qparams(low.min(initial=0.0), high.max(initial=0.0), self.formats.activations)

    def _rounded(self, each: Absorption, scale: np.ndarray) -> np.ndarray:
        """Return a constant as it is once scaled and, if it is a weight, rounded."""
        array = each.scaled(self.arrays[each], scale)
        if each.kind == "vector":
            return array
        layer = describe(each.node)
        axis = layer.axis if isinstance(layer, Layer) and layer.weight == each.index else None
        granularity = PerTensor() if axis is None or not self.formats.per_channel else PerChannel(axis)
        params = weight_qparams(array, self.formats.weights, granularity, name=each.value.name or "")
        return dequantize(quantize(array, params), params)


class _Loss:
    """The error of a layer's outputs, summed over samples."""

    def __init__(self) -> None:
        self.energy = self.squares = 0.0
        self.count = 0
        self.sums: np.ndarray | float = 0.0

    def add(self, wanted: np.ndarray, output: np.ndarray, axis: int) -> None:
        error = output - wanted
        self.energy += float(np.square(wanted, dtype=np.float64).sum())
        self.squares += float(np.square(error, dtype=np.float64).sum())
        self.sums = self.sums + error.sum(axis=_others(error.ndim, axis), dtype=np.float64)
        self.count += error.size // max(error.shape[axis], 1)

    def relative(self, *, centered: bool) -> float:
        mean = float(np.square(self.sums).sum()) / max(self.count, 1) if centered else 0.0
        return max(self.squares - mean, 0.0) / self.energy if self.energy else 0.0


def _weight_sizes(seam: Seam, kind: str) -> np.ndarray:
    """Return the largest magnitude of each channel in the weights that make or read it, [C].

    Each weight is taken relative to its own largest value, so that the readers of a seam count alike.
    """
    found = np.zeros(seam.size)
    for each in seam.absorptions:
        if each.kind == kind and (array := each.array).any():
            found = np.maximum(found, each.sizes(array) / np.abs(array).max())
    return found


def _by_channel(seam: Seam, value: ir.Value, numbers: np.ndarray) -> np.ndarray:
    """Return the largest number of each channel, which a value may repeat."""
    return np.asarray(numbers.reshape(seam.size, seam.values[value][1]).max(axis=1))


def _positive(sizes: np.ndarray) -> np.ndarray:
    return np.where(sizes > 0, sizes, 1.0)


def _others(rank: int, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(rank) if i != axis % rank)


def _run(session: Session, array: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return next(iter(session.run({"data": array, "weight": weight}).values()))


def _has_bias(node: ir.Node) -> bool:
    """Whether a layer has a bias, by which quantize-static corrects the mean error of each output channel."""
    if node.op_type != "MatMul":
        return len(node.inputs) > 2 and node.inputs[2] is not None
    uses = list(node.outputs[0].uses())
    return len(uses) == 1 and uses[0].node.op_type == "Add" and is_constant(uses[0].node.inputs[1 - uses[0].idx])


# Models of one layer alone, and of what makes the channels


def _layer_model(each: Absorption, model: ir.Model) -> ir.Model:
    """Return a model of one layer without its bias; its inputs are ``data`` and ``weight``."""
    data, weight = ir.Value(name="data", type=FLOAT), ir.Value(name="weight", type=FLOAT)
    inputs = [weight, data] if each.index == 0 else [data, weight]
    layer = ir.Node("", each.node.op_type, inputs, each.node.attributes.values())
    layer.outputs[0].name, layer.outputs[0].type = "result", FLOAT
    return _model([data, weight], layer.outputs, [layer], [], model)


def _makers_model(seam: Seam, wanted: Sequence[ir.Value] | Mapping[ir.Value, None], model: ir.Model) -> ir.Model:
    """Return a model that computes some of a seam's values, called ``value#``, from ``data`` and its constants."""
    outer = seam.makers[0].data
    known = {outer: ir.Value(name="data", type=FLOAT)}
    for each in seam.makers:
        known[each.value] = ir.Value(name=_name(each), type=FLOAT)
    inputs = list(known.values())
    initializers, nodes = [], []
    for node in seam.nodes:
        for value in node.inputs:
            if value is not None and value not in known:  # a bound, a shape
                known[value] = ir.Value(name=value.name, type=value.type, const_value=value.const_value)
                initializers.append(known[value])
        sources = [None if value is None else known[value] for value in node.inputs]
        copy = ir.Node(node.domain, node.op_type, sources, node.attributes.values(), num_outputs=len(node.outputs))
        for value, output in zip(node.outputs, copy.outputs, strict=True):
            output.name, output.type = (f"{value.name}#" if value.name else ""), value.type
            known[value] = output
        nodes.append(copy)
    return _model(inputs, [known[value] for value in wanted], nodes, initializers, model)


def _name(each: Absorption) -> str:
    return f"{each.value.name}#"


def _model(
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    initializers: Sequence[ir.Value],
    model: ir.Model,
) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, name="trial")
    graph.opset_imports.update(model.graph.opset_imports)
    return ir.Model(graph, ir_version=model.ir_version)
