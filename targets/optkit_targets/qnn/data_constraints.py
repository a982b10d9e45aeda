"""What HTP asks of operators that move, select, reduce and convert data. Docstrings are the sentences."""

from __future__ import annotations

import onnx_ir as ir

from optkit.graph import argument, constant, ints, static_shape
from optkit.target import Target
from optkit_targets.qnn.constraints import FLOATS, attribute
from optkit_targets.qnn.units import INTEGERS_8, dtype, stored, unit_at

CASTS = {
    "f32": "f32 f16 i32 u8 u32 b", "f16": "f32 f16 i32", "i16": "i32", "i32": "f32 f16 i32 i64 u8 u32 b",
    "i64": "f32 f16 i32 i64 u8 u32 b", "u8": "f32 f16 i32 u8 u32 b", "u32": "f32 i32 i64 u8 u32 b",
    "b": "f32 f16 i32 u8 u32 b",
}  # fmt: skip
_SHORT = {
    "FLOAT": "f32",
    "FLOAT16": "f16",
    "INT16": "i16",
    "INT32": "i32",
    "INT64": "i64",
    "UINT8": "u8",
    "UINT32": "u32",
    "BOOL": "b",
}


def constraint_reduce(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A reduction must name its axes where empty ones mean none."""
    if not node.attributes.get_int("noop_with_empty_axes", 0):
        return ""
    return "" if ints(node, "axes", 1, ()) else "no axes and noop_with_empty_axes = 1"


def constraint_reduce_5d(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Of five dimensions the extremum of floats is taken over one; in a QDQ unit axes must be adjacent."""
    shape = static_shape(node.inputs[0]) or []
    axes = sorted(axis % len(shape) for axis in ints(node, "axes", 1, ()) or range(len(shape))) if shape else []
    if len(shape) < 5:
        return ""
    if not unit_at(node, model).quantized:
        extremum = node.op_type in ("ReduceMax", "ReduceMin") and dtype(node.inputs[0]) in FLOATS
        return f"over {len(axes)}" if extremum and len(axes) > 1 else ""
    apart = axes[-1] - axes[0] >= len(axes) or (node.op_type == "ReduceMin" and len(axes) == len(shape))
    return f"over {axes}" if apart and node.op_type != "ReduceMax" else ""


def constraint_arg(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Of equal values the first counts."""
    return "select_last_index = 1" if node.attributes.get_int("select_last_index", 0) else ""


def constraint_reshape(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A size of 0 means that the dimension stays."""
    return "allowzero = 1" if node.attributes.get_int("allowzero", 0) else ""


def constraint_slice(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Something must remain of every axis."""
    shape = static_shape(node.outputs[0])
    return "nothing remains" if shape is not None and 0 in shape else ""


def constraint_slice_integers(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Integers of three dimensions or more are sliced along the last axis in steps of 1."""
    shape, axes, steps = static_shape(node.inputs[0]), ints(node, "axes", 3), ints(node, "steps", 4, (1,))
    integers = dtype(node.inputs[0]) in (ir.DataType.INT32, ir.DataType.INT64)
    if not integers or shape is None or len(shape) < 3:
        return ""
    last = [step for axis, step in zip(axes or [], steps or [], strict=False) if axis in (-1, len(shape) - 1)]
    return f"steps of {last[0]}" if last and abs(last[0]) != 1 else ""


def constraint_gather(node: ir.Node, model: ir.Model, target: Target) -> str:
    """An int64 row taken by a scalar index is not computed in 32 bits."""
    data, index = node.inputs[0], node.inputs[1]
    whole = static_shape(data) or [1]
    if dtype(data) == ir.DataType.INT64 and static_shape(index) == [] and len(whole) > 1:
        return f"int64 of {len(whole)} dimensions"
    return ""


def constraint_indices(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Constant indices must lie within the axis."""
    shape, index = static_shape(node.inputs[0]), constant(node.inputs[1])
    if shape is None or index is None or not index.size or not shape:
        return ""
    size = shape[node.attributes.get_int("axis", 0)]
    wrong = [int(value) for value in (index.min(), index.max()) if not -size <= value < size]
    return f"{wrong[0]} of {size}" if wrong else ""


def constraint_gather_nd(node: ir.Node, model: ir.Model, target: Target) -> str:
    """GatherND takes no batch dimensions."""
    count = node.attributes.get_int("batch_dims", 0)
    return f"batch_dims = {count}" if count else ""


def constraint_scatter_nd(node: ir.Node, model: ir.Model, target: Target) -> str:
    """ScatterND replaces, adds or multiplies."""
    return attribute(node, "reduction", "none", ("none", "add", "mul"))


def constraint_scatter_elements(node: ir.Node, model: ir.Model, target: Target) -> str:
    """ScatterElements replaces; in a QDQ unit it also adds, multiplies or keeps the largest."""
    taken = ("none", "add", "mul", "max") if unit_at(node, model).quantized else ("none",)
    return attribute(node, "reduction", "none", taken)


def constraint_pad(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Padding is constant, reflected or of the edge, over all axes; what is reflected must be there, and not be cut."""
    if found := attribute(node, "mode", "constant", ("constant", "reflect", "edge")):
        return found
    if argument(node, 3) is not None:
        return "the input axes"
    mode, pads, shape = (
        node.attributes.get_string("mode", "constant"),
        ints(node, "pads", 1),
        static_shape(node.inputs[0]),
    )
    if mode == "reflect" and pads and shape:
        if min(pads) < 0:
            return f"pads {pads}"
        for axis, size in enumerate(shape):
            if max(pads[axis], pads[axis + len(shape)]) >= size:
                return f"{max(pads[axis], pads[axis + len(shape)])} reflected of {size}"
    return ""


def constraint_pad_rank(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Reflections and edges are taken in four dimensions, reflections in five where they are in a QDQ unit."""
    mode = node.attributes.get_string("mode", "constant")
    rank = len(static_shape(node.inputs[0]) or ())
    allowed = 5 if mode == "constant" or (mode == "reflect" and unit_at(node, model).quantized) else 4
    return f"{mode} in {rank} dimensions" if rank > allowed else ""


def constraint_mod(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A remainder has the divisor's sign."""
    return "fmod = 1" if node.attributes.get_int("fmod", 0) else ""


def constraint_one_hot(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The depth and the two values must be constant, and the values no int64."""
    for value in node.inputs[1:]:
        if value is not None and constant(value) is None:
            return f"'{value.name}' is computed"
    return "int64 values" if dtype(node.inputs[2]) == ir.DataType.INT64 else ""


def constraint_operands(node: ir.Node, model: ir.Model, target: Target) -> str:
    """There must be two inputs or more."""
    return "" if len(node.inputs) > 1 else "one input"


def constraint_pow(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The compiler fails on a power of five dimensions whose base is broadcast."""
    base, out = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    return f"{base} to {out}" if base is not None and out is not None and len(out) > 4 and base != out else ""


def constraint_cum_sum(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Sums run forward and include the element itself."""
    wrong = [name for name in ("exclusive", "reverse") if node.attributes.get_int(name, 0)]
    return " and ".join(f"{name} = 1" for name in wrong)


def constraint_extremum(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The compiler fails on the Max and Min of a tensor of 8 bits and a constant one."""
    unit = unit_at(node, model)
    if unit.input_type(0) not in INTEGERS_8 or not unit.quantized or len(node.inputs) != 2:
        return ""
    full = static_shape(node.outputs[0])
    fixed = [value for value in node.inputs if stored(value) is not None and static_shape(value) == full]
    return f"'{fixed[0].name}' is constant" if fixed and fixed[0] is not None else ""


def constraint_cast(node: ir.Node, model: ir.Model, target: Target) -> str:
    """HTP must have the conversion between the two element types."""
    source, goal = dtype(node.inputs[0]), dtype(node.outputs[0])
    if source is None or goal is None or _SHORT.get(goal.name) in CASTS.get(_SHORT.get(source.name, ""), "").split():
        return ""
    return f"{source.name.lower()} to {goal.name.lower()}"
