"""QDQ units: the dequantized inputs, the operator and the quantized output that HTP runs as one integer operator.

The grouping is that of the execution provider (onnxruntime-qnn 2.7, ``qnn_ep_utils.cc``, ``GetOrtQDQSelection`` and
the selectors below it): who reads a dequantized value and is quantized again by the rules of its operator becomes one
unit, and every node outside a unit stands alone, computing in float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant, opset, static_shape
from optkit_targets.qnn.operators import UNIT_RULES

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
INTEGERS_16 = frozenset({ir.DataType.INT16, ir.DataType.UINT16})
INTEGERS_8 = frozenset({ir.DataType.INT8, ir.DataType.UINT8})


@dataclass(frozen=True)
class Unit:
    """An operator with the Q and DQ nodes that it absorbs.

    Attributes:
        node: The operator.
        dequantize: The nodes that feed it, in the order of its inputs.
        quantize: The nodes that read it, in the order of its outputs.
        folded: A Reshape, Relu or Clip between the operator and its Q that the integer grid makes part of it.
    """

    node: ir.Node
    dequantize: tuple[ir.Node, ...] = ()
    quantize: tuple[ir.Node, ...] = ()
    folded: tuple[ir.Node, ...] = ()

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes of the unit."""
        return (*self.dequantize, self.node, *self.folded, *self.quantize)

    @property
    def quantized(self) -> bool:
        """Whether the operator computes in integers."""
        return bool(self.dequantize)

    def input_type(self, index: int) -> ir.DataType | None:
        """Return the element type that input ``index`` has on the NPU: of the integers where it is dequantized here."""
        source = producer(argument(self.node, index))
        if source is not None and source in self.dequantize:
            return dtype(source.inputs[0])
        return dtype(argument(self.node, index))

    def output_type(self, index: int) -> ir.DataType | None:
        """Return the element type that output ``index`` has on the NPU: of the integers where it is quantized here."""
        last = self.folded[-1] if self.folded else self.node
        value = last.outputs[index if last is self.node else 0]
        for user, _ in value.uses():
            if user in self.quantize:
                return dtype(user.outputs[0])
        return dtype(value)


def unit_at(node: ir.Node, model: ir.Model) -> Unit:
    """Return the unit around an operator, or one that holds it alone."""
    return _unit(node, model) or Unit(node)


def units(model: ir.Model) -> list[Unit]:
    """Return the units of the main graph, in its order; every node is in at least one.

    A DQ node that several operators read is in the unit of each: onnxruntime duplicates it. The node itself stays with
    its first reader, and stands alone where that one is in no unit.
    """
    found = {node: unit for node in model.graph if (unit := _unit(node, model)) is not None}
    first: dict[ir.Node, ir.Node] = {}
    for node in model.graph:
        for source in map(producer, node.inputs):
            if source is not None:
                first.setdefault(source, node)
    taken = {member for unit in found.values() for member in (unit.node, *unit.folded, *unit.quantize)}
    taken |= {source for source, reader in first.items() if reader in found and source in found[reader].dequantize}
    return [found.get(node) or Unit(node) for node in model.graph if node in found or node not in taken]


def homes(found: Sequence[Unit]) -> dict[ir.Node, int]:
    """Return the index of the unit that decides about each node: of a shared DQ node, the first that reads it."""
    home = {unit.node: index for index, unit in enumerate(found)}
    for index, unit in enumerate(found):
        for node in unit.nodes:
            home.setdefault(node, index)
    return home


def producer(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value."""
    return None if value is None else value.producer()


def dtype(value: ir.Value | None) -> ir.DataType | None:
    """Return a value's element type, or None where it is absent or not known."""
    if value is None:
        return None
    return value.dtype if value.dtype is not None else value.const_value.dtype if value.const_value else None


def stored(value: ir.Value | None) -> np.ndarray | None:
    """Return the array that a constant is stored as, integers where it is dequantized; None where it is computed."""
    source = producer(value)
    return constant(source.inputs[0] if source is not None and source.op_type == DEQUANTIZE else value)


def incomplete(node: ir.Node, model: ir.Model) -> str:
    """Return what keeps a node behind a DQ from being a unit; empty where nothing does, or nothing is quantized."""
    feeding = [source for source in map(producer, node.inputs) if source is not None and source.op_type == DEQUANTIZE]
    if not feeding or node.op_type in (QUANTIZE, DEQUANTIZE) or _unit(node, model) is not None:
        return ""
    if node.op_type not in UNIT_RULES:
        return f"{node.op_type} has no integer form"
    if not any(user.op_type == QUANTIZE for value in node.outputs for user, _ in value.uses()):
        return "its output is not quantized"
    return "not all of its inputs and outputs are quantized, or their element types differ"


def _unit(node: ir.Node, model: ir.Model) -> Unit | None:
    name = UNIT_RULES.get(node.op_type)
    if name is None or (node.op_type == "MaxPool" and opset(model) < 12):
        return None
    feeding = tuple(source for source in map(producer, node.inputs) if source and source.op_type == DEQUANTIZE)
    folded = _folded(node)
    last = folded[-1] if folded else node
    reading = tuple(user for value in last.outputs for user, _ in value.uses() if user.op_type == QUANTIZE)
    unit = Unit(node, feeding, reading, folded)
    return unit if feeding and _RULES[name](unit) else None


# --- what may be folded between an operator and its Q ---------------------------------------------------------------


def _folded(node: ir.Node) -> tuple[ir.Node, ...]:
    if (reader := _sole_reader(node)) is None:
        return ()
    if _is_redundant(reader):
        return (reader,)
    if node.op_type == "Gemm" and reader.op_type == "Reshape" and _folds_reshape(node):
        after = _sole_reader(reader)
        if after is not None and after.op_type == QUANTIZE:
            return (reader,)
        if after is not None and _is_redundant(after):
            return (reader, after)
    return ()


def _sole_reader(node: ir.Node) -> ir.Node | None:
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    uses = list(node.outputs[0].uses())
    return uses[0][0] if len(uses) == 1 else None


def _is_redundant(node: ir.Node) -> bool:
    """Return whether a Relu or Clip changes nothing, because the grid that its Q puts values on ends where it does."""
    after = _sole_reader(node) if node.op_type in ("Relu", "Clip") else None
    if after is None or after.op_type != QUANTIZE or len(after.inputs) < 3:
        return False
    scale, zero = constant(after.inputs[1]), constant(after.inputs[2])
    kind = dtype(after.outputs[0])
    if scale is None or zero is None or kind not in INTEGERS_8 | INTEGERS_16:
        return False
    grid = np.iinfo(kind.numpy())
    ends = [float(scale.flat[0]) * (bound - int(zero.flat[0])) for bound in (grid.min, grid.max)]
    low, high = 0.0, float(np.finfo(np.float32).max)
    if node.op_type == "Clip":
        low, high = clip_bounds(node)
    return ends[0] >= low and ends[1] <= high


def clip_bounds(node: ir.Node) -> tuple[float, float]:
    """Return a Clip's constant bounds; an absent or computed one counts as infinite."""
    bounds = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        given = node.attributes.get(name)
        array = constant(argument(node, index))
        bounds.append(given.as_float() if given is not None else float(array.flat[0]) if array is not None else default)
    return bounds[0], bounds[1]


def _folds_reshape(gemm: ir.Node) -> bool:
    if any(gemm.attributes.get_int(name, 0) for name in ("transA", "transB")):
        return False
    bias = argument(gemm, 2)
    if bias is None or gemm.attributes.get_float("beta", 1.0) == 0.0:
        return True
    weight, shape = argument(gemm, 1), bias.shape
    if weight is None or weight.shape is None or shape is None:
        return False
    width = weight.shape[1]
    single = static_shape(bias) == []
    static = constant(bias) is not None or (
        (source := producer(bias)) is not None
        and source.op_type == DEQUANTIZE
        and constant(source.inputs[0]) is not None
    )
    return static and (list(shape) in ([width], [1, width]) or (width == 1 and single))


# --- the rules: which Q and DQ nodes an operator must have ----------------------------------------------------------


def _complete(unit: Unit, count: int) -> bool:
    """Return whether ``count`` inputs are dequantized, and every output quantized, once, and read by nothing else."""
    outputs = [value for value in unit.node.outputs if value.name and not (value.name == "" or value is None)]
    readers = sum(len(list(value.uses())) for value in outputs)
    fed_out = any(value.is_graph_output() for value in outputs)
    return len(unit.dequantize) == count and len(outputs) == len(unit.quantize) == readers and not fed_out


def _types(unit: Unit) -> tuple[list[ir.DataType | None], list[ir.DataType | None]]:
    return [dtype(node.inputs[0]) for node in unit.dequantize], [dtype(node.outputs[0]) for node in unit.quantize]


def _scalar_scale(node: ir.Node) -> float | None:
    scale = constant(node.inputs[1])
    return float(scale) if scale is not None and scale.ndim == 0 and scale > 0 else None


def _same_scale(unit: Unit) -> bool:
    scales = {_scale(node) for node in (*unit.dequantize[:1], *unit.quantize)}
    return len(scales) == 1 and None not in scales


def _scale(node: ir.Node) -> float | None:
    scale = constant(node.inputs[1])
    return None if scale is None else float(scale.flat[0])


def _one_type(unit: Unit, count: int) -> bool:
    if not _complete(unit, count):
        return False
    into, out = _types(unit)
    return len({*into, *out}) == 1


def _moves(unit: Unit) -> bool:
    """The data stays as it is, so both grids must be one."""
    if unit.folded or not _one_type(unit, 1):
        return False
    return _scalar_scale(unit.quantize[0]) is not None and _same_scale(unit)


def _signs_agree(unit: Unit) -> bool:
    into = _types(unit)[0]
    return into[0] != ir.DataType.INT8 or into[1] == into[0]


def _conv(unit: Unit) -> bool:
    fed = [producer(argument(unit.node, index)) for index in (0, 1)]
    if any(source not in unit.dequantize for source in fed) or not _ends_alike(unit, len(unit.dequantize)):
        return False
    into = _types(unit)[0]
    return _signs_agree(unit) and (len(into) < 3 or into[2] == ir.DataType.INT32)


def _matmul(unit: Unit) -> bool:
    return _ends_alike(unit, 2) and _signs_agree(unit)


def _gemm(unit: Unit) -> bool:
    whole = _complete(unit, len(unit.node.inputs)) or not unit.quantize
    if len(unit.dequantize) != len(unit.node.inputs) or len(unit.dequantize) < 2 or not whole or not _signs_agree(unit):
        return False
    into, out = _types(unit)
    if out and into[0] != out[0]:
        return False
    return len(into) < 3 or (unit.node.attributes.get_float("beta", 1.0) == 1.0 and into[2] == ir.DataType.INT32)


def _normalization(unit: Unit) -> bool:
    if not _complete(unit, len(unit.node.inputs)):
        return False
    into, out = _types(unit)
    return into[0] == out[0] and (len(into) < 3 or into[2] == ir.DataType.INT32)


def _batch_normalization(unit: Unit) -> bool:
    count = len(unit.dequantize)
    if not 2 <= count <= 5 or (unit.quantize and not _complete(unit, count)) or not _signs_agree(unit):
        return False
    into, out = _types(unit)
    return not out or into[0] == out[0]


def _optional_output(unit: Unit) -> bool:
    if len(unit.dequantize) != len(unit.node.inputs) or (unit.quantize and not _complete(unit, len(unit.dequantize))):
        return False
    into, out = _types(unit)
    return not out or into[0] == out[0]


def _clip(unit: Unit) -> bool:
    data = producer(argument(unit.node, 0))
    return data in unit.dequantize and bool(unit.quantize) and _ends_alike(unit, len(unit.dequantize))


def _ends_alike(unit: Unit, count: int) -> bool:
    if not _complete(unit, count):
        return False
    into, out = _types(unit)
    return into[0] == out[0]


def _compare(unit: Unit) -> bool:
    into, _ = _types(unit)
    return len(into) == len(unit.node.inputs) == 2 and not unit.quantize and into[0] == into[1]


def _split(unit: Unit) -> bool:
    return not unit.folded and _one_type(unit, 1) and _same_scale(unit)


def _top_k(unit: Unit) -> bool:
    if unit.folded or len(unit.dequantize) != 1 or len(unit.quantize) != 1:
        return False
    values = unit.node.outputs[0]
    absorbed = len(list(values.uses())) == 1 and not values.is_graph_output()
    into, out = _types(unit)
    return absorbed and into[0] == out[0] and _same_scale(unit)


def _recurrent(unit: Unit) -> bool:
    fed = producer(argument(unit.node, 0))
    if fed not in unit.dequantize or not _complete(unit, len(unit.dequantize)):
        return False
    return set(_types(unit)[1]) == {dtype(fed.inputs[0])} if fed is not None else False


_RULES: dict[str, Callable[[Unit], bool]] = {
    "moves": _moves,
    "unary": lambda unit: _one_type(unit, 1),
    "binary": lambda unit: _one_type(unit, 2),
    "variadic": lambda unit: _one_type(unit, len(unit.node.inputs)),
    "input": lambda unit: not unit.folded and len(unit.dequantize) == 1,
    "optional output": _optional_output,
    "clip": _clip,
    "pad": lambda unit: 1 <= len(unit.dequantize) <= 2 and _one_type(unit, len(unit.dequantize)),
    "split": _split,
    "conv": _conv,
    "matmul": _matmul,
    "gemm": _gemm,
    "normalization": _normalization,
    "batch normalization": _batch_normalization,
    "rms": lambda unit: _ends_alike(unit, len(unit.node.inputs)),
    "compare": _compare,
    "top-k": _top_k,
    "recurrent": _recurrent,
}
