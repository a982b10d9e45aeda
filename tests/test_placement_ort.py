"""Where each node ends up: which kernel of ONNX Runtime, in which precision, and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.model.loading import load_text
from optkit.package.contract import Placement
from optkit.session import CannotRunError
from optkit.target import Target, load_target
from optkit_targets.ort import constraints
from optkit_targets.ort.packager import OrtPackager
from ort_models import FLOAT, qdq, with_weights
from quantizing import build, random


def placed(model: ir.Model, target: Target) -> dict[str, Placement]:
    return {placement.node: placement for placement in OrtPackager().placement(model, target)}


def test_quantized_nodes_end_in_integer_kernels_on_arm(a53: Target) -> None:
    for kind in ("int8", "uint8"):
        found = placed(qdq(kind), a53)
        assert [p.node for p in OrtPackager().placement(qdq(kind), a53)] == list(found)
        assert found["conv"] == Placement("conv", "Conv", "cpu", "int8", True, "part of the kernel QLinearConv")
        assert found["relu"].precision == "int8"
        assert found["exp"].precision == "float32"
        assert found["exp"].reason == "quantized, yet onnxruntime has no integer kernel for it here: Exp in float32"
        conversions = [p for p in found.values() if p.op_type.endswith("Linear")]
        assert {p.precision for p in conversions} == {"-"}
        assert {p.reason for p in conversions} == {"part of the kernel QLinearConv", "converts between element types"}
        assert all(p.supported for p in found.values())


def test_float_and_fused_nodes_name_their_kernel(a53: Target) -> None:
    found = list(placed(with_weights(FLOAT), a53).values())
    assert [(p.op_type, p.precision, p.reason) for p in found] == [
        ("Conv", "float32", "part of the kernel FusedConv"),
        ("Relu", "float32", "part of the kernel FusedConv"),
        ("Flatten", "-", "moves float32 data"),
        ("Gemm", "float32", "the kernel Gemm"),
    ]


def test_float16_is_computed_in_float32(a53: Target) -> None:
    model = load_text(
        """<ir_version: 8, opset_import: ["" : 17]> net (float16[4] x) => (float16[4] y) {
          [exp] a = Exp (x) [sigmoid] y = Sigmoid (a)
        }"""
    )
    found = placed(model, a53)
    assert {p.precision for p in found.values()} == {"float32"}
    assert all(p.supported for p in found.values())


def test_the_targets_instruction_set_decides_not_this_machines(a53: Target) -> None:
    x86 = a53.model_copy(update={"isa": ("x86_64", "avx2")})
    model = load_text(
        """<ir_version: 8, opset_import: ["" : 17]> net (float[4] x) => (float[4] y)
        <float s = {0.1}, int8 z = {-3}, float t = {0.2}, int8 o = {5}> {
          xq = QuantizeLinear (x, s, z)
          a = DequantizeLinear (xq, s, z)
          b = Sigmoid (a)
          bq = QuantizeLinear (b, t, o)
          c = DequantizeLinear (bq, t, o)
          [add] d = Add (a, c)
          dq = QuantizeLinear (d, t, o)
          y = DequantizeLinear (dq, t, o)
        }"""
    )
    assert placed(model, a53)["add"].reason == "part of the kernel QLinearAdd"
    assert placed(model, x86)["add"].reason.endswith("no integer kernel for it here: Add in float32")


def test_bodies_constants_and_dead_nodes_are_placed(a53: Target) -> None:
    model = load_text(
        """<ir_version: 8, opset_import: ["" : 17]> net (bool c, float[4] x) => (float[4] y)
        <float[4] k = {1, 2, 3, 4}> {
          [folded] kk = Neg (k)
          [dead] d = Identity (x)
          [if] y = If (c) <
            then_branch = t () => (float[4] a) { [then] a = Mul (x, kk) },
            else_branch = e () => (float[4] b) {
              [cast] i = Cast <to = 6> (x)
              [else] j = Add (i, i)
              b = Cast <to = 1> (j)
            }
          >
        }"""
    )
    found = placed(model, a53)
    assert found["folded"].reason == "folded into a constant"
    assert found["dead"].reason == "removed: nothing needs it"
    assert found["if"].reason == "the nodes of its body run one by one"
    assert (found["then"].precision, found["then"].reason) == ("float32", "the kernel Mul")
    assert (found["cast"].precision, found["cast"].reason) == ("-", "converts between element types")
    assert (found["else"].precision, found["else"].reason) == ("int32", "the kernel Add")


def test_a_node_without_a_kernel_is_named_with_the_reason(a53: Target) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]> net (TYPE[4] x) => (TYPE[4] y) {
      [known] a = Neg (x)
      [other] y = NODE (a)
    }"""
    found = placed(load_text(text.replace("TYPE", "float").replace("NODE", "com.example.Magic")), a53)
    sentence = "ONNX Runtime's CPU provider must have a kernel for the operator, its opset and its element types"
    assert found["known"].supported
    assert not found["other"].supported
    assert found["other"].precision == "-"
    assert found["other"].reason == f"{sentence} (not a registered function/op)"
    found = placed(load_text(text.replace("TYPE", "bfloat16").replace("NODE", "Sin")), a53)
    assert not found["known"].supported
    assert found["known"].reason.startswith(f"{sentence} (")


def test_an_opset_outside_the_targets_range_places_nothing(a53: Target) -> None:
    old = a53.model_copy(update={"opset": a53.opset.model_copy(update={"max": 15})})
    found = placed(with_weights(FLOAT), old)
    assert not any(p.supported for p in found.values())
    reasons = {p.reason for p in found.values()}
    assert reasons == {
        "The operator's opset must be one that the target's runtime loads (opset 17, the target loads 7 to 15)"
    }


def test_a_refusal_that_lies_in_no_node_is_a_sentence(a53: Target) -> None:
    model = load_text('<ir_version: 8, opset_import: ["" : 17]> net (float[2] x) => (float[3] y) { y = Add (x, x) }')
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.INT64)  # the output says float
    with pytest.raises(CannotRunError, match="cannot load the model"):
        OrtPackager().placement(model, a53)


def test_every_constraint_has_a_sentence() -> None:
    for constraint in constraints.CONSTRAINTS:
        assert constraint.__name__.startswith("constraint_")
        text = constraint.__doc__ or ""
        assert text.endswith(".")
        assert " must " in text
        assert "\n" not in text


@pytest.mark.parametrize(
    ("level", "isa", "precision"),
    [(4, "asimddp", "int8"), (4, "neon", "float32"), (0, "asimddp", "float32")],
)
def test_packed_blocks_are_multiplied_in_int8_where_level_and_isa_say_so(
    tmp_path: Path, level: int, isa: str, precision: str
) -> None:
    (tmp_path / "board.toml").write_text(f'inherits = "cortex-a53"\nisa = ["{isa}"]\n')
    nbits = f"K = 32, N = 4, bits = 4, block_size = 32, accuracy_level = {level}"
    model = build(
        f"(float[2,32] x) => (y) {{ y = com.microsoft.MatMulNBits<{nbits}>(x, w, s) }}",
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>',
        w=np.ones((4, 1, 16), np.uint8),
        s=random(4, 1),
    )
    (found,) = placed(model, load_target(str(tmp_path / "board.toml"))).values()
    assert (found.op_type, found.precision, found.reason) == ("MatMulNBits", precision, "the kernel MatMulNBits")
