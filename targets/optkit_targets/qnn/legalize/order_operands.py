"""Put the operands of sums and products in the order that HTP computes right."""

from __future__ import annotations

import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import is_constant
from optkit_targets.rewriting import Writer, apply


class OrderOperands(Pass):
    """Write constants second in ``Add`` and ``Mul``, and ``HardSigmoid(x)`` first where it is multiplied by ``x``.

    ``scale * (x * Reciprocal(Sqrt(...)))``, an RMS normalization as exporters write it, does not compile with the scale
    first ("Failed to finalize QNN graph ... MEM_ALLOC"), and ``x * HardSigmoid(x)`` is fused into something else than
    HardSwish unless ``x`` comes second (onnxruntime-qnn 2.7; 2 dB). Sums and products do not depend on the order.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Look at every sum and product, bodies included."""
        apply({"Add": _constant_second, "Mul": _mul}, model, context)


def _swap(node: ir.Node) -> None:
    first, second = node.inputs[:2]
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


def _constant_second(node: ir.Node, writer: Writer) -> str | None:
    if not is_constant(node.inputs[0]) or is_constant(node.inputs[1]):
        return None
    _swap(node)
    return "its constant comes second"


def _mul(node: ir.Node, writer: Writer) -> str | None:
    x, second = node.inputs
    gate = second.producer() if second is not None else None
    if gate is not None and (gate.domain, gate.op_type) == ("", "HardSigmoid") and gate.inputs[0] is x:
        _swap(node)
        return "its HardSigmoid comes first"
    return _constant_second(node, writer)
