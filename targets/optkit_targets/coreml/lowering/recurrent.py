"""LSTM, GRU and RNN: MIL's own operations, or step by step where MIL lacks the form and the sequence is short.

Shapes: X [steps, batch, inputs], W [directions, gates·hidden, inputs], R [directions, gates·hidden, hidden],
B [directions, 2·gates·hidden], Y [steps, directions, batch, hidden]; ``layout`` 1 has the batch first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml.lowering.forms import dims, dtype, known, label, reshaped, setting, transposed
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.shaping import concatenated
from optkit_targets.coreml.lowering.table import lowers

ACTIVATIONS = {"Sigmoid": "sigmoid", "Tanh": "tanh", "Relu": "relu"}
DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
GATES = {"LSTM": (0, 2, 1, 3), "GRU": (1, 2, 0), "RNN": (0,)}  # ONNX's iofc, zrh in MIL's order: ifoz, roz
MAX_STEPS = 64  # longer sequences are not written step by step


@dataclass(frozen=True)
class Cell:
    """One direction of a recurrent operator, its weights in ONNX's order of gates.

    Attributes:
        inputs: [gates·hidden, inputs].
        hidden: [gates·hidden, hidden].
        input_bias: [gates·hidden].
        hidden_bias: [gates·hidden].
        peepholes: [3·hidden], or None.
        activations: MIL's names.
    """

    inputs: np.ndarray
    hidden: np.ndarray
    input_bias: np.ndarray
    hidden_bias: np.ndarray
    peepholes: np.ndarray | None
    activations: tuple[str, ...]

    @property
    def size(self) -> int:
        """Return the number of hidden units."""
        return int(self.hidden.shape[-1])


@dataclass(frozen=True)
class Run:
    """What an operator runs on.

    Attributes:
        sequence: [steps, batch, inputs].
        states: The first hidden states, and cell states of an LSTM: [directions, batch, hidden] each.
        cells: One for each direction.
        reverse: Whether each direction runs from the end.
    """

    sequence: Any
    states: list[Any]
    cells: list[Cell]
    reverse: list[bool]


def ordered(rows: np.ndarray, gates: Sequence[int]) -> np.ndarray:
    """Return rows with their gates in another order."""
    parts = np.split(rows, len(gates)) if len(gates) > 1 else [rows]
    return np.concatenate([parts[gate] for gate in gates])


def _weights(scope: Scope, node: ir.Node, index: int, what: str) -> np.ndarray | None:
    array = known(scope, node, index)
    if array is None and scope.optional(node, index) is not None:
        raise CannotLower(f"its {what} are computed at run time")
    return array


def _cells(scope: Scope, node: ir.Node, kind: np.dtype[Any]) -> list[Cell]:
    """Return the directions' weights."""
    inputs, hidden = _weights(scope, node, 1, "weights W"), _weights(scope, node, 2, "weights R")
    if inputs is None or hidden is None:
        raise CannotLower("it has no weights")
    rows = hidden.shape[1]
    bias = _weights(scope, node, 3, "biases B")
    bias = np.zeros((len(inputs), 2 * rows)) if bias is None else bias
    peepholes = _weights(scope, node, 7, "peepholes P") if node.op_type == "LSTM" else None
    names = [str(name) for name in node.attributes.get_strings("activations", [])] or DEFAULTS[node.op_type] * len(
        inputs
    )
    unknown = [name for name in names if name not in ACTIVATIONS]
    if unknown:
        raise CannotLower(f"activation {unknown[0]} is not among {', '.join(ACTIVATIONS)}")
    each = len(DEFAULTS[node.op_type])
    return [
        Cell(
            inputs[place].astype(kind),
            hidden[place].astype(kind),
            bias[place, :rows].astype(kind),
            bias[place, rows:].astype(kind),
            None if peepholes is None else peepholes[place].astype(kind),
            tuple(ACTIVATIONS[name] for name in names[place * each : (place + 1) * each]),
        )
        for place in range(len(inputs))
    ]


def _run(scope: Scope, node: ir.Node) -> Run:
    """Return what an operator runs on.

    Raises:
        CannotLower: Lengths that differ, a clip, coupled gates, weights that are computed.
    """
    if node.attributes.get("clip") is not None:
        raise CannotLower("it clips its cells: MIL clips at another place")
    if node.attributes.get_int("input_forget", 0):
        raise CannotLower("its input and forget gates are coupled")
    sequence, batch_first = scope.input(node, 0), node.attributes.get_int("layout", 0)
    sequence = transposed(scope, sequence, [1, 0, 2]) if batch_first else sequence
    steps, batch, _ = dims(sequence)
    lengths = setting(scope, node, 4, "sequence_lens")
    if lengths is not None and set(lengths) != {steps}:
        raise CannotLower("its sequences have different lengths")
    kind = np.dtype(np.float16 if dtype(sequence) == "fp16" else np.float32)
    cells = _cells(scope, node, kind)
    shape = (len(cells), batch, cells[0].size)
    states = []
    for index in (5, 6) if node.op_type == "LSTM" else (5,):
        given = scope.optional(node, index)
        if given is not None and batch_first:
            given = transposed(scope, given, [1, 0, 2])
        states.append(scope.mb.const(val=np.zeros(shape, kind)) if given is None else given)
    direction = node.attributes.get_string("direction", "forward")
    reverse = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[str(direction)]
    return Run(sequence, states, cells, reverse)


@lowers("LSTM", "GRU", "RNN")
def recurrent(scope: Scope, node: ir.Node) -> Any:
    """Write a recurrent operator: each direction on its own, Y joined, the states stacked."""
    run = _run(scope, node)
    step_by_step = bool(node.op_type == "GRU" and node.attributes.get_int("linear_before_reset", 0))
    steps = dims(run.sequence)[0]
    if step_by_step and steps > MAX_STEPS:
        raise CannotLower(
            f"linear_before_reset over {steps} steps: MIL has no such GRU, and step by step only {MAX_STEPS}"
        )
    found = []
    for place, (cell, reverse) in enumerate(zip(run.cells, run.reverse, strict=True)):
        first = [_row(scope, state, place) for state in run.states]
        sequence = scope.mb.reverse(x=run.sequence, axes=[0]) if reverse else run.sequence
        work = _gru_steps if step_by_step else WRITERS[node.op_type]
        outputs, *states = work(scope, node, sequence, cell, first)
        found.append([scope.mb.reverse(x=outputs, axes=[0]) if reverse else outputs, *states])
    return _outputs(scope, node, found)


def _row(scope: Scope, state: Any, place: int) -> Any:
    """Return one direction's first state: [batch, hidden]."""
    directions, batch, hidden = dims(state)
    if directions > 1:
        state = scope.mb.slice_by_index(x=state, begin=[place, 0, 0], end=[place + 1, batch, hidden])
    return reshaped(scope, state, [batch, hidden])


def _outputs(scope: Scope, node: ir.Node, found: list[list[Any]]) -> list[Any]:
    """Return Y and the last states in ONNX's shapes."""
    batch_first = node.attributes.get_int("layout", 0)
    joined = [
        concatenated(scope, [scope.mb.expand_dims(x=part[0], axes=[1]) for part in found], 1),
        *(
            concatenated(scope, [scope.mb.expand_dims(x=part[index], axes=[0]) for part in found], 0)
            for index in range(1, len(found[0]))
        ),
    ]
    if not batch_first:
        return joined
    return [
        transposed(scope, joined[0], [2, 0, 1, 3]),
        *(transposed(scope, state, [1, 0, 2]) for state in joined[1:]),
    ]


def _lstm(scope: Scope, node: ir.Node, sequence: Any, cell: Cell, first: list[Any]) -> list[Any]:
    """Return MIL's LSTM of one direction."""
    gates = GATES["LSTM"]
    peepholes = {} if cell.peepholes is None else {"peephole": ordered(cell.peepholes, (0, 2, 1))}
    return list(
        scope.mb.lstm(
            x=sequence,
            initial_h=first[0],
            initial_c=first[1],
            weight_ih=ordered(cell.inputs, gates),
            weight_hh=ordered(cell.hidden, gates),
            bias=ordered(cell.input_bias + cell.hidden_bias, gates),
            direction="forward",
            output_sequence=True,
            recurrent_activation=cell.activations[0],
            cell_activation=cell.activations[1],
            activation=cell.activations[2],
            **peepholes,
            name=label(scope, node),
        )
    )


def _gru(scope: Scope, node: ir.Node, sequence: Any, cell: Cell, first: list[Any]) -> list[Any]:
    """Return MIL's GRU of one direction: the reset gate is applied before the product with R."""
    gates = GATES["GRU"]
    return list(
        scope.mb.gru(
            x=sequence,
            initial_h=first[0],
            weight_ih=ordered(cell.inputs, gates),
            weight_hh=ordered(cell.hidden, gates),
            bias=ordered(cell.input_bias + cell.hidden_bias, gates),
            direction="forward",
            output_sequence=True,
            recurrent_activation=cell.activations[0],
            activation=cell.activations[1],
            name=label(scope, node),
        )
    )


def _rnn(scope: Scope, node: ir.Node, sequence: Any, cell: Cell, first: list[Any]) -> list[Any]:
    """Return MIL's plain recurrence of one direction."""
    return list(
        scope.mb.rnn(
            x=sequence,
            initial_h=first[0],
            weight_ih=cell.inputs,
            weight_hh=cell.hidden,
            bias=cell.input_bias + cell.hidden_bias,
            direction="forward",
            output_sequence=True,
            activation=cell.activations[0],
            name=label(scope, node),
        )
    )


def _gru_steps(scope: Scope, node: ir.Node, sequence: Any, cell: Cell, first: list[Any]) -> list[Any]:
    """Return a GRU with ``linear_before_reset``, the reset gate behind the product with R, step by step."""
    mb, (steps, batch, width) = scope.mb, dims(sequence)
    gate, new = getattr(mb, cell.activations[0]), getattr(mb, cell.activations[1])
    flat = reshaped(scope, sequence, [steps * batch, width])
    fed = mb.linear(x=flat, weight=cell.inputs, bias=cell.input_bias)  # all steps at once
    fed = (
        mb.split(x=reshaped(scope, fed, [steps, batch, 3 * cell.size]), num_splits=steps, axis=0)
        if steps > 1
        else [fed]
    )
    state, rows = first[0], []
    for part in fed:
        given = mb.split(x=reshaped(scope, part, [batch, 3 * cell.size]), num_splits=3, axis=1)
        kept = mb.split(x=mb.linear(x=state, weight=cell.hidden, bias=cell.hidden_bias), num_splits=3, axis=1)
        update, reset = (gate(x=mb.add(x=given[place], y=kept[place])) for place in (0, 1))
        fresh = new(x=mb.add(x=given[2], y=mb.mul(x=reset, y=kept[2])))
        state = mb.add(x=fresh, y=mb.mul(x=update, y=mb.sub(x=state, y=fresh)))  # (1-z)·fresh + z·state
        rows.append(mb.expand_dims(x=state, axes=[0]))
    return [concatenated(scope, rows, 0, name=label(scope, node)), state]


WRITERS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}
