"""Reads the bodies of /v1/messages and its count_tokens: strict JSON, then the objects in them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar, get_args

import msgspec

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.anthropic_fields import (
    SENT_OBJECTS,
    TOOL_CURE,
    AssistantTurn,
    CallerLabels,
    ChoiceType,
    CountTokensRequest,
    MessagesRequest,
    OutputEffort,
    OutputOptions,
    OutputSchema,
    RedactedThinkingBlock,
    SystemTurn,
    TextBlock,
    ThinkingBlock,
    ThinkingDisplay,
    ThinkingOptions,
    ThinkingType,
    ToolDefinition,
    ToolResultBlock,
    ToolSelection,
    ToolUseBlock,
    UserTurn,
)
from sagellm.gateway.protocol.bodies import convert
from sagellm.gateway.protocol.chat_messages import MAX_PARTS
from sagellm.gateway.protocol.json import fields_of, read_json
from sagellm.gateway.protocol.request import at_most
from sagellm.gateway.protocol.tool_choice import MAX_TOOLS
from sagellm.gateway.settings import RequestLimits

V = TypeVar("V")
R = TypeVar("R", bound=CountTokensRequest)
SentType: TypeAlias = type[msgspec.Struct]
Words: TypeAlias = tuple[str, ...]


def read_messages_body(body: bytes, limits: RequestLimits) -> MessagesRequest:
    """Read a body of /v1/messages. Raises ApiError (400)."""
    return _checked(_read(body, MessagesRequest, limits))


def read_count_body(body: bytes, limits: RequestLimits) -> CountTokensRequest:
    """Read a body of /v1/messages/count_tokens. Raises ApiError (400)."""
    return _checked(_read(body, CountTokensRequest, limits))


def _read(body: bytes, struct: type[R], limits: RequestLimits) -> R:
    """Return the body with its types checked."""
    value = read_json(body, max_depth=limits.json_depth)
    if isinstance(value, dict) and value.get("thread") is not None:
        # The client's own loops over tools begin a thread, and go on without it after this code.
        message = "conversations are not kept; send all messages with each request"
        raise wrong("thread", message, "thread_unsupported_request")
    said = fields_of(value, struct.__struct_fields__, SENT_OBJECTS[struct])
    if isinstance(said.get("messages"), list):
        at_most("messages", len(said["messages"]), limits.num_messages, "messages")
    for name, read in _READERS.items():
        if name in said:
            said[name] = read(said[name], name)
    return convert(said, struct)


def _fields(value: Any, struct: SentType, where: str, **words: Words) -> dict[str, Any]:
    """Return the known fields of an object. `words`: the fields that take one of several words."""
    said = fields_of(value, struct.__struct_fields__, SENT_OBJECTS[struct], where)
    for name, allowed in words.items():
        if name in said and said[name] not in allowed:
            raise wrong(f"{where}.{name}", f"must be one of {', '.join(allowed)}")
    return said


class _Place(NamedTuple):
    """A place of blocks. `structs`: the blocks that may stand there, by `type`. `what`: its name.

    `turn`: the type of the message, if the place is the content of one.
    """

    structs: Mapping[str, SentType]
    what: str
    turn: SentType | None = None


_TEXT = {"text": TextBlock}
_SYSTEM = _Place(_TEXT, "a system prompt", SystemTurn)
_RESULT = _Place(_TEXT, "the result of a tool")
_ROLES = {
    "user": _Place({**_TEXT, "tool_result": ToolResultBlock}, "a message of the user", UserTurn),
    "assistant": _Place(
        {
            **_TEXT,
            "thinking": ThinkingBlock,
            "redacted_thinking": RedactedThinkingBlock,
            "tool_use": ToolUseBlock,
        },
        "a message of the assistant",
        AssistantTurn,
    ),
    "system": _SYSTEM,
}


def _turns(value: Any, where: str) -> Any:
    return _each(value, where, _turn)


_ROLE_CURES = {
    "developer": "send the role `system`",
    "function": "send a `tool_result` block in a message of the user",
    "tool": "send a `tool_result` block in a message of the user",
}


def _turn(value: Any, where: str) -> dict[str, Any]:
    role = value.get("role") if isinstance(value, dict) else None
    if isinstance(role, str) and role in _ROLE_CURES:
        raise wrong(f"{where}.role", f"is of another API; {_ROLE_CURES[role]}")
    role, place, said = _tagged(value, "role", _ROLES, where)
    assert place.turn is not None
    said = _fields(said, place.turn, where)
    if "content" in said:
        said["content"] = _blocks(said["content"], f"{where}.content", place)
    return {"role": role, **said}


def _tagged(
    value: Any, tag: str, known: Mapping[str, V], where: str
) -> tuple[str, V, dict[str, Any]]:
    """Return the tag of an object, what `known` has for it, and the object's other fields.

    Raises ApiError (400) if the tag is missing or unknown.
    """
    if not isinstance(value, dict):
        raise wrong(where, "must be an object")
    found = value.get(tag)
    if found is None:
        raise _missing(f"{where}.{tag}")
    if not isinstance(found, str) or found not in known:
        raise wrong(f"{where}.{tag}", f"must be one of {', '.join(known)}")
    return found, known[found], {name: one for name, one in value.items() if name != tag}


def _each(value: Any, where: str, read: Callable[[Any, str], Any]) -> Any:
    """Return a list with all its items read. Another value is left to the check of types."""
    if not isinstance(value, list):
        return value
    return [read(one, f"{where}[{index}]") for index, one in enumerate(value)]


def _blocks(value: Any, where: str, place: _Place) -> Any:
    if isinstance(value, list):
        at_most(where, len(value), MAX_PARTS, "blocks")
    return _each(value, where, lambda one, at: _block(one, at, place))


def _block(value: Any, where: str, place: _Place) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in place.structs:
        served = ", ".join(place.structs)
        message = f"this server reads no such block in {place.what}; it reads {served}"
        raise wrong(f"{where}.type", message, "unsupported_parameter")
    kind, struct, said = _tagged(value, "type", place.structs, where)
    said = _fields(said, struct, where)
    if kind == "tool_result" and "content" in said:
        said["content"] = _blocks(said["content"], f"{where}.content", _RESULT)
    return {"type": kind, **said}


def _tools(value: Any, where: str) -> Any:
    if isinstance(value, list):
        at_most(where, len(value), MAX_TOOLS, "tools")
    return _each(value, where, _tool)


def _tool(value: Any, where: str) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function":
        raise wrong(f"{where}.type", f"is of another API; leave it out, and {TOOL_CURE}")
    if kind not in (None, "custom"):
        message = "this server has no tools of its own; it takes only `custom` tools"
        raise wrong(f"{where}.type", message, "unsupported_parameter")
    return _fields(value, ToolDefinition, where)


def _choice(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(where, 'must be an object such as {"type": "auto"}')
    return _fields(value, ToolSelection, where, type=get_args(ChoiceType))


def _thinking(value: Any, where: str) -> dict[str, Any]:
    types, displays = get_args(ThinkingType), get_args(ThinkingDisplay)
    return _fields(value, ThinkingOptions, where, type=types, display=displays)


def _output(value: Any, where: str) -> dict[str, Any]:
    said = _fields(value, OutputOptions, where, effort=get_args(OutputEffort))
    if "format" in said:
        said["format"] = _format(said["format"], f"{where}.format")
    return said


def _format(value: Any, where: str) -> dict[str, Any]:
    return _fields(value, OutputSchema, where, type=("json_schema",))


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "messages": _turns,
    "system": lambda value, where: _blocks(value, where, _SYSTEM),
    "tools": _tools,
    "tool_choice": _choice,
    "thinking": _thinking,
    "output_config": _output,
    "output_format": _format,
    "metadata": lambda value, where: _fields(value, CallerLabels, where),
}


def _checked(asked: R) -> R:
    """Return a body after the checks of fields that belong together. Raises ApiError (400)."""
    thinking, choice, output = asked.thinking, asked.tool_choice, asked.output_config
    if thinking is not None and thinking.type == "enabled" and thinking.budget_tokens is None:
        raise _missing("thinking.budget_tokens")
    if choice is not None:
        _check_choice(choice, asked)
    if output is not None and output.format is not None and asked.output_format is not None:
        raise wrong("output_format", "stands beside `output_config.format`; give one of them")
    last = asked.messages[-1]
    if isinstance(last, AssistantTurn) and not isinstance(last.content, str):
        calls = [index for index, one in enumerate(last.content) if isinstance(one, ToolUseBlock)]
        if calls:
            place = f"messages[{len(asked.messages) - 1}].content[{calls[0]}]"
            raise wrong(place, "is a call without an answer; send a `tool_result` after it")
    return asked


def _check_choice(choice: ToolSelection, asked: CountTokensRequest) -> None:
    if choice.type == "tool" and choice.name is None:
        raise _missing("tool_choice.name")
    if choice.type != "tool" and choice.name is not None:
        raise wrong("tool_choice.name", "is only for the type `tool`")
    if choice.type in ("any", "tool") and not asked.tools:
        what = f"has the type `{choice.type}`, but there are no `tools`; send some, or `auto`"
        raise wrong("tool_choice", what)


def _missing(param: str) -> ApiError:
    return wrong(param, "is missing", "missing_required_parameter")
