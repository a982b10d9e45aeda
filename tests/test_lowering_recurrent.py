"""LSTM, GRU and RNN in Core ML's MIL, beside onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from lowering_runs import check, numbers, operations, text
from optkit.errors import InputError

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
STEPS, BATCH, INPUTS, HIDDEN = 5, 2, 3, 4


def recurrent(op, direction="forward", attributes="", states=False, peepholes=False, steps=STEPS):
    """Return a model with weights, biases, and first states where asked for, and its inputs."""
    count, rows = DIRECTIONS[direction], GATES[op] * HIDDEN
    constants = {"w": numbers(count, rows, INPUTS, seed=1, low=-1, high=1)}
    constants |= {"r": numbers(count, rows, HIDDEN, seed=2, low=-1, high=1), "b": numbers(count, 2 * rows, seed=3)}
    inputs = {"x": numbers(steps, BATCH, INPUTS)}
    more = ""
    if states:
        inputs |= {"h": numbers(count, BATCH, HIDDEN, seed=4)}
        more = ", , h"
        if op == "LSTM":
            inputs |= {"c": numbers(count, BATCH, HIDDEN, seed=5)}
            more += ", c"
    if peepholes:
        constants |= {"p": numbers(count, 3 * HIDDEN, seed=6)}
        more = ", , , , p"
    last = ", yc" if op == "LSTM" else ""
    body = f'y, yh{last} = {op}<hidden_size = {HIDDEN}, direction = "{direction}"{attributes}>(x, w, r, b{more})'
    outputs = "float y, float yh" + (", float yc" if last else "")
    return text(body, inputs, outputs, constants), inputs


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", GATES)
def test_directions_and_first_states(op, direction):
    model, inputs = recurrent(op, direction, states=True)
    assert op.lower() in operations(model)
    check(model, inputs, deployments=(15, 18), atol=1e-5)


def test_peepholes():
    model, inputs = recurrent("LSTM", peepholes=True)
    check(model, inputs, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_reset_behind_the_product_is_written_step_by_step(direction):
    model, inputs = recurrent("GRU", direction, ", linear_before_reset = 1", states=True)
    assert "gru" not in operations(model)
    check(model, inputs, atol=1e-5)


def test_a_reset_behind_the_product_of_one_step():
    model, inputs = recurrent("GRU", attributes=", linear_before_reset = 1", steps=1)
    check(model, inputs, atol=1e-5)


def test_other_activations():
    model, inputs = recurrent("RNN", attributes=', activations = ["Relu"]')
    check(model, inputs, atol=1e-5)
    model, inputs = recurrent("LSTM", attributes=', activations = ["Sigmoid", "Relu", "Tanh"]')
    check(model, inputs, atol=1e-5)


REFUSED = {
    "it clips its cells": recurrent("LSTM", attributes=", clip = 1.0")[0],
    "its input and forget gates are coupled": recurrent("LSTM", attributes=", input_forget = 1")[0],
    "activation Softsign is not among Sigmoid, Tanh, Relu": recurrent("RNN", attributes=', activations = ["Softsign"]')[
        0
    ],
    "linear_before_reset over 65 steps": recurrent("GRU", attributes=", linear_before_reset = 1", steps=65)[0],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_forms_that_mil_lacks_are_refused(reason):
    with pytest.raises(InputError, match=reason):
        operations(REFUSED[reason])


def test_sequences_of_different_lengths_are_refused():
    inputs = {"x": numbers(3, 2, 3)}
    constants = {"w": numbers(1, 4, 3), "r": numbers(1, 4, 4), "b": numbers(1, 8), "s": np.array([3, 2], np.int32)}
    body = "y, h = RNN<hidden_size = 4>(x, w, r, b, s)"
    with pytest.raises(InputError, match="its sequences have different lengths"):
        operations(text(body, inputs, "float y, float h", constants))
    constants["s"] = np.array([3, 3], np.int32)
    check(text(body, inputs, "float y, float h", constants), inputs, atol=1e-5)


def test_computed_weights_are_refused():
    inputs = {"x": numbers(3, 2, 3), "w": numbers(1, 4, 3), "r": numbers(1, 4, 4)}
    with pytest.raises(InputError, match="its weights W are computed at run time"):
        operations(text("y = RNN<hidden_size = 4>(x, w, r)", inputs, "float y"))
