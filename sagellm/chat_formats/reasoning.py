"""Reasoning between two tags before the answer, as in `<think>...</think>`."""

from collections.abc import Callable
from dataclasses import dataclass

from sagellm.chat_formats.markers import MarkerFinder
from sagellm.chat_formats.part_writer import PartWriter, TextReader


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags around reasoning."""

    opening: str
    closing: str

    def is_open(self, prompt: str) -> bool:
        """Whether the answer to the prompt begins inside its reasoning."""
        return prompt.rstrip().endswith(self.opening)

    def is_closed(self, prompt: str) -> bool:
        """Whether the prompt itself has ended the reasoning, as templates do to switch it off."""
        return prompt.rstrip().endswith(self.closing)


THINK = ReasoningTags("<think>", "</think>")


class ReasoningReader:
    """Reads reasoning, then passes the text after it to `then`. Implements TextReader.

    White space at the ends of the reasoning, and between the reasoning and the answer, is dropped,
    as templates add it. A text that does not begin with the opening tag is passed on.
    """

    def __init__(
        self, tags: ReasoningTags, *, is_open: bool, writer: PartWriter, then: TextReader
    ) -> None:
        self._opening = tags.opening
        self._closing = MarkerFinder((tags.closing,))
        self._writer = writer
        self._then = then
        self._read = self._read_inside if is_open else self._read_start
        self._space: list[str] = []  # white space that may be dropped
        self._rest = ""  # may be the beginning of a tag
        self._is_empty = True  # nothing but white space was read in this state

    def read(self, text: str) -> None:
        self._read(self._take_rest() + text)

    def end(self) -> None:
        rest = self._take_rest()
        if self._read == self._read_start:
            self._then.read("".join(self._space) + rest)
        elif self._read == self._read_inside and rest:
            self._writer.reasoning("".join(self._space) + rest)
        self._then.end()

    def _take_rest(self) -> str:
        rest, self._rest = self._rest, ""
        return rest

    def _read_start(self, text: str) -> None:
        stripped = text.lstrip()
        if len(stripped) < len(text):
            self._space.append(text[: len(text) - len(stripped)])
        if stripped.startswith(self._opening):
            self._space.clear()
            self._go_on(self._read_inside, stripped[len(self._opening) :])
        elif self._opening.startswith(stripped):
            self._rest = stripped
        else:
            text = "".join(self._space) + stripped
            self._space.clear()
            self._go_on(self._then.read, text)

    def _read_inside(self, text: str) -> None:
        place, tag = self._closing.find(text)
        self._add(text[:place])
        if tag:
            self._space.clear()
            self._go_on(self._read_gap, text[place + len(tag) :])
        else:
            self._rest = text[place:]

    def _add(self, text: str) -> None:
        """Write reasoning, without white space at its beginning; hold that at its end back."""
        if self._is_empty:
            text = text.lstrip()
        if not (stripped := text.rstrip()):
            if text:
                self._space.append(text)
            return
        self._is_empty = False
        self._writer.reasoning("".join(self._space) + stripped)
        self._space.clear()
        if len(stripped) < len(text):
            self._space.append(text[len(stripped) :])

    def _read_gap(self, text: str) -> None:
        if stripped := text.lstrip():
            self._go_on(self._then.read, stripped)

    def _go_on(self, read: Callable[[str], None], text: str) -> None:
        self._read = read
        if text:
            read(text)
