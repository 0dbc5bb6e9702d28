"""The streaming contract, line by line, over a scripted bridge."""

from typing import Any

import anyio
import pytest
from gateway_calls import Client, event, gateway_before, last, playing, post
from trio.testing import MockClock

from sagellm.gateway.answers.event_stream import KEEP_ALIVE
from sagellm.gateway.http.endpoints import chat, completions
from sagellm.gateway.settings import Streaming

COMPLETION = {"model": "m", "prompt": "hey", "stream": True}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hey"}], "stream": True}
BOTH = pytest.mark.parametrize(("endpoint", "body"), [(completions, COMPLETION), (chat, CHAT)])
USAGE = {"stream_options": {"include_usage": True}}


def two() -> Any:
    return playing([event("a")], [last("b", num_cached_tokens=0)])


@BOTH
def test_its_headers_say_that_it_streams_and_is_not_kept(run, endpoint, body):
    answered = run(lambda: post(endpoint, two(), body))
    assert answered.status == 200
    assert answered.headers["content-type"] == "text/event-stream"
    assert answered.headers["cache-control"] == "no-cache"
    assert answered.headers["x-accel-buffering"] == "no"


@BOTH
async def test_a_chunk_is_one_line_of_json_and_the_last_is_done(endpoint, body):
    answered = await post(endpoint, two(), body)
    assert all(line.startswith("data: ") and "\n" not in line for line in answered.lines)
    assert answered.lines[-1] == "data: [DONE]"
    assert answered.is_whole


@BOTH
async def test_id_created_and_model_are_the_same_on_all_chunks(endpoint, body):
    answered = await post(endpoint, two(), {**body, **USAGE})
    heads = {(chunk["id"], chunk["created"], chunk["model"]) for chunk in answered.events}
    assert len(heads) == 1
    prefix = "cmpl-" if endpoint is completions else "chatcmpl-"
    assert heads.pop()[0] == f"{prefix}abc"


async def test_a_chat_begins_with_the_role():
    answered = await post(chat, two(), CHAT)
    first = answered.events[0]["choices"][0]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert answered.events[1]["choices"][0]["delta"] == {"content": "a"}
    assert [chunk["object"] for chunk in answered.events] == ["chat.completion.chunk"] * 3


@BOTH
@pytest.mark.parametrize(
    ("reason", "shown"), [("stop", "stop"), ("length", "length"), ("filtered", "content_filter")]
)
async def test_only_the_last_chunk_of_a_choice_has_a_finish_reason(endpoint, body, reason, shown):
    bridge = playing([event("a")], [last("b", reason, stop_reason="end")])
    answered = await post(endpoint, bridge, body)
    *before, end = (chunk["choices"][0] for chunk in answered.events)
    assert end["finish_reason"] == shown
    assert end["stop_reason"] == "end"
    assert all(choice["finish_reason"] is None for choice in before)
    assert all(choice["stop_reason"] is None for choice in before)


@BOTH
async def test_include_usage_adds_one_chunk_without_choices_and_null_before(endpoint, body):
    answered = await post(endpoint, two(), {**body, **USAGE})
    *before, end = answered.events
    assert end["choices"] == []
    assert end["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert all(chunk["usage"] is None for chunk in before)


@BOTH
async def test_without_include_usage_no_chunk_speaks_of_it(endpoint, body):
    answered = await post(endpoint, two(), body)
    assert all("usage" not in chunk for chunk in answered.events)


@BOTH
async def test_continuous_usage_is_on_every_chunk(endpoint, body):
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    answered = await post(endpoint, two(), {**body, **options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in answered.events]
    assert counts == ([1, 2, 2] if endpoint is completions else [1, 1, 2, 2])


@BOTH
async def test_a_token_without_text_still_yields_a_chunk(endpoint, body):
    bridge = playing([event("", num=1)], [event("", num=1)], [last("x")])
    answered = await post(endpoint, bridge, body)
    texts = [text for _, text in answered.deltas]
    assert texts == ["", "", "x"] if endpoint is completions else ["", "", "", "x"]


@BOTH
async def test_what_comes_together_is_one_chunk_a_choice_and_one_send(endpoint, body):
    bridge = playing(
        [event("a"), event("b", choice=1), event("c"), event("d", choice=1)],
        [last("e"), last("f", choice=1)],
    )
    answered = await post(endpoint, bridge, {**body, "n": 2})
    texts = [(index, text) for index, text in answered.deltas if text]
    assert texts == [(0, "ac"), (1, "bd"), (0, "e"), (1, "f")]
    assert len(answered.sends) == 2
    assert answered.sends[1].endswith(b"data: [DONE]\n\n")


@BOTH
def test_an_error_after_200_is_an_event_and_then_done(run, endpoint, body):
    bridge = playing([event("a")], [event("b"), last("", "failed", error="secret path")])
    answered = run(lambda: post(endpoint, bridge, body))
    assert answered.status == 200
    assert answered.text() == "ab"
    error = answered.events[-1]["error"]
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    assert "abc" in error["message"]
    assert answered.is_whole
    assert all(
        choice["finish_reason"] is None
        for chunk in answered.events[:-1]
        for choice in chunk["choices"]
    )


@BOTH
@pytest.mark.parametrize(
    ("reason", "code", "status", "shown"),
    [
        ("refused", "bad_request", 400, None),
        ("refused", "queue_full", 503, "queue_full"),
        ("refused", "slo_unreachable", 503, "slo_unreachable"),
        ("refused", "decode_full", 503, "decode_full"),
        ("refused", "concurrency_limit", 503, "concurrency_limit"),
        ("refused", "would_wait", 503, "would_wait"),
        ("expired", "", 504, "timeout"),
        ("refused", "", 400, "refused"),
        ("failed", "", 500, "engine_failed"),
        ("failed", "operator_failed", 500, "operator_failed"),
        ("cancelled", "", 503, "abort"),
        ("cancelled", "shutting_down", 503, "shutting_down"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_before_the_first_token_has_its_status(
    endpoint, body, reason, code, status, shown, stream
):
    bridge = playing([last("", reason, code=code, error="too long")])
    answered = await post(endpoint, bridge, {**body, "stream": stream})
    assert answered.status == status
    assert answered.json["error"]["code"] == shown
    is_told = status == 400 or code == "operator_failed"
    assert ("too long" in answered.json["error"]["message"]) == is_told


@BOTH
async def test_a_graph_that_ends_without_a_reason_is_no_clean_end(endpoint, body):
    answered = await post(endpoint, playing([event("a")]), body)
    assert answered.events[-1]["error"]["code"] == "shutting_down"


@BOTH
def test_a_fault_of_ours_is_told_without_its_text(run, endpoint, body):
    broken = [event("a")], [None]

    async def ask() -> Any:
        client = Client(body)
        with pytest.raises(AttributeError):
            await client.call(endpoint, gateway_before(playing(*broken)))
        return client.answered

    answered = run(ask)
    assert answered.events[-1]["error"]["message"] == "internal error; the answer is not whole"
    assert answered.is_whole


async def test_a_quiet_stream_is_kept_alive_every_five_seconds(autojump_clock: MockClock):
    more = anyio.Event()
    client = Client(COMPLETION)
    gateway = gateway_before(playing([event("a")], more, [last("b")]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, completions, gateway)
        await anyio.sleep(17)  # of virtual time
        more.set()
    assert client.answered.sends.count(KEEP_ALIVE) == 3
    assert client.answered.text() == "ab"


@pytest.mark.parametrize(("waits_s", "status"), [(4.0, 503), (12.0, 200)])
async def test_a_refusal_that_comes_at_once_has_its_own_status(
    waits_s: float, status: int, autojump_clock: MockClock
):
    more = anyio.Event()
    client = Client(COMPLETION)
    gateway = gateway_before(playing(more, [last("b", "refused", code="queue_full")]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, completions, gateway)
        await anyio.sleep(waits_s)
        assert client.answered.sends == [KEEP_ALIVE] * int(waits_s // 5)
        more.set()
    assert client.answered.status == status
    assert b'"code":"queue_full"' in client.answered.body.replace(b" ", b"")


async def test_who_waits_for_a_first_token_hears_that_we_are_still_there(
    autojump_clock: MockClock,
):
    more, client = anyio.Event(), Client(COMPLETION)
    gateway = gateway_before(playing(more, [event("a")], [last("b")]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, completions, gateway)
        await anyio.sleep(11)
        more.set()
    assert client.answered.sends[:2] == [KEEP_ALIVE, KEEP_ALIVE]
    assert client.answered.text() == "ab"
    assert client.answered.is_whole


def test_keep_alive_on_both_loops(run):
    async def ask() -> Any:
        more, client = anyio.Event(), Client(COMPLETION)
        gateway = gateway_before(
            playing([event("a")], more, [last("b")]), streaming=Streaming(keep_alive_s=0.01)
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.call, completions, gateway)
            await client.received(2)
            more.set()
        return client.answered

    answered = run(ask)
    assert answered.sends[1] == KEEP_ALIVE
    assert answered.text() == "ab"
    assert answered.is_whole


@BOTH
def test_a_client_that_leaves_ends_its_request(run, endpoint, body):
    async def ask() -> Any:
        bridge, client = playing([event("a")], anyio.Event()), Client(body)
        gateway = gateway_before(bridge)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.call, endpoint, gateway)
            await client.received(1)
            client.gone.set()
        return bridge, client.answered, gateway

    bridge, answered, gateway = run(ask)
    assert bridge.left == ["abc"]
    assert not answered.is_whole
    assert gateway.meters.num_disconnects == 1
    assert gateway.budgets.num_open("t") == 0


@BOTH
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_token_ends_its_request(run, endpoint, body, stream):
    async def ask() -> Any:
        waiting, client = anyio.Event(), Client({**body, "stream": stream})
        bridge = playing(waiting)
        gateway = gateway_before(bridge)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.call, endpoint, gateway)
            while not bridge.requests:
                await anyio.lowlevel.checkpoint()
            client.gone.set()
        return bridge, client.answered, gateway

    bridge, answered, gateway = run(ask)
    assert bridge.left == ["abc"]
    assert answered.status in (0, 499)
    assert gateway.meters.num_disconnects == 1
    assert gateway.budgets.num_open("t") == 0


async def test_a_server_that_raises_at_a_gone_client_ends_the_request():
    bridge, client = playing([event("a")], [last("b")]), Client(COMPLETION)

    async def fail(message: Any) -> None:
        raise OSError("gone")

    client.send = fail
    gateway = gateway_before(bridge)
    await client.call(completions, gateway)
    assert bridge.left == ["abc"]
    assert gateway.meters.num_disconnects == 1


async def test_a_client_that_does_not_read_is_ended_after_thirty_seconds(
    autojump_clock: MockClock,
):
    bridge, client = playing([event("a")], [event("b")], [last("c")]), Client(COMPLETION)
    client.reads = anyio.Event()
    with anyio.fail_after(36):  # it is looked at when a comment would be due
        await client.call(completions, gateway_before(bridge))
    assert anyio.current_time() >= 30
    assert bridge.left == ["abc"]
    assert not client.answered.is_whole


async def test_a_client_that_does_not_read_comments_is_ended(autojump_clock: MockClock):
    bridge, client = playing([event("a")], anyio.Event()), Client(COMPLETION)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, completions, gateway_before(bridge))
        await client.received(1)
        client.reads = anyio.Event()
    assert bridge.left == ["abc"]


async def test_a_comment_that_is_slow_to_leave_holds_the_events_back(autojump_clock: MockClock):
    more = anyio.Event()
    bridge, client = playing([event("a")], more, [last("b")]), Client(COMPLETION)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, completions, gateway_before(bridge))
        await client.received(1)
        client.reads = anyio.Event()
        await anyio.sleep(6)  # a comment waits to be read
        more.set()
        await anyio.sleep(1)
        client.reads.set()
    assert client.answered.sends[1] == KEEP_ALIVE
    assert client.answered.text() == "ab"
