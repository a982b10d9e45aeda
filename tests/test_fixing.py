"""Inputs fixed to a value at loading: `--fix INPUT=VALUE`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from command_line import Cli
from optkit.errors import InputError
from optkit.model.loading import graph_inputs, load, load_text, save
from optkit.session import run_samples

RATES = """
<ir_version: 8, opset_import: ["" : 17]>
rates (float[1, 4] x, int64 rate) => (float[1, 4] y) {
    high = Constant<value = int64 {16000}>()
    is_high = Equal (rate, high)
    y = If (is_high) <
        then_branch = loud () => (float[1, 4] a) { two = Constant<value = float {2}>() a = Mul (x, two) },
        else_branch = soft () => (float[1, 4] b) { half = Constant<value = float {0.5}>() b = Mul (x, half) }
    >
}
"""


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    return save(load_text(RATES), tmp_path / "rates.onnx")[0]


def test_a_fixed_input_is_a_constant(rates: Path) -> None:
    model = load(rates, fixed={"rate": 16000})
    assert [value.name for value in graph_inputs(model)] == ["x"]
    x = np.arange(4, dtype=np.float32)[None]
    for rate, factor in ((16000, 2.0), (8000, 0.5)):
        (result,) = run_samples(load(rates, fixed={"rate": rate}), [{"x": x}])
        np.testing.assert_array_equal(result["y"], factor * x)


def test_the_branch_that_it_decides_is_folded(cli: Cli, rates: Path) -> None:
    done = cli("check", str(rates), "-t", "snapdragon-npu")
    assert done.code == 1
    assert "If" in done.err
    goal = rates.with_name("out")
    arguments = ("compile", str(rates), "-t", "host", "--precision", "fp32", "-o", str(goal), "--json")
    assert set(cli(*arguments, "--fix", "rate=8000").json["compiled"]["ops"]) == {"Mul"}


@pytest.mark.parametrize(
    ("fixed", "sentence"),
    [
        ({"rat": 1}, "the model has no input 'rat'; did you mean 'rate'"),
        ({"rate": 0.5}, "input 'rate' of type int64 does not hold 0.5"),
    ],
)
def test_what_cannot_be_fixed(rates: Path, fixed: dict[str, float], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load(rates, fixed=fixed)


def test_a_dynamic_input_and_text_cannot_be_fixed(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x, string[1] s) => (float[n] y, string[1] t)'
    save(load_text(text + " { y = Relu (x) t = Identity (s) }"), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="the shape of input 'x' is not static; fix its dimensions with --dim first"):
        load(tmp_path / "m.onnx", fixed={"x": 1})
    with pytest.raises(InputError, match="input 's' takes no number"):
        load(tmp_path / "m.onnx", fixed={"s": 1})


def test_the_option_says_its_form(cli: Cli, rates: Path) -> None:
    done = cli("inspect", str(rates), "--fix", "rate")
    assert done.code == 2
    assert "--fix takes INPUT=VALUE, not 'rate'; for instance --fix rate=16000" in done.err
