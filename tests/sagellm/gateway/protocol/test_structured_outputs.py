"""What binds an answer: each name that an API has for it, and requests that bind it twice."""

import json
from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import read_chat, read_completion
from sagellm.gateway.protocol.structured_outputs import constraint_of, grammar_of
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.grammars import choice_grammar
from sagellm.runtime.sampling import Grammar

LIMITS = RequestLimits()
SECRET = "the-schema-nobody-may-see"
SCHEMA = {"type": "object", "properties": {"z": {"const": 1}, "a": {}}}
CHOICE = choice_grammar(["yes", "no"])
TEXT = json.dumps(SCHEMA, separators=(",", ":"))


def chat(**fields: Any) -> Any:
    messages = [{"role": "user", "content": "hi"}]
    return read_chat(json.dumps({"messages": messages, **fields}).encode(), LIMITS)


def completion(**fields: Any) -> Any:
    return read_completion(json.dumps({"prompt": "hi", **fields}).encode(), LIMITS)


BOTH = pytest.mark.parametrize("read", [chat, completion])


def json_schema(schema: Any = SCHEMA, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


def grammar(read: Any, **fields: Any) -> Grammar:
    constraint = constraint_of(read(**fields))
    assert constraint is not None
    return grammar_of(constraint, LIMITS.json_depth)


def refusal(read: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        grammar(read, **fields)
    assert caught.value.status == 400
    assert SECRET not in caught.value.message
    return caught.value


FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": json_schema()}, "json_schema", TEXT),
    ({"response_format": json_schema(strict=False)}, "json_schema", TEXT),
    ({"response_format": json_schema(strict=True, description="d")}, "json_schema", TEXT),
    ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
    ({"structured_outputs": {"json": SCHEMA}}, "json_schema", TEXT),
    ({"structured_outputs": {"json": json.dumps(SCHEMA, indent=1)}}, "json_schema", TEXT),
    ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, CHOICE.kind, CHOICE.text),
    ({"structured_outputs": {"grammar": "root ::= x"}}, "lark", "root ::= x"),
    ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
    ({"structured_outputs": {"regex": "a", "json_object": False}}, "regex", "a"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": None}}, "regex", "a"),
    ({"structured_outputs": {"regex": "a", "disable_any_whitespace": False}}, "regex", "a"),
    ({"guided_json": SCHEMA}, "json_schema", TEXT),
    ({"guided_json": json.dumps(SCHEMA)}, "json_schema", TEXT),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["yes", "no"]}, CHOICE.kind, CHOICE.text),
    ({"guided_grammar": "start: x"}, "lark", "start: x"),
    ({"json_schema": json.dumps(SCHEMA)}, "json_schema", TEXT),
    ({"regex": "a+"}, "regex", "a+"),
    ({"ebnf": "root ::= x"}, "lark", "root ::= x"),
]


@BOTH
@pytest.mark.parametrize(("fields", "kind", "text"), FORMS)
def test_every_name_gives_a_grammar(read: Any, fields: Any, kind: Any, text: str) -> None:
    assert grammar(read, **fields) == Grammar(kind=kind, text=text)


@BOTH
@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_text_is_not_bound(read: Any, fields: Any) -> None:
    assert constraint_of(read(**fields)) is None


@BOTH
@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {}}, "response_format.type", "is missing"),
        ({"response_format": "text"}, "response_format", "must be an object"),
        ({"response_format": {"type": SECRET}}, "response_format.type", "json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "is missing",
        ),
        (
            {"response_format": json_schema([SECRET])},
            "response_format.json_schema.schema",
            "expected `object`, got `array`",
        ),
        (
            {"response_format": json_schema(strict=1)},
            "response_format.json_schema.strict",
            "expected `bool",
        ),
        (
            {"response_format": json_schema(schemas={})},
            "response_format.json_schema.schemas",
            "did you mean `response_format.json_schema.schema`?",
        ),
        (
            {"response_format": {**json_schema(), "type": "json_object"}},
            "response_format.json_schema",
            "only for the type `json_schema`",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex, choice"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "length >= 1"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "length >= 1"),
        ({"structured_outputs": {"choice": [5]}}, "structured_outputs.choice[0]", "got `int`"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json", "a JSON schema"),
        ({"structured_outputs": {"json": SECRET}}, "structured_outputs.json", "a JSON schema"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "got `int`"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "does not support",
        ),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "does not support",
        ),
        ({"guided_json": '{"a": 1, "a": 2}'}, "guided_json", "a JSON schema"),
        ({"guided_json": '{"a":' * 40 + "1" + "}" * 40}, "guided_json", "a JSON schema"),
        ({"guided_choice": ["a"] * 8193}, "guided_choice", "length <= 8192"),
        ({"guided_choice": "yes"}, "guided_choice", "expected `array"),
    ],
)
def test_a_wrong_value_is_refused_by_its_place(
    read: Any, fields: Any, param: str, says: str
) -> None:
    error = refusal(read, **fields)
    assert error.param == param
    assert says in error.message


@BOTH
@pytest.mark.parametrize(
    ("fields", "param", "other"),
    [
        (
            {"response_format": json_schema(), "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "response_format",
        ),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex", "response_format"),
        ({"guided_regex": "a", "regex": "a"}, "regex", "guided_regex"),
        ({"structured_outputs": {"regex": "a"}, "ebnf": "x"}, "ebnf", "structured_outputs"),
    ],
)
def test_an_answer_is_bound_once(read: Any, fields: Any, param: str, other: str) -> None:
    error = refusal(read, **fields)
    assert error.param == param
    assert f"stands beside `{other}`" in error.message


@BOTH
def test_text_may_stand_beside_a_grammar(read: Any) -> None:
    assert grammar(read, response_format={"type": "text"}, regex="a").kind == "regex"
