"""The tools of a chat, and which of them the model may or must call."""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from sagellm.chat_formats import ToolSpec, ToolUse
from sagellm.gateway.api_errors import wrong
from sagellm.gateway.protocol.json import fields_of
from sagellm.gateway.protocol.other_apis import TOOL, TOOL_CHOICE, TOOL_FUNCTION, Foreign
from sagellm.gateway.protocol.request import at_most
from sagellm.graphs.vocabulary import nearest

MAX_TOOLS = 1024  # agents with several MCP servers pass the 128 of the OpenAI API
_NUM_GUESSED = 128  # tools that a wrong name is compared with: one takes up to 0.3 ms of the loop
# The lookahead excludes a line end, which "$" alone would allow.
ToolName: TypeAlias = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$(?!\n)")]


class ToolFunction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The description of a tool. `parameters` is a JSON schema of its arguments.

    The arguments of a call obey the schema if the call is required, or if `strict` is true.
    """

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    type: Literal["function"]
    function: ToolFunction

    @property
    def plain(self) -> dict[str, Any]:
        """The tool in the form that chat templates take."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


class FunctionName(msgspec.Struct, frozen=True, kw_only=True):
    """The name of one of the tools."""

    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    """The tool that the model must call."""

    function: FunctionName


class AllowedTool(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    function: FunctionName


class AllowedToolList(msgspec.Struct, frozen=True, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="allowed_tools"
):
    """Some of the tools. The model sees no others."""

    allowed_tools: AllowedToolList


# Type of a choice -> the fields of the object that it names.
_CHOICES = {
    "function": FunctionName.__struct_fields__,
    "allowed_tools": AllowedToolList.__struct_fields__,
}
_NONE = Foreign({}, {})
Tools: TypeAlias = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
ToolMode: TypeAlias = Literal["none", "auto", "required"]
ToolChoice: TypeAlias = ToolMode | NamedTool | AllowedTools


def read_tools(value: Any) -> Any:
    """Return the tools with their known fields only. Types are not yet checked.

    Raises ApiError (400) with the place of the first field that is unknown.
    """
    if not isinstance(value, list):
        return value
    return _known_tools(value, "tools")


def _known_tools(tools: list[Any], where: str) -> list[dict[str, Any]]:
    at_most(where, len(tools), MAX_TOOLS, "tools")
    return [_known(tool, f"{where}[{index}]") for index, tool in enumerate(tools)]


def _known(tool: Any, where: str) -> dict[str, Any]:
    said = fields_of(tool, Tool.__struct_fields__, TOOL, where)
    if "function" in said:
        known = ToolFunction.__struct_fields__
        said["function"] = fields_of(said["function"], known, TOOL_FUNCTION, f"{where}.function")
    return said


def read_tool_choice(value: Any) -> Any:
    """Return the choice with its known fields only. Types are not yet checked.

    Raises ApiError (400) with the place of the first field that is unknown.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _CHOICES:
        return value
    said = fields_of(value, ("type", kind), TOOL_CHOICE, "tool_choice")
    if kind in said:
        place = f"tool_choice.{kind}"
        inner = said[kind] = fields_of(said[kind], _CHOICES[kind], _NONE, place)
        if isinstance(inner.get("tools"), list):  # some clients send the whole tools again
            inner["tools"] = _known_tools(inner["tools"], f"{place}.tools")
    return said


def check_tools(tools: list[Tool], choice: ToolChoice | None) -> None:
    """Raise ApiError (400) for a name that two tools have, and for a choice that has no tool."""
    names: dict[str, None] = {}  # a set that keeps the order
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            raise wrong(f"tools[{index}].function.name", "is the name of an earlier tool, too")
        names[tool.function.name] = None
    if isinstance(choice, NamedTool):
        _check_name("tool_choice.function.name", choice.function.name, names)
    elif isinstance(choice, AllowedTools):
        for index, named in enumerate(choice.allowed_tools.tools):
            place = f"tool_choice.allowed_tools.tools[{index}].function.name"
            _check_name(place, named.function.name, names)
    elif choice == "required" and not names:
        raise wrong("tool_choice", "is `required`, but there are no `tools`")


def _check_name(place: str, name: str, names: dict[str, None]) -> None:
    if name in names:
        return
    if not names:
        raise wrong(place, "names a tool, but there are no `tools`")
    # A name longer than any tool's is no typo, and comparing it would take long.
    close = nearest(name, list(names)[:_NUM_GUESSED]) if len(name) <= 64 else None
    hint = f"; did you mean `{close}`?" if close else ""
    raise wrong(place, f"is none of the {len(names)} tools{hint}")


def offered_tools(tools: list[Tool], choice: ToolChoice | None) -> list[Tool]:
    """Return the tools that the model sees. `check_tools` has passed."""
    if choice == "none":
        return []  # a model that sees tools calls them all the same
    if not isinstance(choice, AllowedTools):
        return tools
    allowed = {tool.function.name for tool in choice.allowed_tools.tools}
    return [tool for tool in tools if tool.function.name in allowed]


def tool_use_of(tools: list[Tool], choice: ToolChoice | None, *, parallel: bool) -> ToolUse:
    """Return the offered tools of a request, in the form that chat formats take.

    `check_tools` has passed.
    """
    specs = tuple(
        ToolSpec(
            name=tool.function.name,
            description=tool.function.description or "",
            parameters=tool.function.parameters,
            strict=tool.function.strict or False,
        )
        for tool in offered_tools(tools, choice)
    )
    if isinstance(choice, NamedTool):  # one call, as in vLLM: clients expect no second one
        return ToolUse(tools=specs, named=choice.function.name, parallel=False)
    if isinstance(choice, AllowedTools):
        return ToolUse(tools=specs, choice=choice.allowed_tools.mode, parallel=parallel)
    return ToolUse(tools=specs, choice=choice or "auto", parallel=parallel)
