"""What no server enforces by itself: times, counts, and what one client costs the others."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import listdir
from typing import Any

import pytest
import trio
from gateway_served import (
    ENDLESS,
    SERVERS,
    STREAM,
    Served,
    first_token,
    get,
    post,
    read_reply,
    received,
    serving,
)
from h2.config import H2Configuration
from h2.connection import H2Connection
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.call import EndpointRoute
from sagellm.gateway.settings import MOST_FILES, RequestLimits, Streaming, raise_open_files

SHORT = RequestLimits(header_s=0.1, body_s=0.1)


async def _is_closed(stream: trio.SocketStream) -> bool:
    with trio.move_on_after(60):
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        return True
    return False


async def _drip(stream: trio.SocketStream, text: bytes) -> None:
    """One byte after the other until the server has had enough."""
    for byte in text:
        try:
            await stream.send_all(bytes([byte]))
        except trio.BrokenResourceError:
            return
        await trio.sleep(0.02)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("sent", [b"", b"GET /live HTTP/1.1\r\nX-Slow: "])
async def test_slow_headers_are_cut_off(server: str, sent: bytes) -> None:
    async with serving(server, limits=SHORT) as served, await served.connect() as stream:
        await stream.send_all(sent or b"G")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drip, stream, b"a" * 1000)
            assert await _is_closed(stream)
            nursery.cancel_scope.cancel()
        assert (await served.ask(get("/live"))).status == 200


@pytest.mark.parametrize("server", SERVERS)
async def test_a_connection_that_says_nothing_is_closed(server: str) -> None:
    async with serving(server, limits=SHORT) as served, await served.connect() as stream:
        assert await _is_closed(stream)


@pytest.mark.parametrize("server", SERVERS)
async def test_a_slow_body_is_refused(server: str) -> None:
    async with serving(server, limits=SHORT) as served, await served.connect() as stream:
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        await stream.send_all(head)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drip, stream, b" " * 1000)
            with trio.fail_after(20):
                assert (await read_reply(stream)).status == 408
            nursery.cancel_scope.cancel()


LARGE = 80_000  # bytes of a prompt, of which two are more than may be in hand at once
HAND = RequestLimits(all_bodies_bytes=2 * LARGE - 1)


def _large(path: str, **fields: Any) -> bytes:
    return post(path, {"prompt": "x" * LARGE, **fields})


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("is_whole", [True, False])
async def test_bodies_in_hand_are_bounded_together(server: str, is_whole: bool) -> None:
    """Of one that is still on its way, and of one whose stream is open."""
    held = _large("/v1/completions", stream=True, truncate_prompt_tokens=5)
    async with serving(server, limits=HAND) as served:
        async with await served.connect() as stream:
            await stream.send_all(held if is_whole else held[:-1])
            if is_whole:
                await first_token(stream)
            while served.app.bodies.num_bytes < LARGE:
                await trio.testing.wait_all_tasks_blocked(0.01)
            refused = await served.ask(_large("/tokenize"))
            assert (refused.status, refused.error["code"]) == (503, "too_many_bodies")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await served.ask(post("/tokenize", {"prompt": "small"}))).status == 200
        await served.idle()
        assert served.app.bodies.num_bytes == 0
        assert (await served.ask(_large("/tokenize"))).status == 200


@pytest.mark.parametrize("server", SERVERS)
async def test_many_large_bodies_at_once_hold_no_more_than_the_bound(server: str) -> None:
    statuses: list[int] = []
    most = 0

    async def ask(served: Served) -> None:
        nonlocal most
        statuses.append((await served.ask(_large("/tokenize"))).status)
        most = max(most, served.app.bodies.num_bytes)

    async with serving(server, limits=HAND) as served:
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(ask, served)
        await served.idle()
        assert served.app.bodies.num_bytes == 0
    assert most <= HAND.all_bodies_bytes
    assert set(statuses) <= {200, 503}
    assert 200 in statuses


async def test_a_body_larger_than_all_may_be_is_read_alone() -> None:
    async with serving("hypercorn", limits=RequestLimits(all_bodies_bytes=10)) as served:
        assert (await served.ask(_large("/tokenize"))).status == 200
        await served.idle()
        assert served.app.bodies.num_bytes == 0


@pytest.mark.parametrize("server", SERVERS)
async def test_a_header_without_end_is_refused(server: str) -> None:
    async with serving(server) as served, await served.connect() as stream:
        await stream.send_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40000)
        reply = await read_reply(stream)
        assert reply.status == 431
        assert reply.headers["x-request-id"]
        assert reply.error["message"]


@contextmanager
def files_limited_to(number: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_serve_takes_all_the_files_that_it_may_open() -> None:
    with files_limited_to(64):
        raise_open_files()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == (MOST_FILES if hard < 0 else min(hard, MOST_FILES))


async def _connections(served: Served, number: int) -> list[trio.SocketStream]:
    found = []
    for _ in range(number):
        found.append(await served.connect())
    return found


async def _answers(served: Served) -> bool:
    with trio.move_on_after(20):
        while True:
            try:
                if (await served.ask(get("/live"))).status == 200:
                    return True
            except OSError:
                await trio.sleep(0.01)
    return False


@pytest.mark.parametrize("server", SERVERS)
async def test_more_connections_than_files_are_survived(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further ones wait or are refused; when some have gone the next are answered."""
    for module in ("hypercorn", "uvicorn"):
        monkeypatch.setattr(f"sagellm.gateway.http.{module}.max_connections", lambda: 4)
    async with serving(server) as served:
        streams = await _connections(served, 12)
        await streams[0].send_all(get("/live"))
        assert (await read_reply(streams[0])).status == 200
        for stream in streams:
            await stream.aclose()
        assert await _answers(served)


async def test_accept_pauses_where_no_file_is_left() -> None:
    async with serving("hypercorn") as served:
        streams = await _connections(served, 4)
        with files_limited_to(len(listdir("/proc/self/fd"))):  # listdir itself had the last one
            late = await served.connect()
            await trio.testing.wait_all_tasks_blocked(0.01)
            await streams[0].send_all(get("/live"))
            assert (await read_reply(streams[0])).status == 200
        streams.append(late)
        await late.send_all(get("/live"))
        with trio.fail_after(20):
            assert (await read_reply(late)).status == 200
        for stream in streams:
            await stream.aclose()


@pytest.mark.parametrize("server", SERVERS)
async def test_a_client_that_does_not_read_is_cut_off(server: str) -> None:
    """Its call ends, though its socket takes nothing and its sender is shielded."""
    patient = Streaming(stall_s=0.1)
    async with (
        serving(server, streaming=patient, routes=[ENDLESS]) as served,
        await served.connect() as stream,
    ):
        await stream.send_all(get("/endless"))
        assert await stream.receive_some(1)
        await served.idle()
        assert (await served.ask(get("/live"))).status == 200


async def test_a_finished_connection_does_not_stay_for_ever() -> None:
    """The end of a stream makes it ready for the next call, with a time-out of its own."""
    async with serving("hypercorn", limits=SHORT) as served, await served.connect() as stream:
        await stream.send_all(STREAM)
        while not served.bridge.held:
            await trio.testing.wait_all_tasks_blocked()
        await served.let_go()
        assert await _is_closed(stream)


GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"localhost")]


@pytest.mark.parametrize(
    "fields",
    [
        [*GET, (b":path", b"/\xfc")],
        [(b":method", b"CONNECT"), (b":authority", b"localhost")],
        [(b":method", b"G\xfcT"), *GET[1:], (b":path", b"/")],
    ],
    ids=["path", "connect", "method"],
)
async def test_a_fault_in_one_connection_ends_that_one_alone(fields: list[Any]) -> None:
    """What passes the parser of HTTP/2, and Hypercorn cannot read: it would end the server."""
    anything = H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
    async with serving("hypercorn") as served, await served.connect() as stream:
        client = H2Connection(anything)
        client.initiate_connection()
        client.send_headers(1, fields, end_stream=True)
        await stream.send_all(client.data_to_send())
        assert await _is_closed(stream)
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await served.ask(get("/live"))).status == 200


async def test_rapid_resets_end_the_connection() -> None:
    """CVE-2023-44487: a stream opened and reset costs the server more than the client."""
    async with serving("hypercorn") as served, await served.connect() as stream:
        client = H2Connection()
        client.initiate_connection()
        with suppress(trio.BrokenResourceError):
            for number in range(1, 6001, 2):
                client.send_headers(number, [*GET, (b":path", b"/live")])
                client.reset_stream(number)
                await stream.send_all(client.data_to_send())
        assert await _is_closed(stream)
        assert (await served.ask(get("/live"))).status == 200


def _unsent_bytes(served: Served) -> int:
    """What the client has not taken, of all connections."""
    server: Any = served.server
    connections = tuple(server._server.server_state.connections)
    return sum(one.transport.get_write_buffer_size() for one in connections)


async def piece(gateway: Gateway, request: Request) -> Response:
    return Response(bytes(24 << 10))


@pytest.mark.parametrize("ending", ["Connection: keep-alive", "Connection: close"])
async def test_the_end_of_an_answer_does_not_wait_for_ever(
    ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is too little to hold the server back: it is done with it, and would close."""
    monkeypatch.setattr("sagellm.gateway.http.uvicorn.KEEP_ALIVE_S", 0.1)
    patient, routes = Streaming(stall_s=0.2), [EndpointRoute("GET", "/piece", piece)]
    async with (
        serving("uvicorn", streaming=patient, routes=routes) as served,
        await served.connect() as stream,
    ):
        while not _unsent_bytes(served):
            await stream.send_all(get("/piece"))
            await trio.sleep(0.005)
        await stream.send_all(get("/piece", ending))
        with trio.fail_after(20):
            while _unsent_bytes(served):  # noqa: ASYNC110 - uvloop tells nobody
                await trio.sleep(0.05)


LARGE_BYTES = 12 << 20


async def large(gateway: Gateway, request: Request) -> Response:
    return Response(bytes(LARGE_BYTES))


@pytest.mark.alone
@pytest.mark.parametrize("server", SERVERS)
async def test_a_client_that_reads_slowly_but_steadily_gets_all(server: str) -> None:
    """The whole takes it several times as long as it may stand still."""
    patient, routes = Streaming(stall_s=0.5), [EndpointRoute("GET", "/large", large)]
    async with (
        serving(server, streaming=patient, routes=routes) as served,
        await served.connect() as stream,
    ):
        await stream.send_all(get("/large"))
        num_bytes = 0
        with trio.fail_after(20):
            while num_bytes < LARGE_BYTES:
                num_bytes += len(await received(stream))
                await trio.sleep(0.01)
