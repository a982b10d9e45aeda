"""Which values can never be negative, whatever is fed to the model."""

from __future__ import annotations

import onnx_ir as ir

from optkit.graph import argument, constant

# The result is non-negative or NaN for every input.
NEVER_NEGATIVE = {"Abs", "Exp", "HardSigmoid", "Hardmax", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid"}
NEVER_NEGATIVE |= {"Softmax", "Softplus", "Sqrt"}
# The result consists of elements, maxima, sums or means of the first input.
KEEPS_SIGN = {"AveragePool", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GlobalAveragePool", "MaxPool"}
KEEPS_SIGN |= {"GlobalMaxPool", "Identity", "ReduceMean", "ReduceSum", "Reshape", "Slice", "SpaceToDepth", "Split"}
KEEPS_SIGN |= {"Squeeze", "Tile", "Transpose", "Unsqueeze"}
DEPTH = 32  # how many operators are looked through


def non_negative(value: ir.Value | None, depth: int = DEPTH) -> bool:
    """Return whether every element of a floating-point value is at least zero, or NaN."""
    array = constant(value)
    if array is not None:
        return bool((array >= 0).all())
    node = value.producer() if value is not None else None
    if value is None or node is None or node.domain or depth == 0:
        return False
    if value is not node.outputs[0] and node.op_type != "Split":
        return False

    def operand(index: int) -> bool:
        return non_negative(argument(node, index), depth - 1)

    def setting(name: str, index: int, default: bool) -> bool:
        """Whether a setting is non-negative, an attribute in old opsets and an input in new ones."""
        if name in node.attributes:
            return (node.attributes.get_float(name, 0.0) or 0.0) >= 0
        return default if argument(node, index) is None else operand(index)

    match node.op_type:
        case op if op in NEVER_NEGATIVE:
            return True
        case op if op in KEEPS_SIGN:
            return operand(0)
        case "Add" | "Concat" | "Min":
            return all(operand(index) for index in range(len(node.inputs)))
        case "Mul":
            return node.inputs[0] is node.inputs[1] or (operand(0) and operand(1))
        case "Max":
            return any(operand(index) for index in range(len(node.inputs)))
        case "Clip":
            return setting("min", 1, default=False) and setting("max", 2, default=True)
        case "Pad":
            return operand(0) and setting("value", 2, default=True)
        case _:
            return False
