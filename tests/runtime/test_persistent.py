"""Persistent sequences give the same results as plain lists."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.containers import MinTree, MutableMinTree, SortedChunks

VALUES = st.sampled_from([0.0, 1.0, 2.5, -1.0, -math.inf, math.inf])


@given(st.lists(st.tuples(st.integers(0, 200), VALUES)), st.integers(0, 220))
def test_it_finds_what_a_search_finds(changes: list[tuple[int, float]], start: int) -> None:
    tree, mutable, values = MinTree(), MutableMinTree(), [math.inf] * 224
    for index, value in changes:
        tree = tree.with_value(index, value)
        mutable[index] = values[index] = value
    lowest = min(values)
    assert tree.minimum == mutable.minimum == lowest
    if lowest == math.inf:
        assert tree.argmin(start) is None
        return
    places = [index for index, value in enumerate(values) if value == lowest]
    assert tree.argmin(start) == next((index for index in places if index >= start), places[0])


def test_a_change_leaves_the_old_tree_as_it_was() -> None:
    before = MinTree().with_value(40, 1.0)
    assert before.with_value(40, 2.0)[40] == 2.0
    assert (before[40], before[7], before[4000]) == (1.0, math.inf, math.inf)


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


def test_a_change_leaves_the_old_sequence_as_it_was() -> None:
    before = SortedChunks([(1,), (3,)])
    assert list(before.inserted((2,))) == [(1,), (2,), (3,)]
    assert list(before) == [(1,), (3,)]


def test_what_is_not_there_cannot_be_removed() -> None:
    with pytest.raises(KeyError):
        SortedChunks([(1,)]).removed((2,))
    with pytest.raises(KeyError):
        SortedChunks[tuple[int]]().removed((2,))
