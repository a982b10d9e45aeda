"""Folds AWQ's input scales into what computes the inputs, where that is exact: gains of normalizations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant
from optkit.pipeline import Context
from optkit.quant.awq import awq_scales
from optkit.quant.walk import Walk

from ._constants import Weights

SAMPLED = 512  # inputs that judge the scales of one site

Quantizer = Callable[[np.ndarray], np.ndarray]


def fold_input_scales(model: ir.Model, context: Context, quantizers: Mapping[Weights, Quantizer]) -> None:
    """Scale weights up, and what their inputs are multiplied with down, before anything is rounded.

    Only a gain of one value per channel can take the scales: that of a LayerNormalization (with its bias), or of a Mul.
    The float model computes the same before and after, up to rounding.

    Args:
        model: The float model, changed in place.
        context: Holds the calibration samples, takes the remarks.
        quantizers: For each constant to be quantized what its rows [N, K] will be after rounding, in float.

    Raises:
        InputError: There are no samples, or the model does not run on one.
    """
    walk = Walk(model, context.calibration, name="method 'awq'")
    sites: dict[ir.Value, list[Weights]] = {}
    for weights in quantizers:
        value = weights.uses[0].node.inputs[0]
        if weights.is_table or weights.is_convolution or value is None:
            context.missed(weights.uses[0].node, "no input scales: it is no matrix product")
        else:
            sites.setdefault(value, []).append(weights)
    found: list[tuple[list[ir.Value], list[Weights], np.ndarray]] = []
    for value, readers in sites.items():
        gains = _gains(value, readers, model.graph)
        if isinstance(gains, str):
            for weights in readers:
                context.missed(weights.uses[0].node, f"no input scales: {gains}")
            continue
        walk.advance(readers[0].uses[0].node)
        scales = _scales(walk.values(value), readers, quantizers)
        if (scales != 1).any():
            found.append((gains, readers, scales))
        else:
            context.missed(readers[0].uses[0].node, "no input scales: none made the error smaller")
    for gains, readers, scales in found:
        for gain in gains:
            _multiply(gain, 1 / scales)
        for weights in readers:
            shape = [1] * weights.array.ndim
            shape[weights.axis] = -1
            _multiply(weights.value, scales.reshape(shape))
        where = next(iter(gains[0].uses())).node
        context.applied(where, f"input scales of {len(readers)} products folded into '{gains[0].name}'")


def _gains(value: ir.Value, readers: Sequence[Weights], main: ir.Graph) -> list[ir.Value] | str:
    """Return the constants that take the scales' inverse, or why there are none."""
    nodes = {weights.uses[0].node for weights in readers}
    if any(len(weights.uses) > 1 or weights.others for weights in readers):
        return "a weight of its input is shared"
    if value.is_graph_output() or any(use.node not in nodes or use.idx for use in value.uses()):
        return "its input is read by more than quantized products"
    producer = value.producer()
    if producer is None or producer.graph is not main or any(node.graph is not main for node in nodes):
        return "its input is not computed in the main graph"
    gemms = (node for node in nodes if "transA" in node.attributes)
    if any(node.attributes["transA"].as_int() for node in gemms):
        return "it transposes its input"
    length = readers[0].length
    if producer.op_type == "LayerNormalization":
        wanted = [argument(producer, 1), argument(producer, 2)]
        axis = producer.attributes["axis"].as_int() if "axis" in producer.attributes else -1
        rank = None if value.shape is None else len(value.shape)
        if len(producer.outputs) > 1 and any(output.uses() for output in producer.outputs[1:]):
            return "its normalization has further results"
        gains = [gain for gain in wanted if gain is not None] if axis in (-1, (rank or 0) - 1) else []
    elif producer.op_type == "Mul":
        gains = [gain for gain in producer.inputs if gain is not None and constant(gain) is not None]
    else:
        return f"'{producer.name}' ({producer.op_type}) has no gain to take them"
    arrays = [constant(gain) for gain in gains]
    if not gains or any(array is None or array.shape[-1:] != (length,) or array.size != length for array in arrays):
        return f"'{producer.name}' has no constant gain of one value per channel"
    if any(len(gain.uses()) > 1 or gain.is_graph_output() for gain in gains):
        return f"the gain of '{producer.name}' is shared"
    return gains


def _scales(
    inputs: Sequence[np.ndarray], readers: Sequence[Weights], quantizers: Mapping[Weights, Quantizer]
) -> np.ndarray:
    rows = np.concatenate([np.asarray(array, np.float32).reshape(-1, array.shape[-1]) for array in inputs])
    step = max(len(rows) // SAMPLED, 1)

    def quantized(weight: np.ndarray) -> np.ndarray:
        sizes = np.cumsum([each.array.size // each.length for each in readers])[:-1]
        parts = zip(np.split(weight, sizes), readers, strict=True)
        return np.concatenate([quantizers[each](part) for part, each in parts])

    stacked = np.concatenate([each.rows() for each in readers])
    return awq_scales([stacked], np.abs(rows).mean(axis=0), rows[::step], quantized, name=readers[0].name)


def _multiply(value: ir.Value, factor: np.ndarray) -> None:
    array = constant(value)
    assert array is not None
    product = (array * factor.reshape(factor.shape)).astype(array.dtype)
    value.const_value = ir.tensor(product.reshape(array.shape), name=value.name)
