"""Reading ahead: order, ends, and errors stay where they belong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.dataset.ahead import read_ahead


@given(st.lists(st.integers()), st.integers(1, 5))
def test_gives_the_same_items_in_order(items: list[int], count: int) -> None:
    assert list(read_ahead(items, count)) == items


def test_an_error_comes_where_the_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("broken sample")

    ahead = read_ahead(items(), 4)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="broken sample"):
        next(ahead)


def test_leaving_early_reads_no_more_than_it_was_ahead() -> None:
    read = []

    def items() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    for item in read_ahead(items(), 2):
        if item == 3:
            break
    assert len(read) <= 8
