"""Content with blocks of tool calls in it: what the formats whose calls begin by a marker share."""

from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Protocol

from sagellm.chat_formats.markers import MarkerFinder
from sagellm.chat_formats.part_writer import PartWriter


class BlockState(Enum):
    READING = auto()
    COMPLETE = auto()
    BROKEN = auto()  # the text that follows is no call


class CallBlock(Protocol):
    """Reads one block of calls, from after its opening marker."""

    state: BlockState
    unused: list[str]  # text that became no call; it is content if the block breaks or is cut off

    def read(self, text: str) -> int:
        """Read the next piece, and return how much of it was read.

        All of it is read while `state` is READING, but for an end that needs more text to be
        understood. That end comes again, before the next piece.
        """
        ...


class CallBlockReader:
    """Reads content and blocks of calls. Implements TextReader.

    White space before a block is dropped at the beginning of the answer and after another block,
    as in vLLM. If a block breaks, its text that became no call is content.
    """

    def __init__(
        self, openings: Iterable[str], open_block: Callable[[str], CallBlock], writer: PartWriter
    ) -> None:
        """`open_block` opens the reader of a block that begins with the given opening."""
        self._openings = MarkerFinder(openings)
        self._open_block = open_block
        self._writer = writer
        self._block: CallBlock | None = None
        self._space: list[str] = []
        self._holds_space = True
        self._rest = ""

    def read(self, text: str) -> None:
        text, at = self._rest + text, 0
        while True:
            before = at, self._block
            at = self._read_block(text, at) if self._block else self._read_content(text, at)
            if at == len(text) or before == (at, self._block):
                break
        self._rest = text[at:]

    def end(self) -> None:
        if self._block is not None:
            unused = "".join(self._block.unused)
            self._writer.content(unused + self._rest if unused.strip() else "")
        elif self._rest:
            self._add(self._rest)

    def _read_content(self, text: str, at: int) -> int:
        place, opening = self._openings.find(text, at)
        self._add(text[at:place])
        if opening:
            self._block = self._open_block(opening)
            self._block.unused[:] = [*self._space, opening]
            self._space.clear()
        return place + len(opening)

    def _add(self, text: str) -> None:
        """Write content. Hold white space back where it is dropped if a block follows."""
        if self._holds_space and not text.strip():
            if text:
                self._space.append(text)
            return
        self._writer.content("".join(self._space) + text)
        self._space.clear()
        self._holds_space = False

    def _read_block(self, text: str, at: int) -> int:
        assert self._block is not None
        at += self._block.read(text[at:] if at else text)
        if self._block.state is BlockState.BROKEN:
            self._add("".join(self._block.unused))
            self._block = None
        elif self._block.state is BlockState.COMPLETE:
            self._holds_space = True
            self._block = None
        return at
