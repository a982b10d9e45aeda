"""Execution with onnxruntime: the one file of the core that creates inference sessions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from optkit.errors import InputError
from optkit.evaluate.fidelity import Outputs
from optkit.model.loading import storable

Inputs = Mapping[str, np.ndarray]

BY_REFERENCE_BYTES = 1 << 16  # weights at least this large are lent to onnxruntime instead of copied

UNKNOWN_OPERATOR = "is not a registered function/op"  # onnxruntime's words

# Shared libraries with custom operators, separated like PATH.
CUSTOM_OPS_VARIABLE = "OPTKIT_CUSTOM_OPS"


class CannotRunError(InputError):
    """onnxruntime cannot load or run this model here (a missing kernel, inputs it rejects)."""


class Session:
    """A loaded model.

    Args:
        model: A model in memory, or the path of an ONNX file.
        optimize: Let onnxruntime rewrite the graph and use its fused and integer kernels. Off, every node runs as
            written: quantize and dequantize nodes in float, which is the reference for all verification.
        threads: Threads within one operator; 0 is onnxruntime's choice.

    Raises:
        CannotRunError: onnxruntime has no kernel for a node, or rejects the graph.
    """

    def __init__(self, model: ir.Model | Path, *, optimize: bool = False, threads: int = 0) -> None:
        options = session_options(optimize=optimize, threads=threads)
        try:
            source: str | bytes
            if isinstance(model, Path):
                source = str(model)
            else:
                source, self._weights = _serialize(model, options)
                options.add_external_initializers(list(self._weights), list(self._weights.values()))
            self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            sentence = _first_line(error)
            hint = f"give the library that holds it in ${CUSTOM_OPS_VARIABLE}" if UNKNOWN_OPERATOR in sentence else ""
            what = f"onnxruntime {ort.__version__} cannot load the model: {sentence}"
            raise CannotRunError(what, hint=hint) from error
        self.input_names = [value.name for value in self._session.get_inputs()]
        self.output_names = [value.name for value in self._session.get_outputs()]
        self._overridable = [value.name for value in self._session.get_overridable_initializers()]

    def run(self, inputs: Inputs, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run one sample and return its outputs by name.

        Args:
            inputs: Arrays by name, for inputs and for initializers that are inputs as well; other names are ignored.
            outputs: The outputs wanted; all of them by default.

        Raises:
            CannotRunError: An input is missing or rejected, or a kernel fails.
        """
        names = list(outputs) if outputs is not None else self.output_names
        taken = [name for name in (*self.input_names, *self._overridable) if name in inputs]
        try:
            values = self._session.run(names, {name: inputs[name] for name in taken})
        except Exception as error:
            what = f"the model does not run on the given inputs: {_first_line(error)}"
            raise CannotRunError(what, hint=self._open_dims()) from error
        return dict(zip(names, values, strict=True))

    def _open_dims(self) -> str:
        """Return what to try where sizes were chosen for dimensions that the model leaves open, or nothing."""
        shapes = {value.name: value.shape or [] for value in self._session.get_inputs()}
        open_dims = dict.fromkeys(
            dim if isinstance(dim, str) else f"{name}.{axis}"
            for name, shape in shapes.items()
            for axis, dim in enumerate(shape)
            if not isinstance(dim, int)
        )
        names = ", ".join(list(open_dims)[:4]) + (", ..." if len(open_dims) > 4 else "")
        return f"a size of an open dimension ({names}) may not suit it: --dim NAME=SIZE fixes one" if open_dims else ""


def session_options(*, optimize: bool, threads: int = 0) -> ort.SessionOptions:
    """Return the options of every session, with the user's custom operators registered.

    Raises:
        InputError: A library named in ``$OPTKIT_CUSTOM_OPS`` does not load.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come back as exceptions
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # the arena doubles its blocks: it would set the peak memory
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if not optimize:
        # Weights packed ahead take other kernels than computed tensors: folding constants would change the rounding.
        options.add_session_config_entry("session.disable_prepacking", "1")
    for library in filter(None, os.environ.get(CUSTOM_OPS_VARIABLE, "").split(os.pathsep)):
        try:
            options.register_custom_ops_library(library)
        except Exception as error:
            what = f"the custom operator library does not load: {_first_line(error)}"
            raise InputError(what, where=library) from error
    return options


def run_samples(model: ir.Model | Path, samples: Iterable[Inputs], *, optimize: bool = False) -> list[Outputs]:
    """Run every sample and return the outputs of each."""
    session = Session(model, optimize=optimize)
    return [session.run(sample) for sample in samples]


def run_with_intermediates(model: ir.Model, sample: Inputs, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Run one sample with optimizations off and return the named tensors of the main graph.

    Names that the main graph does not compute are left out of the result.
    """
    observed = with_outputs(model, names)
    return Session(observed).run(sample)


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """Return a copy of ``model``, sharing its tensors, whose outputs also include the named values."""
    copy = model.clone()
    known = {value.name: value for value in copy.graph.outputs}
    computed = {value.name: value for node in copy.graph for value in node.outputs if value.name}
    for name in names:
        if name in computed and name not in known:
            copy.graph.outputs.append(computed[name])
            known[name] = computed[name]
    return copy


def _serialize(model: ir.Model, options: ort.SessionOptions) -> tuple[bytes, dict[str, ort.OrtValue]]:
    """Return the model without its larger weights, and those weights as they lie in memory.

    Weights in files stay there: onnxruntime maps them itself from the one folder that ``options`` can name. The others
    are lent to it, outside the protobuf, so that no size is too large; it keeps a copy of its own.
    """
    shell = storable(model)
    weights: dict[str, ort.OrtValue] = {}
    main = shell.graph.initializers
    folder: str | None = None
    for name, value in ((n, v) for graph in shell.graphs() for n, v in graph.initializers.items()):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and folder in (None, str(tensor.base_dir)):
            folder = str(tensor.base_dir)
        elif tensor is not None and main.get(name) is value and _lendable(tensor):
            weights[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()))
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=name)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return ir.to_proto(shell).SerializeToString(), weights


def _lendable(tensor: ir.TensorProtocol) -> bool:
    """Whether NumPy has the type: bfloat16 and float8 it lacks, sub-byte types are packed, strings are objects."""
    kinds = tensor.dtype != ir.DataType.STRING and tensor.dtype.bitwidth >= 8 and tensor.nbytes >= BY_REFERENCE_BYTES
    return kinds and tensor.numpy().dtype.kind in "fiub"


# What onnxruntime's ORT_ENFORCE puts before its sentence: file:line function(arguments) qualifiers.
_SOURCE_LOCATION = re.compile(
    r"\S+\.(?:h|cc|cpp):\d+ [^\s(]+(?:\(\))?(?:\([^)]*\))?(?:::<lambda\(\)>)?(?: const)? (?:\[with [^]]*\] )?"
)


def _first_line(error: Exception) -> str:
    """Return the error's sentence without onnxruntime's status prefix and source location."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
    return _SOURCE_LOCATION.sub("", text)
