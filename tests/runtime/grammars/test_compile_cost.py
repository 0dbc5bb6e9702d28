"""The estimated cost of regular expressions."""

import contextlib

import pytest

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.compile_cost import MAX_COST, check_regex_cost, regex_cost


@pytest.mark.parametrize(
    ("regex", "cost"),
    [
        ("", 0),
        ("abc", 0),
        ("a?b*", 4),
        ("a+b{2}c{1,3}", 0),
        ("a{0,3}b{,4}", 4),
        ("a?|b?", 2),
        ("(a?|b?c?)d?", 1 + 4 + 9),
        ("(?:a?)(?P<n>b?)", 1 + 1 + 4),
        (r"\?\*[?*]+", 0),
        (r"[]?]a?[^]*]", 1),
        ("((a?", 3),
        (")a?)", 1),
    ],
)
def test_optional_parts_in_a_row_count(regex: str, cost: int) -> None:
    assert regex_cost(regex) == cost


def test_a_thousand_in_a_row_are_too_many() -> None:
    check_regex_cost(regex_cost("a?" * 1000))
    with pytest.raises(GrammarError, match="optional parts in a row"):
        check_regex_cost(regex_cost("a?" * 1001))
    assert regex_cost("|".join(["a?" * 100] * 100)) == MAX_COST


@pytest.mark.parametrize("part", ["(", "[", "\\", "(?", "[[:", "{", "a|", "()", "\\p{"])
def test_the_time_is_linear(part: str) -> None:
    with contextlib.suppress(GrammarError):
        regex_cost(part * 40_000)
