"""Linear operators with constant weights: finding them, and giving them other weights and another bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, argument, constant, unique
from optkit_passes.fusion.affine import along


class RefusedError(Exception):
    """Why a node cannot be folded; nothing was changed."""


@dataclass(frozen=True)
class Linear:
    """A linear operator with constant weights; ``bias_node`` has its bias: itself, the Add behind a MatMul, or None."""

    node: ir.Node
    weight: np.ndarray
    weight_index: int
    bias_node: ir.Node | None

    @property
    def output(self) -> ir.Value:
        """The result, bias included."""
        return (self.bias_node or self.node).outputs[0]

    @property
    def bias_index(self) -> int:
        """Which input of ``bias_node`` is the bias."""
        if self.bias_node is None or self.bias_node is self.node:
            return 2
        return 0 if constant(self.bias_node.inputs[1]) is None else 1

    def __str__(self) -> str:
        return f"{self.node.op_type} '{self.node.name}'"


def producer_of(value: ir.Value | None) -> Linear:
    """Return the linear operator that computes a value.

    Raises:
        RefusedError: Something else computes it, or its weights are not constant.
    """
    node = value.producer() if value is not None else None
    if node is None:
        raise RefusedError("its input is not computed by an operator with weights")
    if node.op_type == "Add" and node.domain == "":
        for index in (0, 1):
            bias, product = constant(node.inputs[index]), node.inputs[1 - index]
            matmul = product.producer() if product is not None else None
            if bias is not None and matmul is not None and matmul.op_type == "MatMul" and product is not None:
                only_use(product)
                return linear_operator(matmul, "before", node)
    return linear_operator(node, "before")


def linear_operator(node: ir.Node, place: str, bias_node: ir.Node | None = None) -> Linear:
    """Read a node as a linear operator; ``place`` (``before``, ``after``) says where it stands, for the refusal.

    Raises:
        RefusedError: It is none, or its weights are not constant.
    """
    if node.domain or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        raise RefusedError(f"{node.op_type} {place} it has no weights to fold into")
    index = 0 if node.op_type == "MatMul" and constant(node.inputs[1]) is None else 1
    weight = constant(node.inputs[index])
    if weight is None:
        raise RefusedError(f"the weight of {node.op_type} '{node.name}' is not constant")
    if weight.ndim < 2:
        raise RefusedError(f"the weight of {node.op_type} '{node.name}' is a vector")
    if node.op_type == "MatMul" and bias_node is None and place == "after":
        bias_node = _bias_behind(node, weight)
    return Linear(node, weight, index, bias_node if node.op_type == "MatMul" else node)


def _bias_behind(matmul: ir.Node, weight: np.ndarray) -> ir.Node | None:
    """Return the Add of a constant that is the only user of a product, where it makes the result no larger."""
    uses = list(matmul.outputs[0].uses())
    if len(uses) != 1 or matmul.outputs[0].is_graph_output():
        return None
    add, index = uses[0]
    bias = constant(add.inputs[1 - index]) if add.op_type == "Add" and add.graph is matmul.graph else None
    return add if bias is not None and bias.ndim <= weight.ndim else None


def only_use(value: ir.Value) -> tuple[ir.Node, int]:
    """Return the only node that takes a value, and as which input.

    Raises:
        RefusedError: There are more or none, it stands in a body, or the value is a graph output.
    """
    producer = value.producer()
    what = producer.op_type if producer is not None else "it"
    if value.is_graph_output():
        raise RefusedError(f"the result of {what} is an output of the graph")
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.graph is not value.graph:
        raise RefusedError(f"the result of {what} is used elsewhere too" if uses else "its result is not used")
    return uses[0].node, uses[0].idx


def wide(array: np.ndarray) -> np.ndarray:
    """Return the array in float64."""
    return array.astype(np.float64)


def rounded(array: np.ndarray, linear: Linear) -> np.ndarray:
    """Return the array in the type of the operator's weight.

    Raises:
        RefusedError: It overflows there.
    """
    with np.errstate(over="ignore"):
        narrow = array.astype(linear.weight.dtype)
    if not np.isfinite(wide(narrow)).all():
        raise RefusedError(f"the folded weights of {linear} would not be finite in {linear.weight.dtype}")
    return narrow


def new_bias(linear: Linear, axis: int, scale: np.ndarray, shift: np.ndarray) -> np.ndarray | None:
    """Return ``scale * bias + shift``, rounded; None where there is no bias and none is needed.

    Args:
        linear: The operator, whose ``beta`` the result includes.
        axis: The axis that its weight makes, counted from the end.
        scale: One number per output channel.
        shift: One number per output channel.

    Raises:
        RefusedError: The bias is computed, would become larger, or overflows.
    """
    value = argument(linear.bias_node, linear.bias_index) if linear.bias_node is not None else None
    axis = -1 if linear.node.op_type.startswith("Conv") else axis  # the bias of a convolution is a vector
    if value is None:
        return rounded(along(shift, axis, -axis), linear) if shift.any() else None
    old = constant(value)
    if old is None:
        raise RefusedError(f"the bias of {linear} is not constant")
    old = wide(old) * (linear.node.attributes.get_float("beta", 1.0) if linear.node.op_type == "Gemm" else 1.0)
    rank = max(old.ndim, -axis)
    new = old * along(scale, axis, rank) + along(shift, axis, rank)
    if new.size > max(old.size, scale.size):
        raise RefusedError(f"the bias of {linear} varies along another axis than its channels")
    return rounded(new, linear)


def store(linear: Linear, weight: np.ndarray, bias: np.ndarray | None, taken: set[str]) -> str:
    """Give the operator its new weight and bias, and say which of the old ones others still use."""
    note = _set_constant(linear.node, linear.weight_index, weight, "weight", taken)
    if bias is not None and linear.bias_node is not None:
        note += _set_constant(linear.bias_node, linear.bias_index, bias, "bias", taken)
        linear.node.attributes.pop("beta", None)
    return note


def _set_constant(node: ir.Node, index: int, array: np.ndarray, label: str, taken: set[str]) -> str:
    """Give a node another constant; one that has no other use keeps its name, any other stays as it is."""
    old = argument(node, index)
    if old is not None and len(old.uses()) == 1 and not old.is_graph_output():
        tensor = ir.tensor(array, name=old.name)
        old.const_value, old.type, old.shape = tensor, ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        return ""
    node.resize_inputs(max(index + 1, len(node.inputs)))
    assert node.graph is not None
    node.replace_input_with(index, add_constant(node.graph, f"{node.name}/{label}", array, taken))
    return f"; '{old.name}' stays for its other users" if old is not None else ""


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` take the name, type, metadata and every use of ``old``."""
    name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, new.type, new.shape = name, old.type or new.type, old.shape or new.shape
    new.metadata_props.update(old.metadata_props)


def add_behind(matmul: ir.Node, bias: np.ndarray, name: str, taken: set[str]) -> None:
    """Insert ``Add(product, bias)``, which takes over the name and the uses of the product."""
    product, graph = matmul.outputs[0], matmul.graph
    assert graph is not None
    add = ir.node("Add", [None, add_constant(graph, f"{matmul.name}/bias", bias, taken)], name=name)
    take_over(product, add.outputs[0])
    product.name = unique(f"{matmul.name}/product", taken)
    product.type, product.shape = add.outputs[0].type, add.outputs[0].shape
    add.replace_input_with(0, product)
    graph.insert_after(matmul, add)
