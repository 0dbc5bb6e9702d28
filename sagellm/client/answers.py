"""The answers of the OpenAI API: texts that know how they ended, and the reader of a stream."""

from collections import deque
from typing import Any

import msgspec

from sagellm.client.failure import BAD_ANSWER, CUT_OFF, ClientError, broken
from sagellm.client.sse import Event, EventReader, EventTooLong

DONE = b"[DONE]"


class PromptDetails(msgspec.Struct, frozen=True):
    """How much of a prompt was in the cache."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one call, as the server counted them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Message(msgspec.Struct, frozen=True):
    """What a chat says: a whole message, or the next part of it."""

    role: str | None = None
    content: str | None = None


class Choice(msgspec.Struct, frozen=True):
    """One choice of a whole answer, or of a chunk; of `/v1/completions` or of a chat."""

    index: int = 0
    text: str | None = None
    delta: Message | None = None
    message: Message | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: Any = None

    @property
    def content(self) -> str | None:
        """Its text; None where it holds none at all, as in a chunk that only ends."""
        said = self.message or self.delta
        return said.content if said is not None else self.text

    @property
    def is_opening(self) -> bool:
        """Whether it is the chunk that opens a chat, before any token."""
        delta = self.delta
        is_empty = delta is not None and delta.role is not None and not delta.content
        return is_empty and self.finish_reason is None


class Body(msgspec.Struct, frozen=True):
    """A whole answer or one chunk of a stream. Unknown fields are left aside."""

    id: str | None = None
    model: str | None = None
    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(Body)


class Reply(str):
    """The text of a whole answer, and how it ended. `choices` are all that were asked for."""

    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: Any
    usage: Usage | None
    model: str | None
    id: str | None
    choices: "tuple[Reply, ...]"


class Piece(str):
    """The next text of one choice of a stream; the last has a finish reason.

    A server that was asked for usage sends it in a piece without text behind the last.
    """

    choice: int
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: Any
    usage: Usage | None


def piece(
    text: str = "",
    *,
    choice: int = 0,
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
    logprobs: Any = None,
    usage: Usage | None = None,
) -> Piece:
    """A piece with all that it knows."""
    made = Piece(text)
    made.choice, made.finish_reason, made.stop_reason = choice, finish_reason, stop_reason
    made.logprobs, made.usage = logprobs, usage
    return made


def reply(body: Body) -> Reply:
    """The whole answer. Raises ClientError where it holds none."""
    ordered = sorted(body.choices, key=lambda choice: choice.index)
    if not ordered:
        raise ClientError("the server's answer holds no choice", code=BAD_ANSWER)
    replies = tuple(_reply(choice, body) for choice in ordered)
    for one in replies:
        one.choices = replies
    return replies[0]


def _reply(choice: Choice, body: Body) -> Reply:
    made = Reply(choice.content or "")
    made.finish_reason, made.stop_reason = choice.finish_reason, choice.stop_reason
    made.logprobs, made.usage = choice.logprobs, body.usage
    made.model, made.id = body.model, body.id
    return made


def read_body(data: bytes) -> Body:
    """A body of JSON. Raises ClientError where it is none, or holds an error."""
    try:
        body = _DECODER.decode(data)
    except ValueError as error:  # of msgspec, and of text that is no UTF-8
        raise ClientError(f"the server's answer makes no sense: {error}", code=BAD_ANSWER) from None
    if body.error is not None:
        raise broken(data)
    return body


class StreamReader:
    """The chunks of one streamed answer, from the bytes of its body.

    A stream is whole when `[DONE]` came, or the body ended, after every choice had its finish
    reason; anything else is an error, never a silent end. What came before an error is still read.
    """

    def __init__(self) -> None:
        self._events = EventReader()
        self._bodies: deque[Body] = deque()
        self._open: set[int] = set()
        self._num_choices = 0
        self._error: ClientError | None = None
        self.is_over = False

    def feed(self, data: bytes) -> None:
        """Take what the network brought."""
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
        """The body has ended."""
        if not self.is_over:
            self._finish("the connection")

    def next(self) -> Body | None:
        """The next chunk, or None until more is fed. Raises ClientError behind the last."""
        if self._bodies:
            return self._bodies.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _take(self, event: Event) -> None:
        if event.data == DONE:
            return self._finish("the stream")
        if event.name == "error":
            raise broken(event.data)
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
        if self._open or not self._num_choices:
            self._fail(ClientError(f"{what} ended before the answer was whole", code=CUT_OFF))
        self.is_over = True

    def _fail(self, error: ClientError) -> None:
        self._error, self.is_over = error, True


def pieces(body: Body) -> list[Piece]:
    """What a caller is given of one chunk: its choices, and usage behind the last of them."""
    said = [
        piece(
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
        _attach(said, body.usage)
    return said


def _attach(said: list[Piece], usage: Usage) -> None:
    if said:
        said[-1].usage = usage
    else:
        said.append(piece(usage=usage))
