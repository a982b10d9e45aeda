"""Static shapes for analyses: bound from a sample, inferred, and where inference gives up, observed by one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from optkit.errors import InputError
from optkit.model.loading import bind_dims, graph_inputs, infer_shapes

Shape = tuple[int, ...]
SMALL = 64  # elements: more than any list of axes, pads or sizes has


def with_shapes(
    model: ir.Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    sample: Mapping[str, np.ndarray] | None = None,
) -> ir.Model:
    """Return a copy, sharing tensors, whose values carry every static shape that can be found; ``model`` stays as is.

    Args:
        model: The model.
        shapes: Shapes of the inputs by name, for those with dynamic dimensions; by default those of ``sample``.
        sample: Input values. Where shape inference cannot tell a shape and every input's is known, the model runs
            once to learn it: on ``sample``, or on random inputs, which may not take the same path through the data.
            Of an If only the branch taken is seen, and of a Loop or Scan nothing.

    Raises:
        InputError: A shape contradicts the model's.
    """
    bound = model.clone()
    given = {name: tuple(array.shape) for name, array in (sample or {}).items()}
    given.update({name: tuple(shape) for name, shape in (shapes or {}).items()})
    dims: dict[str, int] = {}
    for value in graph_inputs(bound):
        shape = given.get(value.name or "")
        if shape is None:
            continue
        if value.shape is None:
            value.shape = ir.Shape(shape)
        if len(shape) != len(value.shape) or any(
            isinstance(dim, int) and dim != size for dim, size in zip(value.shape, shape, strict=True)
        ):
            declared = ", ".join(str(dim) for dim in value.shape)
            raise InputError(f"the input '{value.name}' takes [{declared}], not {list(shape)}")
        for axis, (dim, size) in enumerate(zip(value.shape, shape, strict=True)):
            if not isinstance(dim, int):
                dims[dim.value or f"{value.name}.{axis}"] = size
    bind_dims(bound, dims)
    _lend_constants(bound)
    infer_shapes(bound)
    if all(static_shape(value) is not None for value in graph_inputs(bound)) and _unknown(bound):
        _observe(bound, sample)
    return bound


def _unknown(model: ir.Model) -> list[tuple[ir.Node, int]]:
    """Return (node, output index) of every value without a static shape, bodies included."""
    nodes = model.graph.all_nodes()
    return [(n, i) for n in nodes for i, v in enumerate(n.outputs) if v.name and static_shape(v) is None]


def _lend_constants(model: ir.Model) -> None:
    """Give each body its own name for the small integer constants that it takes from around it.

    ONNX infers a body without sight of the constants outside, so that a captured list of pads or axes would hide every
    shape behind it. The tensors stay shared.
    """
    for graph in model.graphs():
        lent: dict[ir.Value, ir.Value] = {}
        for node in graph if graph is not model.graph else ():
            for index, value in enumerate(node.inputs):
                tensor = value.const_value if value is not None else None
                if value is None or value.graph is graph or tensor is None or tensor.dtype != ir.DataType.INT64:
                    continue
                if value not in lent and tensor.size <= SMALL:
                    name = f"{value.name}::{node.name}"  # node names are unique over all bodies
                    own = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=value.type, const_value=tensor)
                    graph.register_initializer(own)
                    lent[value] = own
                if value in lent:
                    node.replace_input_with(index, lent[value])


def _observe(model: ir.Model, sample: Mapping[str, np.ndarray] | None) -> None:
    """Run the model once and write the shapes that it computes onto the unknown values."""
    from optkit.dataset.samples import random_samples
    from optkit.session import CannotRunError, run_with_intermediates

    inputs = sample if sample is not None else random_samples(model, 1)[0]
    flat = model.clone()
    try:
        while branches := [node for node in flat.graph if node.op_type == "If" and node.domain == ""]:
            conditions = {node: node.inputs[0] for node in branches}
            names = [value.name or "" for value in conditions.values() if value is not None and value.producer()]
            known = {**inputs, **run_with_intermediates(flat, inputs, names)}
            for node, condition in conditions.items():
                constant = condition.const_value if condition is not None else None
                name = condition.name or "" if condition is not None else ""
                if name not in known and constant is None:
                    return
                taken = known[name] if constant is None else constant.numpy()
                _inline(node, node.attributes["then_branch" if np.all(taken) else "else_branch"].as_graph())
        observed = {f"{node.name}::{i}": value for node in flat.graph for i, value in enumerate(node.outputs)}
        # an If is now one Identity per output, named like the output itself
        observed |= {node.name or "": node.outputs[0] for node in flat.graph if node.op_type == "Identity"}
        wanted = {(n, i): observed[name] for n, i in _unknown(model) if (name := f"{n.name}::{i}") in observed}
        computed = run_with_intermediates(flat, inputs, [value.name or "" for value in wanted.values()])
    except CannotRunError:
        return  # the shapes stay unknown, and whoever needs them says so
    for (node, index), value in wanted.items():
        array = computed.get(value.name or "")
        if isinstance(array, np.ndarray):
            node.outputs[index].shape = ir.Shape(array.shape)
            if node.outputs[index].dtype is None:
                node.outputs[index].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    infer_shapes(model)  # what hangs on the shapes just learned


def _inline(node: ir.Node, branch: ir.Graph) -> None:
    """Put a branch's nodes in the place of its If; values get names of their nodes, which are unique over bodies."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    results = list(branch.outputs)
    branch.outputs.clear()
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        value.name = f"{node.name}::{name}"
        graph.register_initializer(value)
    inner = list(branch)
    branch.remove(inner)
    for other in inner:
        for index, value in enumerate(other.outputs):
            if value.name:
                value.name = f"{other.name}::{index}"
    copies = [ir.Node("", "Identity", [value], name=f"{node.name}::{i}") for i, value in enumerate(results)]
    for copy, old in zip(copies, node.outputs, strict=True):
        copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = old.name, old.type, old.shape
    new = [copy.outputs[0] for copy in copies]
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*inner, *copies], node.outputs, new)


def static_shape(value: ir.Value) -> Shape | None:
    """Return the value's shape where every dimension is known, else None."""
    if value.const_value is not None:
        return tuple(int(dim) for dim in value.const_value.shape.numpy())
    if value.shape is None or not all(isinstance(dim, int) for dim in value.shape):
        return None
    return tuple(int(dim) for dim in value.shape.numpy())


def value_bytes(value: ir.Value) -> int | None:
    """Return the bytes of a value, sub-byte types packed; None where its shape or type is not known."""
    shape = static_shape(value)
    if shape is None or value.dtype is None or value.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    return -(-math.prod(shape) * value.dtype.bitwidth // 8)
