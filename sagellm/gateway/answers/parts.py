"""The parts of one choice of a chat: content, reasoning and tool calls, event by event."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from sagellm.chat_formats import AnswerPart, Content, OpenParser, Reasoning, ToolCallDelta
from sagellm.runtime.messages import TokenEvent


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """What one event adds to a choice.

    `calls` has one entry for each tool call that goes on. `is_in_call`: the choice is inside a tool
    call at the end of the event.
    """

    content: str = ""
    reasoning: str = ""
    calls: Sequence[ToolCallDelta] = field(default_factory=tuple)
    is_in_call: bool = False

    @property
    def has_only_content(self) -> bool:
        """Whether a chunk for the piece has content, perhaps empty, and nothing else."""
        return not (self.reasoning or self.calls or (self.is_in_call and not self.content))


class ChoiceParts:
    """Splits the events of one choice into their parts."""

    def __init__(self, open_parser: OpenParser, *, shows_reasoning: bool = True) -> None:
        """`shows_reasoning` False: the parts of the reasoning are dropped."""
        self._parser = open_parser()
        self._shows_reasoning = shows_reasoning
        self._is_in_call = False
        self.has_calls = False

    def push(self, event: TokenEvent) -> ChatPiece:
        """Return what the next event adds. The last event adds the text that was held back, too."""
        parts = self._parser.push(event.text)
        if event.is_last:
            parts = parts + self._parser.finish()
        if not parts:
            return ChatPiece(is_in_call=self._is_in_call)
        self._is_in_call = isinstance(parts[-1], ToolCallDelta)
        calls = _merged(parts)
        self.has_calls = self.has_calls or bool(calls)
        return ChatPiece(
            "".join(part.text for part in parts if isinstance(part, Content)),
            self._reasoning(parts),
            calls,
            self._is_in_call,
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


class ReasoningCounter:
    """Counts the tokens of one choice that are reasoning, without the marks around it."""

    def __init__(self, open_parser: OpenParser) -> None:
        self._parser = open_parser()
        self._is_inside = False
        self._num_pending = 0  # tokens inside that completed no part: reasoning, or its end

    def count(self, event: TokenEvent) -> int:
        """Return the number of tokens that the event shows to be reasoning."""
        parts = self._parser.push(event.text)
        if event.is_last:
            parts = parts + self._parser.finish()
        if not parts:
            self._num_pending += event.num_tokens if self._is_inside else 0
            return 0
        was_pending, self._num_pending = self._num_pending, 0
        self._is_inside = isinstance(parts[-1], Reasoning)
        inside = sum(len(part.text) for part in parts if isinstance(part, Reasoning))
        if not inside:
            return 0
        if self._is_inside and len(parts) == 1:
            return was_pending + event.num_tokens
        # One event with several tokens, some of them reasoning: share them by length.
        others = len(event.text) - inside
        share = inside / max(1, inside + max(0, others))
        return was_pending + round(event.num_tokens * share)
