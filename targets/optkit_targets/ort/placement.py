"""Where each node runs and in which arithmetic, as ONNX Runtime's own optimizer decides: it is asked, not modelled."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from optkit.model.loading import save
from optkit.package.contract import Placement
from optkit.session import CannotRunError, session_options
from optkit.target import Target
from optkit_targets.ort.constraints import CONSTRAINTS, constraint_kernel, violation
from optkit_targets.ort.executed import CONVERSIONS, INT8_LEVEL, Executed

DEVICE = "cpu"
X86 = frozenset({"x86_64", "AMD64"})
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
DATA_MOVEMENT = frozenset(
    {
        "CenterCropPad",
        "Compress",
        "Concat",
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
        "Reshape",
        "ReverseSequence",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Size",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
    }
)


def place(model: ir.Model, target: Target) -> list[Placement]:
    """Return one placement for each node, bodies included, in the model's order.

    Raises:
        CannotRunError: onnxruntime refuses the model for a reason that lies in no single node.
    """
    try:
        executed, refusal = Executed.of(model, optimized(model, target)), None
    except CannotRunError as error:
        executed, refusal = Executed(), error
    executed.int8_blocks = any(taken.accuracy_level == INT8_LEVEL for taken in target.weights.values())
    # a model that loads has all its kernels
    asked = CONSTRAINTS if refusal else [c for c in CONSTRAINTS if c is not constraint_kernel]
    placements = [_place(node, executed, violation(node, model, target, asked)) for node in model.graph.all_nodes()]
    if refusal and all(placement.supported for placement in placements):
        raise refusal
    return placements


def optimized(model: ir.Model, target: Target) -> ir.Model:
    """Return the graph that onnxruntime executes: fusions and integer kernels chosen, before memory layouts.

    On x86 it turns int8 activations into uint8 before it looks for integer kernels, on ARM it does not; the session
    option for it makes this machine decide as the target would.

    Raises:
        CannotRunError: onnxruntime cannot load the model.
    """
    options = session_options(optimize=True)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.qdqisint8allowed", "0" if X86 & set(target.isa) else "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
        path, result = Path(folder) / "model.onnx", Path(folder) / "optimized.onnx"
        save(model, path)
        options.optimized_model_filepath = str(result)
        try:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise CannotRunError(f"onnxruntime {ort.__version__} cannot load the model: {error}") from error
        return ir.load(result)


def _place(node: ir.Node, executed: Executed, refused: str) -> Placement:
    precision, reason = ("-", refused) if refused else _arithmetic(node, executed)
    return Placement(node.name or "", node.op_type, DEVICE, precision, not refused, reason)


def _arithmetic(node: ir.Node, executed: Executed) -> tuple[str, str]:
    """Return the arithmetic that a node ends in, and the kernel that decides it."""
    if node.op_type in CONTROL_FLOW:
        return "-", "the nodes of its body run one by one"
    kernel = executed.kernel(node)
    if kernel is None:
        folded = executed.is_constant(node)
        return "-", "folded into a constant" if folded else "removed: nothing needs it"
    fused = kernel.op_type != node.op_type
    if node.op_type in CONVERSIONS:
        return "-", f"part of the kernel {kernel.op_type}" if fused else "converts between element types"
    precision = executed.precision(kernel)
    if node.op_type in DATA_MOVEMENT and not fused:
        return "-", f"moves {precision} data"
    if precision == "float32" and _follows_dequantize(node):
        return precision, f"quantized, yet onnxruntime has no integer kernel for it here: {kernel.op_type} in float32"
    return precision, f"{'part of ' if fused else ''}the kernel {kernel.op_type}"


def _follows_dequantize(node: ir.Node) -> bool:
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"
