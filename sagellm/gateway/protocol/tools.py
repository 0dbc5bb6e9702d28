"""Tools and calls of them in a conversation: shown to the model, which calls none itself."""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from sagellm.gateway.failure import ApiError, wrong
from sagellm.gateway.protocol.json import read_json

MAX_TOOLS = 128  # as in the OpenAI API; of calls in one message too
ToolChoice: TypeAlias = Literal["none", "auto"]


class Function(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a tool does. `parameters` is a JSON schema, which is shown and not read."""

    name: Annotated[str, Meta(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may be told of. Further fields are dropped."""

    type: Literal["function"]
    function: Function

    @property
    def plain(self) -> dict[str, Any]:
        """As a chat template knows it."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`arguments`: the JSON text of an object; "" has none."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call in an earlier message of the assistant."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates know it: the arguments are an object."""
        function = {"name": self.function.name, "arguments": self._arguments}
        plain = {"type": self.type, "function": function}
        return plain if self.id is None else {"id": self.id, **plain}

    @property
    def _arguments(self) -> dict[str, Any]:
        text = self.function.arguments
        arguments: dict[str, Any] = msgspec.json.decode(text) if text else {}
        return arguments


Tools: TypeAlias = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
ToolCalls: TypeAlias = Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)]


def check_arguments(call: ToolCall, where: str, max_depth: int) -> None:
    """Raise ApiError (400) where the arguments are no JSON object; the text is not shown."""
    text, param = call.function.arguments, f"{where}.function.arguments"
    try:
        is_object = not text or isinstance(read_json(text.encode(), max_depth=max_depth), dict)
    except ApiError:
        is_object = False
    if not is_object:
        raise wrong(param, "must be the JSON text of an object")


def check_choice(said: dict[str, Any]) -> None:
    """Raise ApiError (400) where a call of a tool is asked for, which is not built."""
    choice = said.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise _unsupported("tool_choice", "this server makes no tool calls; send `none`")
    if said.get("tools") and choice != "none":
        cure = "leave them out, or show them to the model with `tool_choice`: `none`"
        raise _unsupported("tools", f"this server makes no tool calls; {cure}")


def _unsupported(param: str, message: str) -> ApiError:
    return wrong(param, message, "unsupported_parameter")
