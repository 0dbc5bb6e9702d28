"""A sorted sequence as a value, against a sorted list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.persistent import SortedChunks

ITEMS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=60)


@given(ITEMS, ITEMS)
def test_it_is_a_sorted_list(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    chunks, items = SortedChunks(first), sorted(first)
    for item in second:
        chunks = chunks.inserted(item)
        items = sorted([*items, item])
        if item[1] == 0:
            chunks = chunks.removed(item)
            items.remove(item)
        assert (list(chunks), len(chunks), chunks.first) == (
            items,
            len(items),
            min(items, default=None),
        )
    assert chunks.head(3) == tuple(items[:3])


def test_thousands_are_cut_into_chunks() -> None:
    chunks: SortedChunks[tuple[int]] = SortedChunks()
    for number in range(5000):
        chunks = chunks.inserted((number * 7919 % 5000,))
    assert list(chunks) == [(number,) for number in range(5000)]
    assert chunks.head(600)[-1] == (599,)
    for number in range(4999):
        chunks = chunks.removed((number,))
    assert chunks.first == (4999,)


def test_a_value_stays_what_it_was() -> None:
    before = SortedChunks([(1,), (3,)])
    assert list(before.inserted((2,))) == [(1,), (2,), (3,)]
    assert list(before) == [(1,), (3,)]


def test_what_is_not_there_cannot_be_removed() -> None:
    with pytest.raises(KeyError):
        SortedChunks([(1,)]).removed((2,))
    with pytest.raises(KeyError):
        SortedChunks[tuple[int]]().removed((2,))
