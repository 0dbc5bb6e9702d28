"""Serves until a signal, then drains: open calls may end, until a time limit or a second signal."""

import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from sagellm.gateway.http.app import App
from sagellm.gateway.settings import Settings
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
NOTED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # caught: by default they end the process


@contextmanager
def ending_signals() -> Iterator[AsyncIterator[int]]:
    """Catch signals, and yield an iterator over those that should end the server.

    SIGHUP is one of them if standard error is a terminal: it means that the terminal was closed.
    Outside the main thread, which alone receives signals, the iterator never yields.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _never()
        return
    ending = (*ENDING, signal.SIGHUP) if _is_in_terminal() else ENDING
    with trio.open_signal_receiver(*ENDING, *NOTED) as received:
        yield _Obeyed(received, ending)


@dataclass(frozen=True, slots=True)
class _Obeyed:
    """Iterates over the `received` signals that are in `ending`, and logs the other signals."""

    received: AsyncIterator[int]
    ending: tuple[int, ...]

    def __aiter__(self) -> "_Obeyed":
        return self

    async def __anext__(self) -> int:
        while (number := await anext(self.received)) not in self.ending:
            LOG.info("signal_ignored", signal=signal.Signals(number).name)
        return number


async def _never() -> AsyncIterator[int]:
    """An iterator that never yields."""
    await trio.sleep_forever()
    yield 0


def _is_in_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def ignore_noted() -> None:
    """Ignore the signals NOTED in a child process.

    A signal to the process group is meant for the server, which only logs it.
    """
    for number in NOTED:
        signal.signal(number, signal.SIG_IGN)


ABORT_S = 1.0  # the most time to send the error event of every stream
SECOND_SIGNAL = "a second Ctrl-C or SIGTERM ends what is open at once"
CLOSE_S = 0.5  # the most time to close idle connections


class HttpServer(Protocol):
    """A server that runs the app on a socket. Its methods are called from the trio loop."""

    async def run(self, task_status: trio.TaskStatus[None] = ...) -> None:
        """Serve until `stop`, and then until all connections have ended.

        Cancellation closes the connections at once.
        """

    def stop(self) -> None:
        """Accept no more connections."""

    def call_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Schedule a function on the app's loop, which may be another loop."""


class GatewayServing(Protocol):
    """The interface of `serve` to the gateway of this process, or to all gateway processes."""

    async def run(self, task_status: trio.TaskStatus[None] = ...) -> None:
        """Serve until `stop`, and then until all connections have ended.

        Cancellation closes the connections at once.
        """

    def drain(self) -> int:
        """Refuse new calls. Return the number of open calls."""

    async def idle(self) -> None:
        """Wait until no call is open, except calls of routes that answer `while_draining`."""

    def stop(self) -> None:
        """Accept no more connections."""

    @property
    def close_s(self) -> float:
        """The most time from `stop` to the end of `run`, in seconds."""


class ServingHere:
    """Controls the gateway of this process, for `serve`."""

    close_s = CLOSE_S

    def __init__(self, server: HttpServer, app: App) -> None:
        self._server = server
        self._app = app

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._server.run(task_status)

    def drain(self) -> int:
        self._app.gateway.is_draining = True
        return self._app.calls.num_open

    async def idle(self) -> None:
        idle = trio.Event()
        token = trio.lowlevel.current_trio_token()
        self._server.call_soon(self._app.calls.when_idle, lambda: token.run_sync_soon(idle.set))
        await idle.wait()

    def stop(self) -> None:
        self._server.stop()


async def serve(
    serving: GatewayServing,
    settings: Settings,
    signals: AsyncIterator[int],
    end_streams: Callable[[], Awaitable[None]],
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until the first of `signals`, then drain, and return after the last open call.

    During the drain the gateway refuses new calls. The listener stays open until the last stream
    has ended, so that health checks and refusals are answered. After a second signal, or after
    `settings.drain_s`, `end_streams` ends every stream with an error event.
    """
    stopped, first, second = trio.Event(), trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_await_signals, signals, first, second)
        with trio.CancelScope() as serving_scope:  # a signal may come while the server starts
            nursery.start_soon(_cancel_at, first, serving_scope)
            await nursery.start(_run, serving, stopped)
            started()
            await stopped.wait()
            raise RuntimeError("the server ended, and nobody asked it to")
        if not stopped.is_set():
            await _drain(serving, settings, second, end_streams)
            serving.stop()
            with trio.move_on_after(serving.close_s):
                await stopped.wait()
        nursery.cancel_scope.cancel()
    LOG.info("stopped")


async def _drain(
    serving: GatewayServing,
    settings: Settings,
    hurry: trio.Event,
    end_streams: Callable[[], Awaitable[None]],
) -> None:
    """Drain until no call is open, `settings.drain_s` is over, or `hurry` is set."""
    num_open = serving.drain()
    LOG.info("draining", num_open=num_open, drain_s=settings.drain_s, hint=SECOND_SIGNAL)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(settings.drain_s) as waiting:
            nursery.start_soon(_cancel_at, hurry, waiting)
            await trio.sleep(settings.linger_s)
            await serving.idle()
        nursery.cancel_scope.cancel()
    if waiting.cancelled_caught:
        LOG.warning("ending_streams")
        with trio.move_on_after(ABORT_S):
            await end_streams()
            await serving.idle()


async def _run(
    serving: GatewayServing, stopped: trio.Event, task_status: trio.TaskStatus[None]
) -> None:
    """Run the server, and set `stopped` at its end."""
    try:
        await serving.run(task_status)
    finally:
        stopped.set()


async def _await_signals(
    signals: AsyncIterator[int], first: trio.Event, second: trio.Event
) -> None:
    """Set `first` at the first signal, and `second` at any further signal."""
    async for _ in signals:
        (second if first.is_set() else first).set()


async def _cancel_at(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
