"""Recurrent networks, step by step.

The hidden states of ``reverse`` are in the order in which they are computed, the last element first; those of the
backward half of ``bidirectional`` are in the order of the input (apple/coremltools, tests of the operators).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from optkit_targets.coreml.interpreter.kernels.activations import sigmoid
from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray
Activation = Callable[[Array], Array]

# Where activations have parameters, these are their standard ones: those of scaled_tanh make it tanh.
ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
    "hard_sigmoid": lambda x: np.clip(np.float32(0.2) * x + np.float32(0.5), 0, 1),
    "sigmoid_hard": lambda x: np.clip(np.float32(0.2) * x + np.float32(0.5), 0, 1),
    "scaled_tanh": np.tanh,
}


def _zeros(like: Array, rows: int) -> Array:
    return np.zeros(rows, like.dtype)


@executes("rnn")
def rnn(
    x: Array,
    initial_h: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Array | None = None,
    direction: str = "forward",
    output_sequence: Array | bool = False,
    activation: str = "tanh",
) -> tuple[Array, Array]:
    """Return the hidden states of ``h = f(W x + R h + b)``, [S or 1, B, H], and the last one."""
    function, reverse = ACTIVATIONS[activation], direction == "reverse"
    hidden, steps = initial_h, []
    inputs = x @ weight_ih.T + (_zeros(x, len(weight_ih)) if bias is None else bias)
    for step in inputs[::-1] if reverse else inputs:
        hidden = function(step + hidden @ weight_hh.T)
        steps.append(hidden)
    return (np.stack(steps) if output_sequence else hidden[None]), hidden


@executes("gru")
def gru(
    x: Array,
    initial_h: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Array | None = None,
    direction: str = "forward",
    output_sequence: Array | bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: Array | bool = False,
    input_bias: Array | None = None,
) -> tuple[Array, Array]:
    """Return the hidden states of a gated recurrent unit, [S or 1, B, H], and the last one.

    Gates are in the order reset, output, update. The reset gate multiplies what the output gate's recursion reads, or,
    with ``reset_after``, what it gives, its bias included (apple/coremltools, NeuralNetwork.proto, GRULayerParams).
    """
    gate, function, reverse = ACTIVATIONS[recurrent_activation], ACTIVATIONS[activation], direction == "reverse"
    size = weight_hh.shape[1]
    hidden, steps = initial_h, []
    inputs = x @ weight_ih.T + (_zeros(x, 3 * size) if input_bias is None else input_bias)
    recursive = _zeros(x, 3 * size) if bias is None else bias
    recur_r, recur_o, recur_z = np.split(weight_hh, 3)
    bias_r, bias_o, bias_z = np.split(recursive, 3)
    for step in inputs[::-1] if reverse else inputs:
        in_r, in_o, in_z = np.split(step, 3, axis=-1)
        reset = gate(in_r + hidden @ recur_r.T + bias_r)
        update = gate(in_z + hidden @ recur_z.T + bias_z)
        if reset_after:
            output = function(in_o + reset * (hidden @ recur_o.T + bias_o))
        else:
            output = function(in_o + (reset * hidden) @ recur_o.T + bias_o)
        hidden = (1 - update) * output + update * hidden
        steps.append(hidden)
    return (np.stack(steps) if output_sequence else hidden[None]), hidden


@executes("lstm")
def lstm(
    x: Array,
    initial_h: Array,
    initial_c: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Array | None = None,
    peephole: Array | None = None,
    weight_ih_back: Array | None = None,
    weight_hh_back: Array | None = None,
    bias_back: Array | None = None,
    peephole_back: Array | None = None,
    direction: str = "forward",
    output_sequence: Array | bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return the hidden states of a long short-term memory, [S or 1, B, H or 2 H], the last one, and the last cell.

    Gates are in the order input, forget, output, cell. ``clip`` bounds the cell's state.
    """
    functions = (ACTIVATIONS[recurrent_activation], ACTIVATIONS[cell_activation], ACTIVATIONS[activation])
    limit = None if clip is None else float(clip)
    if direction != "bidirectional":
        pass_ = _lstm(
            x, initial_h, initial_c, weight_ih, weight_hh, bias, peephole, direction == "reverse", functions, limit
        )
        sequence, hidden, cell = pass_
        return (sequence if output_sequence else hidden[None]), hidden, cell
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("a bidirectional lstm needs weights of both directions")
    ahead_h, back_h = np.split(initial_h, 2, axis=-1)
    ahead_c, back_c = np.split(initial_c, 2, axis=-1)
    ahead = _lstm(x, ahead_h, ahead_c, weight_ih, weight_hh, bias, peephole, False, functions, limit)
    back = _lstm(x, back_h, back_c, weight_ih_back, weight_hh_back, bias_back, peephole_back, True, functions, limit)
    back = back[0][::-1], back[1], back[2]
    sequence, hidden, cell = (np.concatenate(pair, axis=-1) for pair in zip(ahead, back, strict=True))
    return (sequence if output_sequence else hidden[None]), hidden, cell


def _lstm(
    x: Array,
    hidden: Array,
    cell: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Array | None,
    peephole: Array | None,
    reverse: bool,
    functions: tuple[Activation, Activation, Activation],
    clip: float | None,
) -> tuple[Array, Array, Array]:
    """Return one direction's hidden states [S, B, H] as they are computed, the last one, and the last cell."""
    gate, cell_function, function = functions
    size = weight_hh.shape[1]
    peep_i, peep_f, peep_o = np.split(_zeros(x, 3 * size) if peephole is None else peephole, 3)
    inputs = x @ weight_ih.T + (_zeros(x, 4 * size) if bias is None else bias)
    steps = []
    for step in inputs[::-1] if reverse else inputs:
        in_i, in_f, in_o, in_z = np.split(step + hidden @ weight_hh.T, 4, axis=-1)
        cell = gate(in_f + peep_f * cell) * cell + gate(in_i + peep_i * cell) * cell_function(in_z)
        cell = cell if clip is None else np.clip(cell, -clip, clip)
        hidden = gate(in_o + peep_o * cell) * function(cell)
        steps.append(hidden)
    return np.stack(steps), hidden, cell
