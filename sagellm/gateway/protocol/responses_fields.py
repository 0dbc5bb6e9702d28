"""The objects in a body of /v1/responses: their types, and their fields of other versions."""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from sagellm.gateway.protocol.chat_messages import MAX_PARTS
from sagellm.gateway.protocol.other_apis import Foreign, IgnoredField
from sagellm.gateway.protocol.request import Effort, Label
from sagellm.gateway.protocol.tool_choice import MAX_TOOLS, ToolMode, ToolName

MAX_INCLUDED = 16
MAX_METADATA = 16  # pairs of `metadata`, as in the OpenAI API
INCLUDE_LOGPROBS = "message.output_text.logprobs"

Truncation: TypeAlias = Literal["auto", "disabled"]
Verbosity: TypeAlias = Literal["low", "medium", "high"]
SummaryStyle: TypeAlias = Literal["auto", "concise", "detailed"]
InputRole: TypeAlias = Literal["user", "assistant", "system", "developer"]
# All but the first name items that this server never makes, so they add nothing to an answer.
Includable: TypeAlias = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
MetadataKey: TypeAlias = Annotated[str, Meta(max_length=64)]
MetadataText: TypeAlias = Annotated[str, Meta(max_length=512)]
Metadata: TypeAlias = Annotated[dict[MetadataKey, MetadataText], Meta(max_length=MAX_METADATA)]


class _Sent(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"
):
    """An object that its field `type` names."""


class InputTextPart(_Sent, frozen=True, kw_only=True, tag="input_text"):
    text: str


class OutputTextPart(_Sent, frozen=True, kw_only=True, tag="output_text"):
    """Text of an earlier answer."""

    text: str


class RefusalPart(_Sent, frozen=True, kw_only=True, tag="refusal"):
    """Text of an earlier answer that refused."""

    refusal: str


class SummaryPart(_Sent, frozen=True, kw_only=True, tag="summary_text"):
    text: str


class ReasoningPart(_Sent, frozen=True, kw_only=True, tag="reasoning_text"):
    text: str


ContentParts: TypeAlias = Annotated[
    list[InputTextPart | OutputTextPart | RefusalPart], Meta(max_length=MAX_PARTS)
]


class InputMessage(_Sent, frozen=True, kw_only=True, tag="message"):
    """One turn of the conversation, as a client writes it or as an answer had it."""

    role: InputRole
    content: str | ContentParts


class FunctionCallItem(_Sent, frozen=True, kw_only=True, tag="function_call"):
    """A tool call of an earlier answer. `arguments`: the JSON text of an object."""

    call_id: str
    name: str
    arguments: str


class CallOutputItem(_Sent, frozen=True, kw_only=True, tag="function_call_output"):
    """The result of a called function."""

    call_id: str
    output: str | Annotated[list[InputTextPart], Meta(max_length=MAX_PARTS)]


class ReasoningItem(_Sent, frozen=True, kw_only=True, tag="reasoning"):
    """Reasoning of an earlier answer. The summary counts where there is no content."""

    summary: Annotated[list[SummaryPart], Meta(max_length=MAX_PARTS)] = []
    content: Annotated[list[ReasoningPart], Meta(max_length=MAX_PARTS)] | None = None


class ItemReference(_Sent, frozen=True, kw_only=True, tag="item_reference"):
    """An item of an earlier response, which the server may still have. `type` may be left out."""

    id: str


InputItem: TypeAlias = InputMessage | FunctionCallItem | CallOutputItem | ReasoningItem
SentItem: TypeAlias = InputItem | ItemReference


class FunctionTool(_Sent, frozen=True, kw_only=True, tag="function"):
    """A function that the model may call. `parameters`: a JSON schema of its arguments."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(_Sent, frozen=True, kw_only=True, tag="function"):
    """The one function that the model must call, or one of several that it may call."""

    name: str


class AllowedFunctions(_Sent, frozen=True, kw_only=True, tag="allowed_tools"):
    """Some of the tools. The model sees no others. `mode` "required": it must call one of them."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Meta(min_length=1, max_length=MAX_TOOLS)]


class PlainText(_Sent, frozen=True, kw_only=True, tag="text"):
    pass


class JsonObject(_Sent, frozen=True, kw_only=True, tag="json_object"):
    pass


class JsonSchema(_Sent, frozen=True, kw_only=True, tag="json_schema"):
    name: Label
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer's text. `verbosity` is a hint."""

    format: PlainText | JsonObject | JsonSchema | None = None
    verbosity: Verbosity | None = None


class ReasoningOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The amount of reasoning. The answer has the reasoning itself, and no summary."""

    effort: Effort | None = None
    summary: SummaryStyle | None = None
    generate_summary: SummaryStyle | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/responses. Responses are not stored: `input` has the whole conversation.

    `instructions` are a system message before it. Unless `store` is false, the items of the answer
    are kept for a while, for references by later requests. `truncation` "auto" cuts the oldest
    tokens of a prompt that does not fit. `top_logprobs` needs "message.output_text.logprobs" in
    `include`. The other fields of a chat that have a place in a response have their chat names and
    meanings.
    """

    input: Annotated[str, Meta(min_length=1)] | Annotated[list[SentItem], Meta(min_length=1)]
    instructions: str | None = None
    include: Annotated[list[Includable], Meta(max_length=MAX_INCLUDED)] = []
    metadata: Metadata = {}
    reasoning: ReasoningOptions | None = None
    store: bool = True
    text: TextOptions | None = None
    tool_choice: ToolMode | NamedFunction | AllowedFunctions | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] = []
    truncation: Truncation = "disabled"


# Fields that a chat has under the same name. `SHARED` go to the chat as they are.
SHARED = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_logprobs",
    "parallel_tool_calls",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    # vLLM, and ours
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "return_tokens_as_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "ignore_eos",
    "priority",
    "request_id",
    "cache_salt",
    "chat_template_kwargs",
    "structured_outputs",
    "include_reasoning",
    "slo_ttft_s",
    "timeout_s",
    "no_queue",
)
# Fields that a chat has under another name.
RENAMED = {"max_output_tokens": "max_completion_tokens"}

_UNREAD = IgnoredField("string", "no template reads it")
_STATUS = IgnoredField("string", "an item is taken as it is")
_KEPT = IgnoredField("object", "prefixes are kept in any case")
RESPONSES = Foreign(
    unbuilt={
        "access_programs": (),
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "stream_options": ({}, {"include_obfuscation": False}),
    },
    taken={
        "max_tool_calls": IgnoredField("integer", "bounds tools that a server runs; none are here"),
        "prompt_cache_options": _KEPT,
        "prompt_cache_retention": IgnoredField("string", "prefixes are kept in any case"),
        "service_tier": IgnoredField("string", "there is one tier; `priority` orders requests"),
        "timeout": IgnoredField("number", "the client's own; `timeout_s` ends a request here"),
    },
)
# Fields that need an earlier response -> what to do instead.
STATEFUL = {
    "previous_response_id": "responses are not stored; send the earlier items in `input`",
    "conversation": "conversations are not stored; send the earlier items in `input`",
    "background": "responses are not stored, so none can be fetched later; use `stream`",
    "prompt": "there are no stored prompts; send `instructions` and `input`",
}
MESSAGE_ITEM = Foreign({}, {"id": _UNREAD, "phase": _UNREAD, "status": _STATUS})
TEXT_PART = Foreign(
    unbuilt={},
    taken={
        "annotations": IgnoredField("array", "no template reads them"),
        "id": _UNREAD,
        "logprobs": IgnoredField("array", "no template reads them"),
        "parsed": IgnoredField("object", "the OpenAI clients add it; `text` has the text"),
        "prompt_cache_breakpoint": _KEPT,
    },
)
CALL_ITEM = Foreign(
    unbuilt={"async": (False,), "caller": ({"type": "direct"},), "namespace": ()},
    taken={
        "id": _UNREAD,
        "parsed_arguments": IgnoredField(
            "object", "the OpenAI clients add it; `arguments` has the text"
        ),
        "status": _STATUS,
    },
)
CALL_OUTPUT_ITEM = Foreign(CALL_ITEM.unbuilt, {"id": _UNREAD, "name": _UNREAD, "status": _STATUS})
REASONING_ITEM = Foreign(
    unbuilt={},
    taken={
        "encrypted_content": IgnoredField("string", "only the server that made it can read it"),
        "id": _UNREAD,
        "status": _STATUS,
    },
)
FUNCTION_TOOL = Foreign(
    unbuilt={
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    },
    taken={},
)
REASONING_OPTIONS = Foreign(unbuilt={"context": ("auto",), "mode": ("standard",)}, taken={})
NOTHING_FOREIGN = Foreign({}, {})
# The structs that clients send, and the fields of other versions that each may also have.
SENT: dict[type[msgspec.Struct], Foreign] = {
    ResponsesRequest: RESPONSES,
    InputMessage: MESSAGE_ITEM,
    InputTextPart: TEXT_PART,
    OutputTextPart: TEXT_PART,
    RefusalPart: TEXT_PART,
    SummaryPart: TEXT_PART,
    ReasoningPart: TEXT_PART,
    FunctionCallItem: CALL_ITEM,
    CallOutputItem: CALL_OUTPUT_ITEM,
    ReasoningItem: REASONING_ITEM,
    ItemReference: NOTHING_FOREIGN,
    FunctionTool: FUNCTION_TOOL,
    NamedFunction: NOTHING_FOREIGN,
    AllowedFunctions: NOTHING_FOREIGN,
    PlainText: NOTHING_FOREIGN,
    JsonObject: NOTHING_FOREIGN,
    JsonSchema: NOTHING_FOREIGN,
    TextOptions: NOTHING_FOREIGN,
    ReasoningOptions: REASONING_OPTIONS,
}
