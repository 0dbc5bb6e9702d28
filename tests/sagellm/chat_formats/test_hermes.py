"""Answers of Hermes and Qwen: JSON objects between tags."""

import pytest
from answer_parsing import TIME, USE, WEATHER, call, named, parsed

from sagellm.chat_formats import (
    AnswerPart,
    Content,
    Reasoning,
    ToolCallDelta,
    ToolSpec,
    ToolUse,
    random_id,
)

PARIS = '{"city": "Paris"}'
ONE = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
HARD = '{"city": "\\"}{\\\\", "é☃": [{"<tool_call>": {}}, "</tool_call>"]}'


def made(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "time", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("It is 12.", [Content("It is 12.")]),
        ("", []),
        (ONE, [call(0, "get_weather", PARIS)]),
        (f"\n\n{ONE}\n", [call(0, "get_weather", PARIS)]),
        (f"Let me see.\n{ONE}", [Content("Let me see.\n"), call(0, "get_weather", PARIS)]),
        (f"{ONE}\n{ONE}", [call(0, "get_weather", PARIS), call(1, "get_weather", PARIS)]),
        (f"{ONE}\nDone. ", [call(0, "get_weather", PARIS), Content("\nDone. ")]),
        (made(HARD), [call(0, "time", HARD)]),
        (made("null"), [call(0, "time", "{}")]),
        (made('"{\\"a\\": 1}"'), [call(0, "time", '{"a": 1}')]),
        (made("[1, 2]"), [call(0, "time", "[1, 2]")]),
        ('<tool_call>{"name": "time"}</tool_call>', [call(0, "time", "{}")]),
        ('<tool_call>{"parameters": {"a": 1}, "name": "time"}', [call(0, "time", '{"a": 1}')]),
        (
            '<tool_call>{"id": 7, "name": "time", "arguments": {}, "x": [1]}',
            [call(0, "time", "{}")],
        ),
    ],
)
def test_an_answer(text: str, parts: list[AnswerPart]) -> None:
    assert parsed("hermes", text) == parts


def test_the_closing_tag_may_be_forgotten() -> None:
    text = ONE.removesuffix("</tool_call>")
    found = [call(0, "get_weather", PARIS), call(1, "get_weather", PARIS)]
    assert parsed("hermes", text + ONE) == found
    assert parsed("hermes", f"{text}Done.") == [found[0], Content("Done.")]


@pytest.mark.parametrize(
    "text",
    [
        "a < b <tool_cal <tool_callx",
        "<tool_call",
        "<tool_call>",
        "<tool_call>\n not JSON</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {"a": 1}}</tool_call> and more',
        '<tool_call>{"name": 1}</tool_call>',
        '<tool_call>{"name": nonsense}',
        '<tool_call>{"city": "Paris", "name": "time"}',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name" "time"}',
        '<tool_call>{"id": 1 "name": "time"}',
        '<tool_call>{name: "time"}',
        '<tool_call>{"name": "tim',
        '\n <tool_call>{"arguments": {"a": 1}, "na',
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert parsed("hermes", text) == [Content(text)]


def test_a_call_may_follow_a_broken_one() -> None:
    text = f"<tool_call>oh {ONE}"
    assert parsed("hermes", text) == [Content("<tool_call>oh "), call(0, "get_weather", PARIS)]


def test_an_answer_may_be_cut_off_at_every_place() -> None:
    """What was emitted stays; text that did not become a call is content."""
    text = f"Hm.\n{ONE}"
    named_at = text.index('", "arg') + 1
    for end in range(len(text) + 1):
        parts = parsed("hermes", text[:end])
        if end < named_at:
            assert parts == ([Content(text[:end])] if end else [])
        else:
            arguments = parts[1].arguments if isinstance(parts[1], ToolCallDelta) else None
            assert parts[0] == Content("Hm.\n")
            assert parts[1:] == [call(0, "get_weather", arguments or "")]
            assert text[named_at:end].startswith(f', "arguments": {arguments}'[: end - named_at])


def test_a_call_streams() -> None:
    """The name comes when it is complete, arguments as they come, content at once."""
    parser = named("hermes").open_parser(USE, "", draw_id=lambda length: "x" * length)
    assert parser.push("Hi <too") == [Content("Hi ")]
    assert parser.push("l") == []
    assert parser.push('_call>{"name": "time') == []
    assert parser.push('", "argum') == [ToolCallDelta(0, "call_" + 24 * "x", "time")]
    assert parser.push('ents": {"a') == [ToolCallDelta(0, arguments='{"a')]
    assert parser.push('": 1}') == [ToolCallDelta(0, arguments='": 1}')]
    assert parser.push("}</tool_call>") == []
    assert parser.finish() == []


def test_half_a_character_stays_escaped() -> None:
    """A lone surrogate could not be sent as UTF-8."""
    text = '<tool_call>{"name": "time", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>'
    (part,) = parsed("hermes", text)
    assert isinstance(part, ToolCallDelta)
    assert part.arguments.encode() == b'"{\\"a\\": \\"\\ud800\\"}"'


def test_without_parallel_calls_the_first_counts() -> None:
    use = ToolUse(tools=(WEATHER, TIME), parallel=False)
    assert parsed("hermes", f"{ONE}\n{made('{}')}\nDone.", use=use) == [
        call(0, "get_weather", PARIS),
        Content("\nDone."),
    ]


@pytest.mark.parametrize(
    "use",
    [
        ToolUse(),
        ToolUse(tools=(WEATHER,), choice="none"),
        ToolUse(tools=(WEATHER, TIME), named="time"),
    ],
)
def test_a_call_that_is_not_allowed_is_content(use: ToolUse) -> None:
    assert parsed("hermes", ONE, use=use) == [Content(ONE)]


def test_special_tokens_are_dropped_but_for_those_of_the_format() -> None:
    special_tokens = {"<|im_end|>": 1, "<tool_call>": 2, "</tool_call>": 3, "<pad>": 4}
    text = f"Hi<pad> <|im_en <tool{ONE}<|im_end|>"
    assert parsed("hermes", text, special_tokens=special_tokens) == [
        Content("Hi <|im_en <tool"),
        call(0, "get_weather", PARIS),
    ]


REASONING = "Is it\n\n<tool_call>? {"


@pytest.mark.parametrize(
    ("prompt", "text", "parts"),
    [
        ("", f"<think>\n{REASONING}\n</think>\n\nHi", [Reasoning(REASONING), Content("Hi")]),
        ("", f" <think>{REASONING}</think>Hi\n", [Reasoning(REASONING), Content("Hi\n")]),
        ("<think>\n", f"{REASONING}</think>\n\n", [Reasoning(REASONING)]),
        ("<think>\n", f"{REASONING}</thin", [Reasoning(f"{REASONING}</thin")]),
        ("<think>\n", "</think>Hi", [Content("Hi")]),
        ("</think>\n\n", "Hi", [Content("Hi")]),
        ("", "Hi <think>x</think>", [Content("Hi <think>x</think>")]),
        ("", " <thinking", [Content(" <thinking")]),
        ("", "\n<thi", [Content("\n<thi")]),
        ("", f"<think>hm</think>\n\n{ONE}", [Reasoning("hm"), call(0, "get_weather", PARIS)]),
    ],
)
def test_reasoning(prompt: str, text: str, parts: list[AnswerPart]) -> None:
    assert parsed("qwen3", text, prompt=prompt) == parts


def test_reasoning_streams_without_its_last_space() -> None:
    parser = named("qwen3").open_parser(ToolUse(), "<think>")
    assert parser.push("\n a b ") == [Reasoning("a b")]
    assert parser.push("\n") == []
    assert parser.push("c") == [Reasoning(" \nc")]
    assert parser.push("\n</think>\n") == []
    assert parser.push("\nHi ") == [Content("Hi ")]


def test_ids_are_random() -> None:
    ids = {random_id(9) for _ in range(20)}
    assert len(ids) == 20
    assert all(one.isalnum() and len(one) == 9 for one in ids)


def test_a_tool_of_a_request_has_a_rule() -> None:
    use = ToolUse(tools=(ToolSpec(name="a"), ToolSpec(name="b", strict=True)))
    assert use.is_bound
    assert not use.must_call
    assert not ToolUse(tools=use.tools[:1]).is_bound
    assert ToolUse(tools=use.tools, named="b").allowed == use.tools[1:]
