"""Formulas fused into one operator: layer and RMS normalization, Gelu; what golden text does not say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.dataset.samples import random_samples
from optkit.model.loading import load, load_text
from optkit.pipeline import Context, Pass, Pipeline
from optkit.session import run_samples
from optkit.testing import assert_close
from pass_runs import create, messages, node, op_types, run

LAYER_NORM = (
    "m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Mul (d, d) v = ReduceMean <axes = [-1]> (p) "
    "e = Add (v, eps) s = Sqrt (e) n = Div (d, s) [last] y = Mul (n, g)"
)
GELU = "u = Div (x, root) t = Erf (u) p = Add (t, one) q = Mul (x, p) [last] y = Mul (q, half)"
GELU_CONSTANTS = "float root = {1.4142135}, float one = {1.0}, float half = {0.5}"


def model(
    nodes: str, constants: str, inputs: str = "float[4,8] x", outputs: str = "float[4,8] y", opset: int = 17
) -> ir.Model:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> main ({inputs}) => ({outputs}) <{constants}> {{ {nodes} }}'
    return load_text(text)


def layer_norm(inputs: str = "float[4,8] x", outputs: str = "float[4,8] y", more: str = "") -> ir.Model:
    return model(LAYER_NORM + more, "float eps = {0.00001}, float g = {2.0}", inputs, outputs)


def test_the_fused_node_keeps_the_name_metadata_and_type_of_the_last_one() -> None:
    fused = layer_norm()
    node(fused, "last").metadata_props["optkit.precision"] = "float"
    run(fused, create("fuse-layer-norm"))
    (norm,) = fused.graph
    assert (norm.name, norm.metadata_props) == ("last", {"optkit.precision": "float"})
    assert (norm.outputs[0].name, norm.outputs[0].dtype, norm.outputs[0].shape) == ("y", ir.DataType.FLOAT, [4, 8])
    assert list(fused.graph.initializers) == ["last/scale"]


def test_a_normalization_of_large_means_stays_within_the_declared_effect() -> None:
    before, after = layer_norm(), layer_norm()
    create("fuse-layer-norm").run(after, Context())
    x = (1000 + np.random.default_rng(0).standard_normal((4, 8))).astype(np.float32)
    (a,), (b,) = run_samples(before, [{"x": x}]), run_samples(after, [{"x": x}])
    assert np.abs(a["y"] - b["y"]).max() <= 1e-4 * np.abs(a["y"]).max()


def test_a_default_that_a_caller_can_override_is_no_constant() -> None:
    text = "float[4,8] x, float eps"
    assert messages(layer_norm(text), create("fuse-layer-norm")) == [
        "no constant number is added to the mean of its squares, which Add takes"
    ]
    inputs = "float[4,8] x, float half"
    assert messages(model(GELU, GELU_CONSTANTS, inputs, opset=20), create("fuse-gelu")) == [
        "Mul makes something else of it than x / 2 * (1 + erf(x / sqrt(2)))"
    ]


def test_values_of_unknown_rank_are_normalized_by_nobody_and_still_take_gelu() -> None:
    inputs, outputs = "float x", "float y"
    norm, gelu = layer_norm(), model(GELU, GELU_CONSTANTS, inputs, outputs, opset=20)
    for each in (norm, gelu):
        for value in [*each.graph.inputs, *(value for item in each.graph for value in item.outputs)]:
            value.shape = None
    assert messages(norm, create("fuse-layer-norm")) == ["the rank of its input is not known"]
    create("fuse-gelu").run(gelu, Context())
    assert op_types(gelu) == {"Gelu": 1}


def test_casts_of_bfloat16_are_fused_too() -> None:
    nodes = (
        "c = Cast <to = 1> (x) p = Mul (c, c) v = ReduceMean (p, ax) e = Add (v, eps) s = Sqrt (e) n = Div (c, s) "
        "h = Cast <to = 16> (n) y = Mul (h, g)"
    )
    constants = "float eps = {0.00001}, int64[1] ax = {-1}"
    fused = model(nodes, constants, "bfloat16[2,4] x, bfloat16[4] g", "bfloat16[2,4] y", opset=23)
    create("fuse-rms-norm").run(fused, Context())
    (norm,) = fused.graph
    assert (norm.op_type, [value.name for value in norm.inputs if value is not None]) == (
        "RMSNormalization",
        ["x", "g"],
    )


def test_each_of_two_layers_keeps_constants_that_both_read() -> None:
    def layer(x: str, y: str) -> str:
        renamed = re.sub(r"\b([mdpvesn])\b", rf"\1_{y}", LAYER_NORM.replace("[last] y", y))
        return re.sub(r"\bx\b", x, renamed)

    both = model(f"{layer('x', 'h')} {layer('h', 'y')}", "float eps = {0.00001}, float[8] g = {1,2,3,4,5,6,7,8}")
    run(both, create("fuse-layer-norm"))
    assert op_types(both) == {"LayerNormalization": 2}
    assert list(both.graph.initializers) == ["g"]


@st.composite
def gelus(draw: st.DrawFn) -> str:
    """Write x / 2 * (1 + erf(x / sqrt(2))): three factors in any order and nesting, with products or divisions."""
    count = 0
    nodes = ["u = Div (x, root)" if draw(st.booleans()) else "u = Mul (inverse, x)", "t = Erf (u)"]
    nodes.append(draw(st.sampled_from(["p = Add (t, one)", "p = Add (one, t)"])))
    factors = draw(st.permutations(["x", "half", "p"]))
    while len(factors) > 1:
        a, b, *rest = factors
        count += 1
        divided = draw(st.booleans()) and "half" in (a, b)
        operands = f"Div ({a if b == 'half' else b}, two)" if divided else f"Mul ({a}, {b})"
        nodes.append(f"f{count} = {operands}" if rest else f"y = {operands}")
        factors = [*rest, f"f{count}"]
    return " ".join(nodes)


@settings(max_examples=20, deadline=None)
@given(gelus())
def test_gelu_is_read_in_every_order(nodes: str) -> None:
    constants = f"{GELU_CONSTANTS}, float two = {{2.0}}, float inverse = {{0.70710677}}"
    before, fused = model(nodes, constants, opset=20), model(nodes, constants, opset=20)
    run(fused, create("fuse-gelu"))
    assert op_types(fused) == {"Gelu": 1}
    samples = list(random_samples(before, 2))
    for a, b in zip(run_samples(before, samples), run_samples(fused, samples), strict=True):
        assert_close(a["y"], b["y"], 1e-6)


def fused_in(path: Path, opset: int, *passes: Pass) -> ir.Model:
    """Raise a real model to an opset and run passes on it, each verified on one random sample."""
    found = load(path)
    result = Pipeline([create("raise-opset", opset=opset), *passes]).run(
        found, Context(), list(random_samples(found, 1))
    )
    assert not result.unverified
    return found


def test_every_normalization_of_a_language_model_is_fused(shared: Path) -> None:
    path = shared / "data" / "stories260k" / "stories260k.onnx"
    found = fused_in(path, 23, create("fuse-rms-norm"), create("fuse-layer-norm"))
    assert op_types(found)["RMSNormalization"] == op_types(load(path))["ReduceMean"] == 11
    assert op_types(found)["ReduceMean"] == 0


def test_a_language_model_below_the_opset_says_so(shared: Path) -> None:
    reasons = messages(load(shared / "data" / "stories260k" / "stories260k.onnx"), create("fuse-rms-norm"))
    assert set(reasons) == {"RMSNormalization exists since opset 23, and the model has 17: raise-opset raises it"}


@pytest.mark.parametrize(("opset", "form"), [(20, ("", "Gelu")), (15, ("com.microsoft", "FastGelu"))])
def test_every_gelu_of_a_file_classifier_is_fused(shared: Path, opset: int, form: tuple[str, str]) -> None:
    path = shared / "data" / "magika_v3_3" / "magika_v3_3.onnx"
    found = fused_in(path, opset, create("fuse-gelu", contrib=True))
    assert op_types(found)["Tanh"] == 0
    assert sum((item.domain, item.op_type) == form for item in found.graph.all_nodes()) == 2
