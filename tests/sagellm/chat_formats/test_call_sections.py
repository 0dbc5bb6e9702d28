"""Answers of DeepSeek and Kimi: calls in a section."""

import pytest
from answer_parsing import REQUIRED, USE, ByteTokens, call, named, parsed

from sagellm.chat_formats import AnswerPart, Content, Reasoning, ToolCallDelta, ToolUse

PARIS = '{"city": "Paris"}'


def deepseek(*calls: str) -> str:
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


def v3(name: str, arguments: str) -> str:
    fenced = f"```json\n{arguments}\n```"
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n{fenced}<｜tool▁call▁end｜>"


def v3_1(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def kimi(*calls: tuple[str, str]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>{name}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for name, arguments in calls
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


WEATHER = v3("get_weather", PARIS)
BOTH = [call(0, "get_weather", PARIS), call(1, "time", "{}")]


@pytest.mark.parametrize("made", [v3, v3_1])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_r1", "deepseek_v3_1"])
def test_calls_of_deepseek(name: str, made: type[str]) -> None:
    text = deepseek(made("get_weather", PARIS), made("time", "{}"))
    assert parsed(name, text) == BOTH
    assert parsed(name, f"I look.\n{text}") == [Content("I look.\n"), *BOTH]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (WEATHER, [call(0, "get_weather", PARIS)]),
        (deepseek(WEATHER)[:-3], [call(0, "get_weather", PARIS)]),
        (deepseek(WEATHER)[: -len("`<｜tool▁call▁end｜><｜tool▁calls▁end｜>")], BOTH[:1]),
        (deepseek(WEATHER).removesuffix("<｜tool▁calls▁end｜>"), BOTH[:1]),
        (deepseek(WEATHER).partition(": ")[0], [call(0, "get_weather", '{"city"')]),
        (deepseek(WEATHER) + " Now?", [*BOTH[:1], Content(" Now?")]),
        (
            deepseek(WEATHER, v3("unknown", "{}"), v3("time", "{}")),
            [
                BOTH[0],
                Content(
                    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>unknown\n```json\n"
                    "{}\n```<｜tool▁call▁end｜>\n"
                ),
                BOTH[1],
            ],
        ),
    ],
)
def test_an_answer_that_is_cut_off_or_odd(text: str, parts: list[AnswerPart]) -> None:
    assert parsed("deepseek_v3", text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁begin｜>time",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n[]\n```",
        "<｜tool▁call▁begin｜>time{}",
        v3("unknown", "{}"),
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert parsed("deepseek_v3", text) == [Content(text)]


def test_reasoning_comes_first() -> None:
    text = f"hm\n</think>\n\n{deepseek(WEATHER)}"
    expected = [Reasoning("hm"), BOTH[0]]
    assert parsed("deepseek_r1", text, prompt="<｜Assistant｜><think>\n") == expected
    closed = "<｜Assistant｜></think>"
    assert parsed("deepseek_v3_1", deepseek(WEATHER), prompt=closed) == BOTH[:1]
    assert parsed("kimi_k2_thinking", f"<think>hm</think>{kimi(('time', '{}'))}") == [
        Reasoning("hm"),
        call(0, "time", "{}"),
    ]


def test_arguments_stream() -> None:
    parser = named("deepseek_v3").open_parser(USE, "", draw_id=lambda length: "")
    assert parser.push("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>ti") == []
    assert parser.push("me\n```json\n") == []
    assert parser.push('{"a') == [
        ToolCallDelta(0, "call_", "time"),
        ToolCallDelta(0, arguments='{"a'),
    ]
    assert parser.push('": 1}\n```<｜tool') == [ToolCallDelta(0, arguments='": 1}')]
    assert parser.finish() == []


@pytest.mark.parametrize("name", ["functions.get_weather:3", " functions.get_weather:3 "])
def test_kimi_writes_the_ids_of_its_calls(name: str) -> None:
    text = kimi((name, PARIS), ("functions.time:4", "{}"))
    assert parsed("kimi_k2", text) == [
        ToolCallDelta(0, "functions.get_weather:3", "get_weather", PARIS),
        ToolCallDelta(1, "functions.time:4", "time", "{}"),
    ]


def test_a_call_of_kimi_without_an_id_of_its_own_gets_one() -> None:
    text = kimi(("functions.time:0", "{}"), ("functions.time:0", "{}"), ("time", "{}"))
    parts = parsed("kimi_k2", text)
    assert [part.id for part in parts if isinstance(part, ToolCallDelta)] == [
        "functions.time:0",
        "call_0",
        "call_1",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deepseek_v3", deepseek(WEATHER, v3("time", "{}"))),
        ("deepseek_v3_1", deepseek(v3_1("get_weather", PARIS))),
        ("kimi_k2", kimi(("functions.time:0", "{}"), ("functions.get_weather:1", PARIS))),
    ],
)
def test_a_grammar_has_the_form_of_the_template(name: str, text: str) -> None:
    grammar = named(name).grammar(REQUIRED, "")
    assert grammar is not None
    assert ByteTokens().accepts(grammar, text)
    one = named(name).grammar(ToolUse(tools=USE.tools, choice="required", parallel=False), "")
    assert one is not None
    assert ByteTokens().accepts(one, text) == (name == "deepseek_v3_1")
