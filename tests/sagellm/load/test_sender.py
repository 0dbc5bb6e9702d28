"""One request in virtual time, against a transport that answers from a script."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import msgspec
import pytest
import trio
from scripted_server import MODEL, delta, error, text, used
from trio.testing import MockClock

from sagellm.client.replies import Choice
from sagellm.client.server import AsyncServerConnection
from sagellm.load import LoadTarget, RequestRecord, Sender, _has_token
from sagellm.load.workload import PlannedRequest, Prompts

URL = "http://scripted"
Timed = tuple[float, Any]  # seconds to wait, then what to send


class Body(httpx2.AsyncByteStream):
    """Sends events at their times; an exception in their place is raised."""

    def __init__(self, timed: tuple[Timed, ...]) -> None:
        self._timed = timed

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for wait_s, one in self._timed:
            await trio.sleep(wait_s)
            if isinstance(one, Exception):
                raise one
            data = one if isinstance(one, str) else msgspec.json.encode(one).decode()
            yield f"data: {data}\n\n".encode()


def stream(*timed: Timed) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=Body(timed))


def refusal(status: int, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, headers=headers, json=error("full", status))


def transport(*answers: httpx2.Response) -> tuple[httpx2.MockTransport, list[Any]]:
    """A transport that gives one answer after the other, and keeps the bodies of requests."""
    asked: list[Any] = []
    left = iter(answers)

    async def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(msgspec.json.decode(request.content))
        return next(left)

    return httpx2.MockTransport(answer), asked


SHORT = PlannedRequest(0.0, 5, 3)


async def send(
    *answers: httpx2.Response, planned: PlannedRequest = SHORT, **fields: Any
) -> tuple[RequestRecord, list[Any]]:
    fake, asked = transport(*answers)
    server = AsyncServerConnection(URL, None, 60.0, fake)
    kind = "words" if fields.get("is_chat") else "ids"
    sender = Sender(server, LoadTarget(model=MODEL, **fields), Prompts(kind, seed=0))
    record = await sender.send(0, planned, 0.0)
    await server.aclose()
    return record, asked


GOOD: Callable[[], httpx2.Response] = lambda: stream(  # noqa: E731
    (0.5, text("a")), (0.1, text("b")), (0.2, text("c", "length")), (0.0, used(5, 3)), (0, "[DONE]")
)


async def test_times_are_those_of_the_tokens(autojump_clock: MockClock) -> None:
    record, asked = await send(GOOD(), options={"temperature": 0.0})
    assert record.error is None
    assert record.ttft_s == pytest.approx(0.5)
    assert record.itl_s == pytest.approx([0.1, 0.2])
    assert record.e2e_s == pytest.approx(0.8)
    assert (record.prompt_tokens, record.completion_tokens) == (5, 3)
    assert (record.status, record.finish_reason, record.num_attempts) == (200, "length", 1)
    (body,) = asked
    assert len(body.pop("prompt")) == 5
    assert body == {
        "model": MODEL,
        "max_tokens": 3,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_a_request_says_its_user_and_its_priority(autojump_clock: MockClock) -> None:
    """The model stays that of the load: a server does not know the models of a trace."""
    planned = PlannedRequest(0.0, 5, 3, (), "ann", 0, 0.5, "GPT-4")
    _, (body,) = await send(GOOD(), planned=planned)
    assert (body["user"], body["priority"], body["slo_ttft_s"]) == ("ann", 0, 0.5)
    assert body["model"] == MODEL


async def test_a_chats_opening_and_ending_are_no_tokens(autojump_clock: MockClock) -> None:
    record, asked = await send(
        stream(
            (0.1, delta("", role="assistant")),
            (0.4, delta("a")),
            (0.1, delta("")),
            (0.3, delta(None, "stop")),
            (0, "[DONE]"),
        ),
        is_chat=True,
    )
    assert record.ttft_s == pytest.approx(0.5)
    assert record.num_events == 2  # a token with an incomplete character counts
    assert record.itl_s == pytest.approx([0.1])
    assert len(asked[0]["messages"][0]["content"].split()) == 5


@pytest.mark.parametrize(
    ("answer", "error_class", "num_events"),
    [
        (lambda: refusal(500), "http_500", 0),
        (lambda: refusal(429), "http_429", 0),
        (lambda: stream((0, text("a")), (0, error("died", 500))), "http_500", 1),
        (lambda: stream((0, text("a")), (0, {"error": {"message": "died"}})), "failed", 1),
        (lambda: stream((0, text("a"))), "cut_off", 1),
        (lambda: stream((0, text("a")), (0, httpx2.ReadError(""))), "cut_off", 1),
        (lambda: stream((0, text("a")), (0, "{")), "bad_answer", 1),
        (lambda: httpx2.Response(200, json=text("a", "stop")), "bad_answer", 0),
        (lambda: stream((0, text("a")), (60, text("b"))), "timed_out", 1),
    ],
)
async def test_every_failure_has_a_class(
    answer: Callable[[], httpx2.Response],
    error_class: str,
    num_events: int,
    autojump_clock: MockClock,
) -> None:
    record, _ = await send(answer(), timeout_s=30)
    assert (record.error, record.num_events) == (error_class, num_events)
    assert not record.is_ok


async def test_a_refusal_is_tried_again_when_the_server_says(autojump_clock: MockClock) -> None:
    answers = refusal(429, **{"retry-after": "3"}), refusal(503, **{"retry-after": "4"}), GOOD()
    record, asked = await send(*answers, num_retries=2)
    assert record.is_ok
    assert (record.num_attempts, record.num_refusals, len(asked)) == (3, 2, 3)
    assert record.ttft_s == pytest.approx(7.5)  # from the first attempt


async def test_without_a_time_the_wait_grows(autojump_clock: MockClock) -> None:
    record, _ = await send(refusal(503), refusal(503), GOOD(), num_retries=2)
    assert record.is_ok
    assert 0.75 + 0.5 <= record.ttft_s <= 1.5 + 0.5  # half to all of 0.5 s and 1 s


@pytest.mark.parametrize(
    ("headers", "num_retries", "num_asked"),
    [({}, 0, 1), ({"retry-after": "1"}, 1, 2), ({"x-should-retry": "false"}, 5, 1)],
)
async def test_trying_again_ends(
    headers: dict[str, str], num_retries: int, num_asked: int, autojump_clock: MockClock
) -> None:
    refusals = (refusal(429, **headers) for _ in range(9))
    record, asked = await send(*refusals, num_retries=num_retries)
    assert (record.error, len(asked), record.num_refusals) == ("http_429", num_asked, num_asked)


async def test_other_errors_are_not_tried_again(autojump_clock: MockClock) -> None:
    record, asked = await send(refusal(500), GOOD(), num_retries=5)
    assert (record.error, len(asked)) == ("http_500", 1)


async def test_a_server_that_does_not_end_its_body_is_not_waited_for(
    autojump_clock: MockClock,
) -> None:
    record, _ = await send(stream((0.1, text("a", "stop")), (0, "[DONE]"), (500, "late")))
    assert record.is_ok
    assert record.e2e_s == pytest.approx(0.1)
    assert trio.current_time() < 5


async def test_a_refusal_in_the_middle_of_an_answer_is_not_tried_again(
    autojump_clock: MockClock,
) -> None:
    broken = stream((0.1, text("a")), (0.1, {"error": {"message": "full", "code": 503}}))
    record, asked = await send(broken, stream((0.1, text("b", "stop"))), num_retries=1)
    assert len(asked) == 1
    assert (record.error, record.num_events, record.num_refusals) == ("http_503", 1, 0)


@pytest.mark.parametrize(
    ("delta", "finish", "has"),
    [
        ({"role": "assistant", "content": ""}, None, False),
        ({"content": "a"}, None, True),
        ({"content": ""}, None, True),
        ({}, None, True),
        ({"reasoning_content": "hm"}, None, True),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "1"}}]}, None, True),
        ({}, "stop", False),
        ({"content": "a"}, "length", True),
    ],
)
def test_which_chunks_of_a_chat_have_a_token(
    delta: dict[str, object], finish: str | None, has: bool
) -> None:
    choice = msgspec.convert({"index": 0, "delta": delta, "finish_reason": finish}, Choice)
    assert _has_token(choice) is has
