"""Translates a body of /v1/messages to the body of a chat, and errors of the chat back."""

import json
from itertools import groupby
from typing import Any, TypeAlias

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.anthropic_fields import (
    AnyTurn,
    AssistantBlock,
    AssistantTurn,
    CountTokensRequest,
    MessagesRequest,
    TextBlock,
    TextBlocks,
    ThinkingBlock,
    ThinkingOptions,
    ToolDefinition,
    ToolResultBlock,
    ToolSelection,
    ToolUseBlock,
    UserBlock,
    UserTurn,
)
from sagellm.gateway.protocol.request import at_most
from sagellm.gateway.protocol.tool_choice import MAX_TOOLS
from sagellm.gateway.protocol.translated_chat import TranslatedChat

# Field of the chat -> field of this API. Those of messages and tools depend on the body.
_PLACES = {
    "chat_template_kwargs": "thinking",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "stop": "stop_sequences",
    "tool_choice.function": "tool_choice",
    "user": "metadata.user_id",
}
_MODES = {"auto": "auto", "any": "required", "none": "none"}
_ERROR_MARK = "Error: "
_Placed: TypeAlias = tuple[UserBlock | AssistantBlock, str]  # a block, and its place in the body


class ChatOfMessages(TranslatedChat):
    """The chat that a body of /v1/messages asks for."""

    def renamed(self, error: ApiError) -> ApiError:
        renamed = super().renamed(error)
        if error.code == "context_length_exceeded":
            # Agents look for these words, and shorten the conversation.
            renamed.message = f"prompt is too long: {renamed.message}"
        return renamed


def chat_of(asked: CountTokensRequest) -> ChatOfMessages:
    """Return the chat that a body asks for.

    The limit of the answer's tokens is left out: a chat refuses a limit beyond the context.
    """
    chat = ChatOfMessages(dict(_PLACES))
    body = chat.body
    if asked.model is not None:
        body["model"] = asked.model
    body["messages"] = _Conversation(chat.places).of(asked)
    # A final message of the assistant is the beginning of the answer.
    body["continue_final_message"] = isinstance(asked.messages[-1], AssistantTurn)
    if asked.tools:
        body["tools"] = [_tool(tool, index, chat.places) for index, tool in enumerate(asked.tools)]
    if asked.tool_choice is not None:
        body |= _choice(asked.tool_choice)
    if asked.thinking is not None:
        body["chat_template_kwargs"] = _switches(asked.thinking)
    _add_output(asked, chat)
    if isinstance(asked, MessagesRequest):
        body |= _sampling(asked)
    return chat


def _sampling(asked: MessagesRequest) -> dict[str, Any]:
    fields = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "stop": asked.stop_sequences,
        "stream": asked.stream,
        # The first and the last event of a stream have the usage.
        "stream_options": {"continuous_usage_stats": True},
    }
    labels = asked.metadata
    return fields if labels is None else {**fields, "user": labels.user_id}


def _tool(tool: ToolDefinition, index: int, places: dict[str, str]) -> dict[str, Any]:
    places[f"tools[{index}].function"] = f"tools[{index}]"
    places[f"tools[{index}].function.parameters"] = f"tools[{index}].input_schema"
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    said = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": said}


def _choice(choice: ToolSelection) -> dict[str, Any]:
    named = {"type": "function", "function": {"name": choice.name}}
    return {
        "tool_choice": _MODES.get(choice.type, named),
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }


def _switches(thinking: ThinkingOptions) -> dict[str, bool]:
    """Return the variables that chat templates of models with a switch read."""
    is_on = thinking.type != "disabled"
    return {"enable_thinking": is_on, "thinking": is_on}


def _add_output(asked: CountTokensRequest, chat: ChatOfMessages) -> None:
    output, schema = asked.output_config, asked.output_format
    if output is not None:
        chat.body["reasoning_effort"] = output.effort
        schema = schema or output.format
    if asked.output_format is not None:
        for name in ("response_format", "response_format.json_schema"):
            chat.places[name] = "output_format"
    if schema is not None:
        named = {"name": "answer", "schema": schema.schema, "strict": True}
        chat.body["response_format"] = {"type": "json_schema", "json_schema": named}


class _Conversation:
    """Makes the messages of a chat, and notes the place of each in the client's body."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places = places
        self._messages: list[dict[str, Any]] = []
        self._tools: dict[str, str] = {}  # id of a tool call -> name of the tool

    def of(self, asked: CountTokensRequest) -> list[dict[str, Any]]:
        if asked.system:
            self._add({"role": "system", "content": _text(asked.system)}, "system")
            self._place("content", "system")
        # Chat templates want roles to alternate, and this API counts messages of one role as one.
        for turn_type, turns in groupby(enumerate(asked.messages), lambda turn: type(turn[1])):
            blocks = [placed for index, turn in turns for placed in _blocks(turn, index)]
            if turn_type is UserTurn:
                self._user(blocks)
            elif turn_type is AssistantTurn:
                self._assistant(blocks)
            else:
                self._say("system", blocks)
        return self._messages

    def _user(self, blocks: list[_Placed]) -> None:
        """Add the tool results and the texts between them as messages, in their order."""
        for is_result, group in groupby(blocks, lambda one: isinstance(one[0], ToolResultBlock)):
            if not is_result:
                self._say("user", list(group))
                continue
            for block, place in group:
                assert isinstance(block, ToolResultBlock)
                self._result(block, place)

    def _result(self, block: ToolResultBlock, place: str) -> None:
        content = _text(block.content)
        message = {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": _ERROR_MARK + content if block.is_error else content,
        }
        name = self._tools.get(block.tool_use_id)
        self._add(message if name is None else {**message, "name": name}, place)

    def _say(self, role: str, blocks: list[_Placed]) -> None:
        texts = [block.text for block, _ in blocks if isinstance(block, TextBlock)]
        self._add({"role": role, "content": "\n".join(texts)}, blocks[0][1])

    def _assistant(self, blocks: list[_Placed]) -> None:
        """Add one message with the text, the reasoning and the tool calls of all blocks."""
        texts = [block.text for block, _ in blocks if isinstance(block, TextBlock)]
        thoughts = [block.thinking for block, _ in blocks if isinstance(block, ThinkingBlock)]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        self._add(message, blocks[0][1])
        calls = [(block, place) for block, place in blocks if isinstance(block, ToolUseBlock)]
        at_most(blocks[0][1], len(calls), MAX_TOOLS, "tool calls, with those of the next messages")
        for block, place in calls:
            self._call(block, place, message.setdefault("tool_calls", []))

    def _call(self, block: ToolUseBlock, place: str, calls: list[dict[str, Any]]) -> None:
        name = f"tool_calls[{len(calls)}]"
        self._place(name, place)
        self._place(f"{name}.function", place)
        self._place(f"{name}.function.arguments", f"{place}.input")
        function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
        calls.append({"id": block.id, "type": "function", "function": function})
        self._tools[block.id] = block.name

    def _add(self, message: dict[str, Any], place: str) -> None:
        self._places[f"messages[{len(self._messages)}]"] = place
        self._messages.append(message)

    def _place(self, name: str, place: str) -> None:
        self._places[f"messages[{len(self._messages) - 1}].{name}"] = place


def _blocks(turn: AnyTurn, index: int) -> list[_Placed]:
    """Return the blocks of a message with their places. An empty message has one empty text."""
    place = f"messages[{index}]"
    if isinstance(turn.content, str):
        return [(TextBlock(text=turn.content), place)]
    blocks = [(block, f"{place}.content[{at}]") for at, block in enumerate(turn.content)]
    return blocks or [(TextBlock(text=""), place)]


def _text(content: str | TextBlocks) -> str:
    """Return the text of a system prompt or a tool's result."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
