"""What formats read in the JSON schemas of tools."""

import json
from contextlib import suppress
from typing import Any

import pytest
from answer_parsing import ByteTokens, parsed
from llguidance import LLMatcher

from sagellm.chat_formats import FORMATS, ToolCallDelta, ToolSpec, ToolUse, UnboundSchema
from sagellm.chat_formats.tool_schema import (
    check_bound,
    closed,
    constants,
    loosened,
    member_schema,
    members_of,
    resolved,
    schema_of,
    types_of,
)

ROOT: dict[str, Any] = {
    "$defs": {
        "a": {"$ref": "#/$defs/b"},
        "b": {"type": "integer"},
        "circle": {"$ref": "#/$defs/circle"},
        "self": {"anyOf": [{"$ref": "#/$defs/self"}, {"$ref": "#/$defs/self"}, {"type": "null"}]},
    }
}


def test_references_are_followed() -> None:
    assert resolved({"$ref": "#/$defs/a"}, ROOT) == {"type": "integer"}
    assert resolved({"$ref": "#"}, ROOT) is ROOT
    for unknown in ("#/$defs/x", "#/$defs/circle", "#/$defs/b/type", "http://x"):
        assert resolved({"$ref": unknown}, ROOT).get("type") is None
    assert resolved(True, ROOT) == {}


def test_required_members_come_first() -> None:
    schema = {"properties": {"x": {"type": "null"}, "y": {}, "z": True}, "required": ["z", "w"]}
    members = [(one.name, one.is_required) for one in members_of(schema, {})]
    assert members == [("z", True), ("w", True), ("x", False), ("y", False)]


def test_a_member_has_its_schema_of_all_members() -> None:
    schema = {"properties": {"x": {"$ref": "#/$defs/a"}, "z": True}, "required": ["z", "w", "w"]}
    members = members_of(schema, ROOT)
    assert [one.name for one in members] == ["z", "w", "x"]
    for one in members:
        assert member_schema(schema, one.name, ROOT) == one.schema
    assert member_schema(schema, "y", ROOT) is None


def test_the_types_of_very_many_options_are_not_read() -> None:
    assert types_of({"anyOf": [{"type": "null"}] * 1000}, {}) == {"null"}
    assert len(types_of({"anyOf": [{"type": "null"}] * 2000}, {})) == 6


# Values that a keyword may not have, but that a client may send.
MALFORMED: list[dict[str, Any]] = [
    *({"properties": value} for value in (True, None, 5, "x", [1])),
    *({"required": value} for value in (True, None, 5, "x", [1], [[]], [{}])),
    *({"properties": {"a": {"type": value}}} for value in (True, 5, None, [], [[]], [{}])),
    *({"properties": {"a": {"enum": value}}} for value in (True, 5, None, "x", {})),
    *({"properties": {"a": {"anyOf": value}}} for value in (True, 5, None, {})),
    *({"properties": {"a": {"type": "array", "minItems": value}}} for value in (None, "x", [], -1)),
    *({"properties": {"a": {"type": "string", "maxLength": value}}} for value in (True, "x")),
    *({"properties": {"a": {"type": "string", "format": value}}} for value in ([], {}, 5)),
]


@pytest.mark.parametrize("schema", MALFORMED, ids=str)
@pytest.mark.parametrize("name", ["hermes", "mistral", "qwen3_coder", "gemma4", "harmony"])
def test_a_malformed_schema_is_refused_where_it_would_bind(
    name: str, schema: dict[str, Any]
) -> None:
    use = ToolUse(tools=(ToolSpec(name="f", parameters=schema),), choice="required")
    with pytest.raises(UnboundSchema, match="wrong value of"):
        FORMATS[name].grammar(use, "")


@pytest.mark.parametrize("schema", MALFORMED, ids=str)
def test_a_malformed_schema_breaks_no_parser(schema: dict[str, Any]) -> None:
    use = ToolUse(tools=(ToolSpec(name="f", parameters=schema),))
    text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    (part,) = parsed("qwen3_coder", text, use=use)
    assert isinstance(part, ToolCallDelta)
    assert json.loads(part.arguments) in ({"a": 1}, {"a": "1"})


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "gemma4"])
def test_the_cost_of_a_schema_is_linear(name: str) -> None:
    names = [f"p{number}" for number in range(4000)]
    shared = {"$defs": {"many": {"enum": names}}, "properties": {key: {} for key in names}}
    refs = {key: {"$ref": "#/$defs/many"} for key in names}
    for schema in ({**shared, "required": names}, shared, {**shared, "properties": refs}):
        use = ToolUse(tools=(ToolSpec(name="f", parameters=schema),), choice="required")
        grammar = None
        with suppress(UnboundSchema):
            grammar = FORMATS[name].grammar(use, "")
        assert grammar is None or len(grammar.text) < 1_000_000


@pytest.mark.parametrize(
    ("schema", "options"),
    [({"type": ["null"] * 9}, 1), ({"type": ["null", "integer"]}, 2)],
)
def test_a_type_that_is_named_twice_has_one_rule(schema: dict[str, Any], options: int) -> None:
    tool = ToolSpec(name="f", parameters={"properties": {"a": schema}})
    grammar = FORMATS["gemma4"].grammar(ToolUse(tools=(tool,), choice="required"), "")
    assert grammar is not None
    (rule,) = (line for line in grammar.text.splitlines() if line.startswith("value_1:"))
    assert rule.count("%json") == options


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"number", "null"}),
        ({"enum": [1, 2.5, "a", True, None, [], {}]}, None),
        ({"const": "a", "type": "number"}, {"string"}),
        ({"anyOf": [{"type": "array"}, {"$ref": "#/$defs/a"}]}, {"array", "number"}),
        ({"$ref": "#/$defs/self"}, {"null"}),
        ({}, None),
    ],
)
def test_types(schema: dict[str, Any], types: set[str] | None) -> None:
    every = {"string", "number", "boolean", "null", "array", "object"}
    assert types_of(resolved(schema, ROOT), ROOT) == (every if types is None else types)


def test_constants() -> None:
    assert constants({"const": None}) == [None]
    assert constants({"enum": [1, 2]}) == [1, 2]
    assert constants({"type": "string"}) is None


def test_only_a_strict_tool_must_have_a_schema_that_can_be_bound() -> None:
    schema = {"type": "string", "pattern": "a", "description": "b"}
    check_bound(ToolSpec(name="f"), schema, frozenset({"type"}))
    check_bound(ToolSpec(name="f", strict=True), schema, frozenset({"type", "pattern"}))
    with pytest.raises(UnboundSchema, match="'pattern'"):
        check_bound(ToolSpec(name="f", strict=True), schema, frozenset({"type"}))


def test_arguments_are_an_object() -> None:
    assert schema_of(ToolSpec(name="f")) == {"type": "object"}
    assert schema_of(ToolSpec(name="f", parameters={"required": ["x"]}))["type"] == "object"


LOOSE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "not": {"type": "string", "not": {"const": "a"}, "format": "odd", "minLength": 1},
        "list": {"type": "array", "items": {"contains": {}, "type": "null"}, "uniqueItems": True},
        "one": {"oneOf": [{"type": "string", "if": {}}, True]},
        "date": {"format": "date"},
    },
    "minProperties": 2,
    "additionalProperties": {"propertyNames": {}},
    "$defs": {"a": {"not": {}}, "b": True},
}


def test_keywords_that_no_grammar_can_express_are_left_out() -> None:
    assert loosened(LOOSE) == {
        "type": "object",
        "properties": {
            "not": {"type": "string", "minLength": 1},
            "list": {"type": "array", "items": {"type": "null"}},
            "one": {"anyOf": [{"type": "string"}, True]},
            "date": {"format": "date"},
        },
        "additionalProperties": {},
        "$defs": {"a": {}, "b": True},
    }


def test_a_loose_schema_is_one_that_llguidance_takes() -> None:
    tool = ToolSpec(name="f", parameters=LOOSE)
    grammar = FORMATS["hermes"].grammar(ToolUse(tools=(tool,), choice="required"), "")
    assert grammar is not None
    ByteTokens().matcher(grammar)
    strict = ToolUse(tools=(ToolSpec(name="f", parameters=LOOSE, strict=True),), named="f")
    bound = FORMATS["hermes"].grammar(strict, "")
    assert bound is not None
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(bound.text))


def test_objects_have_the_properties_that_are_named() -> None:
    inner: dict[str, Any] = {"properties": {"y": {}}, "required": ["y"]}
    schema = {"type": "object", "properties": {"x": {"items": inner}}, "$defs": {"d": inner}}
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "type": "object",
        "properties": {"x": {"items": shut}},
        "$defs": {"d": shut},
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"properties": {"x": {}}, "additionalProperties": {"type": "string"}},
        {"properties": {"x": {}}, "patternProperties": {"^a": {}}},
        {"properties": {"x": {}}, "required": ["y"]},
        {"properties": {"x": {}}, "required": [["x"]]},
        {"properties": {"x": {}}, "required": 1},
        {"properties": {"x": {}}, "anyOf": [{"properties": {"y": {}}}]},
        {"items": {"allOf": [{"properties": {"x": {}}}, {"properties": {"y": {}}}]}},
        {"enum": [{"properties": {}}], "properties": 1},
    ],
)
def test_a_schema_that_names_more_or_joins_objects_stays_open(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema
