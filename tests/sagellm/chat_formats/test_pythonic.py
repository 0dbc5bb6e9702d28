"""Answers of calls in Python syntax."""

import ast
import json

import pytest
from answer_parsing import REQUIRED, USE, ByteTokens, call, named, parsed

from sagellm.chat_formats import (
    AnswerPart,
    Content,
    ToolCallDelta,
    ToolSpec,
    ToolUse,
)

PARIS = call(0, "get_weather", '{"city": "Paris"}')
FORMATS = pytest.mark.parametrize("name", ["pythonic", "llama3"])


@FORMATS
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[get_weather(city='Paris')]", [PARIS]),
        ('[get_weather(city="Paris"), time()]', [PARIS, call(1, "time", "{}")]),
        (" [ get_weather ( city = 'Paris' , ) , ] ", [PARIS]),
        ("<|python_start|>[get_weather(city='Paris')]<|python_end|>", [PARIS]),
        ("[get_weather(city='Paris')] Now?", [PARIS, Content(" Now?")]),
        ("[get_weather(city='Paris')", [PARIS]),
        ("[get_weather(city='Paris'), unknown()]", [PARIS, Content(", unknown()]")]),
        ("[get_weather(city='Par", [call(0, "get_weather", '{"city": "Par')]),
        ("[get_weather(ci", [call(0, "get_weather", "")]),
    ],
)
def test_an_answer(name: str, text: str, parts: list[AnswerPart]) -> None:
    special_tokens = {"<|python_end|>": 1}
    assert parsed(name, text.replace("<|python_end|>", ""), special_tokens=special_tokens) == parts


@FORMATS
@pytest.mark.parametrize(
    "text",
    ["[", "[1] says so.", "[]", "[time", "[unknown()]", "It is [time()]", "[time](http://a.b)"],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert parsed(name, text) == [Content(text)]


@pytest.mark.parametrize(
    "value",
    [
        *("'a'", '"a"', "''", "'\"'", '"\'"', r"'a\'b\\'", r"'\n\t\r\"'", "'é☃'"),
        *(r"'\x41\u00e9\U0001f600\0\a'", "'a\\\nb'"),
        *("1", "-2", "+3", "1.5e3", ".5", "5.", "1_000", "0.1", "True", "False", "None"),
        *("[]", "{}", "[1, 'a', [True], None]", "{'a': {'b': [1]}, 'c': .5}", "[{}, {}]"),
    ],
)
def test_values_become_json(value: str) -> None:
    (part,) = parsed("pythonic", f"[time(x={value})]")
    assert isinstance(part, ToolCallDelta)
    assert json.loads(part.arguments) == {"x": ast.literal_eval(value)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("a=true, b=null", '{"a": true, "b": null}'),
        ("a=Paris", '{"a": "Paris"}'),
        ("a=nan, b=1e999", '{"a": "nan", "b": 1e999}'),
        (r"a='\ud83d'", r'{"a": "\ud83d"}'),
        (r"a='\U99999999'", '{"a": "\ufffd"}'),
        (r"a='\d\xg1'", r'{"a": "\\d\\xg1"}'),
        ("a={1: 2}", '{"a": {"1": 2}}'),
    ],
)
def test_odd_values(arguments: str, expected: str) -> None:
    assert parsed("pythonic", f"[time({arguments})]") == [call(0, "time", expected)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[time('a')]", [call(0, "time", ""), Content("'a')]")]),
        ("[time(x=time(y=1))]", [call(0, "time", '{"x": "time"'), Content("(y=1))]")]),
        ("[time(x=1 y=2)]", [call(0, "time", '{"x": 1'), Content("y=2)]")]),
    ],
)
def test_what_is_no_literal_ends_the_call(text: str, parts: list[AnswerPart]) -> None:
    assert parsed("pythonic", text) == parts


def test_many_open_brackets_do_no_harm() -> None:
    (part,) = parsed("pythonic", "[time(x=" + "[" * 20_000)
    assert isinstance(part, ToolCallDelta)


def test_a_string_streams() -> None:
    parser = named("pythonic").open_parser(USE, "", draw_id=lambda length: "")
    assert parser.push("[time(city='P") == [
        ToolCallDelta(0, "call_", "time"),
        ToolCallDelta(0, arguments='{"city": "P'),
    ]
    assert parser.push("a\\") == [ToolCallDelta(0, arguments="a")]
    assert parser.push("'") == [ToolCallDelta(0, arguments="'")]
    assert parser.push("', n=1") == [ToolCallDelta(0, arguments='", "n": ')]
    assert parser.push(")") == [ToolCallDelta(0, arguments="1}")]


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ('[get_weather(city="Paris", days=2), time()]', True),
        ('[get_weather(city="Paris")]', True),
        ("[get_weather(days=2)]", False),
        ("[]", False),
        ("[time(x=1)]", False),
    ],
)
def test_a_grammar_has_required_arguments_first(text: str, accepted: bool) -> None:
    grammar = named("pythonic").grammar(REQUIRED, "")
    assert grammar is not None
    assert ByteTokens().accepts(grammar, text) == accepted


@pytest.mark.parametrize("arguments", ["", "a=1", "b=True", "a=2, b=False"])
def test_optional_arguments_may_be_left_out(arguments: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}}
    use = ToolUse(tools=(ToolSpec(name="f", parameters=schema),), choice="required")
    grammar = named("pythonic").grammar(use, "")
    assert grammar is not None
    assert ByteTokens().accepts(grammar, f"[f({arguments})]")
    assert not ByteTokens().accepts(grammar, "[f(b=True, a=1)]")
