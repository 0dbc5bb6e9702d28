"""All requests of one call in the graph at once, read as one."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from sagellm.gateway.answers.reply import Batch
from sagellm.gateway.door import Door, Entry
from sagellm.runtime.messages import TokenEvent


@asynccontextmanager
async def entered(door: Door, entries: Sequence[Entry]) -> AsyncIterator[AsyncIterator[Batch]]:
    """The batches of the entries, with the number of each event's entry.

    What came together is read together. Leaving the context cancels what is unfinished. Raises
    ApiError where the graph cannot take one of them.
    """
    if len(entries) == 1:
        async with door.enter(entries[0]) as batches:
            yield _Numbered(batches, 0)
        return
    async with _unwrapped(), anyio.create_task_group() as tasks:
        send, receive = anyio.create_memory_object_stream[Batch]()  # no buffer: readers hold back
        async with receive:
            async with send:
                for number, entry in enumerate(entries):
                    tasks.start_soon(_forward, door, entry, number, send.clone())
            yield _Merged(receive)
        tasks.cancel_scope.cancel()


class _Numbered:
    def __init__(self, batches: AsyncIterator[Sequence[TokenEvent]], number: int) -> None:
        self._batches = batches
        self._number = number

    def __aiter__(self) -> "_Numbered":
        return self

    async def __anext__(self) -> Batch:
        number = self._number
        return [(number, event) for event in await self._batches.__anext__()]


class _Merged:
    def __init__(self, receive: MemoryObjectReceiveStream[Batch]) -> None:
        self._receive = receive

    def __aiter__(self) -> "_Merged":
        return self

    async def __anext__(self) -> Batch:
        """Whatever waits, at least one batch."""
        try:
            found = [*await self._receive.receive()]
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        with suppress(anyio.WouldBlock, anyio.EndOfStream):
            while True:
                found += self._receive.receive_nowait()
        return found


async def _forward(
    door: Door, entry: Entry, number: int, send: MemoryObjectSendStream[Batch]
) -> None:
    async with send, door.enter(entry) as batches:
        async for batch in _Numbered(batches, number):
            await send.send(batch)


@asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """Let the first error out of the task group as it was raised."""
    try:
        yield
    except ExceptionGroup as group:
        raise group.exceptions[0] from group.exceptions[0].__cause__
