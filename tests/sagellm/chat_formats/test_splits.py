"""Parsers of all formats: the parts of a text do not depend on its pieces, and cost little."""

import time
from collections.abc import Mapping
from itertools import product

import pytest
from answer_parsing import parsed
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.chat_formats import FORMATS

# Fragments of texts, so that markers and calls come in every order and stand in each other.
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=time>", "<parameter=city>", "</parameter>"),
    *("</function>", "<think>", "</think>", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"),
    *("[CALL_ID]", "<|python_tag|>", "<|channel>thought\n", "<channel|>", "<|tool_call>"),
    *("<tool_call|>", '<|"|>', "<start_function_call>", "<end_function_call>", "<escape>"),
    *("<|start|>assistant", "<|channel|>analysis", "<|channel|>commentary to=functions.time"),
    *("<|channel|>final", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>json"),
    *(
        '{"name": "time", "arguments": {',
        '{"name": "get_weather", "parameters": ',
        '"name"',
        "null",
    ),
    *("call:time{", "time", "city:", '{"city": "', "}", "]", "[", "{", '"', "\\", ",", ": ", ";"),
    *("\n", " ", "<", "é☃", "Hi", "1", "<pad>", "<pa"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "function<｜tool▁sep｜>",
        "```json",
        "```",
    ),
    *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|tool_calls_section_begin|>"),
    *("<|tool_call_begin|>functions.time:0", "<|tool_call_argument_begin|>{}"),
    *("time\n<arg_key>", "city", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<|tool_call_end|>", "<|tool_calls_section_end|>"),
    *("[time(", "get_weather(city='", "x=", "'", "\\u00", "True", ")", "'}", "<|python_start|>["),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)
SPECIAL = {"<pad>": 1, "<|channel>": 2, "<|end|>": 3, "<tool_call>": 4}
PROMPTS = st.sampled_from(["", "<think>\n", "[THINK]", "<|start|>assistant", "</think>\n\n"])

# Formats whose parser does nothing that the parser of another format does not do.
SHARED = frozenset(
    {
        *("hermes", "qwen3_coder", "mistral", "mistral_list", "magistral_2506"),
        *("deepseek_v3", "deepseek_v3_1", "kimi_k2"),
    }
)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in SHARED])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, prompt=PROMPTS, cuts=st.lists(st.integers(0, 80), max_size=12))
def test_pieces_do_not_matter(name: str, text: str, prompt: str, cuts: list[int]) -> None:
    ends = [*sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    starts = [0, *ends[:-1]]
    pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    whole = parsed(name, text, prompt=prompt, special_tokens=SPECIAL)
    assert parsed(name, pieces, prompt=prompt, special_tokens=SPECIAL) == whole
    assert parsed(name, text, prompt=prompt, special_tokens=SPECIAL) == whole
    assert parsed(name, iter(text), prompt=prompt, special_tokens=SPECIAL) == whole


# Beginnings after which a parser waits for something that does not come.
BEGINNINGS = {
    "qwen3": ["\n", "<think>", "<tool_call>", '<tool_call>{"arguments": "'],
    "qwen3_5": ["<function=time><parameter=x>", "<function=get_weather><parameter=days>"],
    "llama3": ['{"name": "time", "parameters": {"a": '],
    "glm": ["<tool_call>time<arg_key>x</arg_key><arg_value>"],
    "pythonic": ["[time(a='"],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS]["],
    "gemma4": ["<|tool_call>call:time{a:["],
    "harmony": ["", "<|channel|>analysis<|message|>"],
    "deepseek_v3_1": ["<｜tool▁call▁begin｜>time<｜tool▁sep｜>{"],
}
REPEATED = ["a", "\n", "<", "[1,", "<tool_call>", "</think", "<pad>"]


def seconds_of(name: str, text: str, special_tokens: Mapping[str, int]) -> float:
    """Processor time of the parser for a text in pieces of four characters."""
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    started = time.process_time()
    parsed(name, pieces, special_tokens=special_tokens)
    return time.process_time() - started


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_cost_is_linear(name: str) -> None:
    """Eight times the text takes about eight times as long, not 64 times."""
    special_tokens = {f"<pad{number}>": number for number in range(500)}
    for beginning, repeated in product(BEGINNINGS[name], REPEATED):
        text = beginning + repeated * (16_000 // len(repeated))
        short = seconds_of(name, text[: len(text) // 8], special_tokens)
        assert seconds_of(name, text, special_tokens) < 20 * short + 0.1


@pytest.mark.parametrize("name", ["plain", "qwen3"])
def test_a_megabyte_takes_seconds(name: str) -> None:
    text = '<tool_call>{"name": "time", "arguments": {"a": "' + "a <b> {c}" * 110_000
    assert seconds_of(name, text, {}) < 20
