"""The parts of one choice of a chat: content, reasoning and tool calls, event by event."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET

from sagellm.chat_formats import AnswerPart, Content, OpenParser, Reasoning, ToolCallDelta
from sagellm.gateway.answers.objects import (
    ApiFinishReason,
    CalledFunction,
    ChatDelta,
    ChatMessage,
    ChatToolCall,
    FunctionDelta,
    ToolCallChunk,
)
from sagellm.gateway.answers.writer import FINISH
from sagellm.runtime.messages import TokenEvent


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """What one event adds to a choice.

    `calls` has one entry for each tool call that goes on.
    """

    content: str = ""
    reasoning: str = ""
    calls: Sequence[ToolCallDelta] = field(default_factory=tuple)

    @property
    def has_only_content(self) -> bool:
        """Whether a chunk for the piece has content and nothing else."""
        return bool(self.content) and not (self.reasoning or self.calls)


_NOTHING = ChatPiece()


class ChoiceParts:
    """Splits the events of one choice into their parts."""

    def __init__(self, open_parser: OpenParser, *, shows_reasoning: bool = True) -> None:
        """`shows_reasoning` False: the parts of the reasoning are dropped."""
        self._parser = open_parser()
        self._shows_reasoning = shows_reasoning
        self.has_calls = False

    def push(self, event: TokenEvent) -> ChatPiece:
        """Return what the next event adds. The last event adds the text that was held back, too."""
        parts = self._parser.push(event.text)
        if event.is_last:
            parts = parts + self._parser.finish()
        if not parts:
            return _NOTHING
        calls = _merged(parts)
        self.has_calls = self.has_calls or bool(calls)
        return ChatPiece(
            "".join(part.text for part in parts if isinstance(part, Content)),
            self._reasoning(parts),
            calls,
        )

    def _reasoning(self, parts: Sequence[AnswerPart]) -> str:
        if not self._shows_reasoning:
            return ""
        return "".join(part.text for part in parts if isinstance(part, Reasoning))


def _merged(parts: Sequence[AnswerPart]) -> list[ToolCallDelta]:
    """Return the pieces of tool calls among `parts`, those of one call joined."""
    found: dict[int, ToolCallDelta] = {}
    for part in parts:
        if isinstance(part, ToolCallDelta):
            begun = found.get(part.index)
            found[part.index] = part if begun is None else _joined(begun, part)
    return list(found.values())


def _joined(first: ToolCallDelta, second: ToolCallDelta) -> ToolCallDelta:
    arguments = first.arguments + second.arguments
    return msgspec.structs.replace(first, arguments=arguments)


def delta_of(piece: ChatPiece) -> ChatDelta:
    """Return the delta of one chunk. It is empty if the text so far may begin a tool call."""
    return ChatDelta(
        content=piece.content or UNSET,
        reasoning_content=piece.reasoning or UNSET,
        reasoning=piece.reasoning or UNSET,
        tool_calls=[_chunk_of(call) for call in piece.calls] or UNSET,
    )


def _chunk_of(call: ToolCallDelta) -> ToolCallChunk:
    if not call.name:
        return ToolCallChunk(index=call.index, function=FunctionDelta(arguments=call.arguments))
    function = FunctionDelta(name=call.name, arguments=call.arguments)
    return ToolCallChunk(index=call.index, id=call.id, type="function", function=function)


def message_of(piece: ChatPiece) -> ChatMessage:
    """Return the message of a whole answer, which is one piece."""
    return ChatMessage(
        content=piece.content or None if piece.calls else piece.content,
        reasoning_content=piece.reasoning or UNSET,
        reasoning=piece.reasoning or UNSET,
        tool_calls=[
            ChatToolCall(id=call.id, function=CalledFunction(call.name, call.arguments))
            for call in piece.calls
        ]
        or UNSET,
    )


def finish_reason(event: TokenEvent, *, has_calls: bool) -> ApiFinishReason | None:
    """Return the reason of an event: "tool_calls" for a choice that has calls and was not cut."""
    # As in the OpenAI API, also if the request named the tool (vLLM then says "stop").
    return (
        "tool_calls" if has_calls and event.finish_reason == "stop" else FINISH[event.finish_reason]
    )
