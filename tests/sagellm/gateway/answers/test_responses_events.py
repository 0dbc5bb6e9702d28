"""Answers to /v1/responses: every sequence of events, read by openai-python's own types."""

import json
from typing import Any

import pytest
from gateway_calls import event, last
from msgspec import Raw
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from sagellm.chat_formats import AnswerPart, Content, Reasoning, ToolCallDelta, open_plain_parser
from sagellm.gateway.answers.logprobs import TokenTexts
from sagellm.gateway.answers.responses_events import ResponsesForm
from sagellm.gateway.answers.responses_objects import ResponseObject
from sagellm.gateway.answers.writer import AnswerSpec, AnswerWriter, UsageCounter
from sagellm.gateway.api_errors import ApiError
from sagellm.runtime.messages import TokenLogprob
from sagellm.runtime.models.tokenizer import ByteTokenizer
from sagellm.session.requests import Encoded

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ECHO = ResponseObject(
    id="",
    created_at=0,
    status="in_progress",
    model="",
    output=[],
    instructions=None,
    max_output_tokens=None,
    temperature=1.0,
    top_p=1.0,
    top_logprobs=0,
    text=Raw(b'{"format":{"type":"text"}}'),
    tools=Raw(b"[]"),
    tool_choice=Raw(b'"auto"'),
    parallel_tool_calls=True,
    reasoning=Raw(b"{}"),
    truncation="disabled",
    metadata={},
    user=None,
    safety_identifier=None,
    prompt_cache_key=None,
)
MESSAGE = (
    "output_item.added content_part.added output_text.delta output_text.done content_part.done "
    "output_item.done"
)
REASONING = MESSAGE.replace("output_text", "reasoning_text")
CALL = (
    "output_item.added function_call_arguments.delta function_call_arguments.done output_item.done"
)


class Scripted:
    """A parser that knows what each letter is: "r" reasoning, "c" and "C" calls, "_" held back."""

    def __init__(self) -> None:
        self._begun: list[str] = []

    def push(self, text: str) -> list[AnswerPart]:
        return [part for letter in text for part in self._parts(letter)]

    def finish(self) -> list[AnswerPart]:
        return []

    def _parts(self, letter: str) -> list[AnswerPart]:
        if letter == "_":
            return []
        if letter == "r":
            return [Reasoning("r")]
        if letter not in "cC":
            return [Content(letter)]
        index = "cC".index(letter)
        begin = [] if letter in self._begun else [ToolCallDelta(index, f"call_{index}", "f", "")]
        self._begun.append(letter)
        return [*begin, ToolCallDelta(index, arguments="{}")]


def writer(**fields: Any) -> AnswerWriter:
    known: dict[str, Any] = {
        "id": "resp_abc",
        "created": 7,
        "model": "m",
        "prompts": (Encoded("hey", (1, 2, 3)),),
        "num_choices": 1,
        "open_parser": Scripted,
    }
    spec = AnswerSpec(**{**known, **fields})
    return AnswerWriter(
        spec, ResponsesForm(ECHO, spec, TokenTexts(ByteTokenizer())), UsageCounter()
    )


def read(content: bytes) -> list[Any]:
    """The events of a stream, each checked against the type that openai-python has for it."""
    found = []
    for block in content.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        EVENTS.validate_python(found[-1], strict=True)
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


def streamed(*events: Any, **fields: Any) -> list[Any]:
    answer = writer(**fields)
    content = b"".join(answer.chunks([(0, each)]) for each in events)
    return read(content + answer.ending())


def whole(*events: Any, **fields: Any) -> Any:
    answer = writer(**fields)
    answer.add([(0, each) for each in events])
    found = json.loads(answer.whole())
    Response.model_validate(found, strict=True)
    return found


def kinds(events: list[Any]) -> str:
    return " ".join(each["type"].removeprefix("response.") for each in events)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", MESSAGE),
        ("ra", f"{REASONING} {MESSAGE}"),
        ("c", CALL),
        ("cC", f"{CALL} {CALL}"),
        ("rac", f"{REASONING} {MESSAGE} {CALL}"),
        ("ca", f"{CALL} {MESSAGE}"),
        ("a_b", MESSAGE.replace("output_text.delta", "output_text.delta output_text.delta")),
        ("", MESSAGE),
    ],
)
def test_each_item_is_added_grows_and_is_done(text, expected):
    events = streamed(*(event(letter) for letter in text), last(""))
    assert kinds(events) == f"created in_progress {expected} completed"


@pytest.mark.parametrize("text", ["ab", "rra", "cC", "r_acC", "ca"])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_the_stream_ends_with_the_whole_answer(text, reason):
    events = [*(event(letter) for letter in text), last("", reason)]
    told, found = streamed(*events), whole(*events)
    final = told[-1]["response"]
    done = [each["item"] for each in told if each["type"] == "response.output_item.done"]
    assert done == final["output"]
    ids = {item.pop("id") for answer in (final, found) for item in answer["output"]}
    assert len(ids) == 2 * len(done)  # each answer has new ids
    assert {**final, "completed_at": 0} == {**found, "completed_at": 0}


def test_choices_that_an_operator_adds_are_not_mixed_in():
    events = [event("a"), event("x", choice=1), last("b"), last("x", choice=1)]
    assert [item["content"][0]["text"] for item in whole(*events)["output"]] == ["ab"]
    final = streamed(*events)[-1]["response"]
    assert [item["content"][0]["text"] for item in final["output"]] == ["ab"]


@pytest.mark.parametrize("text", ["ab", "rca"])
def test_the_deltas_add_up_to_the_items(text):
    events = streamed(*(event(letter) for letter in text), last(""))
    pieces: dict[int, str] = {}
    for each in events:
        if each["type"].endswith(".delta"):
            index = each["output_index"]
            pieces[index] = pieces.get(index, "") + each["delta"]
    texts = [
        item.get("arguments") or item["content"][0]["text"]
        for item in events[-1]["response"]["output"]
    ]
    assert [pieces[index] for index in range(len(texts))] == texts


def test_openai_python_accumulates_the_final_response():
    state: Any = ResponseStreamState(input_tools=[], text_format=omit)
    for each in streamed(event("r"), event("ab"), event("c"), last("")):
        state.handle_event(EVENTS.validate_python(each))
    final = state._completed_response
    assert final.output_text == "ab"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output[2].to_dict() == {
        "type": "function_call",
        "id": final.output[2].id,
        "status": "completed",
        "call_id": "call_0",
        "name": "f",
        "arguments": "{}",
        "parsed_arguments": None,
    }


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        ("stop", "completed", None),
        ("length", "incomplete", {"reason": "max_output_tokens"}),
        ("filtered", "incomplete", {"reason": "content_filter"}),
    ],
)
def test_the_end_is_told_by_status(reason, status, why):
    found = whole(event("ra"), last("b", reason))
    assert (found["status"], found["incomplete_details"]) == (status, why)
    assert [item["status"] for item in found["output"]] == ["completed", status]
    assert (found["completed_at"] is None) == (status == "incomplete")
    assert streamed(event("a"), last("", reason))[-1]["type"] == f"response.{status}"


def test_usage_is_in_the_last_event_only():
    *before, end = streamed(event("ab"), last(""))
    assert before[0]["response"]["usage"] is None
    assert end["response"]["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 5,
    }


def logged(text: str, **fields: Any) -> Any:
    entries = tuple(TokenLogprob(byte, -0.5, top=((byte, -0.5),)) for byte in text.encode())
    return event(text, logprobs=entries, **fields)


def test_logprobs_are_those_of_the_text_and_come_with_it():
    events = streamed(logged("r"), logged("_a"), logged("b"), last(""), num_logprobs=1)
    deltas = [each for each in events if each["type"] == "response.output_text.delta"]
    tokens = [[entry["token"] for entry in each["logprobs"]] for each in deltas]
    assert tokens == [["_", "a"], ["b"]]
    content = events[-1]["response"]["output"][1]["content"][0]
    assert [entry["token"] for entry in content["logprobs"]] == ["_", "a", "b"]


def test_logprobs_of_tokens_without_text_come_at_the_end():
    entry = TokenLogprob(0, -1.0, top=())
    events = streamed(logged("a"), last("", logprobs=(entry,)), num_logprobs=0)
    deltas = [each for each in events if each["type"] == "response.output_text.delta"]
    assert [each["delta"] for each in deltas] == ["a", ""]
    assert len(events[-1]["response"]["output"][0]["content"][0]["logprobs"]) == 2


def test_an_error_is_told_twice_and_ends_the_stream():
    answer = writer()
    content = answer.chunks([(0, event("ra"))])
    events = read(content + answer.failure(ApiError(503, "no more", code="abort")))
    error, failed = events[-2:]
    assert (error["type"], error["code"], error["message"]) == ("error", "abort", "no more")
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "no more"}
    assert [item["type"] for item in failed["response"]["output"]] == ["reasoning"]


def test_an_error_before_the_first_token_comes_after_the_begin():
    events = read(writer().failure(ApiError(429, "too many")))
    assert kinds(events) == "created in_progress error failed"
    assert events[-1]["response"]["error"]["code"] == "rate_limit_exceeded"


def test_a_plain_parser_makes_one_message():
    found = whole(event("<think>a"), last("b"), open_parser=open_plain_parser)
    assert [item["content"][0]["text"] for item in found["output"]] == ["<think>ab"]
