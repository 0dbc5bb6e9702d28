"""Draining on both servers: what is answered meanwhile, and how it ends."""

import pytest
import trio
from gateway_served import (
    ENDLESS,
    SERVERS,
    STREAM,
    Reply,
    Served,
    first_token,
    get,
    post,
    read_reply,
    serving,
)

pytestmark = pytest.mark.parametrize("server", SERVERS)


async def _stream(served: Served) -> trio.SocketStream:
    """A stream that has begun, and is held."""
    stream = await served.connect()
    await stream.send_all(STREAM)
    await first_token(stream)
    return stream


async def _rest(stream: trio.SocketStream) -> bytes:
    """What comes until the server closes."""
    rest = b""
    async with stream:
        try:
            async for data in stream:
                rest += data
        except trio.BrokenResourceError:
            return rest + b"(reset)"
    return rest


async def _ended(served: Served) -> None:
    """Long before the ten minutes that streams may take by default, on any machine."""
    with trio.fail_after(20):
        await served.ended.wait()


async def test_an_idle_gateway_ends_at_once(server: str) -> None:
    async with serving(server) as served:
        served.signal()
        await _ended(served)


async def test_open_streams_finish_while_the_listener_refuses(server: str) -> None:
    async with serving(server) as served:
        stream = await _stream(served)
        served.signal()
        await trio.testing.wait_all_tasks_blocked()
        ready, live = await served.ask(get("/ready")), await served.ask(get("/live"))
        assert (ready.status, live.status) == (503, 200)
        refused = await served.ask(post("/v1/completions", {"prompt": "x"}))
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.error["code"] == "shutting_down"
        await served.let_go()
        rest = await _rest(stream)
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        await _ended(served)


async def test_a_second_signal_ends_streams_with_an_error(server: str) -> None:
    async with serving(server) as served:
        stream = await _stream(served)
        served.signal()
        served.signal()
        rest = await _rest(stream)
        assert b'data: {"error":' in rest
        await _ended(served)


async def test_the_time_to_drain_is_bounded(server: str) -> None:
    async with serving(server, drain_s=0.05) as served:
        stream = await _stream(served)
        served.signal()
        assert b'data: {"error":' in await _rest(stream)
        await _ended(served)


async def test_a_client_that_does_not_read_delays_no_exit(server: str) -> None:
    """Its sender is shielded from cancellation: only its closed socket ends it."""
    async with (
        serving(server, drain_s=0.05, routes=[ENDLESS]) as served,
        await served.connect() as stream,
    ):
        await stream.send_all(get("/endless"))
        assert await stream.receive_some(1)
        served.signal()
        await _ended(served)


async def test_a_stream_that_does_not_end_delays_no_exit(server: str) -> None:
    async with serving(server, drain_s=0.05) as served, await _stream(served):
        served.bridge.let_go = lambda reason: None  # type: ignore[method-assign]
        served.signal()
        await _ended(served)


async def test_the_listener_lingers_for_load_balancers(server: str) -> None:
    async with serving(server, linger_s=0.3) as served:
        served.signal()
        await trio.testing.wait_all_tasks_blocked()
        assert (await served.ask(get("/ready"))).status == 503
        assert not served.ended.is_set()
        await _ended(served)


async def test_a_kept_connection_hears_that_it_is_over(server: str) -> None:
    async with serving(server) as served:
        stream, idle = await _stream(served), await served.connect()
        await idle.send_all(get("/live"))
        assert (await read_reply(idle)).status == 200
        served.signal()
        await trio.testing.wait_all_tasks_blocked()
        await idle.send_all(post("/v1/completions", {"prompt": "x"}))
        reply: Reply = await read_reply(idle)
        assert reply.status == 503
        await served.let_go()
        await _rest(stream)
        assert await _rest(idle) in (b"", b"(reset)")
        await _ended(served)
