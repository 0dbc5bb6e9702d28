"""The messages of a conversation: roles and text; other content is refused by its place."""

from typing import Any, Literal, TypeAlias

import msgspec

from sagellm.gateway.failure import wrong
from sagellm.gateway.protocol.fields import fields_of
from sagellm.gateway.protocol.sizes import at_most
from sagellm.gateway.protocol.unbuilt import MESSAGE, PART
from sagellm.gateway.settings import Limits

MAX_PARTS = 1024  # of one message
Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation. `type` is what some clients add to every message."""

    role: Role
    content: str | list[TextPart]
    name: str | None = None
    tool_call_id: str | None = None
    type: Literal["text"] = "text"

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template knows it: a developer is a system, parts are one text."""
        role = "system" if self.role == "developer" else self.role
        plain = {"role": role, "content": self._text}
        named = {"name": self.name, "tool_call_id": self.tool_call_id}
        return plain | {name: value for name, value in named.items() if value is not None}

    @property
    def _text(self) -> str:
        if isinstance(self.content, str):
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
    return said


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise wrong(f"{where}.type", "only parts of type `text` are served")
    return fields_of(part, TextPart.__struct_fields__, PART, where)
