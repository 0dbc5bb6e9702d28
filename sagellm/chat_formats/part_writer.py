"""Where the readers of a format write the parts of an answer."""

from collections.abc import Callable
from typing import Protocol

from sagellm.chat_formats.answer_parts import AnswerPart, Content, Reasoning, ToolCallDelta
from sagellm.chat_formats.chat_format import ToolUse


class PartWriter:
    """Collects the parts of one answer. Adjacent parts of one kind become one part."""

    def __init__(self, use: ToolUse, new_id: Callable[[], str]) -> None:
        self._names = frozenset(tool.name for tool in use.allowed)
        self._most_calls = None if use.parallel else 1
        self._new_id = new_id
        self._parts: list[AnswerPart] = []
        self._pieces: list[str] = []  # of the content, reasoning or arguments at the end
        self._kind: type[AnswerPart] | None = None
        self._num_calls = 0

    def content(self, text: str) -> None:
        self._add(Content, text)

    def reasoning(self, text: str) -> None:
        self._add(Reasoning, text)

    def begin_call(self, name: str) -> bool:
        """Begin a call. Return False, and do nothing, if no allowed tool has the name.

        Without parallel calls, all calls after the first are dropped, as in vLLM.
        """
        if name not in self._names:
            return False
        self._close()
        self._num_calls += 1
        if not self._is_dropped:
            self._parts.append(ToolCallDelta(self._num_calls - 1, self._new_id(), name))
        return True

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that began last."""
        if not self._is_dropped:
            self._add(ToolCallDelta, text)

    def take(self) -> list[AnswerPart]:
        """Return the collected parts, and forget them."""
        self._close()
        parts, self._parts = self._parts, []
        return parts

    @property
    def _is_dropped(self) -> bool:
        return self._most_calls is not None and self._num_calls > self._most_calls

    def _add(self, kind: type[AnswerPart], text: str) -> None:
        if text and kind is not self._kind:
            self._close()
            self._kind = kind
        if text:
            self._pieces.append(text)

    def _close(self) -> None:
        text = "".join(self._pieces)
        if self._kind is ToolCallDelta:
            self._parts.append(ToolCallDelta(self._num_calls - 1, arguments=text))
        elif self._kind is not None:
            self._parts.append(Content(text) if self._kind is Content else Reasoning(text))
        self._pieces.clear()
        self._kind = None


class TextReader(Protocol):
    """Reads the text of an answer in pieces, and writes its parts to a PartWriter."""

    def read(self, text: str) -> None: ...

    def end(self) -> None:
        """The text has ended: write what was held back."""
        ...


class ContentReader:
    """All text is content."""

    def __init__(self, writer: PartWriter) -> None:
        self._writer = writer

    def read(self, text: str) -> None:
        self._writer.content(text)

    def end(self) -> None:
        pass


class ReadingParser:
    """The parser of readers that write to one PartWriter. Implements AnswerParser."""

    def __init__(self, writer: PartWriter, reader: TextReader) -> None:
        self._writer = writer
        self._reader = reader

    def push(self, text: str) -> list[AnswerPart]:
        self._reader.read(text)
        return self._writer.take()

    def finish(self) -> list[AnswerPart]:
        self._reader.end()
        return self._writer.take()
