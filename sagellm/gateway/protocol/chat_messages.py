"""The messages of a conversation: their types, their checks, and their rendering."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import msgspec
from msgspec import Meta

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.json import fields_of, read_json, shown
from sagellm.gateway.protocol.other_apis import FUNCTION_CALL, MESSAGE, PART, TOOL_CALL
from sagellm.gateway.protocol.request import at_most
from sagellm.gateway.protocol.tool_choice import MAX_TOOLS, Tool
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.models.chat import RESERVED_VARIABLES, Rendering

_ARGUMENTS_DEPTH = 32  # levels of the arguments of one call; deeper ones stay a text


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`arguments`: the JSON text of an object, or a call that was cut off; "" has none."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call in an earlier message of the assistant."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"

    @property
    def plain(self) -> dict[str, Any]:
        """The tool call in the form that chat templates take: the arguments are an object.

        Arguments that are no JSON object stay a text: agents send back what the model wrote, with
        the error, and the model shall see it.
        """
        function = {"name": self.function.name, "arguments": self._arguments}
        plain = {"type": self.type, "function": function}
        return plain if self.id is None else {"id": self.id, **plain}

    @property
    def _arguments(self) -> dict[str, Any] | str:
        text = self.function.arguments
        try:
            value = read_json(text.encode(), max_depth=_ARGUMENTS_DEPTH) if text else {}
        except ApiError:
            value = None
        return value if isinstance(value, dict) else text


ToolCalls: TypeAlias = Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)]

MAX_PARTS = 1024  # parts of one message
Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ConversationMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation. One of the assistant with `tool_calls` needs no content.

    `reasoning_content` and `reasoning` are two spellings of one text. `type` is what some clients
    add to every message.
    """

    role: Role
    content: str | list[TextPart] | None = None
    tool_calls: ToolCalls = []
    reasoning_content: str | None = None
    reasoning: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    type: Literal["text"] = "text"

    @property
    def plain(self) -> dict[str, Any]:
        """The message in the form that chat templates take.

        The role "developer" becomes "system", and parts are joined to one text.
        """
        role = "system" if self.role == "developer" else self.role
        plain = {"role": role, "content": self._text}
        thought = self.reasoning if self.reasoning_content is None else self.reasoning_content
        more = {
            "tool_calls": [call.plain for call in self.calls] or None,
            "reasoning_content": thought,
            "reasoning": thought,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        return plain | {name: value for name, value in more.items() if value is not None}

    @property
    def calls(self) -> list[ToolCall]:
        """The tool calls of an assistant's message. Other roles have none, as in vLLM."""
        return self.tool_calls if self.role == "assistant" else []

    @property
    def _text(self) -> str | None:
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


def read_messages(value: Any, limits: RequestLimits) -> Any:
    """Return the messages with their known fields only. Types are not yet checked.

    Raises ApiError (400) with the place of the first unsupported field.
    """
    if not isinstance(value, list):
        return value
    at_most("messages", len(value), limits.num_messages, "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    said = fields_of(message, ConversationMessage.__struct_fields__, MESSAGE, where)
    parts = said.get("content")
    if isinstance(parts, list):
        at_most(f"{where}.content", len(parts), MAX_PARTS, "parts")
        said["content"] = [
            _part(part, f"{where}.content[{index}]") for index, part in enumerate(parts)
        ]
    calls = said.get("tool_calls")
    if isinstance(calls, list):
        said["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    return said


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise wrong(f"{where}.type", "only parts of type `text` are served")
    return fields_of(part, TextPart.__struct_fields__, PART, where)


def _call(call: Any, where: str) -> dict[str, Any]:
    said = fields_of(call, ToolCall.__struct_fields__, TOOL_CALL, where)
    if said.get("type", "function") != "function":
        raise wrong(f"{where}.type", "only calls of type `function` are served")
    if "function" in said:
        known = FunctionCall.__struct_fields__
        said["function"] = fields_of(said["function"], known, FUNCTION_CALL, f"{where}.function")
    return said


def check_messages(messages: Sequence[ConversationMessage]) -> None:
    """Raise ApiError (400) for missing content."""
    for index, message in enumerate(messages):
        if message.content is None and not message.calls:
            raise wrong(f"messages[{index}].content", "is missing", "missing_required_parameter")


MAX_VARIABLES = 32
MAX_VARIABLE_LEN = 512
_LARGEST = 1 << 20  # bounds numbers, because a template may repeat a text by a variable's number

Variable: TypeAlias = (
    bool
    | Annotated[int, Meta(ge=-_LARGEST, le=_LARGEST)]
    | Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
    | Annotated[str, Meta(max_length=MAX_VARIABLE_LEN)]
    | None
)
Variables: TypeAlias = Annotated[dict[str, Variable], Meta(max_length=MAX_VARIABLES)]
# Switches that clients send to all models. They are accepted even if the template has no such
# variable.
_SWITCHES = frozenset({"enable_thinking", "thinking"})


class Conversation(Protocol):
    """A request with messages: a chat, or a body of /tokenize."""

    @property
    def messages(self) -> Sequence[ConversationMessage]: ...

    @property
    def offered_tools(self) -> Sequence[Tool]: ...

    @property
    def add_generation_prompt(self) -> bool | None: ...

    @property
    def continue_final_message(self) -> bool: ...

    @property
    def chat_template_kwargs(self) -> Mapping[str, Variable]: ...


def check_conversation(asked: Conversation) -> None:
    """Raise ApiError (400) for invalid messages, or for options of rendering that conflict."""
    check_messages(asked.messages)
    if not asked.continue_final_message:
        return
    if asked.add_generation_prompt:
        raise wrong("add_generation_prompt", "stands beside continue_final_message; give one")
    if asked.messages[-1].content is None:
        raise wrong("continue_final_message", "needs a final message with content")


def plain_messages(asked: Conversation) -> list[dict[str, Any]]:
    """Return the messages in the form that chat templates take."""
    return [message.plain for message in asked.messages]


def rendering_of(asked: Conversation, read: frozenset[str], effort: str | None = None) -> Rendering:
    """Return the options with which the model's template renders the conversation.

    `read`: the names of variables that the template reads. `effort`: a `reasoning_effort`. Raises
    ApiError (400) for a variable that the template does not read, or that clients may not set.
    """
    for name in asked.chat_template_kwargs:
        _check_variable(name, read)
    add = asked.add_generation_prompt
    given = {name: value for name, value in asked.chat_template_kwargs.items() if value is not None}
    return Rendering(
        add_generation_prompt=not asked.continue_final_message if add is None else add,
        continue_final_message=asked.continue_final_message,
        tools=tuple(tool.plain for tool in asked.offered_tools),
        variables={
            name: value
            for name, value in {**_effort_variables(effort), **given}.items()
            if name in read
        },
    )


def _effort_variables(effort: str | None) -> dict[str, bool | int | float | str]:
    """Return the variables in which templates read how much the model reasons."""
    if effort is None:
        return {}
    # Templates with a switch have no degrees: only "none" says that the switch is off.
    switches = dict.fromkeys(_SWITCHES, False) if effort == "none" else {}
    return {"reasoning_effort": effort, **switches}


def _check_variable(name: str, read: frozenset[str]) -> None:
    """Raise ApiError (400) for a variable that the client may not set, or that has no effect."""
    if name in RESERVED_VARIABLES:
        raise wrong("chat_template_kwargs", f"{shown(name)} is not for clients to set there")
    if name not in read | _SWITCHES:
        raise wrong("chat_template_kwargs", f"the model's template reads no variable {shown(name)}")
