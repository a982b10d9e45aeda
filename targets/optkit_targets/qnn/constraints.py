"""What HTP asks of every node. The docstring of each constraint is the sentence the user reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from optkit.graph import bodies, constant, static_shape
from optkit.target import Target
from optkit_targets.qnn.operators import DOMAINS, FOUR_D, OLD_FLOATS, OLD_MOVES, OLD_WITHOUT, OLD_WITHOUT_16, OPERATORS
from optkit_targets.qnn.units import DEQUANTIZE, INTEGERS_16, QUANTIZE, dtype, unit_at

Constraint = Callable[[ir.Node, ir.Model, Target], str]
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
FLOAT_ARCH = 69  # the first Hexagon whose tensor processor computes in fp16
DATA_INPUT = {"Where": 1}


def constraint_body(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Nodes with bodies, and the nodes in them, run on the CPU: a context binary has no control flow."""
    if bodies(node):
        return f"{node.op_type} has a body"
    return "" if node.graph is model.graph else "in a body"


def constraint_domain(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The operator must be ONNX's own, or one of another domain that the provider knows."""
    if node.domain in ("", "ai.onnx") or node.op_type in DOMAINS.get(node.domain, ()):
        return ""
    return f"domain '{node.domain}'"


def constraint_opset(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The opset must be one that the target loads."""
    opset = model.opset_imports.get("", 0)
    if node.domain or target.opset.min <= opset <= target.opset.max:
        return ""
    return f"opset {opset}, the target loads {target.opset.min} to {target.opset.max}"


def constraint_operator(node: ir.Node, model: ir.Model, target: Target) -> str:
    """HTP must have a form of the operator."""
    row = OPERATORS.get(node.op_type)
    return "" if row is not None and (row.types or row.unit_types) else f"{node.op_type} has none"


def constraint_static_shapes(node: ir.Node, model: ir.Model, target: Target) -> str:
    """All dimensions must be known and at least 1."""
    for value in _values(node):
        shape = static_shape(value)
        if shape is None:
            return f"'{value.name}' has an open shape"
        if shape and min(shape) < 1 and not value.is_initializer():
            return f"'{value.name}' is empty"
    return ""


def constraint_unit(node: ir.Node, model: ir.Model, target: Target) -> str:
    """An operator that HTP computes in integers alone must be dequantized before and quantized after."""
    row, unit = OPERATORS[node.op_type], unit_at(node, model)
    return "" if unit.quantized or row.types else "computes in float"


def constraint_types(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The element type must be one that the operator's form takes."""
    row, unit = OPERATORS[node.op_type], unit_at(node, model)
    given = unit.input_type(DATA_INPUT.get(node.op_type, 0))
    if unit.quantized:
        given = dtype(unit.dequantize[0].inputs[0]) if given in FLOATS and unit.quantize else given
        taken = row.unit_types | (FLOATS if not unit.quantize else frozenset())
    else:
        taken = row.types
    if given is None or given in taken:
        return ""
    return f"{given.name.lower()}{' in a QDQ unit' if unit.quantized else ''}, taken: {_listed(taken)}"


def constraint_rank(node: ir.Node, model: ir.Model, target: Target) -> str:
    """No tensor may have more dimensions than the operator's form has."""
    row, unit = OPERATORS[node.op_type], unit_at(node, model)
    low, high = row.unit_ranks if unit.quantized else row.ranks
    ranks = [len(shape) for value in _values(node) if (shape := static_shape(value)) is not None]
    data = static_shape(node.inputs[DATA_INPUT.get(node.op_type, 0)]) if node.inputs else None
    if ranks and max(ranks) > high:
        return f"{max(ranks)} dimensions, at most {high}"
    if data is not None and len(data) < low:
        return f"{len(data)} dimensions, at least {low}"
    return ""


def constraint_integer_rank(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Integers of five dimensions must not be int64, nor what the operator takes in four only."""
    refused = {ir.DataType.INT64, *FOUR_D.get(node.op_type, ())}
    for value in _values(node):
        kind = unit_at(node, model).input_type(0) if node.inputs and value is node.inputs[0] else dtype(value)
        if kind in refused and not value.is_initializer() and len(static_shape(value) or ()) > 4:
            return f"{kind.name.lower()} in '{value.name}'" if kind is not None else ""
    return ""


def constraint_floats(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Floats need an HTP that computes in fp16, from architecture 69 on."""
    if architecture(target) >= FLOAT_ARCH or node.op_type in (QUANTIZE, DEQUANTIZE, *OLD_FLOATS):
        return ""
    unit = unit_at(node, model)
    outside = [unit.input_type(index) for index in range(len(node.inputs))]
    outside += [unit.output_type(index) for index in range(len(node.outputs))]
    if unit.quantized:
        outside = [unit.input_type(0), unit.output_type(0)]
    refused = {ir.DataType.FLOAT16} if node.op_type in OLD_MOVES else FLOATS
    return f"architecture {architecture(target)}" if any(kind in refused for kind in outside) else ""


def constraint_architecture(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The operator, in its number of bits, must be one that the architecture has."""
    if architecture(target) >= FLOAT_ARCH:
        return ""
    wide = unit_at(node, model).input_type(0) in INTEGERS_16
    lacking = node.op_type in OLD_WITHOUT or (wide and node.op_type in OLD_WITHOUT_16)
    return f"{architecture(target)} has no {node.op_type}{' of 16 bits' if wide else ''}" if lacking else ""


def architecture(target: Target) -> int:
    """Return the Hexagon architecture's number; a target that names none is taken to compute in floats."""
    return int(target.options.get("htp_arch", FLOAT_ARCH))


def constraint_grid(node: ir.Node, model: ir.Model, target: Target) -> str:
    """Scales and zero points must be constant."""
    for member in unit_at(node, model).nodes:
        if member.op_type in (QUANTIZE, DEQUANTIZE):
            for value in member.inputs[1:]:
                if value is not None and constant(value) is None:
                    return f"'{value.name}' is computed"
    return ""


def constraint_dequantize(node: ir.Node, model: ir.Model, target: Target) -> str:
    """A Q or DQ node outside a unit must have one scale: per channel or block, it exists only in its operator."""
    if node.op_type not in (QUANTIZE, DEQUANTIZE):
        return ""
    scale = constant(node.inputs[1])
    return f"{scale.size} scales" if scale is not None and scale.size != 1 else ""


GENERAL: tuple[Constraint, ...] = (
    constraint_body,
    constraint_domain,
    constraint_opset,
    constraint_operator,
    constraint_static_shapes,
    constraint_unit,
    constraint_types,
    constraint_rank,
    constraint_integer_rank,
    constraint_floats,
    constraint_architecture,
    constraint_grid,
    constraint_dequantize,
)


def violation(node: ir.Node, model: ir.Model, target: Target, constraints: Sequence[Constraint]) -> str:
    """Return the sentence of the first constraint that the node violates, with what it has instead; empty if none."""
    for constraint in constraints:
        if found := constraint(node, model, target):
            return f"{(constraint.__doc__ or '').rstrip('.')} ({found})"
    return ""


def _values(node: ir.Node) -> Iterator[ir.Value]:
    return (value for value in (*node.inputs, *node.outputs) if value is not None and value.name)


def _listed(types: frozenset[ir.DataType]) -> str:
    return ", ".join(sorted(kind.name.lower() for kind in types)) or "none"


def attribute(node: ir.Node, name: str, default: str, taken: Sequence[str]) -> str:
    """Return a string attribute with its value where it is none of those taken."""
    given = node.attributes.get_string(name, default)
    return "" if given in taken else f"{name} = {given}"
