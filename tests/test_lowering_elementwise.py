"""Arithmetic, comparisons, choices and types in Core ML's MIL, beside onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from lowering_runs import check, executed, integers, numbers, operations, text
from optkit.errors import InputError

ALL = (15, 18)  # the first and the last that have forms of their own


def test_two_floats_broadcast_both_ways():
    inputs = {"x": numbers(2, 1, 4), "y": numbers(3, 1, seed=1)}
    operators = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")
    body = "\n".join(f"z{op} = {op}(x, y)" for op in operators)
    check(text(body, inputs, ", ".join(f"float z{op}" for op in operators)), inputs, deployments=ALL)


def test_any_number_of_inputs():
    inputs = {"x": numbers(2, 3), "y": numbers(3, seed=1), "z": numbers(2, 1, seed=2)}
    operators = ("Max", "Min", "Sum", "Mean")
    body = "\n".join(f"w{op} = {op}(x, y, z)\nv{op} = {op}(x)" for op in operators)
    check(text(body, inputs, ", ".join(f"float w{op}, float v{op}" for op in operators)), inputs)


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_integers(kind):
    inputs = {"x": integers(4, 5, kind=kind), "y": integers(5, seed=1, kind=kind)}
    operators = ("Add", "Sub", "Mul", "Max", "Min")
    body = "\n".join(f"z{op} = {op}(x, y)" for op in operators)
    check(text(body, inputs, ", ".join(f"{kind} z{op}" for op in operators)), inputs, deployments=ALL)


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_integers_are_divided_toward_zero(kind):
    inputs = {"x": np.array([7, -7, 7, -7, 6, -6, 0], kind), "y": np.array([2, 2, -2, -2, 3, 3, 5], kind)}
    model = text("z = Div(x, y)", inputs, f"{kind} z")
    check(model, inputs, deployments=ALL)
    assert executed(model, inputs)["z"].tolist() == [3, -3, -3, 3, 2, -2, 0]


def test_remainders_have_the_sign_that_fmod_says():
    inputs = {"x": integers(30, low=-20, high=20), "y": np.where(integers(30, seed=1) == 0, 1, integers(30, seed=1))}
    check(text("z = Mod(x, y)", inputs, "int64 z"), inputs)
    check(text("z = Mod<fmod = 1>(x, y)", inputs, "int64 z"), inputs)
    floats = {"x": numbers(50), "y": numbers(50, seed=1)}
    check(text("z = Mod<fmod = 1>(x, y)", floats, "float z"), floats)


@pytest.mark.parametrize(("kind", "low", "high"), [("uint8", 0, 256), ("int8", -128, 128)])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_narrow_integers_wrap_around(op, kind, low, high):
    inputs = {
        "x": integers(40, low=low, high=high, kind=kind),
        "y": integers(40, seed=1, low=low, high=high, kind=kind),
    }
    function = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}[op]
    found = executed(text(f"z = {op}(x, y)", inputs, f"{kind} z"), inputs)
    assert found["z"].tolist() == function(inputs["x"], inputs["y"]).tolist()


def test_a_power_is_in_the_type_of_its_base():
    inputs = {"x": numbers(3, 4, low=0.1), "y": np.array([2, 3, 0, 1])}
    check(text("z = Pow(x, y)", inputs, "float z"), inputs)
    inputs = {"x": integers(3, 4, low=0, high=5), "y": numbers(4, low=0, high=2)}
    check(text("z = Pow(x, y)", inputs, "int64 z"), inputs)


# Their smallest and largest argument.
FUNCTIONS = {
    **dict.fromkeys(("Abs", "Neg", "Sign", "Exp", "Erf", "Ceil", "Floor", "Round", "Sin", "Cos", "Tan"), (-3, 3)),
    **dict.fromkeys(("Atan", "Sinh", "Cosh", "Tanh", "Asinh"), (-3, 3)),
    "Sqrt": (0, 9),
    "Log": (0.1, 9),
    "Reciprocal": (0.1, 9),
    "Asin": (-1, 1),
    "Acos": (-1, 1),
    "Atanh": (-0.9, 0.9),
    "Acosh": (1, 9),
}


def test_functions_of_one_number():
    inputs = {f"x{op}": numbers(4, 25, low=low, high=high) for op, (low, high) in FUNCTIONS.items()}
    body = "\n".join(f"y{op} = {op}(x{op})" for op in FUNCTIONS)
    outputs = ", ".join(f"float y{op}" for op in FUNCTIONS)
    check(text(body, inputs, outputs, opset=22), inputs, deployments=ALL)


def test_the_inverse_hyperbolic_functions_neither_overflow_nor_cancel():
    inputs = {"x": np.array([1e-6, -1e-3, 0.5, 1, -1, 3, 1e4, -1e15, 1e30], np.float32)}
    check(text("y = Asinh(x)", inputs, "float y"), inputs, atol=0)
    inputs = {"x": np.array([1, 1.0001, 1.9, 2, 2.1, 50, 1e4, 1e15, 1e30], np.float32)}
    check(text("y = Acosh(x)", inputs, "float y"), inputs, atol=0)


def test_logarithm_and_reciprocal_of_zero_are_infinite():
    inputs = {"x": np.zeros(2, np.float32)}
    check(text("y = Log(x)\nz = Reciprocal(x)", inputs, "float y, float z"), inputs)


def test_halves_are_rounded_to_even():
    inputs = {"x": np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.4, 2.6], np.float32)}
    found = executed(text("y = Round(x)", inputs, "float y"), inputs)
    assert found["y"].tolist() == [0, 2, 2, 0, -2, 2, 3]


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_unsigned_integers_are_shifted(direction):
    inputs = {"x": integers(20, low=0, high=256, kind="uint8"), "y": integers(20, seed=1, low=0, high=8, kind="uint8")}
    body = f'z = BitShift<direction = "{direction}">(x, y)'
    check(text(body, inputs, "uint8 z"), inputs)
    check(text(body, {"x": inputs["x"]}, "uint8 z", {"y": inputs["y"]}), {"x": inputs["x"]})


@pytest.mark.parametrize("kind", ["int8", "int64", "uint8", "uint16"])
def test_bits_are_inverted(kind):
    inputs = {"x": integers(20, low=0, high=100, kind=kind)}
    assert executed(text("y = BitwiseNot(x)", inputs, f"{kind} y"), inputs)["y"].tolist() == (~inputs["x"]).tolist()


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.round(numbers(4, 5)), np.round(numbers(5, seed=1))),
        (integers(4, 5), integers(4, 1, seed=1)),
        (integers(4, 5, low=0, kind="uint8"), integers(4, 1, low=0, seed=1, kind="uint8")),
    ],
)
def test_comparisons(x, y):
    inputs, operators = {"x": x, "y": y}, ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
    body = "\n".join(f"z{op} = {op}(x, y)" for op in operators)
    check(text(body, inputs, ", ".join(f"bool z{op}" for op in operators)), inputs, deployments=ALL)


def test_truth_values():
    inputs = {"x": integers(4, 5, low=0, high=2, kind="bool"), "y": integers(5, seed=1, low=0, high=2, kind="bool")}
    operators = ("And", "Or", "Xor", "Equal")
    body = "\n".join(f"w{op} = {op}(x, y)\nz{op} = Not(w{op})" for op in operators)
    check(text(body, inputs, ", ".join(f"bool z{op}" for op in operators)), inputs, deployments=ALL)


def test_a_choice_broadcasts_its_condition():
    inputs = {
        "c": integers(2, 3, 1, low=0, high=2, kind="bool"),
        "x": numbers(4),
        "y": numbers(1, 1, 1, seed=1),
    }
    check(text("z = Where(c, x, y)", inputs, "float z"), inputs)
    inputs |= {"x": integers(3, 4), "y": np.array(7)}
    fixed = {"y": inputs.pop("y")}
    check(text("z = Where(c, x, y)", inputs, "int64 z", fixed), inputs)


@pytest.mark.parametrize("settings", ["", "<detect_positive = 0>", "<detect_negative = 0>"])
def test_what_is_no_number_or_infinite_is_found(settings):
    inputs = {"x": np.array([1, np.nan, np.inf, -np.inf, 0], np.float32)}
    check(text(f"y = IsInf{settings}(x)\nz = IsNaN(x)", inputs, "bool y, bool z"), inputs)


def test_infinity_of_neither_sign_is_never_found():
    inputs = {"x": np.array([np.inf, -np.inf], np.float32)}
    model = text("y = IsInf<detect_positive = 0, detect_negative = 0>(x)\nz = Not(y)", inputs, "bool z")
    assert executed(model, inputs)["z"].all()


CASTS = {"float": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "double": 11}


@pytest.mark.parametrize("wanted", CASTS)
def test_casts_from_floats(wanted):
    inputs = {"x": np.array([0, 1.7, -1.7, 100.4, -0.3], np.float32)}
    if wanted == "uint8":
        inputs["x"] = abs(inputs["x"])
    check(text(f"y = Cast<to = {CASTS[wanted]}>(x)", inputs, f"{wanted} y"), inputs, rtol=1e-3, deployments=(15, 18))


@pytest.mark.parametrize("wanted", CASTS)
def test_casts_from_integers_wrap_around(wanted):
    inputs = {"x": np.array([0, 1, -1, 127, 128, 255, 256, -129, 1000])}
    body, like = f"y = Cast<to = {CASTS[wanted]}>(x)", "y = CastLike(x, l)"
    check(text(body, inputs, f"{wanted} y"), inputs)
    kind = {"float": "float32", "double": "float64"}.get(wanted, wanted)
    check(text(like, inputs, f"{wanted} y", {"l": np.zeros(1, kind)}), inputs)


def test_a_cast_to_a_type_that_mil_lacks_is_refused():
    inputs = {"x": numbers(2)}
    with pytest.raises(InputError, match="MIL has no type BFLOAT16 to cast to"):
        executed(text("y = Cast<to = 16>(x)\nz = Cast<to = 1>(y)", inputs, "float z"), inputs)


def test_dropout_and_identity_leave_no_operation():
    inputs = {"x": numbers(2, 3)}
    model = text("y = Identity(x)\nz, m = Dropout(y)", inputs, "float z")
    assert operations(model) == []
    check(model, inputs)
    check(text("z, m = Dropout(x)", inputs, "float z, bool m"), inputs)


def test_dropout_in_training_is_refused():
    inputs = {"x": numbers(2)}
    fixed = {"r": np.float32(0.5), "t": np.array(True)}
    model = text("y = Dropout(x, r, t)", inputs, "float y", fixed)
    with pytest.raises(InputError, match="training_mode is set"):
        executed(model, inputs)
