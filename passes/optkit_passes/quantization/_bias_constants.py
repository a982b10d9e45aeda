"""The constant that is added to each output channel of a layer, and adding to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, argument, constant


@dataclass(frozen=True)
class BiasConstant:
    """A constant bias of one value per output channel.

    Attributes:
        node: The node that reads it: the layer, or the Add behind it.
        index: The input that it is.
        factor: How much more the node multiplies it with than the product of input and weight.
    """

    node: ir.Node
    index: int
    factor: float = 1.0

    @property
    def value(self) -> ir.Value:
        """The constant."""
        found = self.node.inputs[self.index]
        assert found is not None
        return found

    def moved(self, change: np.ndarray) -> np.ndarray:
        """Return the constant with a value added to every channel, [N]."""
        held = constant(self.value)
        assert held is not None
        return np.asarray(held + change.astype(np.float32) / self.factor, held.dtype)

    def alone(self, moved: np.ndarray) -> bool:
        """Whether another array can take the constant's place for all that read it."""
        bias = self.value
        return len(bias.uses()) == 1 and bias.shape is not None and moved.shape == tuple(bias.shape.numpy())

    def add(self, change: np.ndarray, taken: set[str]) -> float:
        """Add a value to every channel, and return the largest; other readers of the constant keep theirs.

        Args:
            change: One value for each channel, [N].
            taken: The names of the model; grows.
        """
        bias, moved = self.value, self.moved(change)
        if self.alone(moved):
            bias.const_value = ir.tensor(moved, name=bias.name)
        elif self.node.graph is not None:
            new = add_constant(self.node.graph, f"{bias.name}_corrected", moved, taken)
            self.node.replace_input_with(self.index, new)
        return float(np.abs(change).max(initial=0.0))


def bias_constant(node: ir.Node, channels: int) -> BiasConstant | None:
    """Return the constant bias of a Conv, Gemm or MatMul with that many output channels, or None."""
    if node.op_type != "MatMul":
        alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
        if not alpha or not beta or not _fits(argument(node, 2), channels):
            return None
        return BiasConstant(node, 2, beta / alpha)
    product = node.outputs[0]
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output():
        return None
    add, index = uses[0].node, 1 - uses[0].idx
    if (
        add.op_type != "Add"
        or add.domain != ""
        or add.graph is not node.graph
        or not _fits(add.inputs[index], channels)
    ):
        return None
    return BiasConstant(add, index)


def _fits(value: ir.Value | None, channels: int) -> bool:
    array = constant(value)
    return array is not None and array.size in (1, channels) and array.shape[-1:] in ((), (1,), (channels,))
