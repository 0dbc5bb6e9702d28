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
    """The additions of one event to a choice.

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
    """Splits the events of one choice into their parts.

    `ends_in_calls`: the choice has ended with tool calls, and the last of them is whole.
    """

    def __init__(self, open_parser: OpenParser, *, shows_reasoning: bool = True) -> None:
        """`shows_reasoning` False: the parts of the reasoning are dropped."""
        self._parser = open_parser()
        self._shows_reasoning = shows_reasoning
        self._arguments: list[str] | None = None  # of the last call; None: there is no call
        self.ends_in_calls = False

    def push(self, event: TokenEvent) -> ChatPiece:
        """Return what the next event adds. The last event adds the text that was held back, too."""
        parts = self._parser.push(event.text)
        if event.is_last:
            parts = parts + self._parser.finish()
        for part in parts:
            if isinstance(part, ToolCallDelta):
                self._add_arguments(part)
        self.ends_in_calls = event.finish_reason == "stop" and self._has_whole_call(event)
        if not parts:
            return _NOTHING
        return ChatPiece(
            "".join(part.text for part in parts if isinstance(part, Content)),
            self._reasoning(parts),
            _merged(parts),
        )

    def finish_reason(self, event: TokenEvent) -> ApiFinishReason | None:
        """Return the reason of the event that was pushed last."""
        # As in the OpenAI API, also if the request named the tool (vLLM then says "stop").
        return "tool_calls" if self.ends_in_calls else FINISH[event.finish_reason]

    def _add_arguments(self, part: ToolCallDelta) -> None:
        if self._arguments is None or part.name:
            self._arguments = []
        self._arguments.append(part.arguments)

    def _has_whole_call(self, event: TokenEvent) -> bool:
        """Whether there is a call that no stop string has cut; its JSON may be broken."""
        if self._arguments is None:
            return False
        return event.stop_reason is None or is_json_object("".join(self._arguments))

    def _reasoning(self, parts: Sequence[AnswerPart]) -> str:
        if not self._shows_reasoning:
            return ""
        return "".join(part.text for part in parts if isinstance(part, Reasoning))


def is_json_object(text: str) -> bool:
    """Whether a text is the JSON of an object that is not nested very deeply."""
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


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
