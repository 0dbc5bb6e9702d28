"""Translates a body of /v1/responses to that of a chat, and the chat's errors back."""

import re
from typing import Any, Protocol, assert_never

import msgspec

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.responses_fields import (
    INCLUDE_LOGPROBS,
    AllowedFunctions,
    CallOutputItem,
    FunctionCallItem,
    InputItem,
    InputMessage,
    InputTextPart,
    ItemReference,
    NamedFunction,
    OutputTextPart,
    ReasoningItem,
    RefusalPart,
    ResponsesRequest,
)
from sagellm.gateway.protocol.translated_chat import TranslatedChat

# Field of the chat -> field of the response. Those of messages and tools depend on the body.
_PLACES = {
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.function": "tool_choice",
    "truncate_prompt_tokens": "truncation",
}
# Fields that the chat's messages also name where another field is wrong.
_NAMED = re.compile(r"\b(max_completion_tokens|max_tokens|response_format)\b")


class ChatOfResponses(TranslatedChat):
    """The fields of a chat that do not have the same value in a body of /v1/responses."""

    def renamed(self, error: ApiError) -> ApiError:
        renamed = super().renamed(error)
        renamed.message = _NAMED.sub(lambda found: _PLACES[found[0]], renamed.message)
        return renamed


class FindItem(Protocol):
    def __call__(self, item_id: str, place: str) -> InputItem:
        """Return the kept item with an id. `place`: that of the reference. Raises ApiError."""


def chat_of(asked: ResponsesRequest, find: FindItem) -> ChatOfResponses:
    """Return the chat that a body asks for. Raises ApiError for an unknown item."""
    made = ChatOfResponses(dict(_PLACES))
    made.body["messages"] = _messages(asked, made.places, find)
    made.body |= _tools(asked, made.places)
    if INCLUDE_LOGPROBS in asked.include:
        made.body["logprobs"] = True
    if asked.truncation == "auto":
        made.body["truncate_prompt_tokens"] = -1
    if asked.reasoning is not None and asked.reasoning.effort is not None:
        made.body["reasoning_effort"] = asked.reasoning.effort
    if asked.text is not None and asked.text.format is not None:
        made.body["response_format"] = _nested(asked.text.format)
    return made


def _messages(
    asked: ResponsesRequest, places: dict[str, str], find: FindItem
) -> list[dict[str, Any]]:
    conversation = _Conversation(places)
    if asked.instructions is not None:
        conversation.say("system", asked.instructions, "instructions", "instructions")
    if isinstance(asked.input, str):
        conversation.say("user", asked.input, "input", "input")
    else:
        for index, item in enumerate(asked.input):
            place = f"input[{index}]"
            kept = find(item.id, place) if isinstance(item, ItemReference) else item
            conversation.add(kept, place)
    return conversation.messages


class _Conversation:
    """Makes the messages of a chat of items.

    Reasoning, text and calls of the assistant that follow each other are one message, because chat
    templates take them so.
    """

    def __init__(self, places: dict[str, str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self._places = places

    def say(self, role: str, content: str, place: str, text_place: str) -> None:
        self._begin({"role": role, "content": content}, place)
        self._place("content", text_place)

    def add(self, item: InputItem, place: str) -> None:
        match item:
            case InputMessage(role="assistant"):
                turn = self._turn(("content", "tool_calls"), place)
                turn["content"] = _text(item.content)
                self._place("content", f"{place}.content")
            case InputMessage():
                self.say(item.role, _text(item.content), place, f"{place}.content")
            case FunctionCallItem():
                self._call(item, place)
            case CallOutputItem():
                self.say("tool", _text(item.output), place, f"{place}.output")
                self.messages[-1]["tool_call_id"] = item.call_id
            case ReasoningItem():
                turn = self._turn(("content", "tool_calls", "reasoning_content"), place)
                turn["reasoning_content"] = _reasoning(item)
            case _:
                assert_never(item)

    def _call(self, item: FunctionCallItem, place: str) -> None:
        calls = self._turn((), place).setdefault("tool_calls", [])
        self._place("tool_calls", place)  # for an error about their number
        self._place(f"tool_calls[{len(calls)}]", place)
        self._place(f"tool_calls[{len(calls)}].function", place)
        function = {"name": item.name, "arguments": item.arguments}
        calls.append({"id": item.call_id, "type": "function", "function": function})

    def _turn(self, later: tuple[str, ...], place: str) -> dict[str, Any]:
        """Return the assistant's message that goes on, or a new one if it has a field of `later`.

        An assistant's message without content and calls gets an empty content: chats need one.
        """
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "assistant" and not any(last.get(name) for name in later):
            return last
        return self._begin({"role": "assistant", "content": ""}, place)

    def _begin(self, message: dict[str, Any], place: str) -> dict[str, Any]:
        self.messages.append(message)
        self._places[f"messages[{len(self.messages) - 1}]"] = place
        return message

    def _place(self, name: str, place: str) -> None:
        self._places[f"messages[{len(self.messages) - 1}].{name}"] = place


def _text(content: str | list[Any]) -> str:
    """Return the text of a content; that of all its parts, joined."""
    if isinstance(content, str):
        return content
    return "".join(_part_text(part) for part in content)


def _part_text(part: InputTextPart | OutputTextPart | RefusalPart) -> str:
    return part.refusal if isinstance(part, RefusalPart) else part.text


def _reasoning(item: ReasoningItem) -> str:
    return "".join(part.text for part in item.content or item.summary)


def _tools(asked: ResponsesRequest, places: dict[str, str]) -> dict[str, Any]:
    """Return the fields `tools` and `tool_choice` of the chat, if the body has them."""
    said: dict[str, Any] = {}
    if asked.tools:
        said["tools"] = [_nested(tool) for tool in asked.tools]
        places |= {f"tools[{at}].function": f"tools[{at}]" for at in range(len(asked.tools))}
    choice = asked.tool_choice
    if isinstance(choice, AllowedFunctions):
        tools = [_nested(tool) for tool in choice.tools]
        said["tool_choice"] = {
            "type": "allowed_tools",
            "allowed_tools": {"mode": choice.mode, "tools": tools},
        }
        place = "tool_choice.allowed_tools.tools"
        places[place] = "tool_choice.tools"
        places |= {
            f"{place}[{at}].function": f"tool_choice.tools[{at}]" for at in range(len(tools))
        }
    elif isinstance(choice, NamedFunction):
        said["tool_choice"] = _nested(choice)
    elif choice is not None:
        said["tool_choice"] = choice
    return said


def _nested(struct: msgspec.Struct) -> dict[str, Any]:
    """Return an object as chats have it: its fields stand below the name of its type."""
    plain: dict[str, Any] = msgspec.to_builtins(struct)
    kind = plain.pop("type")
    fields = {name: value for name, value in plain.items() if value is not None}
    return {"type": kind, kind: fields} if fields else {"type": kind}
