"""Serving until a signal comes, and then ending well: first gently, then at once."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import structlog
import trio

from sagellm.gateway.app import App

LOG = structlog.get_logger("sagellm.gateway")

ABORT_S = 1.0  # for the error event of every stream to leave
CLOSE_S = 0.5  # for connections that have nothing more to say


class Server(Protocol):
    """What runs the app on a socket. Called from trio, wherever the app's loop is."""

    async def run(self, task_status: trio.TaskStatus[None] = ...) -> None:
        """Serve until stopped and every connection is done; cancelled, close them at once."""

    def stop(self) -> None:
        """Take no more connections."""

    def call_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Call on the app's loop."""


async def serve(
    server: Server,
    app: App,
    signals: AsyncIterator[int],
    end_streams: Callable[[], Awaitable[None]],
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until the first of `signals`, and return once what is open has ended.

    From then on the gateway takes nothing new, but its listener stays until the last stream is
    done, so that health checks and refusals are still answered. After a second signal, or the
    settings' `drain_s`, `end_streams` gives every stream its error event.
    """
    stopped = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_run, server, stopped)
        started()
        await anext(signals)
        settings = app.gateway.settings
        app.gateway.is_draining = True
        LOG.info("draining", num_open=app.calls.num_open, drain_s=settings.drain_s)
        with trio.move_on_after(settings.drain_s) as waiting:
            nursery.start_soon(_cancel_at_next, signals, waiting)
            await trio.sleep(settings.linger_s)
            await _idle(server, app)
        if waiting.cancelled_caught:
            await _end(server, app, end_streams)
        server.stop()
        with trio.move_on_after(CLOSE_S):
            await stopped.wait()
        nursery.cancel_scope.cancel()
    LOG.info("stopped")


async def _run(server: Server, stopped: trio.Event, task_status: trio.TaskStatus[None]) -> None:
    try:
        await server.run(task_status)
    finally:
        stopped.set()


async def _cancel_at_next(signals: AsyncIterator[int], waiting: trio.CancelScope) -> None:
    await anext(signals)
    waiting.cancel()


async def _end(server: Server, app: App, end_streams: Callable[[], Awaitable[None]]) -> None:
    LOG.warning("ending_streams", num_open=app.calls.num_open)
    with trio.move_on_after(ABORT_S):
        await end_streams()
        await _idle(server, app)


async def _idle(server: Server, app: App) -> None:
    """Wait until no call is open that a drain waits for."""
    idle = trio.Event()
    token = trio.lowlevel.current_trio_token()
    server.call_soon(app.calls.when_idle, lambda: token.run_sync_soon(idle.set))
    await idle.wait()
