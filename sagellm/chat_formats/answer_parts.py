"""The parts of an answer, and the contract of the parsers that split its text into them."""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import msgspec


class Content(msgspec.Struct, frozen=True, tag="content", gc=False):
    """Text of the answer for the user."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, tag="reasoning", gc=False):
    """Text of the model's reasoning before its answer."""

    text: str


class ToolCallDelta(msgspec.Struct, frozen=True, tag="tool_call", gc=False):
    """A piece of one tool call.

    `index`: the number of the call in its answer, from 0. `id` and `name` are set in the first
    piece of a call and empty in later pieces. The `arguments` of all pieces of a call, joined, are
    the JSON text of an object, unless the answer was cut off or the model wrote broken JSON.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


AnswerPart: TypeAlias = Content | Reasoning | ToolCallDelta


class AnswerParser(Protocol):
    """Splits the text of one choice into parts. It never fails: text without a known form is
    content.
    """

    def push(self, text: str) -> list[AnswerPart]:
        """Return the parts that the next piece of the text completes. May hold text back."""
        ...

    def finish(self) -> list[AnswerPart]:
        """Return the parts of the text that was held back. No text may follow."""
        ...


OpenParser: TypeAlias = Callable[[], AnswerParser]


class PlainParser:
    """The parser of a model without tools and reasoning: all text is content."""

    def push(self, text: str) -> list[AnswerPart]:
        return [Content(text)] if text else []

    def finish(self) -> list[AnswerPart]:
        return []


def open_plain_parser() -> AnswerParser:
    return PlainParser()
