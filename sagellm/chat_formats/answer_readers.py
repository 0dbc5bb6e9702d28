"""Readers of whole answers: reasoning, content, and blocks of tool calls in the content."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from sagellm.chat_formats.chat_format import AnswerPart
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import (
    MarkerFilter,
    MarkerFinder,
    TextReading,
    TextSource,
    Write,
)


class ReadingParser:
    """Runs the reader of an answer. Implements AnswerParser.

    `dropped`: special tokens that are removed from the text before it is read.
    """

    def __init__(
        self,
        read: Callable[[TextSource, PartWriter], TextReading[None]],
        writer: PartWriter,
        dropped: Iterable[str],
    ) -> None:
        self._source = TextSource()
        self._writer = writer
        self._filter = MarkerFilter(dropped)
        self._reading = read(self._source, writer)

    def push(self, text: str) -> list[AnswerPart]:
        return self._go_on(self._filter.push(text))

    def finish(self) -> list[AnswerPart]:
        self._source.end()
        return self._go_on(self._filter.finish())

    def _go_on(self, text: str) -> list[AnswerPart]:
        self._source.add(text)
        next(self._reading, None)
        return self._writer.take()


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags around reasoning. `title`: a text that follows the opening tag."""

    opening: str
    closing: str
    title: str = ""

    def is_open(self, prompt: str) -> bool:
        """Whether the answer to the prompt begins inside its reasoning."""
        return prompt.rstrip().endswith((self.opening + self.title).rstrip())

    def is_closed(self, prompt: str) -> bool:
        """Whether the prompt itself has ended the reasoning, as templates do to switch it off."""
        return prompt.rstrip().endswith(self.closing)


THINK = ReasoningTags("<think>", "</think>")


def read_reasoning(
    source: TextSource, writer: PartWriter, tags: ReasoningTags, *, is_open: bool
) -> TextReading[str]:
    """Read the reasoning at the beginning of an answer, if there is some.

    White space at the ends of the reasoning, and after it, is dropped, because templates add it.
    Return the white space before an answer without reasoning.
    """
    if not is_open:
        space = yield from source.space()
        if not (yield from source.accept(tags.opening)):
            return space
        yield from source.accept(tags.title)
    yield from source.space()
    yield from source.until(MarkerFinder((tags.closing,)), _Trimmed(writer.reasoning).write)
    yield from source.space()
    return ""


class _Trimmed:
    """Writes text without the white space at its end."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._space: list[str] = []

    def write(self, text: str) -> None:
        stripped = text.rstrip()
        if stripped:
            self._write("".join(self._space) + stripped)
            self._space.clear()
        self._space.append(text[len(stripped) :])


def read_content(source: TextSource, writer: PartWriter, space: str) -> TextReading[None]:
    """Read text that is all content. `space`: white space that comes before it."""
    writer.content(space)
    yield from source.until(MarkerFinder(()), writer.content)


# Reads a block of calls from after its opening. Returns whether the block is complete. If it is
# not, the text that became no call is content.
ReadBlock: TypeAlias = Callable[[TextSource, PartWriter, str], TextReading[bool]]


class _Content:
    """Writes content, with the white space before it that would be dropped before a block."""

    def __init__(self, writer: PartWriter, space: str) -> None:
        self._writer = writer
        self.space = space

    def write(self, text: str) -> None:
        self._writer.content(self.space + text)
        self.space = ""


def read_blocks(
    source: TextSource,
    writer: PartWriter,
    read_block: ReadBlock,
    openings: MarkerFinder,
    *,
    first: str = "",
    space: str = "",
) -> TextReading[None]:
    """Read content and blocks of calls.

    `first`: characters that are openings only where no content comes before them: at the beginning
    of the answer, and after a block. `space`: white space that comes before. White space before a
    block is dropped at these places, as in vLLM.
    """
    space += yield from source.space()
    may_be_first, is_after_block = True, False
    while True:
        content = _Content(writer, space)
        if may_be_first and first and (yield from source.peek()) in {*first}:
            opening = yield from source.take(lambda text: None)
        else:
            opening = yield from source.until(openings, content.write)
        if not opening:
            break
        source.start_record(content.space, opening)
        is_after_block = may_be_first = yield from read_block(source, writer, opening)
        unused = source.stop_record()
        writer.content("" if is_after_block else unused)
        space = (yield from source.space()) if is_after_block else ""
    writer.content("" if is_after_block else content.space)
