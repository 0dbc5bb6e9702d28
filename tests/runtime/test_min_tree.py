"""The smallest of many numbers, against looking at all of them."""

import math

from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.persistent import MinTree, MutableMinTree

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


def test_a_value_stays_what_it_was() -> None:
    before = MinTree().with_value(40, 1.0)
    assert before.with_value(40, 2.0)[40] == 2.0
    assert (before[40], before[7], before[4000]) == (1.0, math.inf, math.inf)
