"""Attention, rotations and Einsum in Core ML's MIL, beside onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from lowering_runs import check, executed, numbers, operations, text
from optkit.errors import InputError

ALL = (15, 18)
NATIVE = "scaled_dot_product_attention"


def heads(**more: np.ndarray) -> dict[str, np.ndarray]:
    """Return queries, keys and values of 2 heads, 4 and 5 long."""
    own = {"q": numbers(1, 2, 4, 8), "k": numbers(1, 2, 5, 8, seed=1), "v": numbers(1, 2, 5, 6, seed=2)}
    return own | more


PRODUCTS = "t = Transpose<perm = [0, 1, 3, 2]>(k) d = MatMul(q, t)"
WEIGHTS = "w = Softmax<axis = -1>(m) y = MatMul(w, v)"


@pytest.mark.parametrize("scaling", ["s = Mul(d, c)", "s = Mul(c, d)", "s = Div(d, r)", "s = Identity(d)"])
@pytest.mark.parametrize("masking", ["m = Add(s, b)", "m = Add(b, s)", "m = Identity(s)"])
def test_products_around_a_softmax_are_attention_from_ios_18_on(scaling, masking):
    inputs = heads()
    mask = np.where(numbers(1, 1, 4, 5) > 2, np.float32(-1e4), np.float32(0))
    constants = {"c": np.float32(0.3), "r": np.float32(2.5), "b": mask}
    model = text(f"{PRODUCTS} {scaling} {masking} {WEIGHTS}", inputs, "float y", constants)
    assert NATIVE in operations(model)
    assert NATIVE not in operations(model, 17)
    check(model, inputs)


def test_attention_whose_products_exporters_write_with_transposed_heads():
    inputs = {name: numbers(1, 6, 16, seed=place) for place, name in enumerate("qkv")}
    split = "{0}r = Reshape({0}, s) {0}h = Transpose<perm = [0, 2, 1, 3]>({0}r)"
    body = f"""{split.format("q")} kr = Reshape(k, s) kt = Transpose<perm = [0, 2, 3, 1]>(kr) {split.format("v")}
               d = MatMul(qh, kt) s1 = Div(d, c) w = Softmax<axis = 3>(s1) y = MatMul(w, vh)"""
    model = text(body, inputs, "float y", {"s": np.array([0, 0, 4, 4]), "c": np.float32(2)})
    assert NATIVE in operations(model)
    check(model, inputs)


OTHERS = {
    "weights that are an output": (f"{PRODUCTS} m = Mul(d, c) {WEIGHTS}", "float y, float w"),
    "a softmax along queries": (f"{PRODUCTS} m = Mul(d, c) w = Softmax<axis = 2>(m) y = MatMul(w, v)", "float y"),
    "no product": ("m = Mul(d, c) w = Softmax<axis = -1>(m) y = MatMul(w, v)", "float y"),
    "a scale of each key": (f"{PRODUCTS} m = Mul(d, e) {WEIGHTS}", "float y"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_products_stay_what_they_are(case):
    body, outputs = OTHERS[case]
    constants = {"c": np.float32(0.3)} if "e)" not in body else {"e": numbers(5, seed=3)}
    inputs = {"d": numbers(1, 2, 4, 5), "v": heads()["v"]} if case == "no product" else heads()
    model = text(body, inputs, outputs, constants)
    assert NATIVE not in operations(model)
    check(model, inputs)


def test_a_mask_of_one_column_is_added_by_hand():
    inputs = heads(b=numbers(1, 1, 4, 1, seed=4))
    model = text(f"{PRODUCTS} m = Add(d, b) {WEIGHTS}", inputs, "float y")
    assert NATIVE not in operations(model)
    check(model, inputs)


@pytest.mark.parametrize(
    "attributes", ["is_causal = 0", "is_causal = 1", "scale = 0.2", "softcap = 2.0", "is_causal = 1, scale = 1.0"]
)
def test_the_operator_is_the_same_on_every_target(attributes):
    inputs = heads()
    model = text(f"y = Attention<{attributes}>(q, k, v)", inputs, "float y", opset=23)
    assert (NATIVE in operations(model)) == ("softcap" not in attributes)
    check(model, inputs, deployments=(15, 18), atol=1e-5)


def test_heads_in_one_axis_shared_keys_and_a_cache():
    inputs = {"q": numbers(2, 3, 16), "k": numbers(2, 3, 8, seed=1), "v": numbers(2, 3, 8, seed=2)}
    inputs |= {"pk": numbers(2, 2, 4, 4, seed=3), "pv": numbers(2, 2, 4, 4, seed=4)}
    body = "y, nk, nv = Attention<q_num_heads = 4, kv_num_heads = 2, is_causal = 1>(q, k, v, , pk, pv)"
    check(text(body, inputs, "float y, float nk, float nv", opset=23), inputs, deployments=ALL, atol=1e-5)


def test_rows_without_any_key_are_zero():
    mask = np.array([[True] * 5, [False] * 5, [True, False] * 2 + [True], [False, True] * 2 + [False]])
    inputs = heads(b=mask)
    found = executed(text("y = Attention(q, k, v, b)", inputs, "float y", opset=23), inputs)["y"]
    assert not found[:, :, 1].any()
    assert np.abs(found[:, :, [0, 2, 3]]).max() > 0


def test_scores_between_the_steps_are_refused():
    model = text("y, a, b, s = Attention<qk_matmul_output_mode = 2>(q, k, v)", heads(), "float y, float s", opset=23)
    with pytest.raises(InputError, match="qk_matmul_output_mode 2 shows scores between the steps"):
        operations(model)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotations(interleaved):
    inputs = {"x": numbers(2, 3, 4, 8), "p": np.array([[0, 1, 2, 3], [3, 1, 0, 2]])}
    angles = numbers(6, 3, seed=1)
    constants = {"c": np.cos(angles), "s": np.sin(angles)}
    body = f"y = RotaryEmbedding<interleaved = {interleaved}, rotary_embedding_dim = 6>(x, c, s, p)"
    check(text(body, inputs, "float y", constants, opset=23), inputs, deployments=ALL)


EQUATIONS = {
    "bhid,bhjd->bhij": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "ij,jk": ((3, 4), (4, 5)),
    "ijk->ki": ((2, 3, 4),),
    "ii->i": ((4, 4),),
    "iji->j": ((3, 4, 3),),
    "...ij,...jk->...ik": ((2, 3, 4), (1, 4, 5)),
    "i,j->ij": ((3,), (4,)),
    "ij,ij->": ((3, 4), (3, 4)),
    "ab,bc,cd->ad": ((2, 3), (3, 4), (4, 5)),
    "bij,bj->bi": ((2, 3, 4), (2, 4)),
    "abc,bd->dc": ((2, 3, 4), (3, 5)),
    "nchw,nwhu->nchu": ((2, 3, 4, 5), (2, 5, 4, 6)),
    "bct,bts->bcs": ((2, 3, 4), (2, 4, 5)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_products_over_named_axes(equation):
    inputs = {f"x{place}": numbers(*shape, seed=place) for place, shape in enumerate(EQUATIONS[equation])}
    model = text(f'y = Einsum<equation = "{equation}">({", ".join(inputs)})', inputs, "float y")
    assert ("einsum" in operations(model)) == (equation == "nchw,nwhu->nchu")
    check(model, inputs, atol=1e-5)
