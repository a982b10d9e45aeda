"""Intel's neural-compressor, silenced: it is handed a copy of the model as a file, and its result is read back.

The one file that imports it. 3.7.1 is its newest version with an ONNX part.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from optkit.errors import InputError, MissingDependencyError
from optkit.model.loading import in_memory, load, save

Sample = Mapping[str, np.ndarray]
Algorithm = Literal["static", "dynamic", "smoothquant", "rtn", "awq", "gptq"]

WEIGHT_ONLY = frozenset({"rtn", "awq", "gptq"})
BITS = 4  # of weights alone: at any other number it writes rounded floats, which are no smaller
INSTALL = "pip install 'optkit[inc]'"
HINT = "choose another algorithm, quantize-static, or quantize-weights"


@dataclass(frozen=True)
class Order:
    """What neural-compressor is asked for.

    Attributes:
        algorithm: How to quantize.
        floats: Names of the nodes that stay float.
        block_size: Weights that share a scale, with weights alone.
        symmetric: Whether weights alone have no zero points.
        alpha: How much of the range SmoothQuant moves from activations into weights.
        reduce_range: Whether 8-bit weights give up one bit.
    """

    algorithm: Algorithm
    floats: frozenset[str]
    block_size: int
    symmetric: bool
    alpha: float
    reduce_range: bool


class NeuralCompressor:
    """The parts of neural-compressor that are used.

    Raises:
        MissingDependencyError: It or its ONNX part is not installed.

    Attributes:
        version: Its version.
    """

    def __init__(self) -> None:
        try:
            with _silent(io.StringIO()):
                import neural_compressor
                from neural_compressor import PostTrainingQuantConfig, quantization, set_workspace
                from neural_compressor.adaptor.ox_utils import weight_only
        except ImportError as error:
            what = f"quantize-inc needs neural-compressor with its ONNX part: {error}"
            raise MissingDependencyError(what, hint=INSTALL) from error
        self.version: str = neural_compressor.__version__
        self._fit: Callable[..., Any] = quantization.fit
        self._settings: Callable[..., Any] = PostTrainingQuantConfig
        self._set_workspace: Callable[[str], None] = set_workspace
        self._weight_only: Any = weight_only  # its main function fails at products of two activations

    def quantize(self, model: ir.Model, order: Order, samples: Sequence[Sample]) -> ir.Model:
        """Return what neural-compressor makes of a copy of the model.

        Args:
            model: The model, which is not changed.
            order: What to do.
            samples: Calibration samples; empty where the algorithm needs none.

        Raises:
            InputError: It fails, returns nothing, or returns what is no valid model.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)  # a fresh one: it appends to files of weights that are there
            save(_prepared(model), folder / "model.onnx")
            failure = self._run(folder, order, samples)
            if failure:
                what = f"neural-compressor {self.version} does not take this model by {order.algorithm}: {failure}"
                raise InputError(what.replace(name, "..."), where="quantize-inc", hint=HINT)
            try:
                return in_memory(load(folder / "result" / "model.onnx"))
            except InputError as error:
                what = f"what neural-compressor {self.version} makes of this model by {order.algorithm} is not valid"
                raise InputError(f"{what}: {error.what}", where="quantize-inc", hint=HINT) from error

    def _run(self, folder: Path, order: Order, samples: Sequence[Sample]) -> str:
        """Quantize ``model.onnx`` into ``result/model.onnx``, and return why that failed, or nothing."""
        said = io.StringIO()
        (folder / "result").mkdir()
        with _silent(said):
            try:
                self._set_workspace(str(folder / "workspace"))  # it always writes a history there
                run = self._run_weights if order.algorithm in WEIGHT_ONLY else self._run_integers
                result = run(str(folder / "model.onnx"), order, _Loader(samples))
                if result is not None:
                    result.save(str(folder / "result" / "model.onnx"))
            except Exception as error:  # whatever it raises: it has no errors of its own
                return f"{type(error).__name__}: {error}"
        return "" if result is not None else last_exception(said.getvalue())

    def _run_weights(self, path: str, order: Order, loader: _Loader) -> Any:
        blocks = {
            "weight_config": dict.fromkeys(sorted(order.floats), "fp32"),
            "num_bits": BITS,
            "group_size": order.block_size,
            "scheme": "sym" if order.symmetric else "asym",
        }
        if order.algorithm == "rtn":
            return self._weight_only.rtn_quantize(path, **blocks)
        quantize = self._weight_only.gptq_quantize if order.algorithm == "gptq" else self._weight_only.awq_quantize
        return quantize(path, loader, n_samples=len(loader.samples), **blocks)

    def _run_integers(self, path: str, order: Order, loader: _Loader) -> Any:
        excluded = {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["fp32"]}}
        patterns = [f"{re.escape(name)}(/MatMulAddFusion)?(_MatMul)?" for name in sorted(order.floats)]
        smooth = {"smooth_quant": True, "smooth_quant_args": {"alpha": order.alpha}}
        settings = self._settings(
            approach="dynamic" if order.algorithm == "dynamic" else "static",
            quant_format="default" if order.algorithm == "dynamic" else "QDQ",
            recipes=smooth if order.algorithm == "smoothquant" else {},
            op_name_dict=dict.fromkeys(patterns, excluded) or None,
            reduce_range=order.reduce_range,  # left open, it would look at the machine it runs on
            quant_level=1,  # once, without a search by accuracy
            calibration_sampling_size=[max(len(loader.samples), 1)],
        )
        return self._fit(path, settings, calib_dataloader=loader if loader.samples else None)


class _Loader:
    """Calibration samples as neural-compressor asks for them: pairs of inputs and labels."""

    batch_size = 1

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        return ((dict(sample), 0) for sample in self.samples)


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


def last_exception(text: str) -> str:
    """Return the last exception of a printed traceback in one line: its main function prints what it catches."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception|Fail)\b", line)]
    return lines[-1] if lines else "it returned no model"


def _prepared(model: ir.Model) -> ir.Model:
    """Return a copy for neural-compressor, which transposes weights and leaves their old shapes beside them."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if not value.is_graph_input() and not value.is_graph_output():
            value.type = value.shape = None
    copy.graph.opset_imports.setdefault("com.microsoft", 1)  # the domain of MatMulNBits, which it does not declare
    return copy
