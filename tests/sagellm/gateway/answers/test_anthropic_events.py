"""Answers to /v1/messages: the events of a stream, and the message that they add up to."""

import json
from typing import Any

import pytest
from gateway_calls import event, last
from hypothesis import given
from hypothesis import strategies as st

from sagellm.chat_formats import AnswerParser, AnswerPart, Content, Reasoning, ToolCallDelta
from sagellm.gateway.answers.anthropic_events import MessageOptions, MessagesForm
from sagellm.gateway.answers.objects import (
    ApiUsage,
    CompletionTokensDetails,
    PromptTokensDetails,
)
from sagellm.gateway.answers.writer import AnswerSpec
from sagellm.gateway.api_errors import ApiError

USAGE = ApiUsage(5, 4, 9, PromptTokensDetails(3), CompletionTokensDetails(1))
TOLD = {
    "input_tokens": 2,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 3,
    "output_tokens": 4,
    "output_tokens_details": {"thinking_tokens": 1},
}
BEGIN = ToolCallDelta(0, "call_1", "f")


def more(arguments: str) -> ToolCallDelta:
    """The next piece of the first call."""
    return ToolCallDelta(0, arguments=arguments)


class ScriptedParser:
    """Returns one list of parts for each piece of text, and the last list at the end."""

    def __init__(self, pieces: list[list[AnswerPart]]) -> None:
        self._pieces = iter(pieces)

    def push(self, text: str) -> list[AnswerPart]:
        return next(self._pieces)

    def finish(self) -> list[AnswerPart]:
        return next(self._pieces, [])


def form_of(*pieces: list[AnswerPart], **options: Any) -> MessagesForm:
    def open_parser() -> AnswerParser:
        return ScriptedParser(list(pieces))

    spec = AnswerSpec(
        id="msg_a", created=7, model="m", prompts=(), num_choices=1, open_parser=open_parser
    )
    return MessagesForm(spec, None, MessageOptions(**options))  # type: ignore[arg-type]


def decoded(sent: bytes) -> list[Any]:
    """The data of events, whose name is their type."""
    events = []
    for block in sent.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def streamed(*pieces: list[AnswerPart], end: Any = None, **options: Any) -> list[Any]:
    form = form_of(*pieces, **options)
    sent = form.opening(USAGE)
    for _ in pieces[:-2]:
        sent += form.chunk(0, event("x"), USAGE)
    return decoded(sent + form.chunk(0, end or last("x"), USAGE) + form.ending(USAGE))


def whole(*parts: AnswerPart, end: Any = None, **options: Any) -> Any:
    form = form_of(list(parts), **options)
    return json.loads(form.whole([(0, end or last("x"))], USAGE))


def block(index: int, started: Any, *deltas: Any) -> list[Any]:
    return [
        {"type": "content_block_start", "index": index, "content_block": started},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def text_delta(text: str) -> Any:
    return {"type": "text_delta", "text": text}


TEXT = {"type": "text", "text": ""}
THINKING = {"type": "thinking", "thinking": "", "signature": ""}
SIGNATURE = {"type": "signature_delta", "signature": ""}
USE = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}


def test_a_stream_begins_and_ends_with_the_message() -> None:
    begun, ping, *middle, delta, stop = streamed([Content("a")], [Content("b")], [])
    assert begun["message"] == {
        "id": "msg_a",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": TOLD,
    }
    assert (ping, stop) == ({"type": "ping"}, {"type": "message_stop"})
    assert middle == block(0, TEXT, text_delta("a"), text_delta("b"))
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert delta["usage"] == TOLD


@pytest.mark.parametrize(
    ("pieces", "blocks"),
    [
        ([[], []], []),
        (
            [[Reasoning("t")], [Reasoning("u"), Content("a")], []],
            [
                *block(
                    0,
                    THINKING,
                    {"type": "thinking_delta", "thinking": "t"},
                    {"type": "thinking_delta", "thinking": "u"},
                    SIGNATURE,
                ),
                *block(1, TEXT, text_delta("a")),
            ],
        ),
        (
            [[Content("a"), BEGIN], [more('{"x"')], [], [more(":1}")]],
            [
                *block(0, TEXT, text_delta("a")),
                *block(
                    1,
                    USE,
                    {"type": "input_json_delta", "partial_json": '{"x"'},
                    {"type": "input_json_delta", "partial_json": ":1}"},
                ),
            ],
        ),
        (
            [[BEGIN, ToolCallDelta(1, "abcdefghi", "g")], []],
            [*block(0, USE), *block(1, {**USE, "id": "abcdefghi", "name": "g"})],
        ),
        ([[Content("\n")], [BEGIN, Content(" ")], []], block(0, USE)),
        ([[Content("\n")], [Content(" a")], []], block(0, TEXT, text_delta("\n a"))),
    ],
)  # fmt: skip
def test_parts_become_blocks(pieces: list[list[AnswerPart]], blocks: list[Any]) -> None:
    assert streamed(*pieces)[2:-2] == blocks


def test_thinking_that_is_omitted_has_empty_blocks() -> None:
    pieces: tuple[list[AnswerPart], ...] = ([Reasoning("t")], [Content("a")], [])
    assert streamed(*pieces, thinking="empty")[2:5] == block(0, THINKING, SIGNATURE)
    assert streamed(*pieces, thinking="none")[2:-2] == block(0, TEXT, text_delta("a"))


PARTS = st.one_of(
    st.builds(Content, st.sampled_from(["", " ", "a", "\u2028"])),
    st.builds(Reasoning, st.sampled_from(["t", "u "])),
    st.builds(ToolCallDelta, st.just(-1), st.just("call_1"), st.just("f"), st.just("")),
    st.builds(ToolCallDelta, st.just(-2), arguments=st.sampled_from(["{", "}", '{"a":1}'])),
)


def numbered(parts: list[Any]) -> list[AnswerPart]:
    """Calls get their numbers; arguments before the first call are left out."""
    index, found = -1, []
    for part in parts:
        if not isinstance(part, ToolCallDelta):
            found.append(part)
            continue
        index += bool(part.name)
        if index >= 0 and (part.name or isinstance(found[-1], ToolCallDelta)):
            found.append(ToolCallDelta(index, part.id, part.name, part.arguments))
    return found


@given(st.lists(PARTS, max_size=8).map(numbered), st.sampled_from(["shown", "empty", "none"]))
def test_the_events_of_a_stream_add_up_to_the_whole_message(
    parts: list[AnswerPart], thinking: Any
) -> None:
    events = streamed(*[[part] for part in parts], [], [], thinking=thinking)
    blocks: list[Any] = []
    for one in events:
        if one["type"] == "content_block_start":
            blocks.append({**one["content_block"], "json": ""})
        elif one["type"] == "content_block_delta":
            for name, text in one["delta"].items():
                where = "json" if name == "partial_json" else name
                blocks[-1][where] += text if name != "type" else ""
    for found in blocks:
        arguments = found.pop("json")
        if arguments and found["type"] == "tool_use":
            found["input"] = whole(BEGIN, more(arguments))["content"][0]["input"]
    answer = whole(*parts, thinking=thinking)
    assert answer["content"] == blocks
    assert answer["stop_reason"] == events[-2]["delta"]["stop_reason"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"x": 123456789012345678901234567890}', {"x": 123456789012345678901234567890}),
        ("", {}),
        ('{"x": ', {}),
        ("[1]", {}),
        ('{"x": NaN}', {}),
        ('{"x": ' + "[" * 9999 + "]" * 9999 + "}", {}),
    ],
)
def test_an_input_is_an_object_in_any_case(arguments: str, expected: Any) -> None:
    answer = whole(BEGIN, more(arguments))
    assert answer["content"] == [{**USE, "input": expected}]


@pytest.mark.parametrize(
    ("parts", "end", "options", "reason", "sequence"),
    [
        ([Content("a")], last("x"), {}, "end_turn", None),
        ([Content("a"), BEGIN], last("x"), {}, "tool_use", None),
        ([BEGIN], last("x", "length"), {}, "max_tokens", None),
        ([], last("x", "length"), {"is_clipped": True}, "model_context_window_exceeded", None),
        ([], last("x", "filtered"), {}, "refusal", None),
        ([], last("x", stop_reason="#"), {"stop_sequences": ("#",)}, "stop_sequence", "#"),
        ([BEGIN], last("x", stop_reason="#"), {"stop_sequences": ("#",)}, "stop_sequence", "#"),
        ([], last("x", stop_reason="#"), {}, "end_turn", None),
        ([], last("x", stop_reason=5), {"stop_sequences": ("#",)}, "end_turn", None),
    ],
)
def test_why_an_answer_ended(
    parts: list[AnswerPart], end: Any, options: Any, reason: str, sequence: str | None
) -> None:
    answer = whole(*parts, end=end, **options)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    delta = streamed(parts, [], end=end, **options)[-2]["delta"]
    assert delta == {"stop_reason": reason, "stop_sequence": sequence}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (500, "api_error"), (503, "overloaded_error")],
)
def test_an_error_is_the_last_event(status: int, kind: str) -> None:
    (failed,) = decoded(form_of().failure(ApiError(status, "why")))
    assert failed == {"type": "error", "error": {"type": kind, "message": "why", "details": None}}


def test_an_error_has_its_code_where_clients_look_for_it() -> None:
    (failed,) = decoded(form_of().failure(ApiError(503, "why", code="queue_full")))
    assert failed["error"]["details"] == {"error_code": "queue_full"}


def test_a_choice_that_was_not_asked_for_is_left_out() -> None:
    form = form_of([Content("a")], [])
    assert form.chunk(1, last("x"), USAGE) == b""
    answer = json.loads(form.whole([(0, last("x")), (1, last("y"))], USAGE))
    assert answer["content"] == [{"type": "text", "text": "a"}]


def test_no_line_end_of_unicode_is_in_an_event() -> None:
    form = form_of([Content("a\u2028\x85b")], [])
    assert (
        len(form.chunk(0, last("x"), USAGE).decode().splitlines()) == 3 * 4
    )  # start, delta, stop, message_delta
