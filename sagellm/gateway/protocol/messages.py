"""The messages of a conversation: roles, text and calls; other content is refused by its place."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from sagellm.gateway.failure import wrong
from sagellm.gateway.protocol.fields import fields_of
from sagellm.gateway.protocol.foreign import FUNCTION_CALL, MESSAGE, PART, TOOL_CALL
from sagellm.gateway.protocol.sizes import at_most
from sagellm.gateway.protocol.tools import FunctionCall, ToolCall, ToolCalls, check_arguments
from sagellm.gateway.settings import Limits

MAX_PARTS = 1024  # of one message
Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
        """As a chat template knows it: a developer is a system, parts are one text."""
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
        """Of the assistant; what others have is left out, as vLLM does."""
        return self.tool_calls if self.role == "assistant" else []

    @property
    def _text(self) -> str | None:
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


def read_messages(value: Any, limits: Limits) -> Any:
    """The messages with only fields that are served in them, types unchecked.

    Raises ApiError (400) that names the place of what is not served.
    """
    if not isinstance(value, list):
        return value
    at_most("messages", len(value), limits.num_messages, "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    said = fields_of(message, Message.__struct_fields__, MESSAGE, where)
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


def check_messages(messages: Sequence[Message], limits: Limits) -> None:
    """Raise ApiError (400) for content that is missing, and calls that are none."""
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.content is None and not message.calls:
            raise wrong(f"{where}.content", "is missing", "missing_required_parameter")
        for number, call in enumerate(message.calls):
            check_arguments(call, f"{where}.tool_calls[{number}]", limits.json_depth)
