"""Answers of gpt-oss: messages in channels."""

import pytest
from answer_parsing import USE, call, named, parsed

from sagellm.chat_formats import AnswerPart, Content, Reasoning, ToolCallDelta, ToolUse

PROMPT = "<|start|>user<|message|>Hi<|start|>assistant"
PARIS = '{"city": "<|end|> Paris"}'
THOUGHT = "<|channel|>analysis<|message|>hm\n<|end|><|start|>assistant"
CALLED = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{PARIS}"
NEXT = "<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<|channel|>final<|message|>Hi", [Content("Hi")]),
        ("<|channel|>final<|message|>Hi<|return|>", [Content("Hi")]),
        (f"{THOUGHT}<|channel|>final<|message|>Hi", [Reasoning("hm\n"), Content("Hi")]),
        (CALLED, [call(0, "get_weather", PARIS)]),
        (f"{CALLED}<|call|>", [call(0, "get_weather", PARIS)]),
        (f"{THOUGHT}{CALLED}", [Reasoning("hm\n"), call(0, "get_weather", PARIS)]),
        (
            f"<|channel|>commentary<|message|>I ask.{NEXT}{CALLED}",
            [Content("I ask."), call(0, "get_weather", PARIS)],
        ),
        (
            f" to=functions.time<|channel|>commentary json<|message|>{{}}{NEXT}{CALLED}",
            [call(0, "time", "{}"), call(1, "get_weather", PARIS)],
        ),
        (f"{THOUGHT}<|channel|>analysis<|message|>so", [Reasoning("hm\n\nso")]),
        (
            f"<|channel|>final<|message|>a{NEXT}<|channel|>final<|message|>b",
            [Content("a\nb")],
        ),
        ("<|channel|>analysis to=functions.time<|message|><|call|>", [call(0, "time", "{}")]),
        ("<|channel|>commentary to=functions.time<|message|>1", [call(0, "time", "1")]),
    ],
)
def test_an_answer(text: str, parts: list[AnswerPart]) -> None:
    assert parsed("harmony", text, prompt=PROMPT) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<|channel|>commentary to=functions.unknown<|message|>{}", [Content("{}")]),
        ("<|channel|>commentary to=python<|message|>1 + 1", [Content("1 + 1")]),
        ("<|channel|>fin", []),
        ("<|channel|>analysis<|message|>hm<|en", [Reasoning("hm<|en")]),
        ("It is 12.", [Content("It is 12.")]),
        ("It is 12.<|end|>", [Content("It is 12.")]),
        ("<|message|>It", [Content("It")]),
        (
            "<|channel|>commentary to=functions.get_weather<|message|>",
            [call(0, "get_weather", "{}")],
        ),
    ],
)
def test_what_is_no_call_or_cut_off(text: str, parts: list[AnswerPart]) -> None:
    assert parsed("harmony", text, prompt=PROMPT) == parts


def test_without_tools_a_call_is_content() -> None:
    text = CALLED.replace(PARIS, "{}")
    assert parsed("harmony", text, use=ToolUse(), prompt=PROMPT) == [Content("{}")]


def test_the_prompt_may_end_inside_a_message() -> None:
    prompt = f"{PROMPT}<|channel|>analysis<|message|>I th"
    text = "ink.<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    assert parsed("harmony", text, prompt=prompt) == [Reasoning("ink."), Content("Hi")]
    assert parsed("harmony", "Hi", prompt=f"{PROMPT}<|channel|>final<|message|>") == [Content("Hi")]


def test_arguments_stream() -> None:
    parser = named("harmony").open_parser(USE, PROMPT, draw_id=lambda length: "")
    assert parser.push("<|channel|>commentary to=functions.time<|mess") == []
    assert parser.push("age|>") == [ToolCallDelta(0, "call_", "time")]
    assert parser.push('{"a') == [ToolCallDelta(0, arguments='{"a')]
    assert parser.push('": 1}<|ca') == [ToolCallDelta(0, arguments='": 1}')]
    assert parser.finish() == []


def test_other_special_tokens_are_dropped() -> None:
    special_tokens = {"<|end|>": 1, "<|endoftext|>": 2}
    text = "<|channel|>final<|message|>Hi<|endoftext|> you<|end|>"
    assert parsed("harmony", text, special_tokens=special_tokens) == [Content("Hi you")]
