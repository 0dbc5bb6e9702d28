"""Reads the body of /v1/responses: strict JSON, then the objects in it, then the chat it asks."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, get_args

import msgspec

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.bodies import ChatRequest, convert
from sagellm.gateway.protocol.chat_messages import MAX_PARTS
from sagellm.gateway.protocol.json import fields_of, read_json, shown
from sagellm.gateway.protocol.request import Effort, at_most
from sagellm.gateway.protocol.responses_chat import ChatOfResponses, FindItem, chat_of
from sagellm.gateway.protocol.responses_fields import (
    INCLUDE_LOGPROBS,
    RENAMED,
    RESPONSES,
    SENT,
    SHARED,
    STATEFUL,
    AllowedFunctions,
    CallOutputItem,
    FunctionCallItem,
    FunctionTool,
    Includable,
    InputMessage,
    InputRole,
    InputTextPart,
    ItemReference,
    JsonObject,
    JsonSchema,
    NamedFunction,
    OutputTextPart,
    PlainText,
    ReasoningItem,
    ReasoningOptions,
    ReasoningPart,
    RefusalPart,
    ResponsesRequest,
    SummaryPart,
    SummaryStyle,
    TextOptions,
    Truncation,
    Verbosity,
)
from sagellm.gateway.protocol.tool_choice import ToolMode
from sagellm.gateway.settings import RequestLimits

Kinds: TypeAlias = Mapping[str, type[msgspec.Struct]]  # value of `type` -> the object's type

_ITEMS: Kinds = {
    "message": InputMessage,
    "function_call": FunctionCallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}
_CONTENT: Kinds = {
    "input_text": InputTextPart,
    "output_text": OutputTextPart,
    "refusal": RefusalPart,
}
_OUTPUT: Kinds = {"input_text": InputTextPart}
_SUMMARY: Kinds = {"summary_text": SummaryPart}
_REASONING: Kinds = {"reasoning_text": ReasoningPart}
_TOOLS: Kinds = {"function": FunctionTool}
_CHOICES: Kinds = {"function": NamedFunction, "allowed_tools": AllowedFunctions}
_NAMED: Kinds = {"function": NamedFunction}
_FORMATS: Kinds = {"text": PlainText, "json_object": JsonObject, "json_schema": JsonSchema}
# The fields of each kind of item that hold lists of parts.
_PARTS: Mapping[str, Mapping[str, Kinds]] = {
    "message": {"content": _CONTENT},
    "function_call": {},
    "function_call_output": {"output": _OUTPUT},
    "reasoning": {"summary": _SUMMARY, "content": _REASONING},
    "item_reference": {},
}


class ResponsesCall(NamedTuple):
    """A checked body: its own fields, the chat that it asks for, and where the chat is from."""

    asked: ResponsesRequest
    chat: ChatRequest
    made: ChatOfResponses


def read_responses(body: bytes, limits: RequestLimits, find: FindItem) -> ResponsesCall:
    """Read a body of /v1/responses. `find` finds the items that the body references.

    Raises ApiError, which names the field of this API. The model's limits are checked later.
    """
    said = _fields(read_json(body, max_depth=limits.json_depth), limits)
    asked = convert({name: said[name] for name in said if name in _OWN}, ResponsesRequest)
    _check_logprobs(said, asked)
    made = chat_of(asked, find)
    passed = {RENAMED.get(name, name): said[name] for name in said if name not in _OWN}
    made.body |= passed
    return ResponsesCall(asked, made.read(limits), made)


# Fields of other APIs, by the object in which clients send them -> what to send instead.
_MEANT: Mapping[type[msgspec.Struct], Mapping[str, str]] = {
    ResponsesRequest: {
        "function_call": "did you mean `tool_choice`?",
        "functions": "did you mean `tools`?",
        "logprobs": f'did you mean `include`: ["{INCLUDE_LOGPROBS}"]?',
        "max_completion_tokens": "did you mean `max_output_tokens`?",
        "max_tokens": "did you mean `max_output_tokens`?",
        "messages": "did you mean `input`?",
        "output_config": "did you mean `text.format`?",
        "reasoning_effort": "did you mean `reasoning.effort`?",
        "response_format": "did you mean `text.format`?",
        "stop_sequences": "did you mean `stop`?",
        "system": "did you mean `instructions`?",
        "thinking": "did you mean `reasoning`?",
        "verbosity": "did you mean `text.verbosity`?",
    },
    InputMessage: {
        "reasoning": "send an item of type `reasoning` before the message",
        "reasoning_content": "send an item of type `reasoning` before the message",
        "tool_call_id": "send an item of type `function_call_output` instead of the message",
        "tool_calls": "send items of type `function_call` after the message",
    },
    FunctionTool: {"input_schema": "did you mean `parameters`?"},
}
_OWN = frozenset(ResponsesRequest.__struct_fields__)
_KNOWN = (*ResponsesRequest.__struct_fields__, *RENAMED, *SHARED)


def _fields(value: Any, limits: RequestLimits) -> dict[str, Any]:
    """Return the known fields of a body, and of the objects in it. Types are not yet checked."""
    if isinstance(value, dict):
        _check_stateless(value)
        _check_names(value, ResponsesRequest, "")
    said = fields_of(value, _KNOWN, SENT[ResponsesRequest])
    _check_words(said, "truncation", get_args(Truncation))
    if isinstance(said.get("input"), list):
        at_most("input", len(said["input"]), limits.num_messages, "items")
        said["input"] = [_item(one, f"input[{at}]") for at, one in enumerate(said["input"])]
    if isinstance(said.get("include"), list):
        for at, one in enumerate(said["include"]):
            _check_words({"": one}, "", get_args(Includable), f"include[{at}]")
    if isinstance(said.get("tools"), list):
        said["tools"] = _objects(said["tools"], _TOOLS, "tools")
    if "tool_choice" in said:
        said["tool_choice"] = _choice(said["tool_choice"])
    if "text" in said:
        said["text"] = _text(said["text"])
    if "reasoning" in said:
        said["reasoning"] = _reasoning(said["reasoning"])
    return said


def _check_stateless(value: dict[str, Any]) -> None:
    """Raise ApiError (400), with what to do instead, for a field that needs a stored response."""
    for name, cure in STATEFUL.items():
        if not any(value.get(name) is harmless for harmless in (None, *RESPONSES.unbuilt[name])):
            raise wrong(name, cure, "unsupported_parameter")


def _check_names(value: dict[str, Any], struct: type[msgspec.Struct], where: str) -> None:
    """Raise ApiError (400), with what to send instead, for a field that other APIs have."""
    for name, cure in _MEANT.get(struct, {}).items():
        if value.get(name) is not None:
            place = f"{where}.{name}" if where else name
            told = f"unknown field `{name}`{f' in {where}' if where else ''}; {cure}"
            raise ApiError(400, told, param=place, code="unknown_parameter")


def _check_words(said: dict[str, Any], name: str, words: tuple[str, ...], where: str = "") -> None:
    """Raise ApiError (400) if a field is given and is none of `words`."""
    if name in said and said[name] not in words:
        raise wrong(where + name, f"must be one of {', '.join(words)}")


def _item(item: Any, where: str) -> dict[str, Any]:
    """Return one item of the input. Messages and references may leave out their type."""
    kind = "message"
    if isinstance(item, dict):
        is_id = {name for name, value in item.items() if value is not None} == {"id"}
        kind = ("item_reference" if is_id else kind) if item.get("type") is None else item["type"]
        item = {**item, "type": kind}
    said = _object(item, _ITEMS, where)
    if said.get("role") in ("tool", "function"):
        cure = "send what a function returned as an item of type `function_call_output`"
        raise wrong(f"{where}.role", cure)
    _check_words(said, "role", get_args(InputRole), f"{where}.")
    for name, kinds in _PARTS[kind].items():
        if isinstance(said.get(name), list):
            at_most(f"{where}.{name}", len(said[name]), MAX_PARTS, "parts")
            said[name] = _objects(said[name], kinds, f"{where}.{name}")
    return said


def _objects(values: list[Any], kinds: Kinds, where: str) -> list[dict[str, Any]]:
    return [_object(value, kinds, f"{where}[{at}]") for at, value in enumerate(values)]


def _object(value: Any, kinds: Kinds, where: str) -> dict[str, Any]:
    """Return the known fields of an object that its `type` names. Raises ApiError (400)."""
    if not isinstance(value, dict):
        raise wrong(where, "must be an object")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise _unserved(kind, kinds, f"{where}.type")
    struct = kinds[kind]
    _check_names(value, struct, where)
    if kind not in struct.__struct_fields__ and isinstance(value.get(kind), dict):
        raise _nested(f"{where}.{kind}")
    fields = {name: one for name, one in value.items() if name != "type"}
    return {"type": kind, **fields_of(fields, struct.__struct_fields__, SENT[struct], where)}


def _nested(param: str) -> ApiError:
    """Return the error of an object whose fields stand below the name of its type, as in chats."""
    where, _, kind = param.rpartition(".")
    told = f"unknown field `{kind}` in {where}; its fields stand beside `type` in this API"
    return ApiError(400, told, param=param, code="unknown_parameter")


# Types that the API has and this server does not: an error may repeat them.
_UNSERVED = frozenset(
    (
        *("input_image", "input_file", "input_audio"),
        *("web_search", "web_search_preview", "file_search", "code_interpreter", "mcp", "custom"),
        *("image_generation", "computer", "computer_use_preview", "local_shell", "shell"),
        *("apply_patch", "namespace", "tool_search", "programmatic_tool_calling"),
    )
)


def _unserved(kind: Any, kinds: Kinds, param: str) -> ApiError:
    served = ", ".join(f"`{name}`" for name in kinds)
    if kind in (None, ""):
        return wrong(param, f"is missing; it must be {served}", "missing_required_parameter")
    named = f"{shown(kind)} is not built; " if isinstance(kind, str) and kind in _UNSERVED else ""
    return wrong(param, f"{named}only {served} is served", "unsupported_parameter")


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        _check_words({"tool_choice": choice}, "tool_choice", get_args(ToolMode))
        return choice
    said = _object(choice, _CHOICES, "tool_choice")
    _check_words(said, "mode", ("auto", "required"), "tool_choice.")
    if isinstance(said.get("tools"), list):
        said["tools"] = _objects(said["tools"], _NAMED, "tool_choice.tools")
    return said


def _text(text: Any) -> dict[str, Any]:
    said = fields_of(text, TextOptions.__struct_fields__, SENT[TextOptions], "text")
    _check_words(said, "verbosity", get_args(Verbosity), "text.")
    if "format" in said:
        said["format"] = _object(said["format"], _FORMATS, "text.format")
    return said


def _reasoning(reasoning: Any) -> dict[str, Any]:
    known = ReasoningOptions.__struct_fields__
    said = fields_of(reasoning, known, SENT[ReasoningOptions], "reasoning")
    _check_words(said, "effort", get_args(Effort), "reasoning.")
    for name in ("summary", "generate_summary"):
        _check_words(said, name, get_args(SummaryStyle), "reasoning.")
    return said


def _check_logprobs(said: dict[str, Any], asked: ResponsesRequest) -> None:
    if said.get("top_logprobs") and INCLUDE_LOGPROBS not in asked.include:
        raise wrong("top_logprobs", f'needs `include`: ["{INCLUDE_LOGPROBS}"]')
