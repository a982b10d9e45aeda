"""Compressed constants cost the bytes that the runtime reads: integers as wide as stored, palettes as indices."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.cost.roofline import NodeCost, Work, price
from optkit.cost.summary import cost_summary
from optkit.cost.work import describe_static
from optkit.graph import add_constant, names
from optkit.model.loading import load_text
from optkit.quant.palette import Palette, write_palette
from optkit.target import Target, load_target

SIDE = 256


@pytest.fixture(scope="module")
def phone() -> Target:
    return load_target("apple-a17-ane")


def product() -> tuple[ir.Model, ir.Node]:
    model = load_text(
        f'<ir_version: 10, opset_import: ["" : 21]> net (float[1,{SIDE}] x, float[{SIDE},{SIDE}] w) => '
        f"(float[1,{SIDE}] y) {{ y = MatMul (x, w) }}"
    )
    del model.graph.inputs[1]
    return model, model.graph.node(0)


def palettized(bits: int) -> ir.Model:
    model, node = product()
    lut = np.arange(1 << bits, dtype=np.float32)[None]
    indices = np.zeros((SIDE, SIDE), np.uint8)
    weight = write_palette(node, "w", Palette(lut, indices, bits), 21, names(model))
    node.replace_input_with(1, weight)
    return model


def dequantized() -> ir.Model:
    model, node = product()
    graph, taken = model.graph, names(model)
    stored = add_constant(graph, "wq", np.ones((SIDE, SIDE), np.int8), taken)
    scale = add_constant(graph, "s", np.array(0.1, np.float32), taken)
    unpack = ir.node("DequantizeLinear", [stored, scale], name="unpack")
    unpack.outputs[0].type, unpack.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([SIDE, SIDE])
    graph.insert_before(node, unpack)
    node.replace_input_with(1, unpack.outputs[0])
    return model


@pytest.mark.parametrize("bits", [1, 3, 4, 6, 8])
def test_palettes_are_read_as_indices_where_the_runtime_has_luts(phone: Target, bits: int) -> None:
    (work,) = describe_static(palettized(bits), reads_palettes=True)
    assert work.read_bytes == SIDE * SIDE * bits // 8 + 4 * 2**bits
    assert work.note == "weights are unpacked on the fly"
    (found,) = cost_summary(palettized(bits), phone).nodes
    assert "expanded" not in found.note


def test_palettes_are_expanded_elsewhere(a53: Target) -> None:
    (work,) = describe_static(palettized(4))
    assert work.read_bytes == 4 * SIDE * SIDE
    assert "expanded when the model is loaded" in cost_summary(palettized(4), a53).nodes[0].note


def test_integers_stay_as_wide_where_floats_are_halved(phone: Target) -> None:
    (work,) = describe_static(dequantized())
    assert (work.dtype, work.read_bytes, work.integer_read_bytes) == ("float32", SIDE * SIDE + 4, SIDE * SIDE)
    cost = price(work, phone)
    assert isinstance(cost, NodeCost)
    assert cost.cost.memory_bytes == SIDE * SIDE + 2


def test_floats_are_halved(phone: Target) -> None:
    cost = price(Work("g", "MatMul", "gemm", macs=10, weight_bytes=400), phone)
    assert isinstance(cost, NodeCost)
    assert cost.cost.memory_bytes == 200
