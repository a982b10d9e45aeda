"""Where Core ML is likely to run each node, predicted from what others measured of the Neural Engine.

Core ML decides on the device, and shows its decision in Xcode's performance report and in `MLComputePlan` alone: a
prediction is all that can be had elsewhere. Every reason names the constraint and who says that it holds.
"""

from __future__ import annotations

import onnx_ir as ir

from optkit.cost.fused import fused
from optkit.graph import argument, constant, ints, is_constant, static_shape
from optkit.package.contract import Placement
from optkit.quant.palette import LUT_BITS_KEY
from optkit.target import Target
from optkit_targets.coreml.constraints import Engine, violation
from optkit_targets.coreml.legalize.keep_float32 import FLOAT_KEY
from optkit_targets.coreml.limits import limits_of
from optkit_targets.coreml.operator_constraints import ALL, THIRD

ENGINE, OTHER = "likely ANE", "likely GPU/CPU"
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
INTEGER_PRODUCTS = 16  # the generation (M4, A17 Pro) that multiplies int8 faster than fp16
PRODUCTS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
STREAMED = {"channel": 14, "block": 15}  # from which on integers of constants are read as they are stored
MOVING_NAMES = """
Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape Slice SpaceToDepth Split Squeeze
Tile Transpose Unsqueeze
"""
MOVES = frozenset(MOVING_NAMES.split())


def place(model: ir.Model, target: Target) -> list[Placement]:
    """Return one placement for each node, bodies included, in the model's order.

    Args:
        model: The model, its shapes inferred.
        target: An Apple device.

    Raises:
        InputError: The target does not say what its engine holds.
    """
    engine = Engine(limits_of(target), _halved(model), model.graph)
    groups = {id(graph): fused(graph) for graph in model.graphs()}
    found = []
    for node in model.graph.all_nodes():
        group = groups[id(node.graph)]
        if node in group.loaded or (node.op_type == DEQUANTIZE and is_constant(argument(node, 0))):
            found.append(_constant(node, engine))
        elif reason := violation(node, engine, ALL):
            found.append(Placement(node.name or "", node.op_type, OTHER, _precision(node, engine), False, reason))
        else:
            product = node.op_type in PRODUCTS and node in group.integer
            integer = product and engine.generation >= INTEGER_PRODUCTS
            precision = "int8" if integer else _precision(node, engine)
            found.append(
                Placement(node.name or "", node.op_type, ENGINE, precision, True, _why(node, engine, integer=integer))
            )
    return found


def _halved(model: ir.Model) -> bool:
    """Whether every float becomes float16, as it does where no pass decided on float types."""
    # a pruned file has no types of values: those of its constants are there still
    kinds = [value.dtype for node in model.graph for value in node.outputs]
    kinds += [value.const_value.dtype for value in model.graph.initializers.values() if value.const_value is not None]
    typed = ir.DataType.FLOAT16 in kinds
    return not typed and model.metadata_props.get(FLOAT_KEY) != "float32"


def _precision(node: ir.Node, engine: Engine) -> str:
    """Return the arithmetic of a node that is not integer."""
    if node.op_type in MOVES or node.op_type in (QUANTIZE, DEQUANTIZE):
        return "-"
    types = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
    if not any(kind.is_floating_point() for kind in types):
        return "-"
    return "float16" if engine.half or ir.DataType.FLOAT not in types else "float32"


def _why(node: ir.Node, engine: Engine, *, integer: bool) -> str:
    """Return why nothing stands against a node, and what is to be heeded."""
    if integer:
        return "weights and activations of 8 bits, multiplied as integers from A17 Pro and M4 on"
    reason = "nothing known stands against it"
    if node.op_type in (QUANTIZE, DEQUANTIZE):
        reason = "converts between floats and 8-bit integers"
    caution = saturating_slice(node, engine)
    return f"{reason}; {caution}" if caution else reason


def saturating_slice(node: ir.Node, engine: Engine) -> str:
    """Return a warning for a slice of the last axis that does not begin at its start.

    Generations 13 and 14 copy it as fixed-point numbers: what is larger than 4094 in magnitude becomes infinite
    (ane-guide 19, measured on M1 and M2).
    """
    shape = static_shape(argument(node, 0))
    if node.op_type not in ("Slice", "Split") or engine.generation >= THIRD or not shape:
        return ""
    if node.op_type == "Slice":
        starts = ints(node, "starts", 1)
        axes = ints(node, "axes", 3, range(len(starts or ())))
        if starts is None or axes is None:
            return ""
        begins = {axis % len(shape): start for axis, start in zip(axes, starts, strict=False)}
        offset = begins.get(len(shape) - 1, 0) not in (0, -shape[-1])
    else:
        offset = node.attributes.get_int("axis", 0) % len(shape) == len(shape) - 1
    return "what exceeds 4094 in magnitude becomes infinite there [ane-guide 19]" if offset else ""


def _constant(node: ir.Node, engine: Engine) -> Placement:
    """Return the placement of a node that makes a constant: how the engine reads it."""
    if LUT_BITS_KEY in node.metadata_props:
        reason = "part of a constant: palettes are read as they are stored [ane-guide A]"
    elif node.op_type == DEQUANTIZE:
        scale = constant(argument(node, 1))
        blocks = node.attributes.get_int("block_size", 0) or (scale is not None and scale.ndim > 1)
        since = STREAMED["block" if blocks else "channel"]
        if engine.generation >= since:
            reason = "part of a constant: integers are read as they are stored [ane-guide A]"
        else:
            what = "blocks of integers" if blocks else "integers"
            reason = f"part of a constant: {what} are expanded to fp16 before generation {since} [ane-guide A]"
    else:
        reason = "part of a constant, computed when the package is made"
    return Placement(node.name or "", node.op_type, ENGINE, "-", True, reason)
