"""Turn division by a constant into multiplication by its reciprocal, which most processors do several times faster."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit import Context, Effect, Pass
from optkit.graph import add_constant, constant, names


class DivToMul(Pass):
    """Replace ``Div(x, c)`` with ``Mul(x, 1/c)`` where ``c`` is a float constant.

    The product rounds once more than the quotient, so that an output may move by a unit in its last place.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-6)

    max_elements: int = 4096  # larger constants stay where they are

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite the divisions of the main graph and of the bodies of If, Loop and Scan."""
        taken = names(model)
        for node in [node for node in model.graph.all_nodes() if node.op_type == "Div" and node.domain == ""]:
            divisor = node.inputs[1]
            array = constant(divisor)
            if divisor is None or node.graph is None or array is None or array.dtype.kind != "f":
                context.missed(node, "the divisor is not a float constant")
            elif array.size > self.max_elements:
                context.missed(node, f"the divisor has {array.size} elements, more than max_elements")
            elif not has_reciprocals(array):
                context.missed(node, "the reciprocal of an element is not a normal number")
            else:
                reciprocal = add_constant(node.graph, f"{divisor.name}.reciprocal", 1 / array, taken)
                node.op_type = "Mul"
                node.replace_input_with(1, reciprocal)
                context.applied(node, f"multiplies by 1/{divisor.name}")


def has_reciprocals(array: np.ndarray) -> bool:
    """Whether ``|c|`` and ``|1/c|`` are normal numbers: below them bits are lost, and above there is only infinity."""
    smallest = np.finfo(array.dtype).tiny
    return bool(((np.abs(array) >= smallest) & (np.abs(array) <= 1 / smallest)).all())
