"""Ctrl-C: once drains, twice stops."""

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def draining(drain: trio.CancelScope, notice: str) -> AsyncIterator[None]:
    """Inside, the first Ctrl-C prints `notice` and cancels `drain`; the second raises
    KeyboardInterrupt. Runs on the main thread only."""
    with trio.open_signal_receiver(signal.SIGINT) as interrupts:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, interrupts, drain, notice)
            yield
            nursery.cancel_scope.cancel()


async def _watch(interrupts: AsyncIterator[int], drain: trio.CancelScope, notice: str) -> None:
    async for _ in interrupts:
        if drain.cancel_called:
            raise KeyboardInterrupt
        print(notice, file=sys.stderr)
        drain.cancel()
