"""The door: how the HTTP app reaches the graph's source and sink."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from sagellm.gateway.errors import ApiError
from sagellm.gateway.settings import Streaming
from sagellm.prompts import Encoded, RequestError
from sagellm.runtime.messages import Sampling, TokenEvent
from sagellm.session import Output, Session, Stream


class Entry(msgspec.Struct, frozen=True, kw_only=True):
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


class Door(Protocol):
    """A graph that is open. All methods are called from the loop that the app runs on."""

    def enter(
        self, entry: Entry
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


class SessionDoor:
    """Reads the streams of an open session."""

    def __init__(self, session: Session, streaming: Streaming) -> None:
        self._session = session
        self._streaming = streaming

    def enter(self, entry: Entry) -> "Entered":
        limits = self._streaming
        return Entered(
            stream_of(self._session, entry, limits.num_buffered_tokens, limits.num_buffered_bytes)
        )

    async def cancel(self, request_id: str) -> bool:
        return self._session.cancel(request_id)

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return False


class Entered:
    """One request that was let in: its batches, until the context is left."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def __aenter__(self) -> "Entered":
        try:
            await self._stream.__aenter__()
        except RequestError as error:
            raise closed() from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> "Entered":
        return self

    async def __anext__(self) -> Sequence[TokenEvent]:
        outputs = await self._stream.take()
        if not outputs:
            raise StopAsyncIteration
        return [event_of(output) for output in outputs]


def stream_of(session: Session, entry: Entry, limit_tokens: int, limit_bytes: int) -> Stream:
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
        raise refused(error) from error


def fields_of(entry: Entry) -> dict[str, object]:
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


def refused(error: RequestError) -> ApiError:
    """What was wrong with the request, as the session says it to its callers."""
    return ApiError(400, str(error))


def closed() -> ApiError:
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
