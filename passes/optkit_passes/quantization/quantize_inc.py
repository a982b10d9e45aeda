"""Quantization by Intel's neural-compressor, handed the model as a file and its result taken back."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.errors import InputError, MissingDependencyError
from optkit.graph import constant
from optkit.model.loading import in_memory, load, save
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.walk import require_finite, require_samples
from optkit.recipe import PRECISION_KEY
from optkit.target import Target

Sample = Mapping[str, np.ndarray]
Algorithm = Literal["static", "dynamic", "smoothquant", "rtn", "awq", "gptq"]

WEIGHT_ONLY = frozenset({"rtn", "awq", "gptq"})
CALIBRATED = frozenset({"static", "smoothquant", "awq", "gptq"})
STACKING = frozenset({"smoothquant", "awq"})  # these join samples along their first axis
LAYER_OPS = frozenset({"Conv", "Gemm", "MatMul"})
BITS = 4  # of weights alone: at any other number it writes rounded floats, which are no smaller

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
INSTALL = "pip install 'optkit[inc]'"


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
        fit = _neural_compressor()
        self._check(model)
        samples: Sequence[Sample] = ()
        if self.algorithm in CALIBRATED:
            samples = require_samples(context.calibration, f"'{self.algorithm}'")
            self._check_samples(samples)
        floats = self._kept(model, context)
        _remark_bodies(model, context)
        if not any(node.op_type in LAYER_OPS and node.name not in floats for node in model.graph):
            return
        result = self._quantized(fit, model, samples, floats, context.target)
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

    def _quantized(
        self, fit: _Library, model: ir.Model, samples: Sequence[Sample], floats: set[str], target: Target | None
    ) -> ir.Model:
        """Return what neural-compressor makes of a copy of the model in a folder of its own.

        Raises:
            InputError: It fails, or returns nothing.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save(
                _prepared(model), folder / "model.onnx"
            )  # a fresh folder: it appends to files of weights that are there
            loader = _Loader(samples)
            said = io.StringIO()
            failure = ""
            with _silent(said):
                try:
                    fit.set_workspace(str(folder / "workspace"))
                    result = self._call(fit, str(folder / "model.onnx"), loader, floats, target)
                    if result is not None:
                        (folder / "result").mkdir()
                        result.save(str(folder / "result" / "model.onnx"))
                except Exception as error:
                    failure = f"{type(error).__name__}: {error}"
                    result = None
            if result is None:
                what = f"neural-compressor {fit.version} does not take this model by {self.algorithm}"
                raise InputError(
                    f"{what}: {failure or _last_exception(said.getvalue())}",
                    where="quantize-inc",
                    hint="choose another algorithm, or quantize-static, quantize-weights",
                )
            return in_memory(load(folder / "result" / "model.onnx"))

    def _call(self, fit: _Library, path: str, loader: _Loader, floats: set[str], target: Target | None) -> Any:
        if self.algorithm in WEIGHT_ONLY:
            blocks = {
                "weight_config": dict.fromkeys(floats, "fp32"),
                "num_bits": BITS,
                "group_size": self.block_size,
                "scheme": "sym" if self.symmetric else "asym",
            }
            if self.algorithm == "rtn":
                return fit.weight_only.rtn_quantize(path, **blocks)
            run = fit.weight_only.gptq_quantize if self.algorithm == "gptq" else fit.weight_only.awq_quantize
            return run(path, loader, n_samples=len(loader.samples), **blocks)
        excluded = {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["fp32"]}}
        smooth = {"smooth_quant": True, "smooth_quant_args": {"alpha": self.alpha}}
        settings = fit.settings(
            approach="dynamic" if self.algorithm == "dynamic" else "static",
            quant_format="default" if self.algorithm == "dynamic" else "QDQ",
            recipes=smooth if self.algorithm == "smoothquant" else {},
            op_name_dict={f"{re.escape(name)}(/MatMulAddFusion)?(_MatMul)?": excluded for name in sorted(floats)}
            or None,
            reduce_range=_reduces_range(target),  # else it would look at the machine it runs on
            quant_level=1,  # once, without a search by accuracy
            calibration_sampling_size=[max(len(loader.samples), 1)],
        )
        return fit.fit(path, settings, calib_dataloader=loader if loader.samples else None)

    def _remark(self, model: ir.Model, result: ir.Model, floats: set[str], context: Context) -> bool:
        """Remark on every node, give quantized nodes their old names back, and return whether there are any."""
        found = {node.name: node for node in result.graph}
        changed = False
        for node in model.graph:
            name = node.name or ""
            new = next((found[name + end] for end in QUANTIZED if name + end in found), None)
            same = next((found[name + end] for end in RENAMED if name + end in found), None)
            if new is not None:
                how = _how(node, new).format(block=self.block_size)
                context.applied(node, f"{how}, by neural-compressor's {self.algorithm}")
                changed, new.name = True, node.name
                continue
            if same is not None and _reads_integers(same):
                context.applied(node, f"activations in 8 bits, by neural-compressor's {self.algorithm}")
                changed = True
            elif node.op_type in LAYER_OPS and node.name not in floats:
                context.missed(node, self._why_left(node))
            elif same is None and not _is_renamed(node, result):
                context.applied(node, "removed: folded into its neighbours by neural-compressor")
            if same is not None:
                same.name = node.name
        return changed


class _Loader:
    """Calibration samples as neural-compressor asks for them: pairs of inputs and labels."""

    batch_size = 1

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        return ((dict(sample), 0) for sample in self.samples)


class _Library:
    """The parts of neural-compressor that are used.

    Attributes:
        version: Its version.
        fit: Its main function.
        settings: The class of its settings.
        set_workspace: Where it writes what it always writes.
        weight_only: Its functions for weights alone: its main function fails at products of two activations.
    """

    def __init__(self) -> None:
        import neural_compressor
        from neural_compressor import PostTrainingQuantConfig, quantization, set_workspace
        from neural_compressor.adaptor.ox_utils import weight_only

        self.version: str = neural_compressor.__version__
        self.fit: Callable[..., Any] = quantization.fit
        self.settings: Callable[..., Any] = PostTrainingQuantConfig
        self.set_workspace: Callable[[str], None] = set_workspace
        self.weight_only: Any = weight_only


def _neural_compressor() -> _Library:
    """Import neural-compressor.

    Raises:
        MissingDependencyError: It or a part of it is not there.
    """
    try:
        with _silent(io.StringIO()):
            return _Library()
    except ImportError as error:
        what = f"quantize-inc needs neural-compressor with its ONNX part: {error}"
        raise MissingDependencyError(what, hint=INSTALL) from error


@contextlib.contextmanager
def _silent(said: io.StringIO) -> Iterator[None]:
    """Catch what is printed, and keep logging and warnings quiet."""
    disabled = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _last_exception(text: str) -> str:
    """Return the last exception of a printed traceback in one line."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception|Fail)\b", line)]
    return lines[-1] if lines else "it returned no model"


def _reduces_range(target: Target | None) -> bool:
    weights = target.weights.get("int8") if target is not None else None
    return target is not None and weights is not None and target.needs_reduced_range(weights)


def _prepared(model: ir.Model) -> ir.Model:
    """Return a copy for neural-compressor: it transposes weights and leaves their old shapes beside them."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if not value.is_graph_input() and not value.is_graph_output():
            value.type = value.shape = None
    copy.graph.opset_imports.setdefault("com.microsoft", 1)  # the domain of MatMulNBits, which it does not declare
    return copy


def _how(node: ir.Node, new: ir.Node) -> str:
    if new.op_type in HOW:
        return HOW[new.op_type]
    weighted = node.op_type in LAYER_OPS and any(constant(value) is not None for value in node.inputs)
    return f"{'weights and ' if weighted else ''}activations in 8 bits with fixed scales"


def _reads_integers(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return any(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def _is_renamed(node: ir.Node, result: ir.Model) -> bool:
    """Whether the node's first result is still computed under its name, by a node with another one."""
    names = {value.name for each in result.graph for value in each.outputs}
    return any(value.name in names for value in node.outputs)


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
    new.name = old.name
    model.graph = new
    model.ir_version = max(model.ir_version, result.ir_version)
