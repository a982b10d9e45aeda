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
        self._values = _fed(model, require_samples(samples, name))
        self._held = {value.name or "": value for value in model.graph.inputs if value.name in self._values[0]}
        self._passed: set[ir.Node] = set()
        self._fixed: set[ir.Node] = set()  # nodes seen that depend on constants only

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
        if value.name not in self._held and value.const_value is not None:
            return [value.const_value.numpy()] * self.count
        producer = value.producer()
        if producer is not None and producer not in self._passed:
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
        """Add a term to a value, in every sample: what changing the node that was just passed has done.

        A value that depends on constants only is computed anew anyway.
        """
        if value.producer() in self._fixed:
            return
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
        ahead: list[ir.Node] = []
        computed: set[ir.Value] = set()
        for each in self.model.graph:
            if each is node and not past:
                break
            if each not in self._passed and each not in self._fixed:
                if self._is_fixed(each):
                    self._fixed.add(each)
                else:
                    ahead.append(each)
                    computed.update(each.outputs)
            if each is node:
                break
        self._passed.update(ahead)
        candidates = dict.fromkeys((*self._held.values(), *(value for each in ahead for value in each.outputs)))
        needed = self._needed([value for value in candidates if value.name], frozenset(keep))
        if ahead:
            self._run(ahead, [value for value in needed if value in computed])
        self._held = {value.name or "": value for value in needed}
        for held in self._values:
            for name in held.keys() - self._held.keys():
                del held[name]

    def _is_fixed(self, node: ir.Node) -> bool:
        """Whether a node depends on constants only; those before it were seen."""
        return bool(node.inputs) and all(
            value is None or is_constant(value) or value.producer() in self._fixed for value in reads(node)
        )

    def _needed(self, values: Sequence[ir.Value], keep: frozenset[ir.Value]) -> list[ir.Value]:
        """Return the values that nodes not passed yet read, and those to keep in any case."""
        in_bodies: set[ir.Value] | None = None
        found = []
        for value in values:
            readers = [use.node for use in value.uses() if use.node not in self._passed and use.node.graph is not None]
            needed = value in keep or value.is_graph_output()
            if not needed and any(reader.graph is self.model.graph for reader in readers):
                needed = True
            elif not needed and readers:  # a node does not know the node whose body it stands in
                if in_bodies is None:
                    later = (node for node in self.model.graph if node not in self._passed and bodies(node))
                    in_bodies = {value for node in later for value in reads(node)}
                needed = value in in_bodies
            if needed:
                found.append(value)
        return found

    def _run(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
        if not outputs:
            return
        read = dict.fromkeys(value for node in nodes for value in reads(node))
        piece = _piece(self.model, [value for value in read if self._held.get(value.name or "") is value], outputs)
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


def spread_samples(samples: Sequence[Mapping[str, np.ndarray]], most: int) -> Sequence[Mapping[str, np.ndarray]]:
    """Return at most ``most`` samples, evenly spread from the first to the last."""
    indices = np.linspace(0, len(samples) - 1, min(most, len(samples))).round()
    return [samples[int(index)] for index in indices]


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


def _fed(model: ir.Model, samples: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Return what every sample says of the model's inputs; a default where another sample overrides it."""
    required = {value.name or "" for value in graph_inputs(model)}
    given: dict[str, ir.Value] = {}
    for index, sample in enumerate(samples):
        missing = sorted(required - sample.keys())
        if missing:
            raise InputError(f"it has no array for input '{missing[0]}'", where=f"calibration sample {index}")
        given |= {value.name or "": value for value in model.graph.inputs if value.name in sample}
    defaults = {name: value.const_value.numpy() for name, value in given.items() if value.const_value is not None}
    return [defaults | {name: array for name, array in sample.items() if name in given} for sample in samples]


def _piece(model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
    """Return a model, sharing its tensors, that computes ``outputs`` from ``inputs``."""
    nodes: dict[ir.Node, None] = {}
    initializers: dict[ir.Value, None] = {}
    seen: set[ir.Value | ir.Node] = set(inputs)
    stack: list[ir.Value | ir.Node] = list(outputs)
    while stack:
        item = stack.pop()
        if isinstance(item, ir.Node):  # everything that it reads is there
            nodes[item] = None
        elif item not in seen and item.graph is model.graph:  # not a value of a body
            seen.add(item)
            producer = item.producer()
            if item.is_initializer():
                initializers[item] = None
            elif producer is not None and producer not in seen:
                seen.add(producer)
                stack += [producer, *reads(producer)]
    graph = ir.GraphView(
        inputs,
        outputs,
        nodes=list(nodes),
        initializers=list(initializers),
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    ).clone()
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)
