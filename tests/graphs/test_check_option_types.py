"""Types of options: the values that they accept, and their description in messages."""

from collections.abc import Mapping
from typing import Any, Literal

import pytest

from sagellm.graphs.ir import FrozenMap, Value
from sagellm.graphs.rules.option_types import accepts, choices, described, shown

POLICY = Literal["fifo", "priority"]


@pytest.mark.parametrize(
    ("hint", "value", "fits"),
    [
        (int, 3, True),
        (int, True, False),
        (int, 3.0, False),
        (float, 3, True),
        (float, True, False),
        (bool, True, True),
        (bool, 1, False),
        (str, "a", True),
        (str, None, False),
        (int | None, None, True),
        (int | None, "a", False),
        (POLICY, "fifo", True),
        (POLICY, "lifo", False),
        (Literal[1], True, False),
        (POLICY | None, None, True),
        (tuple[int, ...], (1, 2), True),
        (tuple[int, ...], (1, "a"), False),
        (tuple[int, ...], 1, False),
        (tuple[int, str], (1, "a"), True),
        (tuple[int, str], (1,), False),
        (tuple, (1, "a"), True),
        (Mapping[str, int], FrozenMap({"a": 1}), True),
        (Mapping[str, int], FrozenMap({"a": "b"}), False),
        (FrozenMap, FrozenMap(), True),
        (dict[str, int], (1,), False),
        (Any, (1,), True),
        (object, None, True),
    ],
)
def test_a_value_fits_a_type(hint: Any, value: Value, fits: bool) -> None:
    assert accepts(hint, value) is fits


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "an integer"),
        (float | None, "a number or null"),
        (bool, "true or false"),
        (POLICY, "one of `fifo`, `priority`"),
        (tuple[str, ...], "a list of items, each a text"),
        (Mapping[str, Any], "a mapping"),
        (Mapping[str, int], "a mapping, each value an integer"),
        (complex, "a value"),
    ],
)
def test_a_type_in_words(hint: Any, words: str) -> None:
    assert described(hint) == words


def test_choices_are_the_literals() -> None:
    assert choices(POLICY) == ("fifo", "priority")
    assert choices(POLICY | None) == ("fifo", "priority")
    assert choices(int) == ()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), ((1,), "a list"), (FrozenMap(), "a mapping"), ("a", "`a`")],
)
def test_a_value_is_shown_as_in_yaml(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_long_value_is_cut() -> None:
    assert len(shown("x" * 1000)) < 50
