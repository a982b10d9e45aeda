"""Equalization: channels of activations are scaled so that one integer scale fits all of them, and scaled back."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.errors import InputError
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.walk import Walk, require_samples, spread_samples
from optkit.session import CannotRunError

from ._equalization import CROSS_LAYER, SMOOTHING, Trial
from ._formats import Formats, choose_formats
from ._layers import CONVOLUTIONS
from ._seams import Seam, find_seams

KEPT = "its channels keep their scales"


class EqualizeChannels(Pass):
    """Move magnitude from channels with large activations or weights to where the integers have room for it.

    All channels of an activation share one scale once it is quantized, and so do all weights where the target takes one
    scale per tensor. Where a convolution, a matrix product or a gain makes channels that only layers with constant
    weights read, each channel can be divided by a power of 2 where it is made, and multiplied by it in the weights that
    read it: in float the model computes the same. Cross-layer equalization and SmoothQuant propose scales; those are
    kept with which the layers behind lose least on calibration samples after rounding, if they gain enough.

    A clamp at an upper bound (ReLU6) is passed by scaling only channels that stay clear of it in the samples. Others
    might not, so that this alone is not exact.

    Attributes:
        weight_bits: Width that weights will have.
        activation_bits: Width that activations will have.
        per_channel: Whether each output channel will have a scale for its weights, where the target takes that.
        products_only: Whether only channels that nothing but matrix products read are tried: the quickest, and the
            ones that gain where each channel has its own scale.
        clamps: Whether clamps are passed; None: where weights share one scale, which clamped networks do not survive.
        smallest_gain: Scales that gain less are not worth it; in dB of the readers' outputs.
        samples: The most calibration samples to observe channels in.
        tried: The most of them to try scales on.
    """

    effect: ClassVar[Effect] = LOSSY

    weight_bits: Literal[4, 8] = 8
    activation_bits: Literal[8, 16] = 8
    per_channel: bool = True
    products_only: bool = False
    clamps: bool | None = None
    smallest_gain: float = Field(default=0.3, ge=0)
    samples: int = Field(default=128, ge=1)
    tried: int = Field(default=8, ge=1)

    def run(self, model: ir.Model, context: Context) -> None:
        """Scale the constants of the main graph in place."""
        formats = choose_formats(context.target, self.weight_bits, self.activation_bits, per_channel=self.per_channel)
        samples = require_samples(context.calibration, "equalization")
        clamps = not formats.per_channel if self.clamps is None else self.clamps
        seams = []
        for found in find_seams(model.graph, clips=clamps):
            if not isinstance(found, Seam):
                node, reason = found
                context.missed(node, f"{KEPT}: {reason}")
            elif self.products_only and any(each.node.op_type in CONVOLUTIONS for each in found.readers):
                context.missed(found.where, f"{KEPT}: a convolution reads them")
            else:
                seams.append(found)
        if seams:  # else no sample needs to be read
            walk = Walk(model, spread_samples(samples, self.samples), optimize=True, name="equalization")
            for seam in context.track(seams, "Equalizing channels", len(seams)):
                walk.advance(seam.where)
                self._equalize(seam, walk, formats, context)
        if len(samples) == 1:
            context.missed("calibration", "one sample only: ranges seen in it may be too narrow for others")

    def _equalize(self, seam: Seam, walk: Walk, formats: Formats, context: Context) -> None:
        """Scale the channels of a seam by the best proposal, if it gains enough; the walk stands before its maker."""
        inputs = [array for array in walk.values(seam.makers[0].data) if array.size]
        if not inputs:
            context.missed(seam.where, f"{KEPT}: no calibration sample reaches it")
            return
        try:
            trial = Trial(seam, walk.model, inputs, formats, most=self.tried)
        except CannotRunError as error:
            where = f"node '{seam.where.name}' on calibration data"
            raise InputError(str(error), where=where, hint=error.hint) from error
        before = trial.error(None)
        proposals = SMOOTHING if formats.per_channel else SMOOTHING + CROSS_LAYER
        least, powers = min(((trial.error(powers), powers) for powers in proposals), key=lambda pair: pair[0])
        gain = 10 * np.log10(before / least) if before > 0 and least > 0 else 0.0
        scale = trial.scales(powers)
        if gain < self.smallest_gain or (scale == 1).all():
            context.missed(seam.where, f"{KEPT}: the best others gain {max(gain, 0.0):.2f} dB")
            return
        for each in seam.absorptions:
            each.value.const_value = ir.tensor(each.scaled(each.array, scale), name=each.value.name)
        readers = f"{len(seam.readers)} layer{'s' * (len(seam.readers) > 1)} behind"
        what = f"{int((scale != 1).sum())} of {seam.size} channels scaled by {scale.min():g} to {scale.max():g}"
        context.applied(seam.where, f"{what}: {gain:.1f} dB less error in {readers}")
