"""Models and measures for the tests of bias correction and of rounding inside quantize-static."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.pipeline import Remark
from optkit.session import run_samples, with_outputs
from quantizing import build, inputs_of, random

NEW = '<ir_version: 10, opset_import: ["" : 21]>'
Data = list[dict[str, np.ndarray]]

EVERYWHERE = (-np.inf, np.inf)


def conv_relu_conv() -> ir.Model:
    return build(
        "(float[1,3,9,9] x) => (float[1,4,9,9] y) { a = Conv <pads=[1,1,1,1]> (x, v, c)  r = Relu (a) "
        "y = Conv <pads=[1,1,1,1]> (r, w, d) }",
        v=random(8, 3, 3, 3),
        c=random(8),
        w=random(4, 8, 3, 3),
        d=random(4),
    )


def two_gemms(header: str = NEW, *, width: int = 96) -> ir.Model:
    """Two products, the first with as many inputs as blocks are tried on."""
    return build(
        f"(float[16,{width}] x) => (float[16,6] y) {{ a = Gemm <transB=1> (x, v, c)  r = Relu (a)  "
        "y = Gemm (r, w, d) }",
        header,
        v=random(24, width),
        c=random(24),
        w=random(24, 6),
        d=random(6),
    )


def mixed(model: ir.Model, count: int = 16) -> Data:
    """Samples whose elements are correlated and have a mean, as those of activations."""
    samples = inputs_of(model, count)
    width = samples[0]["x"].shape[-1]
    mix = random(width, width, seed=7)
    common = np.random.default_rng(3).standard_normal(count).astype(np.float32) + np.float32(0.5)
    return [{"x": shift + sample["x"] @ mix} for sample, shift in zip(samples, common, strict=True)]


def layer_outputs(model: ir.Model) -> list[str]:
    return [node.outputs[0].name or "" for node in model.graph if node.op_type in ("Conv", "Gemm", "ConvTranspose")]


def errors(original: ir.Model, result: ir.Model, name: str, samples: Data, bounds: tuple[float, float]) -> np.ndarray:
    """Return the errors [channels, values] of a layer's clamped outputs; ``name`` is the layer's in ``original``."""
    kept = {value.name for node in result.graph for value in node.outputs}
    other = f"{name}_float" if f"{name}_float" in kept else name  # a graph output that is quantized takes its name
    pairs = zip(
        run_samples(with_outputs(original, [name]), samples),
        run_samples(with_outputs(result, [other]), samples),
        strict=True,
    )
    lost = [np.clip(exact[name], *bounds).astype(np.float64) - np.clip(found[other], *bounds) for exact, found in pairs]
    return np.concatenate([np.moveaxis(each, 1, 0).reshape(each.shape[1], -1) for each in lost], axis=1)


def worst_mean(*arguments: Any) -> float:
    return float(np.abs(errors(*arguments).mean(axis=1)).max())


def power(*arguments: Any) -> float:
    return float(np.square(errors(*arguments)).mean())


def decibels(before: float, after: float) -> float:
    return float(10 * np.log10(before / after))


def corrected(remarks: Sequence[Remark]) -> list[str]:
    return [r.node for r in remarks if r.kind == "applied" and r.message.startswith("bias corrected by up to ")]


def rounded(remarks: Sequence[Remark]) -> list[str]:
    return [r.message for r in remarks if r.message.startswith("weights rounded together")]


def refusals(remarks: Sequence[Remark]) -> list[str]:
    return [r.message for r in remarks if r.kind == "missed" and r.message.startswith("weights rounded to nearest")]


def digest(model: ir.Model) -> str:
    return hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).hexdigest()
