"""Weights of layers set to zero, single ones or two of every four."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field, field_validator, model_validator

from optkit.errors import InputError
from optkit.graph import constant
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.sparsity import keep_largest, keep_pattern
from optkit_passes.quantization._layer_moments import LayerInputs, LayerMoments
from optkit_passes.quantization._weight_uses import WeightUse, weight_uses, why_kept

from ._ends import first_layers, last_layers

SPARSITY = 0.5  # where neither a share nor a pattern is given
PATTERN = re.compile(r"(\d+):(\d+)")
SHORTEST = 16  # products in a sum: of fewer, each matters
DAMPING = 0.1  # how firmly weights that stay are held to what they were, in means of the Hessian's diagonal


class PruneWeights(Pass):
    """Set the weights of layers to zero that their outputs miss least.

    Weights of Conv, ConvTranspose, Gemm and MatMul; a format that keeps zeros apart (Core ML's sparse weights) stores
    each in one bit, so that 16-bit weights become smaller from one zero in 16 on. Everywhere else they are zeros like
    any others. With calibration data the weights that stay are refitted so that the layer's outputs, on inputs that the
    layers pruned before give, come closest to the float model's (Frantar & Alistarh 2023, "SparseGPT", do so column by
    column). That is worth far more than the choice of weights, and with it the smallest are the best choice:

    ================  =========  =========  =====  =========  =====
    SQNR in dB        magnitude  magnitude  Wanda      Wanda    2:4
    32 other samples     zeroed    refitted zeroed  refitted  refit
    ================  =========  =========  =====  =========  =====
    relu_lm                16.7       26.4   15.2       23.9   23.0
    resnet20                6.3       16.4    4.1       14.3   11.9
    mobilenet_v1           -1.9        9.5   -1.2        6.8    5.0
    ================  =========  =========  =====  =========  =====

    A half of the weights are 0, but for those of the first and last layers; 32 samples calibrate.

    The layers that read the model's inputs and those that make its outputs stay dense: every error of the first passes
    through the whole model, and no later layer makes up for one of the last.

    ``palettize-weights`` after it keeps the zeros and clusters the others.

    Attributes:
        sparsity: Share of a layer's weights that become 0; a half where no pattern is given either.
        pattern: ``2:4``: of every 4 neighbours along the axis of input channels 2 stay; instead of a share.
        saliency: Which weights a layer misses least: the smallest (``magnitude``), or those whose product with the root
            mean square of what they are multiplied with is smallest (``activation``: Sun et al. 2024, "A simple and
            effective pruning approach for large language models", Wanda), which needs calibration data.
        compared: The weights that a share is taken of: those of a ``layer``, or of each output channel (``row``).
        refit: Whether the weights that stay make up for those that do not, where calibration sees the layer's inputs.
        ends: Whether the first and the last layers are pruned too.
        min_elements: Constants with fewer elements stay as they are.
    """

    effect: ClassVar[Effect] = LOSSY

    sparsity: float | None = Field(default=None, gt=0, lt=1)
    pattern: str = ""
    saliency: Literal["magnitude", "activation"] = "magnitude"
    compared: Literal["layer", "row"] = "layer"
    refit: bool = True
    ends: bool = False
    min_elements: int = Field(default=1024, ge=0)

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, given: str) -> str:
        found = PATTERN.fullmatch(given)
        if given and (found is None or not 1 <= int(found[1]) < int(found[2])):
            raise ValueError("a pattern is two numbers, the smaller first, such as 2:4")
        return given

    @model_validator(mode="after")
    def _is_one_of_both(self) -> PruneWeights:
        if self.pattern and self.sparsity is not None:
            raise ValueError("give a sparsity or a pattern: a pattern is a sparsity")
        return self

    def run(self, model: ir.Model, context: Context) -> None:
        """Prune every weight of the model, bodies included, that nothing forbids to."""
        weights: dict[ir.Value, list[WeightUse]] = {}
        for node in model.graph.all_nodes():
            found = weight_uses(node)
            if isinstance(found, str):
                context.missed(node, found)
                continue
            for use in found:
                weights.setdefault(use.stored, []).append(use)
        layers = [use.node for uses in weights.values() for use in uses]
        ends = {
            **dict.fromkeys(last_layers(model.graph, layers), "the last layer, whose errors no other makes up for"),
            **dict.fromkeys(first_layers(model.graph, layers), "the first layer, whose errors pass through all others"),
        }
        for stored in list(weights):
            reason = why_kept(stored, weights[stored]) or self._why_dense(stored, weights[stored], ends)
            if reason:
                for use in weights.pop(stored):
                    context.missed(use.node, reason)
        if not weights:
            return
        inputs = self._inputs(model, context)
        for stored, uses in context.track(list(weights.items()), "Pruning", len(weights)):
            self._prune(stored, uses, inputs, context)

    def _why_dense(self, stored: ir.Value, uses: list[WeightUse], ends: dict[ir.Node, str]) -> str:
        """Return why a weight must not be pruned; empty if nothing forbids it."""
        weight = constant(stored)
        if weight is None or not weight.size:
            return f"'{stored.name}' has no elements"
        if any(use.node.op_type == "Gather" for use in uses):
            return "rows of a table enter the model as they are"
        if not self.ends and (use := next((use for use in uses if use.node in ends), None)) is not None:
            return f"{ends[use.node]} (ends = false)"
        if weight.size < self.min_elements:
            return f"{weight.size} weights are fewer than {self.min_elements}"
        found, channels = PATTERN.fullmatch(self.pattern), weight.shape[uses[0].input_axis]
        if found is not None and channels < int(found[2]):
            return f"{channels} input channels a group are too few for {self.pattern}"
        length = weight.size // weight.shape[uses[0].output_axis]
        if length < SHORTEST and self.min_elements:
            return f"each output is a sum of only {length} products"
        return ""

    def _inputs(self, model: ir.Model, context: Context) -> LayerInputs | None:
        """Return what tells the moments of layers' inputs; None where nothing is to be known of them.

        Raises:
            InputError: Activations are asked for, and there is no calibration data.
        """
        if self.saliency == "magnitude" and not self.refit:
            return None
        if context.calibration is None:
            if self.saliency == "activation":
                raise InputError("saliency 'activation' needs calibration data", hint="pass --calibration DATA")
            context.missed("calibration", "no data was given: the weights that stay are not refitted")
            return None
        return LayerInputs(model, context, self.name())

    def _prune(self, stored: ir.Value, uses: list[WeightUse], inputs: LayerInputs | None, context: Context) -> None:
        weight, node = constant(stored), uses[0].node
        assert weight is not None
        if not np.isfinite(weight).all():
            hint = "keep the nodes that read it in float with a rule"
            what = "it holds values that are not finite and cannot be pruned"
            raise InputError(what, where=f"tensor '{stored.name}'", hint=hint)
        seen = None if inputs is None else inputs.moments(uses)
        moments = None if isinstance(seen, str) else seen
        keep = self._kept(weight, uses[0], None if self.saliency == "magnitude" else moments)
        pruned = np.where(keep, weight, weight.dtype.type(0))
        if np.array_equal(pruned, weight):
            context.missed(node, f"{_percent(weight)} of its weights are 0 already")
            return
        gained = ""
        if moments is not None and self.refit:
            fitted = moments.refitted(weight, DAMPING, stored.name or "", keep=keep)
            before, after = (moments.error(weight, each) - moments.error(weight, weight) for each in (pruned, fitted))
            if after < before:
                pruned, gained = fitted, ", the others refitted"
        stored.const_value = ir.tensor(pruned, name=stored.name)
        method = "magnitude" if moments is None else self.saliency
        what = f"{_percent(pruned)} of {weight.size} weights are 0, by {method}{gained}"
        context.applied(node, what + (f"; none refitted: {seen}" if isinstance(seen, str) else ""))
        for use in uses[1:]:
            context.applied(use.node, f"shares '{stored.name}' with '{node.name}'")

    def _kept(self, weight: np.ndarray, use: WeightUse, moments: LayerMoments | None) -> np.ndarray:
        """Return which weights stay."""
        saliency = np.abs(weight.astype(np.float64))
        if moments is not None:
            saliency = saliency * np.sqrt(moments.importance)
        found = PATTERN.fullmatch(self.pattern)
        if found is not None:
            return keep_pattern(saliency, int(found[1]), int(found[2]), axis=use.input_axis)
        axis = use.output_axis if self.compared == "row" else None
        return keep_largest(saliency, SPARSITY if self.sparsity is None else self.sparsity, axis=axis)


def _percent(weight: np.ndarray) -> str:
    return f"{100 * (1 - np.count_nonzero(weight) / weight.size):.3g} %"
