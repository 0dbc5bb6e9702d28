"""The places of what a schema is refused for."""

from typing import Any

import pytest
from hostile_grammars import schema

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar

OVERLAP = {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 1}]}
TAGGED = {"oneOf": [{"type": "string"}, {"type": "null"}]}


def inside(value: Any) -> dict[str, Any]:
    """A schema with others, of which `value` is one."""
    items = {"type": "array", "items": value}
    return {"type": "object", "properties": {"a": TAGGED, "tags": items, "z": {"type": "null"}}}


def refusal(value: dict[str, Any]) -> str:
    with pytest.raises(GrammarError) as refused:
        check_grammar(schema(value))
    return str(refused.value)


@pytest.mark.parametrize(
    ("value", "keyword"),
    [
        (OVERLAP, "oneOf"),
        ({"not": {}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "strng"}, "type"),
        ({"type": "string", "format": "iri"}, "format"),
        ({"$ref": "#/$defs/x"}, "$ref"),
        ({"$ref": "http://x/y"}, "$ref"),
        ({"type": "string", "pattern": "("}, "pattern"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": "[a"}, "pattern"),
        ({"type": "string", "pattern": "a?" * 1001}, "pattern"),
        ({"type": "integer", "multipleOf": 0}, "multipleOf"),
        ({"type": "integer", "multipleOf": 99991}, "multipleOf"),
        ({"type": "string", "minLength": "x"}, "minLength"),
        ({"type": "object", "patternProperties": {"a.*": {}, "aa.*": {}}}, "patternProperties"),
        ({"type": "object", "patternProperties": {f"^{n}$": {} for n in range(102)}},
         "patternProperties"),
        ({"type": "object", "properties": {f"p{n}": {} for n in range(1001)}}, "properties"),
        ({"enum": [[n] for n in range(3500)]}, "enum"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_place(value: dict[str, Any], keyword: str) -> None:
    assert refusal(inside(value)).endswith(f" (at $.properties.tags.items.{keyword})")


def test_places_in_lists_and_definitions() -> None:
    listed = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [TAGGED, {"prefixItems": [OVERLAP]}]}}}
    assert refusal(listed).endswith("(at $.$defs.a.anyOf[1].prefixItems[0].oneOf)")


def test_the_first_of_several_is_named() -> None:
    assert refusal({"type": "object", "properties": {"a": OVERLAP, "b": OVERLAP}}).endswith(
        "(at $.properties.a.oneOf)"
    )


def test_no_place_is_named_that_may_be_another() -> None:
    good, bad = {"type": "string", "minLength": 1}, {"type": "string", "minLength": "x"}
    assert "(at" not in refusal({"type": "object", "properties": {"a": good, "b": bad}})
    assert "(at" not in refusal({"$ref": "#"})


@pytest.mark.parametrize("name", ["Rumpel stilt", "a(b)", "é", "x" * 41, "a\nb", ""])
def test_names_that_are_no_plain_words_are_not_shown(name: str) -> None:
    assert refusal({"properties": {name: {"not": {}}}}).endswith("(at $.properties.*.not)")


def test_of_a_long_path_the_end_is_shown() -> None:
    value: dict[str, Any] = {"not": {}}
    for index in range(30):
        value = {"type": "object", "properties": {f"level_{index}": value}}
    message = refusal(value)
    assert "(at $...properties.level_" in message
    assert message.endswith(".properties.level_0.not)")
    assert len(message) < 250
