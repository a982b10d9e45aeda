from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optkit.errors import InputError
from optkit.quant.packing import pack, unpack


@st.composite
def integers(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=19))
    elements = st.integers(low, high)
    return draw(hnp.arrays(np.int8 if signed else np.uint8, shape, elements=elements)), bits


@given(integers())
def test_what_is_packed_is_unpacked(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    packed = pack(values, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (*values.shape[:-1], -(-values.shape[-1] * bits // 8))
    restored = unpack(packed, bits, values.shape[-1], signed=values.dtype == np.int8)
    assert restored.dtype == values.dtype
    assert np.array_equal(restored, values)


@given(integers())
def test_integer_i_takes_the_bits_from_i_times_bits_on(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    row = values.reshape(-1, values.shape[-1])[:1].ravel() if values.size else np.zeros(0, np.uint8)
    whole = sum((int(value) % (1 << bits)) << (index * bits) for index, value in enumerate(row))
    assert pack(row, bits).tobytes() == whole.to_bytes(-(-row.size * bits // 8), "little")


@pytest.mark.parametrize(
    ("name", "bits"), [("int4", 4), ("uint4", 4), ("int2", 2), ("uint2", 2)], ids=lambda case: str(case)
)
def test_the_order_is_that_of_onnx_tensors(name: str, bits: int) -> None:
    kind = getattr(ml_dtypes, name)
    rng = np.random.default_rng(0)
    low = -(1 << (bits - 1)) if name.startswith("i") else 0
    values = rng.integers(low, low + (1 << bits), 13).astype(np.int8)
    try:
        stored = ir.Tensor(values.astype(kind)).tobytes()
    except TypeError:
        pytest.skip(f"this onnx_ir stores no {name}")
    assert pack(values if low else values.astype(np.uint8), bits).tobytes() == stored


def test_two_integers_of_four_bits_share_a_byte() -> None:
    assert pack(np.array([1, 2, 15], np.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack(np.array([-1, -8], np.int8), 4).tolist() == [0x8F]


@pytest.mark.parametrize(("values", "bits"), [([16], 4), ([-9], 4), ([-1, 8], 4), ([4], 2), ([-3], 2), ([300], 8)])
def test_integers_that_do_not_fit_are_refused(values: list[int], bits: int) -> None:
    with pytest.raises(InputError, match=rf"do not fit in {bits} bits"):
        pack(np.array(values), bits)


def test_bytes_of_another_number_of_integers_are_refused() -> None:
    with pytest.raises(InputError) as error:
        unpack(np.zeros((2, 4), np.uint8), 4, 9)
    assert str(error.value) == "9 integers of 4 bits take 5 bytes, not 4"


@pytest.mark.parametrize("bits", [0, 9])
def test_widths_beyond_a_byte_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=f"integers of {bits} bits cannot be packed into bytes; pack 1 to 8 bits"):
        pack(np.zeros(1, np.uint8), bits)
