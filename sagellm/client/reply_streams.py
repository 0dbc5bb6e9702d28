"""Streamed answers: the parser of chunks, and streams of pieces, blocking and async."""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic

from typing_extensions import TypeVar

from sagellm.client.replies import (
    Choice,
    Piece,
    ResponseBody,
    ResponseFunction,
    ResponseMessage,
    ResponseToolCall,
    T,
    TextReply,
    Usage,
    make_piece,
    read_body,
    whole_reply,
)
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


def chunk_pieces(body: ResponseBody) -> Sequence[Piece | Usage]:
    """The pieces of one chunk, one for each choice. The last piece has the usage, if any.

    Servers send the usage of a call in a chunk without choices: that is the usage alone.
    """
    pieces = [
        make_piece(
            choice.content or "",
            choice=choice.index,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            logprobs=choice.logprobs,
            reasoning=choice.reasoning,
            tool_calls=choice.tool_calls,
        )
        for choice in body.choices
        if not choice.is_opening
    ]
    if body.usage is None:
        return pieces
    if not pieces:
        return [body.usage]
    pieces[-1].usage = body.usage
    return pieces


C = TypeVar("C")
_NO_CHOICE = Choice(message=ResponseMessage())


@dataclass(slots=True)
class GatheredChoice:
    """The pieces of one choice so far."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: dict[int, ResponseToolCall] = field(default_factory=dict)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def take(self, piece: Piece) -> None:
        self.texts.append(piece)
        if piece.reasoning:
            self.thoughts.append(piece.reasoning)
        for part in piece.tool_calls:
            self._take_call(part)
        if piece.finish_reason is not None:
            self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason

    def _take_call(self, part: ResponseToolCall) -> None:
        number = len(self.calls) if part.index is None else part.index
        known = self.calls.get(number)
        if known is None:
            self.calls[number] = part
            return
        arguments = (known.function.arguments or "") + (part.function.arguments or "")
        function = ResponseFunction(known.function.name or part.function.name, arguments)
        self.calls[number] = ResponseToolCall(function, known.id or part.id, number)

    def choice(self, index: int) -> Choice:
        message = ResponseMessage(
            role="assistant",
            content="".join(self.texts),
            reasoning="".join(self.thoughts) or None,
            tool_calls=tuple(self.calls[number] for number in sorted(self.calls)),
        )
        return Choice(
            index=index,
            message=message,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class _StreamState(Generic[C, T]):
    """The base of both kinds of stream: gathers the pieces, and keeps the usage.

    `usage`: complete after the last piece; None if the server sends none. `read_value`: see
    `TextReply`.
    """

    usage: Usage | None = None
    read_value: Callable[[str], T] | None = None
    _is_closed = False

    def __init__(self, close: Callable[[], C]) -> None:
        self._close = close
        self._gathered: dict[int, GatheredChoice] = {}

    @property
    def finish_reason(self) -> str | None:
        """The finish reason of choice 0; None before its last piece."""
        first = self._gathered.get(0)
        return None if first is None else first.finish_reason

    @property
    def reply(self) -> TextReply[T]:
        """The answer so far; after the last piece, the whole answer, without logprobs."""
        gathered = self._gathered.items()
        choices = tuple(each.choice(index) for index, each in gathered) or (_NO_CHOICE,)
        reply: TextReply[T] = whole_reply(ResponseBody(choices=choices, usage=self.usage))
        for each in reply.choices:
            each.read_value = self.read_value
        return reply

    @property
    def parsed(self) -> T:
        """The whole answer as a value, like `TextReply.parsed`. Read the stream to its end first.

        Raises ClientError.
        """
        return self.reply.parsed

    def _note(self, piece: Piece | Usage) -> Piece | None:
        """Gather a piece and return it; None for the usage alone, which is no piece."""
        if isinstance(piece, Usage):
            self.usage = piece
            return None
        gathered = self._gathered.get(piece.choice)
        if gathered is None:
            gathered = self._gathered[piece.choice] = GatheredChoice()
        gathered.take(piece)
        if piece.usage is not None:
            self.usage = piece.usage
        return piece


@misused(
    __aiter__="a stream of UnifiedInferenceClient is read with `for`",
    __aenter__="a stream of UnifiedInferenceClient is entered with `with`",
)
class ReplyStream(_StreamState[None, T]):
    """The pieces of one answer. Closing the stream before its end cancels the request.

    Leaving `with` closes the stream, and so does losing the last reference to it. Iteration raises
    ClientError if the answer breaks off.
    """

    def __init__(self, pieces: Iterator[Piece | Usage], close: Callable[[], None]) -> None:
        super().__init__(close)
        self._pieces = pieces

    def __iter__(self) -> "ReplyStream[T]":
        return self

    def __next__(self) -> Piece:
        if self._is_closed:
            raise StopIteration
        fault = blocked_loop("reading a blocking stream", "AsyncUnifiedInferenceClient")
        if fault is not None:
            raise ClientError(fault, code=MISUSED)
        while (piece := self._note(next(self._pieces))) is None:
            pass
        return piece

    def close(self) -> None:
        """Close the stream: iteration ends. Idempotent."""
        self._is_closed = True
        self._close()

    def __enter__(self) -> "ReplyStream[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._close()  # a dropped stream must not keep its request running


@misused(
    __iter__="a stream of AsyncUnifiedInferenceClient is read with `async for`",
    __enter__="a stream of AsyncUnifiedInferenceClient is entered with `async with`",
)
class AsyncReplyStream(_StreamState[Awaitable[None], T]):
    """The pieces of one answer, for trio and asyncio. Only `async with` and `aclose` close it."""

    def __init__(
        self, pieces: AsyncIterator[Piece | Usage], close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(close)
        self._pieces = pieces

    def __aiter__(self) -> "AsyncReplyStream[T]":
        return self

    async def __anext__(self) -> Piece:
        if self._is_closed:
            raise StopAsyncIteration
        while (piece := self._note(await anext(self._pieces))) is None:
            pass
        return piece

    async def aclose(self) -> None:
        """Close the stream: iteration ends. Idempotent."""
        self._is_closed = True
        await self._close()

    async def __aenter__(self) -> "AsyncReplyStream[T]":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
