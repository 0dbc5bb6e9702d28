"""Hypercorn's HTTP/1.1 and HTTP/2 protocols, with time limits for clients that do not read."""

from contextlib import suppress
from http import HTTPStatus
from itertools import chain
from typing import Any

import h11
import hypercorn
import trio
from h2.errors import ErrorCodes
from hypercorn.events import Event, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Body, EndBody
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import H11SendableEvent

from sagellm.gateway.api_errors import refusal

LINGER_S = 1.0  # the most time that a closing connection still reads from the client
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class Connection(trio.abc.HalfCloseableStream):
    """A socket stream with a time limit for each send.

    If the client does not read one send within `stall_s` seconds, the connection is closed, even if
    the sender is shielded from cancellation. After `send_eof`, incoming bytes are read and dropped
    until the client closes: closing with unread bytes would make the kernel drop the answer (RFC
    9112, 9.6).
    """

    def __init__(self, stream: trio.SocketStream, stall_s: float) -> None:
        self._stream = stream
        self._stall_s = stall_s
        self._is_leaving = False
        self._is_reading = False
        self._ended = trio.Event()

    @property
    def socket(self) -> trio.socket.SocketType:
        return self._stream.socket

    def kill(self) -> None:
        """Close the socket at once. Tasks that send or receive get ClosedResourceError."""
        self._ended.set()
        self._stream.socket.close()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with trio.move_on_after(self._stall_s):
            await self._stream.send_all(data)
            return
        self.kill()
        raise trio.BrokenResourceError("the client does not read")

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        self._is_leaving = True
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return bytes from the client; b"" at the end, or if another task is reading the rest."""
        if self._is_reading:  # `aclose` reads the rest of the bytes in another task
            await self._ended.wait()
            return b""
        self._is_reading = True
        try:
            return await self._receive(max_bytes)
        finally:
            self._is_reading = False

    async def aclose(self) -> None:
        if self._is_leaving and not self._ended.is_set():
            with trio.move_on_after(LINGER_S), suppress(*_GONE):
                await self.receive_some(1 << 16)
        self.kill()
        await trio.lowlevel.checkpoint()

    async def _receive(self, max_bytes: int | None) -> bytes:
        """Return the next bytes. After `send_eof`, drop all bytes until the client closes."""
        while True:
            try:
                data = bytes(await self._stream.receive_some(max_bytes))
            except _GONE:
                self._ended.set()
                raise
            if not data:
                self._ended.set()
            if not data or not self._is_leaving:
                return data


_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


class HypercornConfig(hypercorn.Config):
    """Hypercorn's settings. `stall_s`: the time limit of a send to a client, in seconds."""

    stall_s: float


class HypercornHttp1(H11Protocol):
    """HTTP/1.1 with JSON errors for invalid requests, without upgrades.

    The Upgrade header is ignored, because proxies pass it on unread. Status lines have the standard
    phrase, which Hypercorn leaves empty: some clients show nothing else of an error.
    """

    async def _check_protocol(self, event: h11.Request) -> None:
        """Switch to HTTP/2 only at its preface, `PRI * HTTP/2.0`."""
        if event.method == b"PRI":
            await super()._check_protocol(event)

    async def _create_stream(self, request: h11.Request) -> None:
        plain = [(name, value) for name, value in request.headers if name != b"upgrade"]
        if len(plain) < len(request.headers):
            request = h11.Request(
                method=request.method,
                headers=plain,
                target=request.target,
                http_version=request.http_version,
            )
        await super()._create_stream(request)

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        if isinstance(event, h11.Response | h11.InformationalResponse):
            event = type(event)(
                status_code=event.status_code,
                headers=event.headers,
                reason=_PHRASES.get(event.status_code, b""),
            )
        await super()._send_h11_event(event)

    async def _send_error_response(self, status_code: int) -> None:
        headers, body = refusal(status_code)
        own = chain(headers, self.config.response_headers("h11"))
        await self._send_h11_event(h11.Response(status_code=status_code, headers=list(own)))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


class HypercornHttp2(H2Protocol):
    """HTTP/2 that ends streams of clients that do not read, and closes idle connections.

    A stream is reset if it ends early, or if its client reads nothing for `stall_s` seconds.
    Hypercorn does not reset such streams: its senders wait for ever for the window of a client that
    has left.

    A connection without open streams is idle, even if it sends bytes: its next request must come
    within `keep_alive_timeout`. Hypercorn has no such limit between the preface and the first
    answer.
    """

    config: HypercornConfig

    async def initiate(
        self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None
    ) -> None:
        await super().initiate(headers, settings)
        if self.idle:
            await self.send(Updated(idle=True))

    async def handle(self, event: Event) -> None:
        had_streams = bool(self.streams)
        await super().handle(event)
        if had_streams and self.idle and not self.closed:
            await self.send(Updated(idle=True))

    async def stream_send(self, event: StreamEvent) -> None:
        if not isinstance(event, Body | EndBody):
            return await super().stream_send(event)
        with trio.move_on_after(self.config.stall_s):
            return await super().stream_send(event)
        await self._close_stream(event.stream_id)

    async def _close_stream(self, stream_id: int) -> None:
        await super()._close_stream(stream_id)
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None or buffer.complete:
            return
        await buffer.close()  # releases the task that waits for room in the buffer
        await self._window_updated(stream_id)  # wakes the task that removes the closed buffer
        if not self.closed and not self.connection.streams[stream_id].closed:
            self.connection.reset_stream(stream_id, ErrorCodes.INTERNAL_ERROR)
            await self._flush()


class Protocols(ProtocolWrapper):
    """Selects this module's protocols. A connection may change from HTTP/1.1 to HTTP/2."""

    def __init__(self, made: ProtocolWrapper) -> None:
        super().__init__(
            made.app,
            made.config,
            made.context,
            made.task_group,
            made.state,
            made.ssl,
            made.client,
            made.server,
            made.send,
            "h2" if isinstance(made.protocol, H2Protocol) else None,
        )

    @property
    def protocol(self) -> HypercornHttp1 | HypercornHttp2:
        return self._protocol

    @protocol.setter
    def protocol(self, made: H11Protocol | H2Protocol) -> None:
        ours: Any = HypercornHttp2 if isinstance(made, H2Protocol) else HypercornHttp1
        self._protocol: HypercornHttp1 | HypercornHttp2 = ours(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.state,
            self.ssl,
            self.client,
            self.server,
            self.send,
        )
