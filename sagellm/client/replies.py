"""Answers of the OpenAI API: whole replies, streams of pieces, and the parser of chunks."""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

from sagellm.client.responses import (
    BAD_ANSWER,
    CUT_OFF,
    MISUSED,
    ClientError,
    EventReader,
    EventTooLong,
    ServerSentEvent,
    stream_error,
)
from sagellm.errors import blocked_loop, misused

DONE = b"[DONE]"


class PromptDetails(msgspec.Struct, frozen=True):
    """Details of the prompt's tokens: how many of them were in the server's prefix cache."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """The token counts of one call, as the server reports them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class ResponseMessage(msgspec.Struct, frozen=True):
    """A message of a chat; in a stream, the next part of the message."""

    role: str | None = None
    content: str | None = None


class Choice(msgspec.Struct, frozen=True):
    """One choice of an answer: completions have `text`, chats `message`, in a stream `delta`."""

    index: int = 0
    text: str | None = None
    delta: ResponseMessage | None = None
    message: ResponseMessage | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: Any = None

    @property
    def content(self) -> str | None:
        """The text of the choice; None for a chunk without text, such as a mere finish reason."""
        part = self.message or self.delta
        return part.content if part is not None else self.text

    @property
    def is_opening(self) -> bool:
        """Whether this is the first chunk of a chat, which has a role but no token."""
        delta = self.delta
        is_empty = delta is not None and delta.role is not None and not delta.content
        return is_empty and self.finish_reason is None


class ResponseBody(msgspec.Struct, frozen=True):
    """A whole answer, or one chunk of a stream. Unknown fields are ignored."""

    id: str | None = None
    model: str | None = None
    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(ResponseBody)


class TextReply(str):
    """The text of a whole answer, with its other fields. `choices`: the replies of all choices."""

    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: Any
    usage: Usage | None
    model: str | None
    id: str | None
    choices: "tuple[TextReply, ...]"


class Piece(str):
    """The next text of one choice of a stream. The last piece of a choice has a finish reason.

    A server may send the usage in a piece without text after all other pieces.
    """

    choice: int
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: Any
    usage: Usage | None


def make_piece(
    text: str = "",
    *,
    choice: int = 0,
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
    logprobs: Any = None,
    usage: Usage | None = None,
) -> Piece:
    """A piece with its attributes."""
    piece = Piece(text)
    piece.choice, piece.finish_reason, piece.stop_reason = choice, finish_reason, stop_reason
    piece.logprobs, piece.usage = logprobs, usage
    return piece


def whole_reply(body: ResponseBody) -> TextReply:
    """The reply of the first choice. Raises ClientError for an answer without choices."""
    ordered = sorted(body.choices, key=lambda choice: choice.index)  # servers may mix them
    if not ordered:
        raise ClientError("the server's answer holds no choice", code=BAD_ANSWER)
    replies = tuple(_choice_reply(choice, body) for choice in ordered)
    for reply in replies:
        reply.choices = replies
    return replies[0]


def _choice_reply(choice: Choice, body: ResponseBody) -> TextReply:
    reply = TextReply(choice.content or "")
    reply.finish_reason, reply.stop_reason = choice.finish_reason, choice.stop_reason
    reply.logprobs, reply.usage = choice.logprobs, body.usage
    reply.model, reply.id = body.model, body.id
    return reply


def read_body(data: bytes) -> ResponseBody:
    """Decode a body. Raises ClientError for invalid JSON and for an error in the body."""
    try:
        body = _DECODER.decode(data)
    except ValueError as error:  # msgspec raises it also for text that is not UTF-8
        raise ClientError(f"the server's answer makes no sense: {error}", code=BAD_ANSWER) from None
    if body.error is not None:
        raise stream_error(data)
    return body


class ChunkReader:
    """Parses the bytes of a streamed answer into chunks.

    A stream is complete if every choice has a finish reason before `[DONE]` or the end of the body.
    Any other end is an error, which `next` raises after the chunks before it.
    """

    def __init__(self) -> None:
        self._events = EventReader()
        self._bodies: deque[ResponseBody] = deque()
        self._open: set[int] = set()
        self._num_choices = 0
        self._error: ClientError | None = None
        self.is_over = False

    def feed(self, data: bytes) -> None:
        """Parse the next bytes of the body."""
        try:
            for event in self._events.feed(data):
                if self.is_over:
                    return
                self._take(event)
        except EventTooLong as error:
            self._fail(ClientError(f"the server sent {error}", code=BAD_ANSWER))
        except ClientError as error:
            self._fail(error)

    def end(self) -> None:
        """Note that the body has ended."""
        if not self.is_over:
            self._finish("the connection")

    def next(self) -> ResponseBody | None:
        """Remove and return the next chunk, if any. Raises ClientError after those of a failure."""
        if self._bodies:
            return self._bodies.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _take(self, event: ServerSentEvent) -> None:
        if event.data == DONE:
            return self._finish("the stream")
        if event.name == "error":
            raise stream_error(event.data)
        body = read_body(event.data)
        self._bodies.append(body)
        for choice in body.choices:
            self._note(choice)

    def _note(self, choice: Choice) -> None:
        if choice.finish_reason is not None:
            self._open.discard(choice.index)
        else:
            self._open.add(choice.index)
        self._num_choices += 1

    def _finish(self, what: str) -> None:
        if self._open or not self._num_choices:  # a stream without any choice is no answer
            self._fail(ClientError(f"{what} ended before the answer was whole", code=CUT_OFF))
        self.is_over = True

    def _fail(self, error: ClientError) -> None:
        self._error, self.is_over = error, True


def chunk_pieces(body: ResponseBody) -> list[Piece]:
    """The pieces of one chunk, one for each choice. The last piece has the usage, if any."""
    pieces = [
        make_piece(
            choice.content or "",
            choice=choice.index,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            logprobs=choice.logprobs,
        )
        for choice in body.choices
        if not choice.is_opening
    ]
    if body.usage is not None:
        _attach_usage(pieces, body.usage)
    return pieces


def _attach_usage(pieces: list[Piece], usage: Usage) -> None:
    if pieces:
        pieces[-1].usage = usage
    else:
        pieces.append(make_piece(usage=usage))


C = TypeVar("C")


class _StreamState(Generic[C]):
    """The base of both kinds of stream: keeps the finish reason of choice 0 and the usage."""

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
class ReplyStream(_StreamState[None]):
    """The pieces of one answer. Closing the stream before its end cancels the request.

    Leaving `with` closes the stream, and so does losing the last reference to it. Iteration raises
    ClientError if the answer breaks off.
    """

    def __init__(self, pieces: Iterator[Piece], close: Callable[[], None]) -> None:
        super().__init__(close)
        self._pieces = pieces

    def __iter__(self) -> "ReplyStream":
        return self

    def __next__(self) -> Piece:
        if self._is_closed:
            raise StopIteration
        fault = blocked_loop("reading a blocking stream", "AsyncUnifiedInferenceClient")
        if fault is not None:
            raise ClientError(fault, code=MISUSED)
        return self._note(next(self._pieces))

    def close(self) -> None:
        """Close the stream: iteration ends. Idempotent."""
        self._is_closed = True
        self._close()

    def __enter__(self) -> "ReplyStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._close()  # a dropped stream must not keep its request running


@misused(
    __iter__="a stream of AsyncUnifiedInferenceClient is read with `async for`",
    __enter__="a stream of AsyncUnifiedInferenceClient is entered with `async with`",
)
class AsyncReplyStream(_StreamState[Awaitable[None]]):
    """The pieces of one answer, for trio and asyncio. Only `async with` and `aclose` close it."""

    def __init__(self, pieces: AsyncIterator[Piece], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(close)
        self._pieces = pieces

    def __aiter__(self) -> "AsyncReplyStream":
        return self

    async def __anext__(self) -> Piece:
        if self._is_closed:
            raise StopAsyncIteration
        return self._note(await anext(self._pieces))

    async def aclose(self) -> None:
        """Close the stream: iteration ends. Idempotent."""
        self._is_closed = True
        await self._close()

    async def __aenter__(self) -> "AsyncReplyStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
