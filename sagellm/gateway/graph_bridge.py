"""The bridge between the HTTP app and an open graph."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from sagellm.gateway.answers.writer import EventBatch
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.settings import Streaming
from sagellm.runtime.messages import Sampling, TokenEvent
from sagellm.session import Output, Session, Stream
from sagellm.session.requests import Encoded, RequestError


class GraphRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the gateway hands it to the graph. Times in seconds."""

    request_id: str
    text: str  # of the prompt, which a map before the model may rewrite
    token_ids: tuple[int, ...]
    messages: tuple[dict[str, Any], ...] = ()  # instead of a text, where the engine takes text
    sampling: Sampling
    priority: int = 2
    tenant: str = ""
    model: str = ""
    salt: str = ""
    slo_ttft_s: float | None = None
    timeout_s: float | None = None
    waited_s: float = 0.0  # since its body was read
    trace: str = ""  # W3C traceparent, if any
    operation: str = "text_completion"  # or "chat", as traces call it


class GraphBridge(Protocol):
    """A graph that is open. All methods are called from the loop that the app runs on."""

    def enter(
        self, entry: GraphRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[Sequence[TokenEvent]]]:
        """Start a request. Yields what has come since the last batch, in order, never empty.

        Every choice ends with exactly one event that has a `finish_reason`. Leaving the context
        cancels what is unfinished. A request whose reader leaves more than the settings' tokens or
        bytes unread is cancelled; what was buffered may still be read, and its last event has
        finish reason "cancelled" and code "slow_reader".
        Raises ApiError where the graph cannot take it at all.
        """

    async def cancel(self, request_id: str) -> bool:
        """End a request from outside; False where it is not known."""

    async def cancel_elsewhere(self, call_id: str) -> bool:
        """End all requests of a call that another gateway before the same graph has; False where
        none knows it.
        """


class SessionBridge:
    """Reads the streams of an open session."""

    def __init__(self, session: Session, streaming: Streaming) -> None:
        self._session = session
        self._streaming = streaming

    def enter(self, entry: GraphRequest) -> "SessionBatches":
        limits = self._streaming
        return SessionBatches(
            stream_of(self._session, entry, limits.num_buffered_tokens, limits.num_buffered_bytes)
        )

    async def cancel(self, request_id: str) -> bool:
        return self._session.cancel(request_id)

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return False


class SessionBatches:
    """One request that was let in: its batches, until the context is left."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def __aenter__(self) -> "SessionBatches":
        try:
            await self._stream.__aenter__()
        except RequestError as error:
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


def stream_of(session: Session, entry: GraphRequest, limit_tokens: int, limit_bytes: int) -> Stream:
    """The stream of an entry, not started. Raises ApiError for what a session does not take."""
    try:
        return session.stream(
            entry.messages or Encoded(entry.text, entry.token_ids),
            sampling=entry.sampling,
            limit_tokens=limit_tokens,
            limit_bytes=limit_bytes,
            **fields_of(entry),
        )
    except RequestError as error:
        raise bad_request(error) from error


def fields_of(entry: GraphRequest) -> dict[str, object]:
    """What a session is told of an entry beside its prompt."""
    return {
        "request_id": entry.request_id,
        "priority": entry.priority,
        "user_id": entry.tenant,
        "model": entry.model,
        "salt": entry.salt,
        "trace": entry.trace,
        "tags": {"operation": entry.operation},
        "slo_ttft_s": entry.slo_ttft_s,
        "timeout_s": entry.timeout_s,
        "waited_s": entry.waited_s,
    }


def bad_request(error: RequestError) -> ApiError:
    """What was wrong with the request, as the session says it to its callers."""
    return ApiError(400, str(error))


def graph_closed() -> ApiError:
    """The graph takes no more."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=1.0)


def event_of(output: Output) -> TokenEvent:
    """A whole answer, as some operators give it, is an event that is the only and last one."""
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
async def entered(
    bridge: GraphBridge, entries: Sequence[GraphRequest]
) -> AsyncIterator[AsyncIterator[EventBatch]]:
    """The batches of the entries, with the number of each event's entry.

    What came together is read together. Leaving the context cancels what is unfinished. Raises
    ApiError where the graph cannot take one of them.
    """
    if len(entries) == 1:
        async with bridge.enter(entries[0]) as batches:
            yield _Numbered(batches, 0)
        return
    async with _unwrapped(), anyio.create_task_group() as tasks:
        send, receive = anyio.create_memory_object_stream[
            EventBatch
        ]()  # no buffer: readers hold back
        async with receive:
            async with send:
                for number, entry in enumerate(entries):
                    tasks.start_soon(_forward, bridge, entry, number, send.clone())
            yield _Merged(receive)
        tasks.cancel_scope.cancel()


class _Numbered:
    def __init__(self, batches: AsyncIterator[Sequence[TokenEvent]], number: int) -> None:
        self._batches = batches
        self._number = number

    def __aiter__(self) -> "_Numbered":
        return self

    async def __anext__(self) -> EventBatch:
        number = self._number
        return [(number, event) for event in await self._batches.__anext__()]


class _Merged:
    def __init__(self, receive: MemoryObjectReceiveStream[EventBatch]) -> None:
        self._receive = receive

    def __aiter__(self) -> "_Merged":
        return self

    async def __anext__(self) -> EventBatch:
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
    bridge: GraphBridge, entry: GraphRequest, number: int, send: MemoryObjectSendStream[EventBatch]
) -> None:
    async with send, bridge.enter(entry) as batches:
        async for batch in _Numbered(batches, number):
            await send.send(batch)


@asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """Let the first error out of the task group as it was raised."""
    try:
        yield
    except ExceptionGroup as group:
        raise group.exceptions[0] from group.exceptions[0].__cause__
