"""The JSON objects of answers to /v1/messages: messages, the events of a stream, and errors."""

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sagellm.gateway.answers.objects import ApiUsage, TokenCount
from sagellm.gateway.api_errors import ApiError

JsonObjectText: TypeAlias = Annotated[msgspec.Raw, Meta(extra_json_schema={"type": "object"})]
StopReason: TypeAlias = Literal[
    "end_turn",
    "max_tokens",
    "stop_sequence",
    "tool_use",
    "refusal",
    "model_context_window_exceeded",
]


class TextContent(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ThinkingContent(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    """The model's reasoning. `signature`: "", because this server reads a reasoning as it is."""

    thinking: str
    signature: str = ""


class ToolUseContent(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    """A call of a tool. `input`: a JSON object, {} if the model did not write a whole one."""

    id: str
    name: str
    input: JsonObjectText


AnswerContent: TypeAlias = TextContent | ThinkingContent | ToolUseContent


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """The tokens of the answer that were reasoning."""

    thinking_tokens: TokenCount


class MessageUsage(msgspec.Struct, frozen=True):
    """Tokens of one call. The prompt has `input_tokens` and `cache_read_input_tokens`."""

    input_tokens: TokenCount
    cache_creation_input_tokens: TokenCount
    cache_read_input_tokens: TokenCount
    output_tokens: TokenCount
    output_tokens_details: OutputTokensDetails


def message_usage(usage: ApiUsage) -> MessageUsage:
    """Return the usage of a call in the form of this API."""
    num_cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - num_cached,
        cache_creation_input_tokens=0,  # nobody pays for what is stored
        cache_read_input_tokens=num_cached,
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(usage.completion_tokens_details.reasoning_tokens),
    )


class AnsweredMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or the beginning of a streamed one."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerContent]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class CountedTokens(msgspec.Struct, frozen=True):
    input_tokens: TokenCount


class TextDelta(msgspec.Struct, frozen=True, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, frozen=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(msgspec.Struct, frozen=True, tag_field="type", tag="signature_delta"):
    signature: str = ""


class InputDelta(msgspec.Struct, frozen=True, tag_field="type", tag="input_json_delta"):
    """The next piece of a JSON text."""

    partial_json: str


BlockPiece: TypeAlias = TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class MessageStart(msgspec.Struct, frozen=True, tag_field="type", tag="message_start"):
    message: AnsweredMessage


class PingEvent(msgspec.Struct, frozen=True, tag_field="type", tag="ping"):
    """An event without content."""


class BlockStart(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: AnswerContent


class BlockDelta(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: BlockPiece


class BlockStop(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_stop"):
    index: int


class MessageStop(msgspec.Struct, frozen=True, tag_field="type", tag="message_stop"):
    """The end of a stream."""


class StopDelta(msgspec.Struct, frozen=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag_field="type", tag="message_delta"):
    """The reason why the answer ended. `usage`: that of the whole call."""

    delta: StopDelta
    usage: MessageUsage


_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorDetails(msgspec.Struct, frozen=True):
    """`error_code`: the cause, in one word that stays. Clients act on some of these words."""

    error_code: str


class AnthropicError(msgspec.Struct, frozen=True):
    type: str
    message: str
    details: ErrorDetails | None = None


class AnthropicFailure(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """The body of an error, or the event of one. `request_id`: the id of the call."""

    error: AnthropicError
    request_id: str | UnsetType = UNSET


def anthropic_error(error: ApiError) -> AnthropicError:
    """Return an error in the form of this API."""
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    details = None if error.code is None else ErrorDetails(error.code)
    return AnthropicError(_ERROR_TYPES.get(error.status, other), error.message, details)


MessageEvent: TypeAlias = (
    MessageStart
    | PingEvent
    | BlockStart
    | BlockDelta
    | BlockStop
    | MessageDelta
    | MessageStop
    | AnthropicFailure
)
