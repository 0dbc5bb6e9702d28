"""Answers of FunctionGemma and Gemma 4: calls in a notation of their own."""

import json
from itertools import permutations

import pytest
from answer_parsing import ByteTokens, call, named, parsed

from sagellm.chat_formats import AnswerPart, Content, Reasoning, ToolCallDelta, ToolSpec, ToolUse

USE = ToolUse(tools=(ToolSpec(name="f"), ToolSpec(name="g.x-1")))
MARKS = {
    "gemma4": ("<|tool_call>", "<tool_call|>", '<|"|>'),
    "function_gemma": ("<start_function_call>", "<end_function_call>", "<escape>"),
}


def made(name: str, text: str) -> str:
    """A text in which `(`, `)` and `'` are the marks of a format."""
    opening, closing, quote = MARKS[name]
    return text.replace("(", opening).replace(")", closing).replace("'", quote)


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("(call:f{})", "{}"),
        ("(call:f{a:'x',b:'',c:' \"\\ {é\n'})", r'{"a": "x", "b": "", "c": " \"\\ {é\n"}'),
        ("(call:f{a:1,b:-2.5e3,c:true,d:null})", '{"a": 1, "b": -2.5e3, "c": true, "d": null}'),
        ("(call:f{a:[],b:[1,'x',[{}]]})", '{"a": [], "b": [1, "x", [{}]]}'),
        ("(call:f{ a : { b : { c : 1 } } , 'd:e' : 2 })", '{"a": {"b": {"c": 1}}, "d:e": 2}'),
        ("(call:f{a:Paris or so,b:01})", '{"a": "Paris or so", "b": "01"}'),
        ('(call:f{"a":"x,y"})', '{"a": "x,y"}'),
    ],
)
def test_arguments_become_json(name: str, text: str, arguments: str) -> None:
    json.loads(arguments)
    assert parsed(name, made(name, text), use=USE) == [call(0, "f", arguments)]


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Hi (call:g.x-1{})", [Content("Hi "), call(0, "g.x-1", "{}")]),
        ("(call:f{})(call:f{})", [call(0, "f", "{}"), call(1, "f", "{}")]),
        ("(call:f{}", [call(0, "f", "{}")]),
        ("(call:f{a:'x", [call(0, "f", '{"a": "x')]),
        ("(call:f{a:tr", [call(0, "f", '{"a": ')]),
        ("(call:f{a:1,})", [call(0, "f", '{"a": 1, ""'), Content(made("gemma4", "}"))]),
        ("(call:f{a 1})", [call(0, "f", '{"a 1"'), Content("}")]),
    ],
)
def test_an_answer(name: str, text: str, parts: list[AnswerPart]) -> None:
    found = parsed(name, made(name, text).replace(MARKS[name][1], ""), use=USE)
    assert found == parts


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize(
    "text", ["(", "(call:", "(call:f", "(call:unknown{})", "(cal:f{})", "(call:f[]"]
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert parsed(name, made(name, text), use=USE) == [Content(made(name, text))]


def test_a_text_streams() -> None:
    parser = named("function_gemma").open_parser(USE, "", draw_id=lambda length: "")
    begun = [ToolCallDelta(0, "call_", "f"), ToolCallDelta(0, arguments='{"a": ')]
    assert parser.push("<start_function_call>call:f{a:<es") == begun
    assert parser.push('cape>"b') == [ToolCallDelta(0, arguments='"\\"b')]
    assert parser.push("<escape") == []
    assert parser.push(">}") == [ToolCallDelta(0, arguments='"}')]


def test_gemma4_thinks_in_a_channel() -> None:
    special_tokens = {"<|channel>": 1, "<channel|>": 2, "<turn|>": 3}
    text = "<|channel>thought\nhm\n<channel|>Hi<turn|>"
    assert parsed("gemma4", text, special_tokens=special_tokens) == [
        Reasoning("hm"),
        Content("Hi"),
    ]


def test_many_open_brackets_do_no_harm() -> None:
    text = "<start_function_call>call:f{a:" + "[" * 50_000
    (part,) = parsed("function_gemma", text, use=USE)
    assert isinstance(part, ToolCallDelta)
    assert len(part.arguments) == len('{"a": ') + 50_000


def test_optional_members_come_in_the_order_of_the_schema() -> None:
    tool = ToolSpec(name="f", parameters={"properties": {"a": {}, "b": {}, "c": {}}})
    grammar = named("gemma4").grammar(ToolUse(tools=(tool,), named="f", parallel=False), "")
    assert grammar is not None
    for length in range(4):
        for names in permutations("abc", length):
            members = ",".join(f"{name}:1" for name in names)
            text = made("gemma4", f"(call:f{{{members}}})")
            assert ByteTokens().accepts(grammar, text) is (list(names) == sorted(names))
