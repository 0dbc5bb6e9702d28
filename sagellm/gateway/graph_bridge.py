"""The bridge between the HTTP app and an open graph, and readers of a call's events."""

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

EventBatch: TypeAlias = Sequence[tuple[int, TokenEvent]]  # (number of the request, event)
NOW = Timing()  # a request that has just arrived, without a timeout


class GraphBridge(Protocol):
    """The interface through which the app uses an open graph, on the app's loop."""

    def open_stream(
        self, request: Request, timing: Timing = NOW
    ) -> AbstractAsyncContextManager[AsyncIterator[Sequence[TokenEvent]]]:
        """Start a request, as `Session.start` does. Yields batches of events, in order.

        No batch is empty. Every choice ends with exactly one event that has a `finish_reason`.
        Leaving the context cancels the unfinished request. If the unread events exceed the limits
        of the settings, the request is cancelled: the buffered events can still be read, and the
        last event has finish reason "cancelled" and code "slow_reader". Raises ApiError if the
        graph does not accept the request.
        """

    async def cancel(self, request_id: str) -> bool:
        """Cancel a request of this gateway. Return False for an unknown id."""

    async def cancel_elsewhere(self, call_id: str) -> bool:
        """Cancel all requests of a call that another gateway of the same graph serves.

        Return False if no gateway knows the call.
        """


class SessionBridge:
    """The bridge to a session on the same loop."""

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
    """The event batches of one request, on the session's loop."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def __aenter__(self) -> "SessionBatches":
        try:
            await self._stream.__aenter__()
        except RequestError as error:  # the id is unique, so the only cause is a stopped session
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
    """The queue of one request's unread events, filled and read on the app's loop."""

    def __init__(self, on_read: Callable[[int], None]) -> None:
        """`on_read` is called with the number of tokens of each batch that is read."""
        self.end: ApiError | bool = False
        self._on_read = on_read
        self._unread: list[Output] = []
        self._arrival = anyio.Event()

    def put(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        """Add events. `end` is True for the last events, or the error that ends the request."""
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
    """Return the stream of a request, not yet entered. Raises ApiError for a wrong request."""
    try:
        return session.start(request, timing, limits)
    except RequestError as error:
        raise ApiError(400, str(error)) from error


def graph_closed() -> ApiError:
    """Return the 503 for a request to a graph that is closing."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=1.0)


def num_tokens(outputs: Sequence[Output]) -> int:
    return sum(output.num_tokens for output in outputs)


def event_of(output: Output) -> TokenEvent:
    """Return an output as an event. A whole answer (from some operators) becomes one event."""
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
        vector=output.vector,
    )


@asynccontextmanager
async def open_streams(
    bridge: GraphBridge, requests: Sequence[Request], timing: Timing
) -> AsyncIterator[AsyncIterator[EventBatch]]:
    """Start all requests of one call. Yields batches of (number of the request, event).

    All waiting events come in one batch. Leaving the context cancels the unfinished requests.
    Raises ApiError if the graph does not accept one of the requests.
    """
    if len(requests) == 1:  # the usual call, without the cost of tasks and a queue
        async with bridge.open_stream(requests[0], timing) as batches:
            yield _Numbered(batches)
        return
    async with _unwrapped(), anyio.create_task_group() as tasks:
        # No buffer: events of a slow reader stay in the streams, whose limits count them.
        send, receive = anyio.create_memory_object_stream[EventBatch]()
        async with receive:
            async with send:
                for number, request in enumerate(requests):
                    stream = bridge.open_stream(request, timing)
                    tasks.start_soon(_forward, stream, number, send.clone())
            yield _Merged(receive)
        tasks.cancel_scope.cancel()


class _Numbered:
    """The event batches of a call with one request, which has number 0."""

    def __init__(self, batches: AsyncIterator[Sequence[TokenEvent]]) -> None:
        self._batches = batches

    def __aiter__(self) -> "_Numbered":
        return self

    async def __anext__(self) -> EventBatch:
        return [(0, event) for event in await self._batches.__anext__()]


class _Merged:
    """The event batches of a call with several requests, in the order of their arrival."""

    def __init__(self, receive: MemoryObjectReceiveStream[EventBatch]) -> None:
        self._receive = receive

    def __aiter__(self) -> "_Merged":
        return self

    async def __anext__(self) -> EventBatch:
        """Wait for a batch, and return all waiting batches joined into one."""
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
    """Send the batches of one request to the queue of its call."""
    async with send, stream as batches:
        async for batch in batches:
            await send.send([(number, event) for event in batch])


@asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """Raise the first error of a task group, without the exception group around it."""
    try:
        yield
    except ExceptionGroup as group:
        raise group.exceptions[0] from group.exceptions[0].__cause__
