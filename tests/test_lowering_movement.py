"""Shapes, slices, splits, rims and triangles in Core ML's MIL, beside onnxruntime."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowering_runs import check, executed, integers, numbers, operations, text
from optkit.errors import GateError, InputError
from optkit_targets.coreml.lowering.shaping import joined, moves
from optkit_targets.coreml.program import lower, save

ALL = (15, 18)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def refusal(model, deployment: int = 18) -> str:
    with pytest.raises(InputError) as caught:
        operations(model, deployment)
    return str(caught.value)


def test_shapes_of_one_tensor_after_the_other():
    x = {"x": numbers(2, 3, 4)}
    body = """a = Reshape(x, s) b = Flatten<axis = -1>(a) c = Unsqueeze(b, u) d = Squeeze(c, q)
              e = Transpose(d) f = Expand(e, r) y = Tile(f, t)"""
    constants = {"s": ints(0, -1, 2), "u": ints(-1, 0), "q": ints(0), "r": ints(2, 1, 1, 12), "t": ints(1, 2, 1, 2)}
    check(text(body, x, "float y", constants), x, deployments=ALL)


@pytest.mark.parametrize(("opset", "end"), [(7, "<axes = [0, 2]>(x)"), (13, "(x, a)")])
def test_axes_to_squeeze_as_attribute_and_as_input(opset, end):
    x = {"x": numbers(1, 3, 1)}
    constants = {"a": ints(0, 2)} if opset > 12 else {}
    check(text(f"b = Squeeze{end} y = Neg(b)", x, "float y", constants, opset), x)
    check(text("b = Squeeze(x) y = Neg(b)", x, "float y", opset=opset), x)


def test_a_reshape_that_keeps_the_shape_is_nothing():
    x = {"x": numbers(2, 3)}
    assert operations(text("a = Reshape(x, s) y = Neg(a)", x, "float y", {"s": ints(2, 3)})) == ["mul"]


def test_a_shape_computed_from_static_shapes_is_constant():
    x = {"x": numbers(2, 3, 4)}
    body = "s = Shape(x) h = Gather(s, i) r = Concat<axis = 0>(h, m) y = Reshape(x, r)"
    model = text(body, x, "float y", {"i": ints(0), "m": ints(-1)})
    assert operations(model)[-1] == "reshape"
    assert executed(model, x)["y"].shape == (2, 12)


def test_a_computed_shape_is_refused():
    x = {"x": numbers(2, 3), "s": ints(3, 2)}
    assert "its shape is computed at run time" in refusal(text("y = Reshape(x, s)", x, "float[3,2] y"))


def test_windows_of_six_axes_are_written_in_five():
    x = {"x": numbers(2, 8, 8, 3)}
    body = "a = Reshape(x, s) b = Transpose<perm = [0, 1, 3, 2, 4, 5]>(a) y = Reshape(b, w)"
    model = text(body, x, "float y", {"s": ints(2, 2, 4, 2, 4, 3), "w": ints(8, 16, 3)})
    assert set(operations(model)) == {"reshape", "transpose"}
    check(model, x, deployments=ALL)


def test_shuffled_pixels_of_six_axes_are_written_in_five():
    x = {"x": numbers(2, 8, 3, 5)}
    body = "a = Reshape(x, s) b = Transpose<perm = [0, 1, 4, 2, 5, 3]>(a) y = Reshape(b, w)"
    check(text(body, x, "float y", {"s": ints(2, 2, 2, 2, 3, 5), "w": ints(2, 2, 6, 10)}), x)


def test_six_axes_elsewhere_are_refused():
    x = {"x": numbers(2, 2, 2, 2, 2)}
    model = text("a = Unsqueeze(x, u) y = Neg(a)", x, "float y", {"u": ints(0)})
    assert "a result has 6 axes: MIL tensors have at most 5" in refusal(model)
    assert "output 'y': a result has 6 axes" in refusal(text("y = Unsqueeze(x, u)", x, "float y", {"u": ints(0)}))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_transposes_of_many_axes_are_moves_of_few(data):
    shape = data.draw(st.lists(st.integers(1, 3), min_size=6, max_size=8))
    perm = data.draw(st.permutations(range(len(shape))))
    array, now = np.arange(np.prod(shape)).reshape(shape), list(shape)
    found = array
    for order in moves(now, perm):
        groups = joined(now, order)
        assert len(groups) <= 5
        sizes = [int(np.prod([now[axis] for axis in group])) for group in sorted(groups)]
        places = [sorted(groups).index(group) for group in groups]
        found = found.reshape(sizes).transpose(places)
        now = [now[axis] for axis in order]
    np.testing.assert_array_equal(found.reshape(now), array.transpose(perm))


SLICES = [
    ((1, -1), (4, 2**62), (0, 1), (1, 1)),
    ((-2, 10), (-(2**62), -(2**62)), (0, 2), (-1, -2)),
    ((0,), (-1,), (2,), (3,)),
]


@pytest.mark.parametrize(("starts", "ends", "axes", "steps"), SLICES)
def test_slices(starts, ends, axes, steps):
    x = {"x": numbers(4, 3, 7)}
    constants = {"s": ints(*starts), "e": ints(*ends), "a": ints(*axes), "t": ints(*steps)}
    check(text("y = Slice(x, s, e, a, t)", x, "float y", constants), x, deployments=ALL)


def test_slices_by_attributes():
    x = {"x": numbers(4, 3)}
    check(text("y = Slice<starts = [1, -2], ends = [9, 3], axes = [0, 1]>(x)", x, "float y", opset=9), x)


def test_a_window_with_a_computed_start():
    inputs = {"x": numbers(2, 9), "s": ints(-4)}
    body = "e = Add(s, three) y = Slice(x, s, e, a)"
    model = text(body, inputs, "float[2,3] y", {"three": ints(3), "a": ints(1)})
    found = executed(model, inputs)
    np.testing.assert_array_equal(found["y"], inputs["x"][:, 5:8])
    unknown = text(body, inputs, "float[2,n] y", {"three": ints(3), "a": ints(1)})
    assert "the length of the slice is not static" in refusal(unknown)


def test_parts_without_elements_are_left_out():
    x = {"x": numbers(4, 3)}
    body = "a, b, c = Split<axis = 1>(x, s) y = Concat<axis = 1>(c, b, a, b)"
    model = text(body, x, "float y", {"s": ints(2, 0, 1)})
    assert operations(model) == ["split", "concat"]
    check(model, x)


def test_unequal_parts():
    x = {"x": numbers(7, 2)}
    check(text("a, b, c = Split<axis = 0, num_outputs = 3>(x)", x, "float a, float b, float c"), x)
    check(text("a, b = Split<axis = 0, split = [3, 4]>(x)", x, "float a, float b", opset=11), x)


PADS = ["constant", "edge", "reflect", "wrap"]


@pytest.mark.parametrize("mode", PADS)
def test_rims_of_floats_and_integers(mode):
    x = {"x": numbers(3, 4, 5), "i": integers(3, 4, kind="int32")}
    body = f'y = Pad<mode = "{mode}">(x, p) z = Pad<mode = "{mode}">(x, q, , a) w = Pad<mode = "{mode}">(i, r)'
    constants = {"p": ints(0, 1, 2, 0, 0, 3), "q": ints(1, -1, 2, 2), "a": ints(0, -1), "r": ints(1, 0, 0, 2)}
    check(text(body, x, "float y, float z, int32 w", constants), x, deployments=ALL)


def test_rims_as_attributes_and_with_a_value():
    x = {"x": numbers(2, 3), "b": np.array([[True, False]])}
    check(text("y = Pad<pads = [0, 1, 2, 0], value = -1.5>(x)", {"x": x["x"]}, "float y", opset=10), {"x": x["x"]})
    constants = {"p": ints(0, 1, 1, 0), "v": np.float32(7), "t": np.array(True)}
    check(text("y = Pad(x, p, v) c = Pad(b, p, t)", x, "float y, bool c", constants), x)


def test_rims_and_cuts_around_the_center():
    x = {"x": numbers(5, 4, 3)}
    body = "y = CenterCropPad(x, s) z = CenterCropPad<axes = [-1, 0]>(x, t)"
    check(text(body, x, "float y, float z", {"s": ints(2, 7, 3), "t": ints(4, 9)}), x)


def test_rims_that_are_computed_are_refused():
    inputs = {"x": numbers(2, 3), "v": numbers(1)}
    model = text("s = Squeeze(v) y = Pad(x, p, s)", inputs, "float y", {"p": ints(0, 1, 1, 0)})
    assert "the value to pad with is computed at run time" in refusal(model)


@pytest.mark.parametrize("k", [-2, 0, 1])
@pytest.mark.parametrize("upper", [0, 1])
def test_triangles(k, upper):
    x = {"x": np.where(numbers(2, 4, 5) > 2, np.inf, numbers(2, 4, 5)).astype(np.float32)}
    check(text(f"y = Trilu<upper = {upper}>(x, k)", x, "float y", {"k": np.array(k)}), x)


def test_kept_elements():
    x = {"x": numbers(3, 4)}
    constants = {"c": np.array([True, False, True, True])}
    check(text("y = Compress<axis = -1>(x, c) z = Compress(x, c)", x, "float y, float z", constants), x)
    computed = text("c = Greater(v, zero) y = Compress(v, c)", {"v": numbers(3)}, "float y", {"zero": np.float32(0)})
    assert "its condition is computed at run time" in refusal(computed)


@pytest.mark.parametrize("order", ["DCR", "CRD"])
def test_blocks_of_channels_and_space(order):
    x = {"x": numbers(2, 8, 4, 6)}
    check(text(f'y = DepthToSpace<blocksize = 2, mode = "{order}">(x)', x, "float y"), x, deployments=ALL)


def test_bodies_that_values_decide_are_refused():
    inputs = {"x": numbers(2), "c": np.array([True])}
    body = "s = Squeeze(c) y = If(s) <then_branch = t () => (float[2] a) { a = Neg(x) }, "
    body += "else_branch = e () => (float[2] b) { b = Abs(x) }>"
    with pytest.raises(GateError, match=r"\(If\): its condition is computed at run time"):
        operations(text(body, inputs, "float[2] y"))


def test_numbers_in_the_node_itself():
    x = {"x": numbers(2, 3)}
    body = "c = Constant<value_float = 2.5>() i = Constant<value_ints = [3, 2]>() r = Reshape(x, i) y = Mul(r, c)"
    check(text(body, x, "float y"), x)
    with pytest.raises(InputError, match="its value_string is no dense tensor of numbers"):
        operations(text('s = Constant<value_string = "a">() y = Identity(x)', x, "float y"))


def test_inputs_of_other_types_are_refused():
    model = text("y = Neg(x)", {"x": numbers(2)}, "float y")
    model.graph.inputs[0].dtype = ir.DataType.BFLOAT16
    assert "Core ML has no tensors of BFLOAT16, the type of input 'x'" in refusal(model)


def test_a_model_has_the_same_bytes_however_many_were_written_before(tmp_path):
    x = {"x": numbers(2, 3, 4)}
    body = 'a = Pad<mode = "wrap">(x, p) i = Cast<to = 7>(a) h = Hardmax(a) g = Gather(i, j) '
    body += "y = Cast<to = 1>(g) z = Add(y, h)"
    constants = {"p": ints(0, 0, 1, 0, 0, 2), "j": ints(1, 0)}
    files = []
    for name in ("first.mlpackage", "second.mlpackage"):
        package = save(lower(text(body, x, "float z", constants), 18), 18, tmp_path / name, half=True, metadata={})
        files.append({path.relative_to(package): path.read_bytes() for path in package.rglob("*") if path.is_file()})
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", ["float32", "int64", "bool"])
def test_scalar_inputs_are_fed_as_one_element(kind):
    x = {"x": np.array(3).astype(kind), "v": numbers(2, 3)}
    check(text("a = Cast<to = 1>(x) y = Add(a, v) z = Neg(a)", x, "float[2,3] y, float z"), x)


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_pads_of_float16_are_filled_with_float16(mode):
    x = {"x": numbers(2, 5).astype(np.float16)}
    program = lower(text(f'y = Pad<mode = "{mode}">(x, p)', x, "float16 y", {"p": ints(0, 1, 0, 2)}), 18)
    (pad,) = (op for op in program.functions["main"].operations if op.op_type == "pad")
    pad.input_spec.validate_inputs(pad.name, pad.op_type, pad.inputs)


def test_constants_of_types_that_mil_lacks_are_refused():
    constants = {"d": ints(3), "v": np.array([0, 1], ml_dtypes.bfloat16)}
    model = text("y = OneHot(i, d, v)", {"i": ints(0, 2)}, "bfloat16[2,3] y", constants)
    assert "MIL has no constants of bfloat16" in refusal(model)
