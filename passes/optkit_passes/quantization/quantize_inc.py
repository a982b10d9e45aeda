"""Quantization by Intel's neural-compressor, as a pass among the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.errors import InputError
from optkit.graph import constant
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.walk import require_finite, require_samples
from optkit.recipe import PRECISION_KEY
from optkit.target import Target

from ._neural_compressor import WEIGHT_ONLY, Algorithm, NeuralCompressor, Order, Sample

CALIBRATED = frozenset({"static", "smoothquant", "awq", "gptq"})
STACKING = frozenset({"smoothquant", "awq"})  # these join samples along their first axis
LAYER_OPS = frozenset({"Conv", "Gemm", "MatMul"})

# What is appended to a node's name: by onnxruntime, whose basic optimizations neural-compressor applies, where it makes
# a Gemm of a MatMul and an Add; by neural-compressor where it makes a MatMul of a Gemm; and where it quantizes.
RENAMED = [fused + split for fused in ("", "/MatMulAddFusion") for split in ("", "_MatMul")]
QUANTIZED = [f"{renamed}{end}" for renamed in RENAMED for end in ("_quant", "_Q4")]
HOW = {
    "MatMulNBits": "weights in 4 bits, one scale for each block of {block}",
    "MatMulInteger": "weights in 8 bits, activations in 8 bits with a scale for each run",
    "ConvInteger": "weights in 8 bits, activations in 8 bits with a scale for each run",
    "Gather": "table stored in 8 bits",
}
GPTQ_ROUNDS = "neural-compressor's gptq rounds to nearest: it passes no rounding error on to the weights that follow"


class QuantizeInc(Pass):
    """Quantize with Intel's neural-compressor (``pip install 'optkit[inc]'``), to have its algorithms side by side.

    It sees the main graph of the float model and chooses by itself what becomes integer; nodes that a rule keeps in
    float are excluded. Its weight-only algorithms replace MatMul by onnxruntime's MatMulNBits.

    Its ``gptq`` never passes a rounding error on (it reads columns of a triangular matrix where the algorithm has
    rows), so that its result is no better than that of ``rtn``; ``quantize-weights`` has one that does.

    Attributes:
        algorithm: ``static`` (8 bits, scales from calibration), ``dynamic`` (8 bits, scales at run time),
            ``smoothquant`` (``static`` after ranges moved from activations into weights); or weights alone in 4 bits:
            ``rtn`` (rounded to nearest), ``awq``, ``gptq``.
        block_size: Weights that share a scale, with weights alone: a power of two, at least 16.
        symmetric: Whether weights alone are quantized without zero points. Where they have some, it packs those of an
            odd number of blocks wrongly; such nodes stay float.
        alpha: How much of the range smoothquant moves: 0 none, 1 all.
    """

    effect: ClassVar[Effect] = LOSSY

    algorithm: Algorithm = "static"
    block_size: int = Field(default=32, ge=16)
    symmetric: bool = True
    alpha: float = Field(default=0.5, ge=0, le=1)

    def run(self, model: ir.Model, context: Context) -> None:
        """Quantize the main graph; the model's graph is replaced by neural-compressor's.

        Raises:
            MissingDependencyError: neural-compressor is not installed, or only a version without ONNX.
            InputError: There is no calibration data where it is needed, or neural-compressor fails on this model.
        """
        tool = NeuralCompressor()
        self._check(model)
        samples: Sequence[Sample] = ()
        if self.algorithm in CALIBRATED:
            samples = require_samples(context.calibration, f"'{self.algorithm}'")
            self._check_samples(samples)
        floats = self._kept(model, context)
        _remark_bodies(model, context)
        if not any(node.op_type in LAYER_OPS and node.name not in floats for node in model.graph):
            return
        reduce_range = _reduces_range(context.target)
        order = Order(self.algorithm, frozenset(floats), self.block_size, self.symmetric, self.alpha, reduce_range)
        result = tool.quantize(model, order, samples)
        if self._remark(model, result, floats, context):
            _take(model, result)
            if self.algorithm == "gptq":
                context.missed("gptq", GPTQ_ROUNDS)

    def _check(self, model: ir.Model) -> None:
        """Refuse block sizes that onnxruntime does not take, and weights that are not finite.

        Raises:
            InputError: Either.
        """
        if self.block_size & (self.block_size - 1):
            raise InputError(f"block_size {self.block_size} is not a power of two", where="quantize-inc")
        for node in (node for node in model.graph if node.op_type in LAYER_OPS):
            for value in node.inputs:
                array = constant(value)
                if value is not None and array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
                    what = f"tensor '{value.name}' holds NaN or infinite values, which neural-compressor would spread"
                    raise InputError(
                        what, where=f"node '{node.name}'", hint="quantize-static keeps such nodes in float"
                    )

    def _check_samples(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that are not finite, or that the algorithm cannot join.

        Raises:
            InputError: A sample holds NaN or infinity, or samples differ in shape.
        """
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for index, sample in enumerate(samples):
            for name, array in sample.items():
                shapes.setdefault(name, set()).add(array.shape)
                if array.dtype.kind == "f" and array.size:
                    require_finite(array, name, index)
        uneven = next((name for name, found in shapes.items() if len(found) > 1), None)
        if uneven is not None and self.algorithm in STACKING:
            listed = " and ".join(str(list(shape)) for shape in sorted(shapes[uneven])[:2])
            what = f"neural-compressor's {self.algorithm} needs samples of one shape, and '{uneven}' has {listed}"
            raise InputError(what, where="calibration", hint="cut them to one length, or choose another algorithm")

    def _kept(self, model: ir.Model, context: Context) -> set[str]:
        """Return the nodes of the main graph that must stay float, and remark on each."""
        kept: set[str] = set()
        for node in (node for node in model.graph if node.name):
            precision = node.metadata_props.get(PRECISION_KEY, "")
            reason = f"kept in float by a rule ({precision})" if precision.startswith("fp") else self._why_float(node)
            if reason:
                kept.add(node.name or "")
                context.missed(node, reason)
        return kept

    def _why_float(self, node: ir.Node) -> str:
        """Return why neural-compressor must not be given a weight to pack, or nothing."""
        if self.algorithm not in WEIGHT_ONLY or node.op_type != "MatMul":
            return ""
        if self.algorithm == "awq" and (node.inputs[0] is None or node.inputs[0].producer() is None):
            return "neural-compressor's awq needs a node before it, and its input is the model's own"
        weight = constant(node.inputs[1])
        if weight is None or weight.ndim != 2:
            return ""
        if self.algorithm == "awq" and weight.shape[0] % self.block_size:
            return f"neural-compressor's awq does not take {weight.shape[0]} rows in blocks of {self.block_size}"
        blocks = -(-weight.shape[0] // self.block_size)
        if not self.symmetric and blocks % 2:
            return f"neural-compressor packs the zero points of an odd number of blocks ({blocks}) wrongly"
        return ""

    def _why_left(self, node: ir.Node) -> str:
        """Return why a layer that was offered stayed float."""
        if self.algorithm in WEIGHT_ONLY and node.op_type != "MatMul":
            return f"neural-compressor's {self.algorithm} takes MatMul alone"
        if self.algorithm in WEIGHT_ONLY and constant(node.inputs[1]) is None:
            return "its second input is no constant weight"
        return f"neural-compressor's {self.algorithm} left it in float"

    def _remark(self, model: ir.Model, result: ir.Model, floats: set[str], context: Context) -> bool:
        """Remark on every node, give nodes their old names back, and return whether any was quantized."""
        found = {node.name: node for node in result.graph}
        computed = {value.name for node in result.graph for value in node.outputs}
        by = f"by neural-compressor's {self.algorithm}"
        folded: list[ir.Node] = []
        changed = False
        for node in model.graph:
            name = node.name or ""
            new = next((found[name + end] for end in QUANTIZED if name + end in found), None)
            same = next((found[name + end] for end in RENAMED if name + end in found), None)
            if new is not None:
                context.applied(node, f"{_how(node, new).format(block=self.block_size)}, {by}")
            elif same is not None and _reads_integers(same):
                context.applied(node, f"activations in 8 bits, {by}")
            elif node.op_type in LAYER_OPS and name not in floats:
                context.missed(node, self._why_left(node))
            elif same is None and not any(value.name in computed for value in node.outputs):
                folded.append(node)
            changed = changed or new is not None or (same is not None and _reads_integers(same))
            kept = new or same
            if kept is not None:
                kept.name = node.name
        for node in folded if changed else ():
            context.applied(node, f"removed: folded into its neighbours {by}")
        return changed


def _reduces_range(target: Target | None) -> bool:
    weights = target.weights.get("int8") if target is not None else None
    return target is not None and weights is not None and target.needs_reduced_range(weights)


def _how(node: ir.Node, new: ir.Node) -> str:
    if new.op_type in HOW:
        return HOW[new.op_type]
    weighted = node.op_type in LAYER_OPS and any(constant(value) is not None for value in node.inputs)
    return f"{'weights and ' if weighted else ''}activations in 8 bits with fixed scales"


def _reads_integers(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return any(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def _remark_bodies(model: ir.Model, context: Context) -> None:
    for node in model.graph.all_nodes():
        if node.graph is not model.graph and node.op_type in LAYER_OPS:
            context.missed(node, "inside the body of a control-flow node, which neural-compressor does not enter")


def _take(model: ir.Model, result: ir.Model) -> None:
    """Replace the model's graph by the result's, with the shapes, notes and operator sets that the model had."""
    old, new = model.graph, result.graph
    for before, after in zip([*old.inputs, *old.outputs], [*new.inputs, *new.outputs], strict=True):
        after.type, after.shape = before.type, before.shape
    notes = {node.name: node.metadata_props for node in old}
    for node in new:
        node.metadata_props.update(notes.get(node.name, {}))
    used = {node.domain for node in new.all_nodes()} | {"", *old.opset_imports}
    for domain in [domain for domain in new.opset_imports if domain not in used]:
        del new.opset_imports[domain]
    order = sorted(new.initializers.items())  # it keeps some of them in sets
    new.initializers.clear()
    new.initializers.update(order)
    new.name = old.name
    model.graph = new
    model.ir_version = max(model.ir_version, result.ir_version)
