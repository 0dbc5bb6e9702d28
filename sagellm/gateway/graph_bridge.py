"""The bridge between the HTTP app and an open graph."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Protocol, TypeAlias

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.settings import Streaming
from sagellm.runtime.messages import Request, TokenEvent
from sagellm.session import Output, Session, Stream
from sagellm.session.requests import RequestError, Timing
from sagellm.session.stream import UnreadLimits

EventBatch: TypeAlias = Sequence[tuple[int, TokenEvent]]  # with the number of each event's request
NOW = Timing()  # a request that has just arrived, without a timeout


class GraphBridge(Protocol):
    """The app's way to an open graph. All methods are called on the app's loop."""

    def open_stream(
        self, request: Request, timing: Timing = NOW
    ) -> AbstractAsyncContextManager[AsyncIterator[Sequence[TokenEvent]]]:
        """Start a request, as `Session.start` does. Yields batches of events in order; no batch is
        empty.

        Every choice ends with exactly one event that has a `finish_reason`. Leaving the context
        cancels the unfinished request. A request whose reader leaves more than the settings' tokens
        or bytes unread is cancelled: the buffered events can still be read, and the last one has
        finish reason "cancelled" and code "slow_reader".
        Raises ApiError where the graph does not take the request.
        """

    async def cancel(self, request_id: str) -> bool:
        """End a request of this gateway. Return False for an unknown id."""

    async def cancel_elsewhere(self, call_id: str) -> bool:
        """End all requests of a call of another gateway of the same graph. Return False where no
        gateway knows the call.
        """


class SessionBridge:
    """Reads the streams of a session in the same loop."""

    def __init__(self, session: Session, streaming: Streaming) -> None:
        self._session = session
        self._limits = UnreadLimits(streaming.num_buffered_tokens, streaming.num_buffered_bytes)

    def open_stream(self, request: Request, timing: Timing = NOW) -> "SessionBatches":
        return SessionBatches(start_stream(self._session, request, timing, self._limits))

    async def cancel(self, request_id: str) -> bool:
        return self._session.cancel(request_id)

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return False


class SessionBatches:
    """The batches of one request, in the session's loop."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def __aenter__(self) -> "SessionBatches":
        try:
            await self._stream.__aenter__()
        except RequestError as error:  # ids are unique here, so the session has ended
            raise graph_closed() from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> "SessionBatches":
        return self

    async def __anext__(self) -> Sequence[TokenEvent]:
        outputs = await self._stream.take()
        if not outputs:
            raise StopAsyncIteration
        return [event_of(output) for output in outputs]


class EventInbox:
    """A queue of one request's events, filled and read on the app's loop."""

    def __init__(self, on_read: Callable[[int], None]) -> None:
        """`on_read` is called with the number of tokens of each batch that is read."""
        self.end: ApiError | bool = False
        self._on_read = on_read
        self._unread: list[Output] = []
        self._arrival = anyio.Event()

    def put(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        """Add events. `end`: whether these are the last, or the error that ends the request."""
        self._unread.extend(outputs)
        self.end = self.end or end
        self._arrival.set()

    def __aiter__(self) -> "EventInbox":
        return self

    async def __anext__(self) -> Sequence[TokenEvent]:
        while not self._unread:
            if isinstance(self.end, ApiError):
                raise self.end
            if self.end:
                raise StopAsyncIteration
            self._arrival = anyio.Event()  # events of anyio cannot be cleared
            await self._arrival.wait()
        taken, self._unread = self._unread, []
        self._on_read(num_tokens(taken))
        return [event_of(output) for output in taken]


def start_stream(
    session: Session, request: Request, timing: Timing, limits: UnreadLimits
) -> Stream:
    """Return the stream of a request, not entered. Raises ApiError for a wrong request."""
    try:
        return session.start(request, timing, limits)
    except RequestError as error:
        raise ApiError(400, str(error)) from error


def graph_closed() -> ApiError:
    """Return the error of a request for a graph that is closing."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=1.0)


def num_tokens(outputs: Sequence[Output]) -> int:
    return sum(output.num_tokens for output in outputs)


def event_of(output: Output) -> TokenEvent:
    """Return an output as an event. A whole answer of some operators is its only event."""
    if isinstance(output, TokenEvent):
        return output
    return TokenEvent(
        request_id=output.request_id,
        choice=output.choice,
        text=output.text,
        token_ids=output.token_ids,
        num_tokens_without_ids=output.num_tokens_without_ids,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        error=output.error,
        code=output.code,
        retry_after_s=output.retry_after_s,
        num_prompt_tokens=output.num_prompt_tokens,
        num_cached_tokens=output.num_cached_tokens,
        stamps=output.stamps,
    )


@asynccontextmanager
async def open_streams(
    bridge: GraphBridge, requests: Sequence[Request], timing: Timing
) -> AsyncIterator[AsyncIterator[EventBatch]]:
    """Start all requests of one call. Yields batches of (number of the request, event).

    Batches that wait are read together. Leaving the context cancels the unfinished requests.
    Raises ApiError where the graph does not take one of them.
    """
    if len(requests) == 1:  # needs neither tasks nor a queue
        async with bridge.open_stream(requests[0], timing) as batches:
            yield _Numbered(batches)
        return
    async with _unwrapped(), anyio.create_task_group() as tasks:
        send, receive = anyio.create_memory_object_stream[
            EventBatch
        ]()  # no buffer: a slow reader holds streams back
        async with receive:
            async with send:
                for number, request in enumerate(requests):
                    stream = bridge.open_stream(request, timing)
                    tasks.start_soon(_forward, stream, number, send.clone())
            yield _Merged(receive)
        tasks.cancel_scope.cancel()


class _Numbered:
    """The batches of a call with one request."""

    def __init__(self, batches: AsyncIterator[Sequence[TokenEvent]]) -> None:
        self._batches = batches

    def __aiter__(self) -> "_Numbered":
        return self

    async def __anext__(self) -> EventBatch:
        return [(0, event) for event in await self._batches.__anext__()]


class _Merged:
    """The batches of a call with several requests."""

    def __init__(self, receive: MemoryObjectReceiveStream[EventBatch]) -> None:
        self._receive = receive

    def __aiter__(self) -> "_Merged":
        return self

    async def __anext__(self) -> EventBatch:
        """Return all waiting batches, at least one, as one batch."""
        try:
            found = [*await self._receive.receive()]
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        with suppress(anyio.WouldBlock, anyio.EndOfStream):
            while True:
                found += self._receive.receive_nowait()
        return found


async def _forward(
    stream: AbstractAsyncContextManager[AsyncIterator[Sequence[TokenEvent]]],
    number: int,
    send: MemoryObjectSendStream[EventBatch],
) -> None:
    async with send, stream as batches:
        async for batch in batches:
            await send.send([(number, event) for event in batch])


@asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """Unwrap the first error from the exception group of a task group."""
    try:
        yield
    except ExceptionGroup as group:
        raise group.exceptions[0] from group.exceptions[0].__cause__
