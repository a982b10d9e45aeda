"""quantize-inc: what neural-compressor does to a model, and what happens where it is absent or fails.

The tests marked ``inc`` need the extra ``inc``, whose ceilings ask for an environment of its own: `.ci/inc` makes one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optkit.dataset.samples import Samples
from optkit.errors import InputError, MissingDependencyError
from optkit.evaluate.fidelity import compare
from optkit.model.loading import load, load_text
from optkit.pass_check import interface
from optkit.pipeline import Context, Pipeline, Remark
from optkit.recipe import PRECISION_KEY
from optkit.session import run_samples
from optkit_passes.quantization._neural_compressor import NeuralCompressor, last_exception
from optkit_passes.quantization.quantize_inc import GPTQ_ROUNDS, QuantizeInc
from quantizing import build, inputs_of, missed, random

ALGORITHMS = ("static", "dynamic", "smoothquant", "rtn", "awq", "gptq")
INTEGER = {"Conv", "MatMul", "MatMulInteger", "ConvInteger", "MatMulNBits"}

inc = [
    pytest.mark.inc,
    pytest.mark.skipif(
        importlib.util.find_spec("neural_compressor") is None, reason="the extra 'inc' is not installed (.ci/inc)"
    ),
]


def with_inc(function: Any) -> Any:
    for mark in inc:
        function = mark(function)
    return function


def perceptron(width: int = 64) -> ir.Model:
    return build(
        f"""(float[N,{width}] x) => (float[N,16] y) {{
            t = Tanh (x) a = MatMul (t, w) b = Add (a, c) r = Relu (b) y = MatMul (r, v)
        }}""",
        w=random(width, 96),
        c=random(96),
        v=random(96, 16),
    )


def network() -> ir.Model:
    return build(
        """(float[N,3,12,12] x) => (float[N,10] y) {
            a = Conv <pads=[1,1,1,1]> (x, w, b) n = BatchNormalization (a, s, o, m, d) r = Relu (n)
            p = GlobalAveragePool (r) f = Flatten (p) y = Gemm <transB=1> (f, g, h)
        }""",
        w=random(16, 3, 3, 3),
        b=random(16),
        s=np.ones(16, np.float32),
        o=random(16, seed=1),
        m=random(16, seed=2),
        d=np.ones(16, np.float32),
        g=random(10, 16),
        h=random(10),
    )


def quantize(
    model: ir.Model, samples: Sequence[dict[str, np.ndarray]] | None = None, **options: Any
) -> tuple[ir.Model, list[Remark]]:
    """Run the pass strictly, verified on two samples, and return the result and the remarks."""
    result = model.clone()
    given = list(samples) if samples is not None else inputs_of(model, 8)
    context = Context(calibration=Samples(given))
    Pipeline([QuantizeInc.model_validate(options)], strict=True).run(result, context, inputs_of(model, 2, seed=3))
    return result, context.remarks


def quality(model: ir.Model, other: ir.Model) -> float:
    fresh = inputs_of(model, 8, seed=2)
    return compare(run_samples(model, fresh), run_samples(other, fresh)).sqnr_db


def test_absence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neural_compressor", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs neural-compressor .*; pip install 'optkit\[inc\]'"
    ) as raised:
        QuantizeInc().run(perceptron(), Context())
    assert raised.value.exit_code == 5


def test_last_exception_of_a_traceback() -> None:
    text = "Traceback (most recent call last):\n  File x\nKeyError: 'bits'\n2026 [ERROR] Specified timeout\n"
    assert last_exception(text) == "KeyError: 'bits'"
    assert last_exception("") == "it returned no model"


@with_inc
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_matrix_products(algorithm: str) -> None:
    model = perceptron()
    result, remarks = quantize(model, algorithm=algorithm)
    names = {node.name: node for node in model.graph}
    applied = {remark.node for remark in remarks if remark.kind == "applied"}
    assert {name for name, node in names.items() if node.op_type == "MatMul"} <= applied
    assert interface(result) == interface(model)
    assert [value.shape for value in result.graph.inputs] == [value.shape for value in model.graph.inputs]
    weights = [
        v for v in result.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.const_value.size > 96
    ]
    assert not [value.name for value in weights if value.shape == ir.Shape([64, 96])]
    assert quality(model, result) > (14 if algorithm in {"rtn", "awq", "gptq"} else 30)


@with_inc
@pytest.mark.parametrize("algorithm", ["static", "dynamic", "smoothquant"])
def test_convolutions(algorithm: str) -> None:
    model = network()
    result, remarks = quantize(model, algorithm=algorithm)
    assert any(remark.op_type == "Conv" and remark.kind == "applied" for remark in remarks)
    assert {node.op_type for node in result.graph} & {"QuantizeLinear", "DynamicQuantizeLinear"}
    assert quality(model, result) > 25


@with_inc
def test_float_nodes_have_a_reason() -> None:
    result, remarks = quantize(network(), algorithm="rtn")
    assert missed(remarks) == {
        "Conv": "neural-compressor's rtn takes MatMul alone",
        "Gemm": "neural-compressor's rtn takes MatMul alone",
    }
    assert [node.op_type for node in result.graph] == [node.op_type for node in network().graph]


@with_inc
def test_product_of_activations_stays() -> None:
    model = build(
        "(float[4,64] x, float[64,8] z) => (float[4,8] y) { a = MatMul (x, w) y = MatMul (a, z) }", w=random(64, 64)
    )
    _, remarks = quantize(model, algorithm="rtn")
    assert "its second input is no constant weight" in {remark.message for remark in remarks}


@with_inc
def test_gptq_says_what_it_is() -> None:
    _, remarks = quantize(perceptron(), algorithm="gptq")
    assert (GPTQ_ROUNDS, "missed") in {(remark.message, remark.kind) for remark in remarks}


@with_inc
@pytest.mark.parametrize("algorithm", ["static", "dynamic", "rtn"])
def test_a_rule_keeps_a_node(algorithm: str) -> None:
    model = perceptron()
    kept = next(node for node in model.graph if node.op_type == "MatMul")
    kept.metadata_props[PRECISION_KEY] = "fp32"
    result, remarks = quantize(model, algorithm=algorithm)
    assert (kept.name, "kept in float by a rule (fp32)") in {(remark.node, remark.message) for remark in remarks}
    same = next(node for node in result.graph if node.name == kept.name)
    assert same.metadata_props[PRECISION_KEY] == "fp32"
    weight = same.inputs[1]
    assert weight is not None
    assert weight.dtype == ir.DataType.FLOAT
    assert weight.is_initializer()


@with_inc
@pytest.mark.parametrize(("width", "asymmetric"), [(64, True), (96, False), (80, False)])
def test_odd_numbers_of_blocks_have_no_zero_points(width: int, asymmetric: bool) -> None:
    model = build(f"(float[N,{width}] x) => (float[N,96] y) {{ y = MatMul (x, w) }}", w=random(width, 96))
    result, remarks = quantize(model, algorithm="rtn", symmetric=False)
    assert ("MatMulNBits" in {node.op_type for node in result.graph}) == asymmetric
    assert asymmetric or "packs the zero points of an odd number of blocks (3) wrongly" in remarks[0].message


@with_inc
def test_awq_leaves_rows_that_do_not_divide() -> None:
    _, remarks = quantize(perceptron(80), algorithm="awq")
    assert "neural-compressor's awq does not take 80 rows in blocks of 32" in {remark.message for remark in remarks}


@with_inc
def test_awq_leaves_products_of_the_input() -> None:
    model = build("(float[N,64] x) => (float[N,16] y) { y = MatMul (x, w) }", w=random(64, 16))
    _, remarks = quantize(model, algorithm="awq")
    assert "needs a node before it, and its input is the model's own" in remarks[0].message


@with_inc
def test_bodies_are_remarked() -> None:
    model = load_text(
        """<ir_version: 8, opset_import: ["" : 17]> main (float[2,4] x, bool c) => (float[2,4] y)
        <float[4,4] w = {1,0,0,0, 0,2,0,0, 0,0,3,0, 0,0,0,4}> {
            h = MatMul (x, w)
            y = If (c) <then_branch = t () => (float[2,4] p) { p = MatMul (h, w) },
                        else_branch = e () => (float[2,4] q) { q = MatMul (w, w) }>
        }"""
    )
    samples = [{"x": array, "c": np.array(True)} for array in np.ones((4, 2, 4), np.float32)]
    context = Context(calibration=Samples(samples))
    Pipeline([QuantizeInc(algorithm="static")], strict=True).run(model, context, samples[:1])
    assert any("inside the body of a control-flow node" in remark.message for remark in context.remarks)
    assert len(run_samples(model, samples)) == 4


@with_inc
def test_same_input_same_bytes() -> None:
    first, second = (quantize(perceptron(), algorithm="awq")[0] for _ in range(2))
    assert ir.to_proto(first).SerializeToString(deterministic=True) == ir.to_proto(second).SerializeToString(
        deterministic=True
    )


@with_inc
@pytest.mark.parametrize("algorithm", ["static", "awq"])
def test_silence_and_no_files(
    algorithm: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perceptron()
    (tmp_path / "model").mkdir()
    ir.save(model, tmp_path / "model" / "m.onnx", external_data="m.data")
    before = (tmp_path / "model" / "m.data").read_bytes()
    monkeypatch.chdir(tmp_path)
    result, _ = quantize(load(tmp_path / "model" / "m.onnx"), algorithm=algorithm)
    assert capfd.readouterr() == ("", "")
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["m.data", "m.onnx", "model"]
    assert (tmp_path / "model" / "m.data").read_bytes() == before
    assert quality(model, result) > 14


@with_inc
@pytest.mark.parametrize(
    ("algorithm", "samples", "sentence"),
    [
        ("static", [], "'static' needs calibration data and the data given holds no samples"),
        ("gptq", [], "'gptq' needs calibration data"),
        ("static", [{"x": np.full((1, 64), np.nan, np.float32)}], "calibration sample 0: tensor 'x' has NaN values"),
        (
            "awq",
            [{"x": np.ones((n, 64), np.float32)} for n in (1, 2)],
            r"calibration: neural-compressor's awq needs samples of one shape, and 'x' has \[1, 64\] and \[2, 64\]",
        ),
    ],
)
def test_calibration_that_cannot_be_used(algorithm: str, samples: list[dict[str, np.ndarray]], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        quantize(perceptron(), samples, algorithm=algorithm)


@with_inc
def test_one_sample_is_enough() -> None:
    model = perceptron()
    assert quality(model, quantize(model, inputs_of(model, 1))[0]) > 10


@with_inc
def test_weights_that_are_not_finite() -> None:
    weight = random(64, 16)
    weight[3, 3] = np.inf
    model = build("(float[N,64] x) => (float[N,16] y) { y = MatMul (x, w) }", w=weight)
    with pytest.raises(InputError, match="tensor 'w' holds NaN or infinite values"):
        quantize(model)


@with_inc
def test_block_size() -> None:
    with pytest.raises(InputError, match="block_size 48 is not a power of two"):
        quantize(perceptron(), algorithm="rtn", block_size=48)


@with_inc
def test_its_failure_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("bits")

    monkeypatch.setattr(NeuralCompressor, "_run_integers", fail)
    with pytest.raises(
        InputError, match=r"quantize-inc: neural-compressor 3\.7\.1 does not take this model by static: KeyError"
    ):
        quantize(perceptron())


@with_inc
@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_operator_sets(opset: int) -> None:
    model = build(
        "(float[N,64] x) => (float[N,16] y) { a = MatMul (x, w) r = Relu (a) y = MatMul (r, v) }",
        header=f'<ir_version: 8, opset_import: ["" : {opset}]>',
        w=random(64, 96),
        v=random(96, 16),
    )
    result, remarks = quantize(model, algorithm="rtn")
    assert result.graph.opset_imports[""] == opset
    assert any(remark.kind == "applied" for remark in remarks)
