"""The objects in a body of /v1/messages: their types, and the fields that have no effect here."""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from sagellm.gateway.protocol.chat_messages import MAX_PARTS
from sagellm.gateway.protocol.other_apis import Foreign, IgnoredField
from sagellm.gateway.protocol.request import Hint, NonEmptyText, within
from sagellm.gateway.protocol.tool_choice import MAX_TOOLS, ToolName
from sagellm.runtime.sampling import RANGES

ChoiceType: TypeAlias = Literal["auto", "any", "tool", "none"]
ThinkingType: TypeAlias = Literal["enabled", "disabled", "adaptive"]
ThinkingDisplay: TypeAlias = Literal["summarized", "omitted"]
OutputEffort: TypeAlias = Literal["low", "medium", "high", "xhigh", "max"]


class ContentBlock(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"
):
    """A piece of a message, which its field `type` names."""


class TextBlock(ContentBlock, frozen=True, kw_only=True, tag="text"):
    text: str


class ThinkingBlock(ContentBlock, frozen=True, kw_only=True, tag="thinking"):
    """Reasoning of an earlier answer. The signature is not read."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(ContentBlock, frozen=True, kw_only=True, tag="redacted_thinking"):
    """Reasoning that only the server which made it can read. It is dropped."""

    data: str


class ToolUseBlock(ContentBlock, frozen=True, kw_only=True, tag="tool_use"):
    """A tool call of an earlier answer."""

    id: str
    name: str
    input: dict[str, Any]


TextBlocks: TypeAlias = Annotated[list[TextBlock], Meta(max_length=MAX_PARTS)]


class ToolResultBlock(ContentBlock, frozen=True, kw_only=True, tag="tool_result"):
    """The result of a called tool. With `is_error`, the model reads `Error: ` before the text."""

    tool_use_id: str
    content: str | TextBlocks = ""
    is_error: bool = False


UserBlock: TypeAlias = TextBlock | ToolResultBlock
AssistantBlock: TypeAlias = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock


class ConversationTurn(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role"
):
    """One message, of the role in its tag. Successive messages of one role count as one."""


class UserTurn(ConversationTurn, frozen=True, kw_only=True, tag="user"):
    content: str | Annotated[list[UserBlock], Meta(max_length=MAX_PARTS)]


class AssistantTurn(ConversationTurn, frozen=True, kw_only=True, tag="assistant"):
    """A message of the model. The last message of a conversation is the beginning of the answer."""

    content: str | Annotated[list[AssistantBlock], Meta(max_length=MAX_PARTS)]


class SystemTurn(ConversationTurn, frozen=True, kw_only=True, tag="system"):
    content: str | TextBlocks


AnyTurn: TypeAlias = UserTurn | AssistantTurn | SystemTurn


class ToolDefinition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool that the client runs. `input_schema`: a JSON schema of the input of its calls."""

    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] = "custom"


class ToolSelection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether the model may or must call a tool. `name`: the tool of type "tool"."""

    type: ChoiceType
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether the model reasons, where its chat template has a switch. The budget is a hint."""

    type: ThinkingType
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: ThinkingDisplay = "summarized"


class OutputSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The JSON schema of the answer's text."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    effort: OutputEffort | None = None
    format: OutputSchema | None = None


class CallerLabels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`user_id` is a hint."""

    user_id: Hint | None = None


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/messages/count_tokens: what the model is told."""

    messages: Annotated[list[AnyTurn], Meta(min_length=1)]
    model: str | None = None
    system: str | TextBlocks = ""
    tools: Annotated[list[ToolDefinition], Meta(max_length=MAX_TOOLS)] = []
    tool_choice: ToolSelection | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None
    output_format: OutputSchema | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/messages. `output_format` is an earlier name of `output_config.format`.

    An answer never leaves the model's context: a larger `max_tokens` asks for all that is left.
    """

    max_tokens: Annotated[int, within("max_tokens")]
    temperature: Annotated[float, within("temperature")] = 1.0
    top_p: Annotated[float, within("top_p")] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=int(RANGES["top_k"][1]))] = 0  # 0: all
    stop_sequences: list[NonEmptyText] = []
    stream: bool = False
    metadata: CallerLabels | None = None


_CACHED = {"cache_control": IgnoredField("object", "prefixes are kept in any case")}
_NONE = Foreign({}, {})
_FORMAT_CURE = "send `output_config.format`"
BODY = Foreign(
    unbuilt={
        "billing_policy": (),
        "compaction": (),
        "container": (),
        # The second value is what agents send: it clears nothing.
        "context_management": (
            {"edits": []},
            {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        ),
        "diagnostics": (),
        "fallback_credit_token": (),
        "fallbacks": ([],),
        "inference_geo": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
        "thread": (),
    },
    taken={
        **_CACHED,
        "service_tier": IgnoredField("string", "there is one tier"),
        "user_profile_id": IgnoredField("string", "a label for the caller's own records"),
    },
    cures={
        "function_call": "send `tool_choice`",
        "functions": "send `tools`",
        "input": "send `messages`",
        "instructions": "send `system`",
        "max_completion_tokens": "send `max_tokens`",
        "max_output_tokens": "send `max_tokens`",
        "parallel_tool_calls": "send `tool_choice.disable_parallel_tool_use`",
        "prompt": "send `messages`",
        "reasoning": "send `output_config.effort`",
        "reasoning_effort": "send `output_config.effort`",
        "response_format": _FORMAT_CURE,
        "stop": "send `stop_sequences`",
        "stream_options": "leave it out: every stream has the usage",
        "text": _FORMAT_CURE,
        "user": "send `metadata.user_id`",
    },
)
_ASSISTANT_TURN = Foreign(
    {},
    {},
    {
        "reasoning": "send a `thinking` block in `content`",
        "reasoning_content": "send a `thinking` block in `content`",
        "tool_calls": "send `tool_use` blocks in `content`",
    },
)
_TOOL_SELECTION = Foreign({}, {}, {"function": "send its `name`"})
_OUTPUT_SCHEMA = Foreign({}, {}, {"json_schema": "send its `schema`"})
TOOL_CURE = "send its `name` and `description`, and its parameters as `input_schema`"
TEXT_BLOCK = Foreign(unbuilt={"citations": ([],)}, taken=_CACHED)
TOOL_USE_BLOCK = Foreign(
    unbuilt={"caller": ({"type": "direct"},)}, taken=_CACHED, cures={"arguments": "send `input`"}
)
TOOL_RESULT_BLOCK = Foreign(unbuilt={}, taken=_CACHED, cures={"tool_call_id": "send `tool_use_id`"})
TOOL_DEFINITION = Foreign(
    unbuilt={
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "input_examples": ([],),
    },
    taken={
        **_CACHED,
        "eager_input_streaming": IgnoredField("boolean", "inputs are streamed in any case"),
    },
    cures={"function": TOOL_CURE, "parameters": "send `input_schema`"},
)
# The objects that clients send, and the fields without effect that each may also have.
SENT_OBJECTS: dict[type[msgspec.Struct], Foreign] = {
    MessagesRequest: BODY,
    CountTokensRequest: BODY,
    UserTurn: _NONE,
    AssistantTurn: _ASSISTANT_TURN,
    SystemTurn: _NONE,
    TextBlock: TEXT_BLOCK,
    ThinkingBlock: _NONE,
    RedactedThinkingBlock: _NONE,
    ToolUseBlock: TOOL_USE_BLOCK,
    ToolResultBlock: TOOL_RESULT_BLOCK,
    ToolDefinition: TOOL_DEFINITION,
    ToolSelection: _TOOL_SELECTION,
    ThinkingOptions: _NONE,
    OutputSchema: _OUTPUT_SCHEMA,
    OutputOptions: _NONE,
    CallerLabels: _NONE,
}
