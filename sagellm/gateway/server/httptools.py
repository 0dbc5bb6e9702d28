"""uvicorn's HTTP/1.1 connection, with the limits in time and size that it leaves out."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sagellm.gateway.server.refusal import refusal
from sagellm.gateway.settings import Settings

LINGER_S = 1.0  # for the client to read why it was refused
_SPARE_S = 5.0  # the app's own limit on a body's time comes first, and answers


class Config(uvicorn.Config):
    """Carries our limits to where uvicorn makes its connections, and what to run beside them."""

    settings: Settings
    max_connections: int
    watch: Callable[[], Coroutine[Any, Any, None]]


class Http1(HttpToolsProtocol):
    """Closes a connection whose headers or body take too long, or whose peer does not read."""

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._limits = config.settings.limits
        self._stall_s = config.settings.streaming.stall_s
        self._max_connections = config.max_connections
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._in_head = self._in_body = self._has_ended_one = self._is_refused = False
        self._num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect(self._limits.header_s)
        if len(self.connections) > self._max_connections:
            self.refuse(503)

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        self.resume_writing()
        if self._closing is not None:
            self._closing.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        self.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.close()

    def timeout_keep_alive_handler(self) -> None:
        self.close()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._reading is None:
            self._expect(self._limits.header_s)
        was_in_head, self._has_ended_one = self._in_head, False
        super().data_received(data)
        if self._in_head and (was_in_head or not self._has_ended_one):
            self._num_head_bytes += len(data)
            if self._num_head_bytes > self._limits.header_bytes and not self._is_refused:
                self.refuse(431)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._num_head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._expect(self._limits.body_s + _SPARE_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._rest()
        self._in_body, self._has_ended_one = False, True
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self._stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400)

    def refuse(self, status: int) -> None:
        """Answer bytes that never became a request; close once the client has, or a moment later:
        to close with unread bytes would make the kernel drop the answer.
        """
        headers, body = refusal(status)
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._is_refused = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._rest()
        self._reading = self.loop.call_later(LINGER_S, self.close)

    def close(self) -> None:
        """Close once what is left has been taken, or cut off who does not take it."""
        self.transport.close()
        if self._closing is None:
            self._closing = self.loop.call_later(self._stall_s, self.transport.abort)

    def _expect(self, seconds: float) -> None:
        self._rest()
        self._reading = self.loop.call_later(seconds, self._late)

    def _rest(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _late(self) -> None:
        """Bytes of a next request do not end the answer to the one before."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and not self._in_body:
            self._expect(self._limits.header_s)
        else:
            self.close()
