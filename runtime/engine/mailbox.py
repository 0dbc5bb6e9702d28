"""Mailboxes: the events of one owner, one batch a step, on their way from an engine to a reader."""

from collections import deque
from collections.abc import Callable

import trio

from sagellm.runtime.port import EngineEvent

# Batches that may wait. One batch is read while the next step computes, and two more absorb the
# jitter of the reader. More would only let an engine outrun a slow reader.
MAX_BATCHES = 4


class Mailbox:
    """The events of one owner. The engine calls `post` and `flush`; one reader iterates.

    A mailbox never blocks the engine. While it `is_full`, the scheduler skips the owner's
    sequences, so a slow reader delays its own sequences alone. Events posted outside a step (of a
    cancelled sequence) may exceed the bound by one event a sequence. `on_read` is called when a
    full mailbox has room again.
    """

    def __init__(self, on_read: Callable[[], None]) -> None:
        self._on_read = on_read
        self._posted: list[EngineEvent] = []
        self._batches: deque[tuple[EngineEvent, ...]] = deque()
        self.is_full = False
        self._filled = trio.Event()
        self._is_closed = False

    @property
    def num_free(self) -> int:
        """Batches that still fit."""
        return max(0, MAX_BATCHES - len(self._batches))

    def post(self, event: EngineEvent) -> None:
        self._posted.append(event)

    def flush(self) -> None:
        """Make the posted events one batch, if there are any."""
        if self._posted:
            self._batches.append(tuple(self._posted))
            self._posted.clear()
            self.is_full = len(self._batches) >= MAX_BATCHES
            self._filled.set()

    def close(self) -> None:
        """End the iteration after the batches that are left."""
        self.flush()
        self._is_closed = True
        self._filled.set()

    def __aiter__(self) -> "Mailbox":
        return self

    async def __anext__(self) -> tuple[EngineEvent, ...]:
        await trio.lowlevel.checkpoint()
        while not self._batches:
            if self._is_closed:
                raise StopAsyncIteration
            self._filled = trio.Event()
            await self._filled.wait()
        was_full = self.is_full
        batch = self._batches.popleft()
        self.is_full = len(self._batches) >= MAX_BATCHES
        if was_full:
            self._on_read()
        return batch
