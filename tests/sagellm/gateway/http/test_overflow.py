"""Calls that are refused where their connections are accepted."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import ceil
from socket import create_connection, socket, socketpair

import pytest
import trio
from gateway_calls import gateway_before, playing
from gateway_served import STREAM, Reply, Served, get, post, read_reply, serving
from logged import logged

from sagellm.gateway.http.app import App, Overflow, build_app
from sagellm.gateway.http.hypercorn import _AT_ONCE_BOUNDED
from sagellm.gateway.metrics.meters import HttpMeters, NoMeters

NUM_CALLS = 30


class Receiving(trio.abc.ReceiveStream):
    """Of a socket of any family."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self._sock.recv(max_bytes or 1 << 16)

    async def aclose(self) -> None:
        self._sock.close()
        await trio.lowlevel.checkpoint()


class LateMeters(NoMeters):
    def app_lag_s(self) -> float:
        return 0.2


def app_with(objective_s: float | None) -> App:
    app = build_app(
        gateway_before(playing([]), meters=HttpMeters(("/v1/completions", "/v1/messages")))
    )
    app.objective_s = objective_s
    return app


@contextmanager
def waiting_calls(served: Served) -> Iterator[list[socket]]:
    """Whole calls in the kernel's queue, sent without a turn of the loop between."""
    with ExitStack() as clients:
        calls = []
        for _ in range(NUM_CALLS):
            calls.append(clients.enter_context(create_connection(("127.0.0.1", served.port))))
            calls[-1].sendall(STREAM)
        yield calls


async def reply_of(sock: socket) -> Reply:
    """It closes the socket."""
    sock.setblocking(False)
    async with Receiving(trio.socket.from_stdlib_socket(sock)) as stream:
        return await read_reply(stream)


async def test_a_turn_takes_a_few_calls_where_others_can_be_refused() -> None:
    async with serving("hypercorn") as served:
        served.app.objective_s = 60.0
        with waiting_calls(served):
            num_turns = 0
            while len(served.bridge.held) < NUM_CALLS:
                await trio.lowlevel.checkpoint()
                num_turns += 1
            await served.let_go()
            await served.idle()
    assert num_turns >= ceil(NUM_CALLS / (_AT_ONCE_BOUNDED + 1))


async def test_what_waits_while_the_loop_is_too_late_is_refused_in_one_turn() -> None:
    async with serving("hypercorn") as served:
        served.app.objective_s, served.gateway.meters = 1.0, LateMeters()
        with logged() as lines, waiting_calls(served) as calls:
            replies = [await reply_of(call) for call in calls]
    assert {(reply.status, reply.error["code"]) for reply in replies} == {(503, "slo_unreachable")}
    refused = [line["num_calls"] for line in lines if line["event"] == "calls_refused"]
    assert refused == [NUM_CALLS - _AT_ONCE_BOUNDED - 1]


@pytest.mark.parametrize("is_strained", [False, True])
async def test_nobody_waits_where_all_were_accepted(
    is_strained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next to come, minutes later, would have waited since then."""
    asked: list[float] = []
    monkeypatch.setattr(Overflow, "is_strained", lambda self, now: is_strained)
    monkeypatch.setattr(Overflow, "is_over", lambda self, now: bool(asked.append(now)))
    num_taken = 1 if is_strained else _AT_ONCE_BOUNDED + 1
    async with serving("hypercorn") as served:
        served.app.objective_s = 60.0
        with ExitStack() as clients:
            for _ in range(num_taken):
                client = clients.enter_context(create_connection(("127.0.0.1", served.port)))
                client.sendall(STREAM)
            while len(served.bridge.held) < num_taken:
                await trio.lowlevel.checkpoint()
            await served.let_go()
            await served.idle()
    assert asked == []


async def test_connections_may_wait_for_a_tenth_of_the_objective() -> None:
    overflow = Overflow(app_with(2.0))
    assert [overflow.is_over(now) for now in (5.0, 5.1)] == [False, False]
    assert [overflow.is_strained(now) for now in (5.04, 5.06)] == [False, True]
    overflow.none_waits()
    assert not overflow.is_strained(5.2)
    assert [overflow.is_over(now) for now in (5.2, 5.3, 5.5)] == [False, False, True]
    overflow.none_waits()
    assert [overflow.is_strained(now) for now in (5.6, 7.4, 7.6)] == [True, True, False]
    assert not overflow.is_over(7.6)


def test_without_an_objective_nothing_is_refused() -> None:
    overflow = Overflow(app_with(None))
    assert not any(overflow.is_over(now) for now in (0.0, 1000.0))


async def test_a_refusal_has_the_form_of_its_api() -> None:
    app, (client, server) = app_with(1.0), socketpair()
    with client, server:
        client.sendall(post("/v1/messages", {}, "X-Request-ID: mine"))
        assert Overflow(app).refuse(server)
        reply = await reply_of(client)
    assert reply.is_whole
    assert (reply.status, reply.error["type"]) == (503, "overloaded_error")
    assert reply.headers["request-id"] == "mine"


async def test_a_refusal_is_as_the_app_would_write_it() -> None:
    app, (client, server) = app_with(1.0), socketpair()
    with client, server:
        client.sendall(post("/v1/completions?x=1", {"prompt": "x"}, "X-Request-ID: mine"))
        assert Overflow(app).refuse(server)
        reply = await reply_of(client)
    assert reply.is_whole
    assert (reply.status, reply.reason) == (503, "Service Unavailable")
    assert (reply.error["type"], reply.error["code"]) == ("service_unavailable", "slo_unreachable")
    assert reply.headers["x-request-id"] == "mine"
    assert (reply.headers["retry-after"], reply.headers["x-should-retry"]) == ("1", "false")
    meters = app.gateway.meters
    assert isinstance(meters, HttpMeters)
    assert list(meters.responses.items()) == [((("/v1/completions", "POST"), 503), 1)]
    assert meters.num_active == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        get("/live"),
        get("/v1/completions"),
        post("/tokenize", {"prompt": "x"}),
        STREAM[:-1],
        STREAM + b"G",
        STREAM.replace(b"HTTP/1.1", b"HTTP/1.0"),
        b"\x16\x03\x01",
    ],
)
def test_anything_else_is_left_to_the_server(sent: bytes) -> None:
    client, server = socketpair()
    with client, server:
        server.setblocking(False)
        client.sendall(sent)
        assert not Overflow(app_with(1.0)).refuse(server)
        if sent:
            assert server.recv(1 << 16) == sent
