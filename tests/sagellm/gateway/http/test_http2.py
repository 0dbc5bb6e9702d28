"""HTTP/2, whose flow control lets a client hold back one answer and still read the others."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
from gateway_served import get, received, serving
from h2.connection import H2Connection
from h2.events import StreamReset
from h2.settings import SettingCodes
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.call import EndpointRoute
from sagellm.gateway.settings import RequestLimits, Streaming

SHORT = RequestLimits(header_s=0.2)
HEAD = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"localhost")]
ASK = [*HEAD, (b":path", b"/v1/models")]
PATIENT, HASTY = Streaming(stall_s=60.0), Streaming(stall_s=0.1)


async def _ask_without_window(stream: trio.SocketStream) -> H2Connection:
    """Ask for an answer, and never let any of its body come."""
    client = H2Connection()
    client.initiate_connection()
    client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    client.send_headers(1, ASK, end_stream=True)
    await stream.send_all(client.data_to_send())
    client.receive_data(await received(stream))
    await trio.testing.wait_all_tasks_blocked(0.02)
    return client


async def _leave(stream: trio.SocketStream, client: H2Connection) -> None:
    await stream.aclose()


async def _reset(stream: trio.SocketStream, client: H2Connection) -> None:
    client.reset_stream(1)
    await stream.send_all(client.data_to_send())


Leave = Callable[[trio.SocketStream, H2Connection], Awaitable[None]]


@pytest.mark.parametrize("leave", [_leave, _reset])
async def test_a_client_that_leaves_an_answer_unread_leaves_nothing_behind(leave: Leave) -> None:
    async with serving("hypercorn", streaming=PATIENT) as served, await served.connect() as stream:
        client = await _ask_without_window(stream)
        assert served.app.calls.num_open
        await leave(stream, client)
        await served.idle()


async def _is_reset(stream: trio.SocketStream, client: H2Connection) -> bool:
    while True:
        data = await received(stream)
        if any(isinstance(got, StreamReset) for got in client.receive_data(data)):
            return True


async def test_an_answer_that_no_window_is_opened_for_is_ended() -> None:
    async with serving("hypercorn", streaming=HASTY) as served, await served.connect() as stream:
        client = await _ask_without_window(stream)
        assert await _is_reset(stream, client)
        await served.idle()
        assert (await served.ask(get("/live"))).status == 200


async def failing(gateway: Gateway, request: Request) -> Response:
    async def begin() -> AsyncIterator[bytes]:
        yield b"a"
        raise LookupError

    return StreamingResponse(begin())


async def test_an_answer_that_breaks_off_is_reset() -> None:
    """It neither ends as if it were whole, nor leaves its client waiting."""
    routes = [EndpointRoute("GET", "/failing", failing)]
    async with serving("hypercorn", routes=routes) as served, await served.connect() as stream:
        client = H2Connection()
        client.initiate_connection()
        client.send_headers(1, [*HEAD, (b":path", b"/failing")], end_stream=True)
        await stream.send_all(client.data_to_send())
        with trio.fail_after(20):
            assert await _is_reset(stream, client)


def _nothing(client: H2Connection) -> bytes:
    return b""


def _part_of_a_frame(client: H2Connection) -> bytes:
    client.send_headers(1, ASK, end_stream=True)
    return client.data_to_send()[:-3]


def _priorities(client: H2Connection) -> bytes:
    client.prioritize(3, weight=7)
    client.prioritize(5, weight=9, depends_on=3)
    return client.data_to_send()


def _a_request_that_is_reset(client: H2Connection) -> bytes:
    client.send_headers(1, [(b":method", b"POST"), *ASK[1:]])
    client.reset_stream(1)
    return client.data_to_send()


def _part_of_headers(client: H2Connection) -> bytes:
    """A block of headers of which no CONTINUATION comes."""
    client.send_headers(1, [*ASK, (b"x-long", b"y" * 20_000)], end_stream=True)
    return client.data_to_send()[:16_400]


Said = Callable[[H2Connection], bytes]


@pytest.mark.parametrize(
    "say",
    [_nothing, _part_of_a_frame, _priorities, _a_request_that_is_reset, _part_of_headers],
)
async def test_a_connection_without_a_request_is_closed(say: Said) -> None:
    async with serving("hypercorn", limits=SHORT) as served, await served.connect() as stream:
        client = H2Connection()
        client.initiate_connection()
        hello = client.data_to_send()
        await stream.send_all(hello + say(client))
        with trio.fail_after(5):
            while await stream.receive_some():
                pass
        await served.idle()
