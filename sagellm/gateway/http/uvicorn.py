"""Serves the app with uvicorn, uvloop and httptools, and with limits that uvicorn lacks."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from socket import socket
from typing import Any

import anyio.abc
import trio
import uvicorn
import uvloop
from anyio import TASK_STATUS_IGNORED
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sagellm.gateway.api_errors import refusal
from sagellm.gateway.http.app import App
from sagellm.gateway.settings import BACKLOG, Settings, max_connections

LINGER_S = 1.0  # the time that a refused client has to read the answer
_SPARE_S = (
    5.0  # added to the time of a body, so that the app's own limit comes first and answers a 408
)


class UvicornConfig(uvicorn.Config):
    """uvicorn's settings, with the gateway's limits.

    `watch`: a task to run on the app's loop. `body_s`: the longest time of a body, by its path.
    """

    settings: Settings
    max_connections: int
    watch: Callable[[], Coroutine[Any, Any, None]]
    body_s: Callable[[bytes], float]


class UvicornHttp1(HttpToolsProtocol):
    """HTTP/1.1 with time limits for headers, for bodies, and for clients that do not read."""

    def __init__(self, config: UvicornConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._limits = config.settings.limits
        self._stall_s = config.settings.streaming.stall_s
        self._max_connections = config.max_connections
        self._body_s = config.body_s
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
        self.resume_writing()  # cancels the stall timer, and wakes a sender
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
        self._expect(self._body_s(self.url.partition(b"?")[0]) + _SPARE_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._rest()
        self._in_body, self._has_ended_one = False, True
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Called if the write buffer is full. Cut the client off if it does not read in time."""
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
        """Answer bytes that are no valid request, and close the connection after LINGER_S.

        Not at once: closing with unread bytes would make the kernel drop the answer.
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
        """Close after the client has read all sent bytes; abort if it does not within `stall_s`."""
        self.transport.close()
        if self._closing is None:
            self._closing = self.loop.call_later(self._stall_s, self.transport.abort)

    def _expect(self, seconds: float) -> None:
        """Start the timer for headers or a body, instead of the previous timer."""
        self._rest()
        self._reading = self.loop.call_later(seconds, self._late)

    def _rest(self) -> None:
        """Stop the timer for headers or a body."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _late(self) -> None:
        """Close the connection, because headers or a body are late.

        If the previous request is still being answered, only restart the timer.
        """
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and not self._in_body:
            self._expect(self._limits.header_s)
        else:
            self.close()


KEEP_ALIVE_S = 5


class UvicornServer:
    """Serves from `run` until `stop`, and then until the last connection has ended.

    The app runs on an asyncio loop in another thread. All methods are called from the trio loop.
    """

    def __init__(self, app: App, settings: Settings, sock: socket) -> None:
        self._server = _Server(configure(app, settings))
        self._sock = sock

    def stop(self) -> None:
        """Accept no more connections, and close idle connections."""
        self._server.should_exit = True

    def call_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Schedule a function on the app's loop; without effect if the loop has ended."""
        if self._server.loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._server.loop.call_soon_threadsafe(function, *args)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve. Cancellation closes every connection at once."""
        started, ended = trio.Event(), trio.Event()
        token = trio.lowlevel.current_trio_token()
        self._server.tell_started = lambda: token.run_sync_soon(started.set)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_thread, ended)
            try:
                await started.wait()
                task_status.started()
                await ended.wait()
            finally:
                # Flags, besides `abort`: a server that is still starting has no connections.
                self._server.should_exit = self._server.force_exit = True
                self.call_soon(self._server.abort)

    async def _run_thread(self, ended: trio.Event) -> None:
        """Run the server's thread. Cancellation does not stop it; `abort` does."""
        try:
            await trio.to_thread.run_sync(self._run)
        finally:
            ended.set()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._server.serve([self._sock]))


class UvicornOnItsLoop:
    """As UvicornServer, for a gateway process: the app's asyncio loop is the main loop."""

    def __init__(self, app: App, settings: Settings, sock: socket) -> None:
        self._server = _Server(configure(app, settings))
        self._sock = sock

    def stop(self) -> None:
        self._server.should_exit = True

    async def run(self, task_status: anyio.abc.TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        self._server.tell_started = task_status.started
        try:
            await self._server.serve([self._sock])
        except asyncio.CancelledError:
            self._server.abort()
            raise


def configure(app: App, settings: Settings) -> UvicornConfig:
    """Return uvicorn's settings for a gateway."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)  # the app logs failures
    config = UvicornConfig(
        app,
        http=UvicornHttp1,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    config.settings = settings
    config.watch = app.run_background
    config.body_s = app.body_s
    config.max_connections = max_connections()
    return config


class _Server(uvicorn.Server):
    """uvicorn's server, without signal handlers. `tell_started` is called when it accepts."""

    config: UvicornConfig
    loop: asyncio.AbstractEventLoop | None = None  # set by `startup`
    watching: asyncio.Task[None]
    tell_started: Callable[[], None]

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = loop = asyncio.get_running_loop()
        # Kept in a field: the loop holds only weak references to tasks. It ends with the loop.
        self.watching = loop.create_task(self.config.watch())
        self.tell_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers: the caller handles signals."""
        yield

    def abort(self) -> None:
        """Close every connection and cancel every call, at once."""
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()
        for task in self.server_state.tasks:
            task.cancel()
