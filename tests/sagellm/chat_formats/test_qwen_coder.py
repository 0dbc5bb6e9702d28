"""Answers of Qwen3-Coder: arguments between tags."""

import pytest
from answer_parsing import call, named, parsed

from sagellm.chat_formats import AnswerPart, Content, Reasoning, ToolCallDelta, ToolSpec, ToolUse

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "count": {"type": "integer"},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "maybe": {"type": ["string", "null"]},
        "ref": {"$ref": "#/$defs/point"},
    },
    "$defs": {"point": {"type": "object"}},
}
USE = ToolUse(tools=(ToolSpec(name="f", parameters=SCHEMA), ToolSpec(name="g")))


def made(**arguments: str) -> str:
    inner = "".join(
        f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in arguments.items()
    )
    return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (made(), "{}"),
        (made(text='a "b"\\\n<c> é'), '{"text": "a \\"b\\"\\\\\\n<c> é"}'),
        (made(text="\n\n"), '{"text": "\\n\\n"}'),
        (made(text="12"), '{"text": "12"}'),
        (made(unit="C", count=" 12 "), '{"unit": "C", "count": 12}'),
        (made(count="twelve"), '{"count": "twelve"}'),
        (made(count="NaN", items="[Infinity]"), '{"count": "NaN", "items": "[Infinity]"}'),
        (made(flag="True", maybe="None"), '{"flag": true, "maybe": null}'),
        (made(maybe="12"), '{"maybe": "12"}'),
        (
            made(items='[1, {"a": "]"}]', ref='{"x": 1}'),
            '{"items": [1, {"a": "]"}], "ref": {"x": 1}}',
        ),
        (made(other="1"), '{"other": "1"}'),
        (made(**{"a b": "1"}), '{"a b": "1"}'),
        ("<function=f><parameter=text>a</parameter></function>", '{"text": "a"}'),
    ],
)
def test_arguments_become_json(text: str, arguments: str) -> None:
    assert parsed("qwen3_coder", text, use=USE) == [call(0, "f", arguments)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"Hm.\n{made()}\n{made()}", [Content("Hm.\n"), call(0, "f", "{}"), call(1, "f", "{}")]),
        (made(text="a")[:44], [call(0, "f", '{"text": "a')]),
        (made(count="12")[:52], [call(0, "f", '{"count": ')]),
        (made(text="a")[:35], [call(0, "f", "")]),
        (made().replace("</function>", "oh"), [call(0, "f", ""), Content("oh\n</tool_call>")]),
    ],
)
def test_an_answer(text: str, parts: list[AnswerPart]) -> None:
    assert parsed("qwen3_coder", text, use=USE) == parts


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n{}",
        "<function=f",
        "<function=unknown>\n</function>",
        "<function=f and more",
        "<functions=f>",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert parsed("qwen3_coder", text, use=USE) == [Content(text)]


def test_a_text_streams_and_other_values_come_whole() -> None:
    parser = named("qwen3_coder").open_parser(USE, "", draw_id=lambda length: "")
    first = ToolCallDelta(0, "call_", "f")
    assert parser.push("<function=f><parameter=text>\na") == [
        first,
        ToolCallDelta(0, arguments='{"text": "a'),
    ]
    assert parser.push('"b\n') == [ToolCallDelta(0, arguments='\\"b')]
    assert parser.push("c\n</para") == [ToolCallDelta(0, arguments="\\nc")]
    assert parser.push("meter><parameter=count>1") == [ToolCallDelta(0, arguments='", "count": ')]
    assert parser.push("2</parameter>") == [ToolCallDelta(0, arguments="12")]
    assert parser.push("</function>") == [ToolCallDelta(0, arguments="}")]


def test_reasoning_comes_first() -> None:
    text = f"hm</think>\n\n{made()}"
    assert parsed("qwen3_5", text, use=USE, prompt="<think>\n") == [
        Reasoning("hm"),
        call(0, "f", "{}"),
    ]
