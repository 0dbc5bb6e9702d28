"""The signals that a server obeys, as nginx and uvicorn do, and those that it only notes."""

import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
NOTED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # which would end a process unasked


@contextmanager
def ending_signals() -> Iterator[AsyncIterator[int]]:
    """Those that end a server; only the main thread receives any. SIGHUP is one of them where
    standard error is a terminal: the terminal has gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _never()
        return
    ending = (*ENDING, signal.SIGHUP) if _is_in_terminal() else ENDING
    with trio.open_signal_receiver(*ENDING, *NOTED) as received:
        yield _Obeyed(received, ending)


@dataclass(frozen=True, slots=True)
class _Obeyed:
    """Those of the signals `received` that are `ending`; the others are logged."""

    received: AsyncIterator[int]
    ending: tuple[int, ...]

    def __aiter__(self) -> "_Obeyed":
        return self

    async def __anext__(self) -> int:
        while (number := await anext(self.received)) not in self.ending:
            LOG.info("signal_ignored", signal=signal.Signals(number).name)
        return number


async def _never() -> AsyncIterator[int]:
    await trio.sleep_forever()
    yield 0


def _is_in_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def ignore_noted() -> None:
    """In a process that the server has started: whoever signals all of them means the server."""
    for number in NOTED:
        signal.signal(number, signal.SIG_IGN)
