"""Answers of Llama: JSON objects that are the whole answer."""

import pytest
from answer_parsing import USE, call, named, parsed

from sagellm.chat_formats import AnswerPart, Content

PARIS = '{"city": "Paris; {"}'
ONE = f'{{"name": "get_weather", "parameters": {PARIS}}}'
TWO = '{"type": "function", "name": "time", "parameters": {}}'
BOTH = [call(0, "get_weather", PARIS), call(1, "time", "{}")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (ONE, BOTH[:1]),
        (f"\n{ONE}\n", BOTH[:1]),
        (f"<|python_tag|>{ONE}", BOTH[:1]),
        (f"Hm. <|python_tag|> {ONE}", [Content("Hm. "), *BOTH[:1]]),
        (f"<|python_start|>{ONE}<|python_end|>", [*BOTH[:1], Content("<|python_end|>")]),
        (f"{ONE}; {TWO}", BOTH),
        (f"{ONE}\n{TWO};", BOTH),
        (f"{ONE}<|python_tag|>{TWO}", BOTH),
        (f"{ONE} Done.", [*BOTH[:1], Content("Done.")]),
    ],
)
def test_an_answer(text: str, parts: list[AnswerPart]) -> None:
    assert parsed("llama3", text) == parts


@pytest.mark.parametrize(
    "text",
    [
        f"The call is {ONE}",
        '{"city": "Paris"}',
        "{}",
        "{",
        '{"name": "unknown", "parameters": {}}',
        '{"name": "get_wea',
        '{"parameters": {"a": 1}',
        '<|python_tag|>print("hi")',
        "<|python_tag|>",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert parsed("llama3", text) == [Content(text)]


def test_an_object_that_is_no_call_streams_from_its_first_member() -> None:
    parser = named("llama3").open_parser(USE, "")
    assert parser.push('{"city"') == []
    assert parser.push(': "Par') == [Content('{"city": "Par')]
    assert parser.push("is") == [Content("is")]
