"""Running palettize-weights strictly, and reading what it wrote."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from optkit.dataset.samples import Samples
from optkit.pipeline import Context, Pipeline
from optkit.quant.palette import Palette, palette_of
from optkit_passes.quantization.palettize_weights import PalettizeWeights
from quantizing import inputs_of


def palettized(
    model: ir.Model, samples: list[dict[str, np.ndarray]] | None = None, **options: object
) -> tuple[ir.Model, list[str], list[str]]:
    """Return the result, what was applied and what was missed."""
    result = model.clone()
    context = Context(calibration=None if samples is None else Samples(samples))
    Pipeline([PalettizeWeights.model_validate(options)], strict=True).run(result, context, inputs_of(model, 2))
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    kinds = [[r.message for r in context.remarks if r.kind == kind] for kind in ("applied", "missed")]
    return result, kinds[0], kinds[1]


def palettes(model: ir.Model) -> list[Palette]:
    found = [palette_of(node) for node in model.graph.all_nodes()]
    return [palette for palette in found if palette is not None]
