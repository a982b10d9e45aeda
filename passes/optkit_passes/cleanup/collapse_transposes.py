"""Merge transposes with each other, and turn those that move no data into reshapes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import add_constant, argument, cannot_forward, constant, forward, names, remove

# Elementwise with one data input, and correctly rounded: the same bits wherever in memory an element lies.
UNARY = {"Abs", "BitwiseNot", "Cast", "Ceil", "Floor", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Neg", "Not"}
UNARY |= {"Reciprocal", "Relu", "Round", "Shrink", "Sign", "Sqrt", "ThresholdedRelu"}
# The same with further inputs, where each of these is a single constant.
WITH_SCALARS = {"Add", "Clip", "DequantizeLinear", "Div", "Max", "Min", "Mul", "PRelu", "QuantizeLinear", "Sub"}
# Elementwise, but vectorized kernels round the last few elements of a row differently from the others.
ROUNDED = {"Celu", "Cos", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Log", "Mish", "Selu", "Sigmoid"}
ROUNDED |= {"Sin", "Softplus", "Softsign", "Swish", "Tanh"}


class CollapseTransposes(Pass):
    """``Transpose(f(Transpose(x, p)), q)`` becomes ``f(Transpose(x, p q))``, or ``f(x)`` where they are inverse.

    ``f`` is a chain of elementwise operators that round the same way in any layout, or nothing. A Transpose that only
    moves axes of size 1 becomes a Reshape, which copies nothing.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Merge each transpose with the one before it, in order, then look at what is left."""
        taken = names(model)
        for graph in list(model.graphs()):
            for node in list(graph):
                if _perm(node) is not None:
                    _merge(node, context)
            for node in list(graph):
                if _perm(node) is not None:
                    _to_reshape(node, taken, context)


def _perm(node: ir.Node | None) -> list[int] | None:
    """Return the permutation of a transpose: axis ``i`` of the result is axis ``perm[i]`` of the input."""
    if node is None or (node.domain, node.op_type) != ("", "Transpose") or node.graph is None:
        return None
    perm = node.attributes.get_ints("perm")
    if perm is not None:
        return list(perm)
    x = node.inputs[0]
    return None if x is None or x.shape is None else list(range(len(x.shape)))[::-1]


def _is_elementwise(node: ir.Node, rank: int) -> bool:
    if node.domain != "" or len(node.outputs) != 1 or not node.inputs:
        return False
    if node.op_type in UNARY | ROUNDED:
        return True
    others = [value for value in node.inputs[1:] if value is not None]
    arrays = [constant(value) for value in others]
    return node.op_type in WITH_SCALARS and all(a is not None and a.size == 1 and a.ndim <= rank for a in arrays)


def _merge(node: ir.Node, context: Context) -> None:
    """Merge a transpose with the one that its input comes from, through elementwise nodes between them."""
    outer = _perm(node) or []
    chain: list[ir.Node] = []  # from the transpose back to the first one
    value = node.inputs[0]
    while value is not None and (producer := value.producer()) is not None and _is_elementwise(producer, len(outer)):
        chain.append(producer)
        value = producer.inputs[0]
    first = value.producer() if value is not None else None
    inner = _perm(first)
    x = argument(first, 0) if first is not None else None
    if first is None or inner is None or x is None or value is None or first.graph is not node.graph:
        return
    perm = [inner[axis] for axis in outer]  # result axis i is axis outer[i] of the middle, axis inner[outer[i]] of x
    inverse = perm == sorted(perm)
    shared = [link for link in chain if len(link.outputs[0].uses()) > 1 or link.outputs[0].is_graph_output()]
    if shared:
        context.missed(node, f"the result of '{shared[-1].name}' is used in the transposed layout too")
        return
    rounded = [link.op_type for link in chain if link.op_type in ROUNDED]
    if rounded:
        context.missed(node, f"{rounded[-1]} before it may round differently in another layout")
        return
    if not inverse and (len(value.uses()) > 1 or value.is_graph_output()):
        context.missed(node, f"the result of '{first.name}' is used elsewhere too")
        return
    end = chain[0].outputs[0] if chain else x
    objection = cannot_forward(node.outputs[0], end) if inverse else ""
    if objection:
        context.missed(node, objection)
        return
    cancelled = "cancelled by" if inverse else "merged into"
    context.applied(node, f"'{first.name}' {cancelled} it" + (f" through {len(chain)} nodes" if chain else ""))
    back = [inner.index(axis) for axis in range(len(inner))]  # the layout of x
    for link in chain:
        shape = link.outputs[0].shape
        if shape is not None and len(shape) == len(back):
            link.outputs[0].shape = ir.Shape([shape[axis] for axis in back])
    if chain:
        chain[-1].replace_input_with(0, x)
    if inverse:
        forward(node.outputs[0], end)
        remove(node)
    else:
        node.replace_input_with(0, end)
        node.attributes["perm"] = ir.AttrInt64s("perm", perm)
    remove(first)


def _to_reshape(node: ir.Node, taken: set[str], context: Context) -> None:
    """Turn a transpose that keeps the order of its axes longer than 1 into a reshape."""
    x, perm = argument(node, 0), _perm(node) or []
    if x is None or x.shape is None or len(x.shape) != len(perm) or perm == sorted(perm) or node.graph is None:
        return
    dims = list(x.shape)
    moved = [axis for axis in perm if dims[axis] != 1]
    if moved != sorted(moved):
        return
    # 0 copies the dimension in the same place, -1 is what is left of the elements: undefined beside an empty copy
    target = [
        dim if isinstance(dim := dims[axis], int) else 0 if axis == place else -1 for place, axis in enumerate(perm)
    ]
    if target.count(-1) > 1 or (-1 in target and 0 in target):
        context.missed(node, "only axes of size 1 move, but a Reshape cannot say where the free dimensions go")
        return
    if any(dim == 0 for dim in dims):
        context.missed(node, "only axes of size 1 move, but the tensor is empty")
        return
    shape = add_constant(node.graph, f"{node.name}/shape", np.array(target, np.int64), taken)
    node.op_type = "Reshape"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(1, shape)
    context.applied(node, f"only axes of size 1 move: a reshape to {target}")
