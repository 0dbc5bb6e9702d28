"""Tool calls and reasoning in answers of chats, streamed and whole, for every family of models."""

import json
import re
from typing import Any

import pytest
from chat_templates import (
    CARD,
    HARMONY,
    HERMES,
    KIMI,
    LLAMA3,
    MISTRAL,
    PLAIN,
    QWEN3,
    TemplateTokenizer,
    tool,
)
from gateway_calls import Answered, event, last, playing, post

from sagellm.gateway.http.endpoints import chat
from sagellm.runtime.messages import TokenLogprob

TOOLS = [tool("f", x=0), tool("g")]
CALLS = {
    "hermes": (
        HERMES,
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
        '\n<tool_call>{"name": "g", "arguments": {}}</tool_call>',
    ),
    "qwen3": (
        QWEN3,
        '<think>\nso\n</think>\n\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
    ),
    "llama3": (LLAMA3, '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}'),
    "mistral": (MISTRAL, '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}'),
}
MADE = [("f", '{"x": 1}'), ("g", "{}")]
FAMILY = pytest.mark.parametrize("family", CALLS)


def letters(text: str, **end: Any) -> list[list[Any]]:
    """One event for each character of the text, and the last event."""
    return [*([event(letter)] for letter in text), [last("", **end)]]


async def answer(template: str, *batches: Any, **fields: Any) -> Answered:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    tokenizer = TemplateTokenizer(template)
    answered = await post(chat, playing(*batches), body, tokenizer=tokenizer, model=CARD)
    assert answered.status == 200, answered.body
    return answered


async def streamed(template: str, text: str, **fields: Any) -> list[Any]:
    """The choices of the chunks after the role, one chunk for each character and the end."""
    answered = await answer(template, *letters(text), tools=TOOLS, stream=True, **fields)
    choices = [chunk["choices"][0] for chunk in answered.events[1:]]
    assert len(choices) == len(text) + 1
    return choices


def calls_of(deltas: list[Any]) -> list[tuple[str, str]]:
    """The names and arguments that a client puts together."""
    found: dict[int, list[str]] = {}
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls", ())):
        if piece["index"] not in found:
            assert (piece["type"], bool(piece["id"])) == ("function", True)
            found[piece["index"]] = [piece["function"]["name"], ""]
        else:
            assert set(piece) == {"index", "function"}
            assert set(piece["function"]) == {"arguments"}
        found[piece["index"]][1] += piece["function"]["arguments"]
    return [(name, arguments) for _, (name, arguments) in sorted(found.items())]


@FAMILY
async def test_a_whole_answer_has_the_calls(family: str) -> None:
    template, text = CALLS[family]
    (choice,) = (await answer(template, *letters(text), tools=TOOLS)).json["choices"]
    made = [(call["function"]["name"], call["function"]["arguments"])
            for call in choice["message"]["tool_calls"]]  # fmt: skip
    assert made == MADE
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    assert {call["type"] for call in choice["message"]["tool_calls"]} == {"function"}


@FAMILY
async def test_a_streamed_answer_has_the_calls_piece_by_piece(family: str) -> None:
    choices = await streamed(*CALLS[family])
    deltas = [choice["delta"] for choice in choices]
    assert calls_of(deltas) == MADE
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    assert [choice["finish_reason"] for choice in choices][-2:] == [None, "tool_calls"]
    assert len([delta for delta in deltas if delta.get("tool_calls")]) > 4


@FAMILY
async def test_ids_are_unique_and_of_the_familys_form(family: str) -> None:
    template, text = CALLS[family]
    (choice,) = (await answer(template, *letters(text), tools=TOOLS)).json["choices"]
    form = "[a-zA-Z0-9]{9}" if family == "mistral" else "call_[a-zA-Z0-9]{24}"
    ids = {call["id"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 2
    assert all(re.fullmatch(form, each) for each in ids)


CUT_CALLS = [
    ('<tool_call>{"name": "f", "arguments": {"x": 1', "stop"),
    ('<tool_call>{"name": "f"', "stop"),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}', "tool_calls"),
    ('<tool_call>{"name": "g", "arguments": {}}</tool_call><tool_call>{"na', "tool_calls"),
    ('<tool_call>{"name": "g"}</tool_call><tool_call>{"name": "f", "arguments": {', "stop"),
]


@pytest.mark.parametrize(("text", "reason"), CUT_CALLS)
async def test_a_call_that_a_stop_string_cut_is_no_call_to_make(text: str, reason: str) -> None:
    events = letters(text, stop_reason="#")
    whole = (await answer(HERMES, *events, tools=TOOLS)).json["choices"][0]
    stream = (await answer(HERMES, *events, tools=TOOLS, stream=True)).events[-1]["choices"][0]
    assert whole["finish_reason"] == stream["finish_reason"] == reason
    assert whole["stop_reason"] == stream["stop_reason"] == "#"
    assert whole["message"]["tool_calls"]


async def test_a_token_without_a_part_has_an_empty_delta() -> None:
    """An empty content would begin a text beside the call, for clients that gather parts."""
    choices = await streamed(HERMES, 'a <tool_call>{"name": "f", "arguments": {}}</tool_call>')
    deltas = [choice["delta"] for choice in choices]
    assert [delta["content"] for delta in deltas if "content" in delta] == ["a", " "]
    assert deltas.count({}) > 20


async def test_an_answer_and_its_results_go_back_through_the_template() -> None:
    text = 'Wait.<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    first = (await answer(HERMES, *letters(text), tools=TOOLS)).json["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"]}
    bridge = playing([last("done")])
    for content in ("12", [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]):
        history = [{"role": "user", "content": "hi"}, first, {**result, "content": content}]
        body = {"messages": history, "tools": TOOLS}
        tokenizer = TemplateTokenizer(HERMES)
        assert (await post(chat, bridge, body, tokenizer=tokenizer, model=CARD)).status == 200
    for request in bridge.requests:
        _, _, rendered = request.prompt.partition("user: hi\n")
        made = '<tool_call>{"name": "f", "arguments": {"x": 1}}'
        assert rendered == f"assistant: Wait.{made}\ntool: 12\nassistant: "


async def test_the_ids_that_kimi_writes_go_back_to_it() -> None:
    made = "<|tool_call_begin|>functions.g:3"
    text = f"<|tool_calls_section_begin|>{made}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    first = (await answer(KIMI, *letters(text), tools=TOOLS)).json["choices"][0]["message"]
    bridge, tokenizer = playing([last("done")]), TemplateTokenizer(KIMI)
    body = {"messages": [first], "tools": TOOLS}
    assert (await post(chat, bridge, body, tokenizer=tokenizer, model=CARD)).status == 200
    assert made in bridge.requests[0].prompt


async def test_a_call_that_was_cut_off_goes_back_as_text() -> None:
    """Agents send back what the model wrote, with the error, so that it can correct itself."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": '}}
    broken = {"role": "assistant", "content": None, "tool_calls": [call]}
    bridge = playing([last("done")])
    body = {"messages": [broken], "tools": TOOLS}
    tokenizer = TemplateTokenizer(HERMES)
    assert (await post(chat, bridge, body, tokenizer=tokenizer, model=CARD)).status == 200
    assert json.dumps('{"x": ') in bridge.requests[0].prompt


async def test_content_before_a_call_stays() -> None:
    text = 'Let me see.<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    (choice,) = (await answer(HERMES, *letters(text), tools=TOOLS)).json["choices"]
    assert choice["message"]["content"] == "Let me see."
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "g"


async def test_two_choices_have_calls_of_their_own() -> None:
    def call(name: str, arguments: str) -> str:
        return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'

    first, second = call("f", '{"x": 1}'), call("g", '{"y": 2}')
    batches = [
        *([event(a), event(b, choice=1)] for a, b in zip(first, second, strict=True)),
        [last(), last(choice=1)],
    ]
    answered = await answer(HERMES, *batches, tools=TOOLS, n=2, stream=True)
    choices = [chunk["choices"][0] for chunk in answered.events]
    for index, made in enumerate([("f", '{"x": 1}'), ("g", '{"y": 2}')]):
        deltas = [choice["delta"] for choice in choices if choice["index"] == index]
        assert calls_of(deltas) == [made]


async def test_only_one_call_is_made_where_calls_are_not_parallel() -> None:
    template, text = CALLS["hermes"]
    answered = await answer(template, *letters(text), tools=TOOLS, parallel_tool_calls=False)
    assert len(answered.json["choices"][0]["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_is_cut_off_ends_for_its_length(stream: bool) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": '
    answered = await answer(HERMES, *letters(text, reason="length"), tools=TOOLS, stream=stream)
    choice = (answered.events[-1] if stream else answered.json)["choices"][0]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
async def test_what_may_be_no_call_is_content(fields: Any) -> None:
    template, text = CALLS["hermes"]
    (choice,) = (await answer(template, *letters(text), **fields)).json["choices"]
    assert choice["message"]["content"] == text
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


async def test_logprobs_and_ids_ride_on_the_chunk_of_their_token() -> None:
    text = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    batches = [[event(one, logprobs=(TokenLogprob(ord(one), -1.0),))] for one in text]
    fields = {"tools": TOOLS, "stream": True, "logprobs": True, "return_token_ids": True}
    answered = await answer(HERMES, *batches, [last()], **fields)
    choices = [chunk["choices"][0] for chunk in answered.events[1:-1]]
    assert [choice["logprobs"]["content"][0]["token"] for choice in choices] == list(text)
    assert [choice["token_ids"] for choice in choices] == [[ord(one)] for one in text]
    assert calls_of([choice["delta"] for choice in choices]) == [("g", "{}")]


THOUGHT = "<think>\nso it is\n</think>\n\nyes"


async def test_reasoning_has_two_names_in_a_whole_answer() -> None:
    (choice,) = (await answer(QWEN3, *letters(THOUGHT))).json["choices"]
    message = choice["message"]
    assert message["reasoning_content"] == message["reasoning"] == "so it is"
    assert message["content"] == "yes"


async def test_reasoning_has_two_names_in_a_stream() -> None:
    answered = await answer(QWEN3, *letters(THOUGHT), stream=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in answered.events]
    for name, text in {
        "reasoning_content": "so it is",
        "reasoning": "so it is",
        "content": "yes",
    }.items():
        assert "".join(delta.get(name, "") for delta in deltas) == text


@pytest.mark.parametrize("stream", [True, False])
async def test_the_tokens_of_the_reasoning_are_counted(stream: bool) -> None:
    options = {"stream": stream, "stream_options": {"include_usage": True}}
    answered = await answer(QWEN3, *letters(THOUGHT), **options)
    usage = (answered.events[-1] if stream else answered.json)["usage"]
    assert usage["completion_tokens"] == len(THOUGHT)
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len("so it is")}


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_may_be_left_out_but_is_counted(stream: bool) -> None:
    options = {"stream": stream, "stream_options": {"include_usage": True}}
    answered = await answer(QWEN3, *letters(THOUGHT), include_reasoning=False, **options)
    assert b"so it is" not in answered.body
    assert b"reasoning_content" not in answered.body
    usage = (answered.events[-1] if stream else answered.json)["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len("so it is")


async def test_reasoning_that_the_request_switches_off_is_content() -> None:
    (choice,) = (await answer(QWEN3, *letters("yes"), reasoning_effort="none")).json["choices"]
    assert choice["message"]["content"] == "yes"


async def test_several_tokens_in_one_event_share_its_reasoning() -> None:
    answered = await answer(QWEN3, [event("<think>abc</think>xyz", num=21)], [last()])
    details = answered.json["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == 3


async def test_reasoning_after_a_preamble_is_counted() -> None:
    between = "<|end|><|start|>assistant"
    text = (
        f"<|channel|>commentary<|message|>I look.{between}<|channel|>analysis<|message|>hm"
        f"{between}<|channel|>final<|message|>yes"
    )
    for batches in (letters(text), [[event(text, num=len(text))], [last()]]):
        usage = (await answer(HARMONY, *batches)).json["usage"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] == len("hm")


async def test_harmony_shows_its_channels() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}'
    )
    (choice,) = (await answer(HARMONY, *letters(text), tools=TOOLS)).json["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("f", '{"x": 1}')
    assert choice["message"]["reasoning_content"] == "hm"
    assert choice["finish_reason"] == "tool_calls"


async def test_a_plain_model_shows_every_text() -> None:
    text = CALLS["hermes"][1] + THOUGHT
    (choice,) = (await answer(PLAIN, *letters(text))).json["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
