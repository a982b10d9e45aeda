"""Gather, Scatter, TopK, ArgMax, OneHot, reductions and running sums in Core ML's MIL, beside onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from lowering_runs import check, executed, integers, numbers, operations, text
from optkit.errors import InputError

ALL = (15, 17, 18)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_gathers_with_indices_from_the_end():
    inputs = {"x": numbers(4, 5), "i": integers(2, 3, low=-4, high=4), "e": integers(2, 3, low=-5, high=5)}
    inputs |= {"n": integers(3, 1, low=-4, high=4)}
    body = "a = Gather(x, i) b = GatherElements<axis = 1>(x, e) c = GatherND(x, n)"
    check(text(body, inputs, "float a, float b, float c"), inputs, deployments=ALL)


def test_counted_indices_need_no_correction():
    inputs = {"x": numbers(4, 5)}
    body = "k = ArgMax<axis = 1, keepdims = 0>(x) y = Gather(t, k) z = Gather(t, c)"
    model = text(body, inputs, "float y, float z", {"t": numbers(5, 2, seed=1), "c": ints(-1, 2)})
    assert "select" not in operations(model)
    check(model, inputs)


def test_gathers_in_batches_need_ios_16():
    inputs = {"x": numbers(2, 3, 4), "i": integers(2, 1, low=0, high=3)}
    model = text("y = GatherND<batch_dims = 1>(x, i)", inputs, "float y")
    check(model, inputs, deployments=(16, 18))
    with pytest.raises(
        InputError, match="GatherND with batch_dims needs the deployment target iOS 16, this one is iOS 15"
    ):
        operations(model, 15)


def test_gathers_of_truth_values_and_of_narrow_constants():
    inputs = {"i": integers(3, low=0, high=4)}
    constants = {"t": np.array([True, False, True, True]), "u": integers(4, low=0, high=256, kind="uint8")}
    check(text("y = Gather(t, i) z = Gather(u, i)", inputs, "bool y, uint8 z", constants), inputs)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatters(reduction):
    inputs = {"x": numbers(4, 5), "u": numbers(2, 3, seed=1), "v": numbers(2, 5, seed=2), "w": numbers(4, 2, seed=3)}
    constants = {
        "i": np.array([[0, 1, 2], [3, -1, 0]]),
        "n": np.array([[1], [-1]]),
        "k": np.array([[0, 1], [-1, 2], [3, 4], [1, 0]]),
    }
    body = f'''a = ScatterElements<axis = 0, reduction = "{reduction}">(x, i, u)
               b = ScatterND<reduction = "{reduction}">(x, n, v)
               c = ScatterElements<axis = 1, reduction = "{reduction}">(x, k, w)'''
    check(text(body, inputs, "float a, float b, float c", constants), inputs, deployments=(15, 18))


def test_scatters_of_integers_by_computed_indices():
    inputs = {"x": integers(6), "i": ints(-1, 2), "u": integers(2, seed=1)}
    check(text("y = ScatterElements(x, i, u)", inputs, "int64 y"), inputs)


def test_largest_elements_and_where_they_are():
    inputs = {"x": numbers(3, 7)}
    body = """v, i = TopK(x, k) s, j = TopK<axis = 0, largest = 0>(x, t) a = ArgMax<axis = 1, keepdims = 0>(x)
              b = ArgMin(x)"""
    outputs = "float v, int64 i, float s, int64 j, int64 a, int64 b"
    check(text(body, inputs, outputs, {"k": ints(4), "t": ints(2)}), inputs, deployments=ALL)


def test_the_last_of_equal_elements():
    inputs = {"x": np.array([[2, 1, 2, 0], [3, 3, 3, 3]], np.float32)}
    check(text("y = ArgMax<axis = 1, select_last_index = 1>(x)", inputs, "int64 y"), inputs)


def test_a_computed_k_is_refused():
    inputs = {"x": numbers(3, 7), "k": ints(2)}
    with pytest.raises(InputError, match="its k is computed at run time"):
        operations(text("v, i = TopK(x, k)", inputs, "float v, int64 i"))


def test_rows_with_one_element_on():
    inputs = {"i": ints(0, -1, 2, 9)}
    body = "y = OneHot<axis = 0>(i, d, v) z = OneHot(i, d, w)"
    constants = {"d": ints(4), "v": np.array([0.5, 2], np.float32), "w": ints(0, 1)}
    check(text(body, inputs, "float y, int64 z", constants), inputs)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_caches_that_are_written_from_a_place_on(mode):
    starts = ints(3, 1) if mode == "circular" else ints(2, 0)
    inputs = {"c": numbers(2, 3, 4, 2), "u": numbers(2, 3, 2, 2, seed=1), "w": starts}
    found = executed(text(f'y = TensorScatter<mode = "{mode}">(c, u, w)', inputs, "float y", opset=24), inputs)["y"]
    wanted = inputs["c"].copy()
    for sample, start in enumerate(starts):
        wanted[sample, :, [start % 4, (start + 1) % 4]] = inputs["u"][sample].transpose(1, 0, 2)
    np.testing.assert_array_equal(found, wanted)


def test_what_is_not_zero_is_not_static():
    with pytest.raises(InputError, match="how many elements are not zero is known at run time only"):
        operations(text("y = NonZero(x)", {"x": numbers(3)}, "int64 y"))


REDUCTIONS = ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"]


def test_reductions_of_floats():
    inputs = {"x": numbers(2, 3, 4, low=0.5)}
    body = " ".join(f"y{op} = Reduce{op}<keepdims = {place % 2}>(x, a)" for place, op in enumerate(REDUCTIONS))
    model = text(body, inputs, ", ".join(f"float y{op}" for op in REDUCTIONS), {"a": ints(-1, 0)})
    check(model, inputs, deployments=(15, 18))


def test_reductions_along_all_axes_or_none():
    inputs = {"x": numbers(2, 3, low=0.5)}
    body = """a = ReduceSum(x) b = ReduceSum<noop_with_empty_axes = 1>(x) c = ReduceL2<noop_with_empty_axes = 1>(x)
              d = ReduceMean<keepdims = 0>(x) e = ReduceLogSum<noop_with_empty_axes = 1>(x)
              f = ReduceSumSquare<noop_with_empty_axes = 1>(x)"""
    check(text(body, inputs, "float a, float b, float c, float d, float e, float f"), inputs)


def test_reductions_by_attribute_of_integers_and_truth_values():
    inputs = {"x": integers(3, 4, kind="int32"), "b": np.array([[True, False], [False, False]])}
    check(
        text(
            "y = ReduceSum<axes = [1]>(x) z = ReduceMax<axes = [0]>(x)",
            {"x": inputs["x"]},
            "int32 y, int32 z",
            opset=11,
        ),
        {"x": inputs["x"]},
    )
    check(
        text("y = ReduceMax(b, a) z = ReduceMin(b, a)", {"b": inputs["b"]}, "bool y, bool z", {"a": ints(1)}),
        {"b": inputs["b"]},
    )


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_running_sums(exclusive, reverse):
    inputs = {"x": numbers(2, 5)}
    body = f"y = CumSum<exclusive = {exclusive}, reverse = {reverse}>(x, a)"
    check(text(body, inputs, "float y", {"a": np.array(-1)}), inputs)


@pytest.mark.parametrize("opset", [11, 13])
def test_hard_maxima(opset):
    inputs = {"x": numbers(2, 3, 4)}
    check(text("y = Hardmax<axis = 1>(x)", inputs, "float y", opset=opset), inputs)
