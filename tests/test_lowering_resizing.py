"""Resize, Upsample and GridSample in Core ML's MIL beside onnxruntime, and their matrices beside ONNX's reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowering_runs import check, executed, numbers, operations, text
from optkit.errors import InputError
from optkit_targets.coreml.lowering import interpolation
from optkit_targets.coreml.lowering.interpolation import Axis

MODES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")


def resized(shape, sizes, attributes):
    inputs = {"x": numbers(*shape)}
    model = text(f"y = Resize<{attributes}>(x, , , s)", inputs, "float y", {"s": np.array(sizes, np.int64)}, 18)
    return model, inputs


OWN = [
    (
        "mode = 'nearest', coordinate_transformation_mode = 'asymmetric', nearest_mode = 'floor'",
        (8, 15),
        "upsample_nearest_neighbor",
    ),
    ("mode = 'nearest'", (8, 15), "upsample_nearest_neighbor"),
    ("mode = 'linear'", (8, 10), "resize_bilinear"),
    ("mode = 'linear'", (3, 7), "resize_bilinear"),
    ("mode = 'linear', coordinate_transformation_mode = 'align_corners'", (7, 9), "resize_bilinear"),
    ("mode = 'linear', coordinate_transformation_mode = 'asymmetric'", (8, 10), "resize_bilinear"),
    ("mode = 'cubic'", (8, 10), "matmul"),
    ("mode = 'linear', antialias = 1", (2, 3), "matmul"),
    ("mode = 'nearest'", (7, 3), "gather"),
    (
        "mode = 'nearest', coordinate_transformation_mode = 'asymmetric', nearest_mode = 'floor'",
        (2, 5),
        "slice_by_index",
    ),
]


@pytest.mark.parametrize(("attributes", "size", "operation"), OWN)
def test_core_mls_own_resizers_are_written_where_they_compute_the_same(attributes, size, operation):
    model, inputs = resized((1, 2, 4, 5), (1, 2, *size), attributes.replace("'", '"'))
    assert operation in operations(model)
    check(model, inputs, deployments=(15, 18), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cubic", "nearest"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_on_every_axis(kind, mode):
    attributes = f'mode = "{kind}", coordinate_transformation_mode = "{mode}"'
    shape, sizes = ((3, 4, 5), (3, 6, 3)) if kind != "cubic" else ((1, 2, 6, 7), (1, 2, 4, 9))
    model, inputs = resized(shape, sizes, attributes)
    check(model, inputs, atol=1e-5)


def test_scales_of_old_opsets():
    inputs = {"x": numbers(1, 2, 3, 4)}
    scales = {"s": np.array([1, 1, 2, 3], np.float32)}
    for opset, op in ((9, "Upsample"), (10, "Resize")):
        check(text(f'y = {op}<mode = "linear">(x, s)', inputs, "float y", scales, opset), inputs, atol=1e-5)
        check(text(f'y = {op}<mode = "nearest">(x, s)', inputs, "float y", scales, opset), inputs)


def test_three_axes_of_space():
    model, inputs = resized((1, 2, 3, 4, 5), (1, 2, 6, 8, 10), 'mode = "nearest"')
    check(model, inputs)


def test_computed_sizes_are_refused():
    inputs = {"x": numbers(1, 1, 2, 2), "s": np.array([1, 1, 4, 4])}
    with pytest.raises(InputError, match="its sizes is computed at run time"):
        operations(text("y = Resize(x, , , s)", inputs, "float[1,1,4,4] y", opset=18))


def test_resizers_of_integers_compute_in_floats():
    inputs = {"x": np.arange(12, dtype=np.int32).reshape(1, 1, 3, 4)}
    model = text('y = Resize<mode = "nearest">(x, , , s)', inputs, "int32 y", {"s": np.array([1, 1, 6, 8])}, 18)
    np.testing.assert_array_equal(executed(model, inputs)["y"], inputs["x"].repeat(2, 2).repeat(2, 3))


@given(
    st.integers(2, 9),
    st.integers(1, 12),
    st.sampled_from([*MODES, "half_pixel_symmetric"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_matrices_are_those_of_onnx(before, after, mode, cubic, antialias):
    from onnx.reference.ops import op_resize

    axis = Axis(0, before, after, after / before)
    coordinates = interpolation.points(axis, mode)
    found = interpolation.weights(axis, coordinates, cubic=-0.75 if cubic else None, antialias=antialias)
    names = {(False, False): "_linear_coeffs", (False, True): "_linear_coeffs_antialias"}
    names |= {(True, False): "_cubic_coeffs", (True, True): "_cubic_coeffs_antialias"}
    coefficients = getattr(op_resize, names[cubic, antialias])
    x = np.random.default_rng(0).normal(size=before)
    wanted = [
        op_resize._interpolate_1d_with_x(
            x, after / before, after, float(place), coefficients, coordinate_transformation_mode=mode
        )
        for place in range(after)
    ]
    np.testing.assert_allclose(found @ x, wanted, atol=1e-9)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-9)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("corners", [0, 1])
def test_images_sampled_at_points(padding, corners):
    inputs = {"x": numbers(1, 2, 4, 5), "g": numbers(1, 3, 6, 2, seed=1, low=-1.3, high=1.3)}
    for mode in ("linear", "nearest"):
        body = f'y = GridSample<mode = "{mode}", padding_mode = "{padding}", align_corners = {corners}>(x, g)'
        check(text(body, inputs, "float y", opset=20), inputs, atol=1e-5)


def test_cubic_samples_are_refused():
    inputs = {"x": numbers(1, 2, 4, 5), "g": numbers(1, 3, 6, 2, seed=1)}
    with pytest.raises(InputError, match="mode 'cubic': MIL samples by the nearest element or bilinearly"):
        operations(text('y = GridSample<mode = "cubic">(x, g)', inputs, "float y", opset=20))


@pytest.mark.parametrize("corners", [0, 1])
def test_grids_of_affine_maps(corners):
    inputs = {"x": numbers(2, 3, 4, 5), "t": numbers(2, 2, 3, seed=1, low=-1, high=1)}
    body = f"g = AffineGrid<align_corners = {corners}>(t, s) y = GridSample<align_corners = {corners}>(x, g)"
    check(text(body, inputs, "float y", {"s": np.array([2, 3, 4, 6])}, 20), inputs, atol=1e-5)
