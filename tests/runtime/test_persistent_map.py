from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.persistent_map import PersistentMap

STEPS = st.lists(st.tuples(st.integers(0, 99), st.none() | st.integers()))


@given(STEPS)
def test_it_is_what_a_dict_is_at_every_step(steps: Any) -> None:
    changing, history = {}, []
    shared = PersistentMap()
    for key, value in steps:
        if value is None:
            changing.pop(key, None)
            shared = shared.without(key)
        else:
            changing[key] = value
            shared = shared.with_item(key, value)
        history.append((shared, dict(changing)))
    for then, expected in history:  # no later update reached an earlier mapping
        assert dict(then) == expected
        assert len(then) == len(expected)


def test_what_changes_nothing_copies_nothing() -> None:
    mapping = PersistentMap([("a", 1)])
    assert mapping.without("b") is mapping
    assert repr(mapping) == "PersistentMap({'a': 1})"
    assert mapping == {"a": 1}
