"""Errors of a translation name the client's own fields."""

import pytest

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.translated_chat import TranslatedChat, place_of

PLACES = {"a": "x", "a.b": "y", "a[1]": "z[0]", "ab": "w"}


@pytest.mark.parametrize(
    ("param", "place"),
    [
        ("a", "x"),
        ("a.c", "x.c"),
        ("a.b", "y"),
        ("a.b[3].c", "y[3].c"),
        ("a[1].b", "z[0].b"),
        ("a[10]", "x[10]"),
        ("abc", "abc"),
        ("c.a", "c.a"),
    ],
)
def test_the_nearest_field_with_a_place_names_it(param: str, place: str) -> None:
    assert place_of(param, PLACES) == place


def test_the_message_begins_with_the_new_name() -> None:
    error = TranslatedChat(PLACES).renamed(wrong("a.b", "is no `a.b`", "code"))
    assert (error.message, error.param, error.code) == ("y: is no `a.b`", "y", "code")


def test_another_message_stays() -> None:
    told = ApiError(404, "no such model", param="ab", should_retry=False)
    error = TranslatedChat(PLACES).renamed(told)
    assert (error.message, error.param, error.should_retry) == ("no such model", "w", False)
