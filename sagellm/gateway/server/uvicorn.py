"""uvicorn on uvloop and httptools, in a thread of its own; with limits that it has not."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socket import socket
from typing import Any

import anyio.abc
import trio
import uvicorn
import uvloop
from anyio import TASK_STATUS_IGNORED

from sagellm.gateway.app import App
from sagellm.gateway.listen import BACKLOG, max_connections
from sagellm.gateway.server.httptools import Config, Http1
from sagellm.gateway.settings import Settings

KEEP_ALIVE_S = 5


class UvicornServer:
    """Serves from `run` until `stop`, and then until the last connection is done.

    The app runs on an asyncio loop in a thread; all methods are called from trio.
    """

    def __init__(self, app: App, settings: Settings, sock: socket) -> None:
        self._server = _Server(configure(app, settings))
        self._sock = sock

    def stop(self) -> None:
        """Take no more connections, and close those that are idle."""
        self._server.should_exit = True

    def call_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Call on the loop of the app."""
        if self._server.loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and with it every call
                self._server.loop.call_soon_threadsafe(function, *args)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Cancelled, it closes every connection at once."""
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
                self._server.should_exit = self._server.force_exit = True  # still starting, too
                self.call_soon(self._server.abort)

    async def _run_thread(self, ended: trio.Event) -> None:
        """Waits for the thread also where it is cancelled: `abort` ends it."""
        try:
            await trio.to_thread.run_sync(self._run)
        finally:
            ended.set()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._server.serve([self._sock]))


class UvicornOnItsLoop:
    """As UvicornServer, for a process whose own loop is the asyncio loop that the app runs on."""

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


def configure(app: App, settings: Settings) -> Config:
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)  # the app logs what goes wrong
    config = Config(
        app,
        http=Http1,
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
    config.watch = app.gateway.meters.watch_app_loop
    config.max_connections = max_connections()
    return config


class _Server(uvicorn.Server):
    config: Config
    loop: asyncio.AbstractEventLoop | None = None  # until it runs
    watching: asyncio.Task[None]
    tell_started: Callable[[], None]

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = loop = asyncio.get_running_loop()
        self.watching = loop.create_task(self.config.watch())  # ended with the loop
        self.tell_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Not here: whoever runs this knows what they mean."""
        yield

    def abort(self) -> None:
        """End now: every connection is closed, and every call hears of it."""
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()
        for task in self.server_state.tasks:
            task.cancel()
