"""Where an engine leaves the events of one owner, one batch a step."""

from collections import deque
from collections.abc import Callable

import trio

from sagellm.runtime.port import EngineEvent

# Batches that may wait. One is being read while the next step computes; two more absorb the jitter
# of the reader. More would only let an engine run ahead of a reader that cannot follow.
MAX_BATCHES = 4


class Mailbox:
    """The events of one owner: `post` and `flush` by the engine, `async for` by one reader.

    It never blocks the engine: while `is_full`, the scheduler passes over the owner's sequences, so
    a slow reader holds up nobody but itself. What is posted outside a step (a cancelled sequence)
    may exceed the bound by one event a sequence.
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
        """Batches that it still takes."""
        return max(0, MAX_BATCHES - len(self._batches))

    def post(self, event: EngineEvent) -> None:
        self._posted.append(event)

    def flush(self) -> None:
        """Make what was posted one batch, if anything was."""
        if self._posted:
            self._batches.append(tuple(self._posted))
            self._posted.clear()
            self.is_full = len(self._batches) >= MAX_BATCHES
            self._filled.set()

    def close(self) -> None:
        """The reader gets what is left, then the end."""
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
