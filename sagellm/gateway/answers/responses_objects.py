"""The JSON objects of answers to /v1/responses, with the field names of the OpenAI API."""

from typing import Literal, TypeAlias

import msgspec

from sagellm.gateway.answers.objects import ApiUsage, ChatLogprob, TokenCount

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]
ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]

FaultCode: TypeAlias = Literal["server_error", "rate_limit_exceeded"]


class MessageText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    """The text of a message. There are no annotations: no tool of this server cites sources."""

    text: str
    annotations: tuple[()] = ()
    logprobs: list[ChatLogprob] = []


class ReasoningText(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"
):
    text: str


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[MessageText]


class OutputReasoning(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """The model's reasoning. It is not summarised."""

    id: str
    status: ItemStatus
    summary: tuple[()] = ()
    content: list[ReasoningText]


class OutputCall(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A tool call. `arguments` are the JSON text of an object, unless the call is incomplete."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem: TypeAlias = OutputMessage | OutputReasoning | OutputCall


class ResponseInputDetails(msgspec.Struct, frozen=True):
    """The tokens of the input whose keys and values were there already.

    `cache_write_tokens` counts those that a client has asked to keep; no field asks for that here.
    """

    cached_tokens: TokenCount
    cache_write_tokens: TokenCount = 0


class ResponseOutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: TokenCount


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: TokenCount
    input_tokens_details: ResponseInputDetails
    output_tokens: TokenCount
    output_tokens_details: ResponseOutputDetails
    total_tokens: TokenCount


def response_usage(usage: ApiUsage) -> ResponseUsage:
    return ResponseUsage(
        usage.prompt_tokens,
        ResponseInputDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        ResponseOutputDetails(usage.completion_tokens_details.reasoning_tokens),
        usage.total_tokens,
    )


class CountedInput(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: TokenCount


class IncompleteDetails(msgspec.Struct, frozen=True):
    """The reason why an answer ended before its end."""

    reason: Literal["max_output_tokens", "content_filter"]


class ResponseFault(msgspec.Struct, frozen=True):
    """The error of a failed response."""

    code: FaultCode
    message: str


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """An answer to /v1/responses. Times are seconds since 1970.

    `Raw`: JSON that repeats the request. It is encoded once for all events of a stream.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: ResponseStatus
    completed_at: int | None = None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None
    error: ResponseFault | None = None
    incomplete_details: IncompleteDetails | None = None
    # what was asked for
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    text: msgspec.Raw
    tools: msgspec.Raw
    tool_choice: msgspec.Raw
    parallel_tool_calls: bool
    reasoning: msgspec.Raw
    truncation: Literal["auto", "disabled"]
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    # the same for all
    background: Literal[False] = False
    max_tool_calls: None = None
    previous_response_id: None = None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
