"""Fits integer weights and biases to what their layers really read, layer by layer, in closed form.

A layer of the quantized model reads rounded inputs and multiplies them with rounded weights. Two things can be made
good without training, while every layer before it is final: the weights can be rounded so that their errors cancel in
the layer's outputs (GPTQ, see `optkit.quant.gptq`), and the mean error that is left in each output channel can be taken
off the bias (empirical bias correction: Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction", section 4.2). The bias is stored in 32 bits, so that this costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, constant, names
from optkit.pipeline import Context
from optkit.quant.gptq import gptq
from optkit.quant.integers import (
    MOST_PAIR,
    PerBlock,
    PerChannel,
    QuantParams,
    dequantize,
    largest_pairs,
    quantize,
)
from optkit.quant.walk import Walk, require_samples, spread_samples

from ._layers import CLAMP_OPS, Layer, clamp_bounds, summed_rows
from ._qdq import WrittenLayer, element_type
from ._rows import MatrixLayer, matrix_layer

HELD_BYTES = 1 << 26  # what the samples that walk along may hold
FEWEST = 8  # samples that walk along, however large
STREAMS = 4  # a layer's input and output, in float and quantized
ROWS_PER_COLUMN = 8  # inputs that the rounding of one row is fitted to, per weight of it
FEWEST_ROWS = 4096  # and at least so many, where there are: small layers fit too well to few of them
MOST_COLUMNS = 1024  # rounded together; the correlations of wider inputs are cut into such pieces

Rounding = Literal["nearest", "gptq"]


class Reconstruction:
    """A walk over the float and the quantized model side by side.

    Args:
        original: The float model.
        twins: Its node for every layer of the quantized model.
        model: The quantized model.
        context: Holds the calibration samples; receives the remarks.
        largest: Elements of the largest tensor in one sample, which decides how many samples can walk along.
        pairs_saturate: Whether kernels add the products of two neighbouring weights in int16.
    """

    def __init__(
        self,
        original: ir.Model,
        twins: Mapping[ir.Node, ir.Node],
        model: ir.Model,
        context: Context,
        *,
        largest: int,
        pairs_saturate: bool,
    ) -> None:
        samples = require_samples(context.calibration, "bias correction")
        chosen = spread_samples(samples, max(FEWEST, HELD_BYTES // max(1, 4 * STREAMS * largest)))
        self.context = context
        self.graph, self.taken = model.graph, names(model)
        self.pairs_saturate = pairs_saturate
        self.twins = twins
        self.float_walk = Walk(original, chosen, optimize=True)
        self.walk = Walk(model, chosen)

    def run(self, layers: Sequence[tuple[Layer, WrittenLayer]], rounding: Rounding, *, correct_bias: bool) -> None:
        """Fit the layers, which stand in graph order."""
        for layer, stored in self.context.track(layers, "Fitting layers", len(layers)):
            if rounding != "nearest":
                self._round(layer, stored, centered=correct_bias and stored.bias is not None)
            if correct_bias:
                self._correct(layer.node, stored)

    def _round(self, layer: Layer, stored: WrittenLayer, *, centered: bool) -> None:
        """Choose the integers of a layer's weight for the smallest error of its outputs.

        ``centered``: about their mean, which the bias will make up for.
        """
        form = matrix_layer(layer, stored.weight.shape)
        if isinstance(form, str) or form.groups > 1:
            reason = form if isinstance(form, str) else "its channels are summed in groups"
            self.context.missed(layer.node, f"weights rounded to nearest: {reason}")
            return
        assert layer.weight is not None
        weight = layer.node.inputs[layer.weight]
        assert weight is not None
        if len(stored.integers.uses()) != 1 or len(weight.uses()) != 1:
            self.context.missed(layer.node, f"weights rounded to nearest: '{stored.integers.name}' has several readers")
            return
        self.walk.advance(layer.node)
        matrix, name = form.matrix(stored.weight), stored.integers.name or ""
        values = self.walk.values(layer.node.inputs[0])
        inputs = [value for value in values if value.size and len(form.rows(value, 1))]
        if not inputs:
            self.context.missed(layer.node, "weights rounded to nearest: no calibration sample reaches it")
            return
        found = quantize(matrix, _part(stored.params, form, slice(None)), name=name)
        gains, before = np.zeros(len(matrix)), 0.0
        for part in _pieces(form, stored.params):
            hessian = _moments(form, inputs, part, centered=centered)
            params = _part(stored.params, form, part)
            fitted = gptq(matrix[:, part], hessian, params, name=name)
            nearest = _errors(matrix[:, part], found[:, part], params, hessian)
            gain = nearest - _errors(matrix[:, part], fitted, params, hessian)
            before += float(nearest.sum())
            gains += np.maximum(gain, 0)
            found[:, part] = np.where(gain[:, None] > 0, fitted, found[:, part])
        if self.pairs_saturate and (rows := summed_rows(layer, form.restore(found))) is not None:
            overflows = largest_pairs(rows) > MOST_PAIR
            found[overflows] = quantize(matrix, _part(stored.params, form, slice(None)))[overflows]
            gains[overflows] = 0
        gained = float(gains.sum())
        if gained <= 0:
            self.context.missed(layer.node, "weights rounded to nearest: rounded together they do no better")
            return
        integers = np.ascontiguousarray(form.restore(found)).astype(element_type(stored.params.grid).numpy())
        stored.integers.const_value = ir.tensor(integers, name=name)
        less = _decibels(before, max(before - gained, 0.0))
        self.context.applied(layer.node, f"weights rounded together: {less} less output error")

    def _correct(self, node: ir.Node, stored: WrittenLayer) -> None:
        """Take the mean error of each output channel off the bias."""
        if stored.bias is None:
            return
        wanted, outputs = self.float_walk.outputs(self.twins[node]), self.walk.outputs(node)
        if not any(output.size for output in outputs):
            return
        lost = _mean_errors(wanted, outputs, _bounds(self.twins[node].outputs[0]))
        reader = stored.bias.producer() or node
        index = list(reader.inputs).index(stored.bias) if reader is node else 0
        bias = reader.inputs[index]
        held = constant(bias)
        assert bias is not None
        assert held is not None
        if stored.bias_scale is None:
            moved = np.asarray(held + lost, held.dtype)
            change = (moved - held).astype(np.float32)
        else:  # the products are added on top of it: a bit stays free
            moved = np.clip(np.rint(held + lost / stored.bias_scale), -(2.0**30), 2.0**30).astype(np.int32)
            change = ((moved - held.astype(np.int64)) * stored.bias_scale).astype(np.float32)
        if not change.any():
            return
        if len(bias.uses()) == 1:
            bias.const_value = ir.tensor(moved, name=bias.name)
        else:
            reader.replace_input_with(index, add_constant(self.graph, f"{bias.name}_corrected", moved, self.taken))
        self.walk.add(node.outputs[0], change.reshape(-1, *[1] * (outputs[0].ndim - 2)))
        self.context.applied(node, f"bias corrected by up to {float(np.abs(change).max()):.2g}")


def _pieces(form: MatrixLayer, params: QuantParams) -> list[slice]:
    """Return the columns that are rounded together: whole blocks, about ``MOST_COLUMNS`` of them."""
    size = params.granularity.size if isinstance(params.granularity, PerBlock) else 1
    step = max(MOST_COLUMNS // size, 1) * size
    return [slice(first, first + step) for first in range(0, form.columns, step)]


def _moments(form: MatrixLayer, inputs: Sequence[np.ndarray], part: slice, *, centered: bool) -> np.ndarray:
    """Return the second moments [K', K'] of a part of the layer's inputs, about their mean if ``centered``."""
    columns = len(range(*part.indices(form.columns)))
    most = -(-max(ROWS_PER_COLUMN * columns, FEWEST_ROWS) // len(inputs))
    total, squares, count = np.zeros(columns), np.zeros((columns, columns)), 0
    middle = form.rows(inputs[0], most)[:, part].mean(axis=0) if centered else 0  # near the mean: nothing cancels later
    for turn, value in enumerate(inputs):
        rows = form.rows(value, most, turn)[:, part] - middle
        squares += rows.T @ rows
        total += rows.sum(axis=0)
        count += len(rows)
    if centered:
        squares -= np.outer(total, total / max(count, 1))
        np.fill_diagonal(squares, np.maximum(np.diag(squares), 0))
    return squares


def _part(params: QuantParams, form: MatrixLayer, part: slice) -> QuantParams:
    """Return the parameters of some columns of the matrix [N, K], whose rows are the channels."""
    granularity = params.granularity
    if isinstance(granularity, PerChannel):
        return replace(params, granularity=PerChannel(0))
    if not isinstance(granularity, PerBlock):
        return params
    first, last, _ = part.indices(form.columns)
    blocks = slice(first // granularity.size, -(-last // granularity.size))
    scale, zero_point = (
        (array.T if form.transposed else array)[:, blocks] for array in (params.scale, params.zero_point)
    )
    return replace(params, scale=scale, zero_point=zero_point, granularity=PerBlock(1, granularity.size))


def _errors(weight: np.ndarray, integers: np.ndarray, params: QuantParams, hessian: np.ndarray) -> np.ndarray:
    """Return the diagonal of ``D H D^T`` [N], the squared error of each output, for D [N, K] that of the weights."""
    lost = (weight - dequantize(integers, params)).astype(np.float64)
    return np.asarray(((lost @ hessian) * lost).sum(axis=1))


def _bounds(value: ir.Value) -> tuple[float, float]:
    """Return the bounds of the Relu or Clip that is the value's only reader; infinite where there is none."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type not in CLAMP_OPS:
        return -np.inf, np.inf
    return clamp_bounds(uses[0].node) or (-np.inf, np.inf)


def _mean_errors(
    wanted: Sequence[np.ndarray], outputs: Sequence[np.ndarray], bounds: tuple[float, float]
) -> np.ndarray:
    """Return by how much each channel, axis 1, falls short on average where its clamped value is not the same anyway.

    Beyond the bounds of the activation that follows an error does no harm, and must not move what lies within.
    """
    total = count = np.zeros(outputs[0].shape[1])
    for exact, output in zip(wanted, outputs, strict=True):
        axes = (0, *range(2, output.ndim))
        inside = ((exact > bounds[0]) & (exact < bounds[1])) | ((output > bounds[0]) & (output < bounds[1]))
        error = np.clip(exact, *bounds) - np.clip(output, *bounds)
        total = total + error.sum(axis=axes, dtype=np.float64)  # 0 where both are beyond the same bound
        count = count + inside.sum(axis=axes)
    return np.asarray(total / np.maximum(count, 1))


def _decibels(before: float, after: float) -> str:
    return f"{10 * np.log10(before / after):.1f} dB" if after > 0 else "all of the"
