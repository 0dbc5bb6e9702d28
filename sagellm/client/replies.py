"""Answers of the OpenAI API: whole replies, and the pieces of streams."""

from collections.abc import Callable
from typing import Any, Generic

import msgspec
from typing_extensions import TypeVar

from sagellm.client.responses import BAD_ANSWER, CUT_OFF, MISUSED, ClientError, stream_error

T = TypeVar("T", default=Any)


class PromptDetails(msgspec.Struct, frozen=True):
    """Details of the prompt's tokens: how many of them were in the server's prefix cache."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """The token counts of one call, as the server reports them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class ResponseFunction(msgspec.Struct, frozen=True):
    """The function of a tool call; in a stream, a part of it. `arguments` is JSON text."""

    name: str | None = None
    arguments: str | None = None


class ResponseToolCall(msgspec.Struct, frozen=True):
    """A tool call of an answer. In a stream, a part of the call with number `index`."""

    function: ResponseFunction = ResponseFunction()
    id: str | None = None
    index: int | None = None

    @property
    def name(self) -> str:
        """The name of the called tool."""
        return self.function.name or ""

    @property
    def arguments(self) -> str:
        """The arguments: the JSON text of an object, unless the answer was cut off."""
        return self.function.arguments or "{}"

    @property
    def plain(self) -> dict[str, Any]:
        """The call as a part of the assistant's message in the next request."""
        arguments = self.arguments
        try:
            is_object = isinstance(msgspec.json.decode(arguments), dict)
        except ValueError:
            is_object = False
        # A server refuses messages whose arguments are no object, which it cannot render.
        function = {"name": self.name, "arguments": arguments if is_object else "{}"}
        return {"id": self.id or "", "type": "function", "function": function}


class ResponseMessage(msgspec.Struct, frozen=True):
    """A message of a chat; in a stream, the next part of the message.

    Servers name the text of reasoning either `reasoning` or `reasoning_content`.
    """

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ResponseToolCall, ...] | None = None


class Choice(msgspec.Struct, frozen=True):
    """One choice of an answer: completions have `text`, chats `message`, in a stream `delta`."""

    index: int = 0
    text: str | None = None
    delta: ResponseMessage | None = None
    message: ResponseMessage | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: Any = None
    token_ids: tuple[int, ...] | None = None  # where the call asked for them

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
        is_bare = is_empty and not self.reasoning and not self.tool_calls
        return is_bare and self.finish_reason is None

    @property
    def reasoning(self) -> str | None:
        """The text of the model's reasoning, under either of its names."""
        part = self.message or self.delta
        return (part.reasoning or part.reasoning_content) if part is not None else None

    @property
    def tool_calls(self) -> tuple[ResponseToolCall, ...]:
        part = self.message or self.delta
        return (part.tool_calls or ()) if part is not None else ()


class ResponseBody(msgspec.Struct, frozen=True):
    """A whole answer, or one chunk of a stream. Unknown fields are ignored."""

    id: str | None = None
    model: str | None = None
    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(ResponseBody)


class TextReply(str, Generic[T]):
    """The text of a whole answer, with its other fields. `choices`: the replies of all choices.

    `T` is the type that the call gave as `response_format`. `read_value`: reads the text as a `T`.
    """

    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: Any
    usage: Usage | None
    model: str | None
    id: str | None
    reasoning: str | None
    tool_calls: tuple[ResponseToolCall, ...]
    choices: "tuple[TextReply[T], ...]"
    read_value: Callable[[str], T] | None = None

    @property
    def text(self) -> str:
        """The text alone, as a plain `str`."""
        return str(self)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message for the next call: text and tool calls, without reasoning."""
        calls = [call.plain for call in self.tool_calls]
        if not calls:
            return {"role": "assistant", "content": self.text}
        return {"role": "assistant", "content": self.text or None, "tool_calls": calls}

    @property
    def parsed(self) -> T:
        """The answer as a value of the type that the call gave as `response_format`.

        Raises ClientError if the answer is not whole, or does not fit the type.
        """
        if self.read_value is None:
            cause = "the call asked for no JSON; give response_format to have a parsed answer"
            raise ClientError(cause, code=MISUSED)
        if self.finish_reason != "stop":
            raise self._unfinished()
        return self.read_value(self.text)

    def _unfinished(self) -> ClientError:
        if self.tool_calls:
            names = ", ".join(call.name for call in self.tool_calls)
            return ClientError(f"the model did not answer: it calls {names}", code=CUT_OFF)
        if self.finish_reason is None:
            return ClientError("the answer has not ended: read the stream first", code=MISUSED)
        tokens = self.usage.completion_tokens if self.usage is not None else None
        far = f"{len(self)} characters" + ("" if tokens is None else f" and {tokens} tokens")
        fix = "; raise max_tokens" if self.finish_reason == "length" else ""
        cause = f"the answer ended after {far} with finish_reason {self.finish_reason!r}"
        return ClientError(f"{cause}, before its JSON was whole{fix}", code=CUT_OFF)


class Piece(str):
    """The next text of one choice of a stream. The last piece of a choice has a finish reason.

    `reasoning` and `tool_calls` are the next parts of these; the text of such a piece is empty.
    `usage`: where the server sends it with a piece; the stream has it in any case.
    """

    choice: int
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: Any
    usage: Usage | None
    reasoning: str | None
    tool_calls: tuple[ResponseToolCall, ...]


def make_piece(
    text: str = "",
    *,
    choice: int = 0,
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
    logprobs: Any = None,
    usage: Usage | None = None,
    reasoning: str | None = None,
    tool_calls: tuple[ResponseToolCall, ...] = (),
) -> Piece:
    """A piece with its attributes."""
    piece = Piece(text)
    piece.choice, piece.finish_reason, piece.stop_reason = choice, finish_reason, stop_reason
    piece.logprobs, piece.usage = logprobs, usage
    piece.reasoning, piece.tool_calls = reasoning, tool_calls
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
    reply: TextReply = TextReply(choice.content or "")
    reply.finish_reason, reply.stop_reason = choice.finish_reason, choice.stop_reason
    reply.logprobs, reply.usage = choice.logprobs, body.usage
    reply.model, reply.id = body.model, body.id
    reply.reasoning, reply.tool_calls = choice.reasoning, choice.tool_calls
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
