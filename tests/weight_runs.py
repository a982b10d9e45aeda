"""Runs of quantize-weights, checked strictly, and what they say."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optkit.dataset.samples import Samples, random_samples
from optkit.pipeline import Context, Pipeline
from optkit_passes.quantization.quantize_weights import QuantizeWeights
from quantizing import build, random

OPSET21 = '<ir_version: 10, opset_import: ["" : 21]>'
OPSET25 = '<ir_version: 11, opset_import: ["" : 25]>'


def quantize(model: ir.Model, calibration: Samples | None = None, **options: Any) -> Context:
    """Run the pass strictly, checked on random samples, small constants too."""
    context = Context(calibration=calibration)
    options = {"min_elements": 0, **options}
    samples = list(random_samples(model, 2))
    assert not Pipeline([QuantizeWeights(**options)], strict=True).run(model, context, samples).unverified
    return context


def missed(context: Context) -> list[str]:
    return [remark.message for remark in context.remarks if remark.kind == "missed"]


def product(k: int = 80, n: int = 24, header: str = OPSET21) -> ir.Model:
    return build(f"(float[3,7,{k}] x) => (float[3,7,{n}] y) {{ y = MatMul (x, w) }}", header, w=random(k, n))
