"""Runs a model over calibration samples piece by piece, so that a pass can change layers in order and see the effect.

A method that fits a layer to the inputs it will really get needs those inputs with every earlier layer already changed.
Running the whole model once per layer would cost layers squared; keeping every tensor would cost all the memory. A walk
runs each node once and holds, between two pieces, only the values that later nodes read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.errors import InputError
from optkit.graph import bodies, is_constant
from optkit.model.loading import graph_inputs
from optkit.session import CannotRunError, Session


class Walk:
    """The state of a model that has been run up to some node, for every sample.

    Nodes that were not reached yet may be changed, replaced, added or removed between two calls: what is run is what
    stands in the graph when the walk gets there. Nodes that were passed must stay, but for those that only depend on
    constants, such as dequantized weights: they are never held, and run anew with every piece that reads them.

    Args:
        model: The model; only its main graph is walked, bodies run with the node that holds them.
        samples: Calibration samples; each maps input names to arrays.
        optimize: Let onnxruntime rewrite each piece and use integer kernels. Off, every node runs as written.
        name: What needs the samples, for the error.

    Raises:
        InputError: No samples, or a sample without one of the model's inputs.
    """

    def __init__(
        self,
        model: ir.Model,
        samples: Sequence[Mapping[str, np.ndarray]] | None,
        *,
        optimize: bool = False,
        name: str = "quantization",
    ) -> None:
        self.model = model
        self.optimize = optimize
        fed = [value.name or "" for value in graph_inputs(model)]
        self._values = [_fed(sample, fed, index) for index, sample in enumerate(require_samples(samples, name))]
        self._passed: set[ir.Node] = set()

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self._values)

    def inputs(self, node: ir.Node) -> list[list[Any]]:
        """Run everything before ``node`` and return its inputs, for every sample; None for an omitted one.

        Raises:
            InputError: The model does not run on a sample, or an input holds NaN or infinity.
        """
        self.advance(node)
        return [list(row) for row in zip(*(self.values(value) for value in node.inputs), strict=True)]

    def values(self, value: ir.Value | None) -> list[Any]:
        """Return a value for every sample: a constant, or one that some node not passed yet reads.

        Raises:
            InputError: It holds NaN or infinity.
        """
        if value is None:
            return [None] * self.count
        if is_constant(value) and value.const_value is not None:
            return [value.const_value.numpy()] * self.count
        if value in _fixed(self.model.graph):
            return list(Session(_piece(self.model, [], [value])).run({}).values()) * self.count
        found = [held[value.name or ""] for held in self._values]
        for index, array in enumerate(found):
            if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.size:
                require_finite(array, value.name or "", index)
        return found

    def outputs(self, node: ir.Node) -> list[Any]:
        """Run everything up to ``node``, itself included, and return its first output for every sample.

        Raises:
            InputError: The model does not run on a sample, or the output holds NaN or infinity.
        """
        self.advance(node, past=True, keep=node.outputs[:1])
        return self.values(node.outputs[0])

    def add(self, value: ir.Value, term: np.ndarray) -> None:
        """Add a term to a value that is held, in every sample: what changing the node that was just passed has done."""
        for held in self._values:
            held[value.name or ""] = held[value.name or ""] + term

    def advance(self, node: ir.Node | None, *, past: bool = False, keep: Iterable[ir.Value] = ()) -> None:
        """Run every node that stands before ``node`` in the graph, or all of them.

        Args:
            node: A node of the main graph that was not passed yet; None for the end of the graph.
            past: Run the node itself as well.
            keep: Values to hold even if no later node reads them; the model's outputs always are.

        Raises:
            InputError: The model does not run on a sample.
        """
        fixed = _fixed(self.model.graph)
        computed = [each for each in self.model.graph if not each.outputs or each.outputs[0] not in fixed]
        ahead: list[ir.Node] = []
        for each in computed:
            if each is node and not past:
                break
            if each not in self._passed:
                ahead.append(each)
            if each is node:
                break
        self._passed.update(ahead)
        later = (value for each in computed if each not in self._passed for value in reads(each))
        needed = {value.name or "" for value in (*later, *keep, *self.model.graph.outputs)}
        if ahead:
            self._run(ahead, needed)
        for held in self._values:
            for name in [name for name in held if name not in needed]:
                del held[name]

    def _run(self, nodes: list[ir.Node], needed: set[str]) -> None:
        computed = {value.name: value for node in nodes for value in node.outputs if value.name}
        outputs = [value for name, value in computed.items() if name in needed]
        if not outputs:
            return
        read = {value.name: value for node in nodes for value in reads(node)}
        inputs = [value for name, value in read.items() if name in self._values[0] and name not in computed]
        piece = _piece(self.model, inputs, outputs)
        for value in piece.graph.inputs:
            held = self._values[0][value.name or ""]
            if value.type is None and isinstance(held, np.ndarray):
                value.type = ir.TensorType(ir.DataType.from_numpy(held.dtype))
        session = Session(piece, optimize=self.optimize)
        wanted = [value.name or "" for value in outputs]
        for index, held in enumerate(self._values):
            try:
                held.update(session.run(held, wanted))
            except CannotRunError as error:
                raise InputError(str(error), where=f"calibration sample {index}", hint=error.hint) from error


def reads(node: ir.Node) -> dict[ir.Value, None]:
    """Return every value that a node reads, its bodies included."""
    found = dict.fromkeys(value for value in node.inputs if value is not None)
    for body in bodies(node):
        for inner in body.all_nodes():
            found |= dict.fromkeys(value for value in inner.inputs if value is not None)
        found |= dict.fromkeys(body.outputs)
    return found


def _fixed(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that depend on constants only."""
    found: set[ir.Value] = set()
    for node in graph:
        if node.inputs and all(value is None or is_constant(value) or value in found for value in reads(node)):
            found.update(node.outputs)
    return found


def require_samples(
    samples: Sequence[Mapping[str, np.ndarray]] | None, name: str
) -> Sequence[Mapping[str, np.ndarray]]:
    """Return the samples.

    Raises:
        InputError: There are none.
    """
    if samples is None or not len(samples):
        given = "none was given" if samples is None else "the data given holds no samples"
        hint = "pass --calibration DATA: an .npz, a folder of arrays or images, or module:function"
        raise InputError(f"{name} needs calibration data and {given}", hint=hint)
    return samples


def require_finite(array: np.ndarray, name: str, index: int) -> tuple[float, float]:
    """Return the smallest and the largest value of a tensor with elements seen in calibration sample ``index``.

    Raises:
        InputError: It holds NaN or infinity.
    """
    with np.errstate(invalid="ignore"):
        low, high = float(array.min()), float(array.max())  # NaN if there is one
    if not (np.isfinite(low) and np.isfinite(high)):
        kind = "NaN" if np.isnan(low) or np.isnan(high) else "infinite"
        raise InputError(
            f"tensor '{name}' has {kind} values",
            where=f"calibration sample {index}",
            hint="leave the sample out, or keep the nodes that read the tensor in float with a rule",
        )
    return low, high


def _fed(sample: Mapping[str, np.ndarray], names: list[str], index: int) -> dict[str, Any]:
    for name in names:
        if name not in sample:
            raise InputError(f"it has no array for input '{name}'", where=f"calibration sample {index}")
    return dict(sample)


def _piece(model: ir.Model, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    """Return a model, sharing its tensors, that computes ``outputs`` from ``inputs``."""
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    graph.opset_imports.update(model.graph.opset_imports)
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)
