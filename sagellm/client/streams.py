"""Streams of pieces, for plain threads and for async code: an iterator that is closed."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Generic, TypeVar

from sagellm.client.answers import Piece, Usage
from sagellm.client.failure import MISUSED, ClientError
from sagellm.misuse import blocked_loop, misused

C = TypeVar("C")


class _Account(Generic[C]):
    """What both kinds of stream know once they are over: how choice 0 ended, and the usage."""

    finish_reason: str | None = None
    usage: Usage | None = None
    _is_closed = False

    def __init__(self, close: Callable[[], C]) -> None:
        self._close = close

    def _note(self, piece: Piece) -> Piece:
        if piece.choice == 0 and piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
        if piece.usage is not None:
            self.usage = piece.usage
        return piece


@misused(
    __aiter__="a stream of UnifiedInferenceClient is read with `for`",
    __aenter__="a stream of UnifiedInferenceClient is entered with `with`",
)
class Stream(_Account[None]):
    """The pieces of one answer as they come. Closed before its end, the request is cancelled.

    Raises ClientError where the answer breaks off. `with` closes it; so does losing it.
    """

    def __init__(self, pieces: Iterator[Piece], close: Callable[[], None]) -> None:
        super().__init__(close)
        self._pieces = pieces

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Piece:
        if self._is_closed:
            raise StopIteration
        fault = blocked_loop("reading a blocking stream", "AsyncUnifiedInferenceClient")
        if fault is not None:
            raise ClientError(fault, code=MISUSED)
        return self._note(next(self._pieces))

    def close(self) -> None:
        """Idempotent; afterwards the stream is at its end."""
        self._is_closed = True
        self._close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._close()


@misused(
    __iter__="a stream of AsyncUnifiedInferenceClient is read with `async for`",
    __enter__="a stream of AsyncUnifiedInferenceClient is entered with `async with`",
)
class AsyncStream(_Account[Awaitable[None]]):
    """As `Stream`, for trio and asyncio; only `async with` and `aclose` close it in time."""

    def __init__(self, pieces: AsyncIterator[Piece], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(close)
        self._pieces = pieces

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Piece:
        if self._is_closed:
            raise StopAsyncIteration
        return self._note(await anext(self._pieces))

    async def aclose(self) -> None:
        """Idempotent; afterwards the stream is at its end."""
        self._is_closed = True
        await self._close()

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
