"""Answers of GLM: keys and values between tags."""

import pytest
from answer_parsing import REQUIRED, USE, ByteTokens, call, named, parsed

from sagellm.chat_formats import AnswerPart, Content, Reasoning, ToolCallDelta


def made(name: str, gap: str = "\n", **arguments: str) -> str:
    inner = "".join(
        f"<arg_key>{key}</arg_key>{gap}<arg_value>{value}</arg_value>{gap}"
        for key, value in arguments.items()
    )
    return f"<tool_call>{name}{gap}{inner}</tool_call>"


PARIS = made("get_weather", city="Paris", days="2")
CALLED = call(0, "get_weather", '{"city": "Paris", "days": 2}')


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (PARIS, [CALLED]),
        (made("get_weather", gap="", city="Paris", days="2"), [CALLED]),
        (f"Hm.\n{PARIS}\n{made('time')}", [Content("Hm.\n"), CALLED, call(1, "time", "{}")]),
        (
            made("get_weather", city=' "a"\n<b>\n'),
            [call(0, "get_weather", '{"city": " \\"a\\"\\n<b>\\n"}')],
        ),
        (made("get_weather", days="two"), [call(0, "get_weather", '{"days": "two"}')]),
        (made("time", x="1"), [call(0, "time", '{"x": "1"}')]),
        (PARIS.removesuffix("l>"), [call(0, "get_weather", '{"city": "Paris", "days": 2')]),
        (PARIS.partition("ris")[0], [call(0, "get_weather", '{"city": "Pa')]),
        (PARIS.partition("/arg_k")[0], [call(0, "get_weather", "")]),
        (PARIS.partition("value>")[0], [call(0, "get_weather", "")]),
        (f"<think>hm</think>\n{PARIS}", [Reasoning("hm"), CALLED]),
    ],
)
def test_an_answer(text: str, parts: list[AnswerPart]) -> None:
    assert parsed("glm", text) == parts


@pytest.mark.parametrize(
    "text", ["<tool_call>", "<tool_call>time", made("unknown", x="1"), "<tool_call>\n{}"]
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert parsed("glm", text) == [Content(text)]


def test_a_text_streams_and_other_values_come_whole() -> None:
    parser = named("glm").open_parser(USE, "", draw_id=lambda length: "")
    assert parser.push("<tool_call>get_weather<arg_key>city</arg_key><arg_value>P") == [
        ToolCallDelta(0, "call_", "get_weather"),
        ToolCallDelta(0, arguments='{"city": "P'),
    ]
    assert parser.push('"a</arg_v') == [ToolCallDelta(0, arguments='\\"a')]
    assert parser.push("alue><arg_key>days</arg_key><arg_value>1") == [
        ToolCallDelta(0, arguments='", "days": ')
    ]
    assert parser.push("</arg_value>") == [ToolCallDelta(0, arguments="1")]
    assert parser.push("</tool_call>") == [ToolCallDelta(0, arguments="}")]


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        (PARIS, True),
        (made("get_weather", gap="", city="Paris"), True),
        (f"<think>hm</think>\n{made('time')}\n{PARIS}", True),
        (made("get_weather", days="2"), False),
        (made("get_weather", city="Paris", days="two"), False),
    ],
)
def test_a_grammar_binds_the_arguments(text: str, accepted: bool) -> None:
    grammar = named("glm").grammar(REQUIRED, "")
    assert grammar is not None
    assert ByteTokens().accepts(grammar, text) == accepted
