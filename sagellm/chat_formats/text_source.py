"""The text of an answer, for readers that are generators, and the markers in it.

A reader yields where it needs more text, and goes on when the text has come:

    yield from source.space()
    if (yield from source.accept("{")):
        ...

So a reader is written as if the whole text was there, and reads each character once.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TypeAlias, TypeVar

T = TypeVar("T")
TextReading: TypeAlias = Generator[None, None, T]  # a reader with a result
Write: TypeAlias = Callable[[str], None]

_NO_SPACE = re.compile(r"\S")
MAX_MARKER_LEN = 100  # a longer special token is treated as text


class MarkerFinder:
    """Finds the first of several markers. Of markers at one place, the shortest counts, so that
    the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        self._sorted = sorted(one for one in set(markers) if 0 < len(one) <= MAX_MARKER_LEN)
        self._known = frozenset(self._sorted)
        self._lengths = sorted(set(map(len, self._sorted)))
        firsts = "".join(sorted({marker[0] for marker in self._sorted}))
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else "(?!)")

    def find(self, text: str, start: int = 0) -> tuple[int, str]:
        """Return the place of the first marker, and the marker.

        If the text ends where a marker may have begun, return that place and "". If there is
        neither, return the length of the text and "".
        """
        for found in self._first.finditer(text, start):
            place = found.start()
            for length in self._lengths:
                if (marker := text[place : place + length]) in self._known:
                    return place, marker
            if self._may_begin(text[place : place + MAX_MARKER_LEN]):
                return place, ""
        return len(text), ""

    def _may_begin(self, tail: str) -> bool:
        at = bisect_left(self._sorted, tail)
        return at < len(self._sorted) and self._sorted[at].startswith(tail)


@lru_cache(maxsize=64)  # a tokenizer may have a thousand special tokens, and each choice a parser
def _finder_of(markers: frozenset[str]) -> MarkerFinder:
    return MarkerFinder(markers)


class MarkerFilter:
    """Removes markers from a text. A beginning of a marker is held back."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._finder = _finder_of(frozenset(markers))
        self._rest = ""

    def push(self, text: str) -> str:
        """Return the text without markers, as far as it is known."""
        text, at, kept = self._rest + text, 0, []
        while True:
            place, marker = self._finder.find(text, at)
            kept.append(text[at:place])
            if not marker:
                self._rest = text[place:]
                return "".join(kept)
            at = place + len(marker)

    def finish(self) -> str:
        """Return the text that was held back."""
        rest, self._rest = self._rest, ""
        return rest


class TextSource:
    """The text that has come and was not read. Only what may begin a marker stays unread.

    After `end`, readers do not yield: what they wait for does not come.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._is_ended = False
        self._record: list[str] | None = None

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._is_ended = True

    def start_record(self, *texts: str) -> None:
        """Note all text that is read from now on. `texts`: what the record begins with."""
        self._record = list(texts)

    def stop_record(self) -> str:
        """Return the recorded text, and forget it."""
        record, self._record = self._record, None
        return "".join(record or ())

    def peek(self) -> TextReading[str]:
        """Return the next character; "" at the end."""
        while self._at == len(self._text) and not self._is_ended:
            yield
        return self._text[self._at : self._at + 1]

    def accept(self, text: str) -> TextReading[bool]:
        """Read the text if it comes next."""
        while not self._text.startswith(text, self._at):
            rest = self._text[self._at : self._at + len(text)]
            if self._is_ended or not text.startswith(rest):
                return False
            yield
        self._take(len(text))
        return True

    def skip_cut(self, *texts: str) -> None:
        """If the answer was cut off in one of the texts, read what there is of it."""
        rest = self._text[self._at :]
        if self._is_ended and any(text.startswith(rest) for text in texts):
            self._take(len(rest))

    def space(self) -> TextReading[str]:
        """Read white space, and return it."""
        pieces: list[str] = []
        yield from self.before(_NO_SPACE, pieces.append)
        return "".join(pieces)

    def before(self, pattern: re.Pattern[str], write: Write) -> TextReading[str]:
        """Read up to a character of `pattern`, and write what was read. Return that character,
        which stays unread; "" at the end.
        """
        while True:
            found = pattern.search(self._text, self._at)
            place = found.start() if found else len(self._text)
            self._write(place - self._at, write)
            if found or self._is_ended:
                return found.group() if found else ""
            yield

    def until(self, finder: MarkerFinder, write: Write) -> TextReading[str]:
        """Read up to a marker, and write what comes before it. Return the marker, which is read
        too; "" at the end.
        """
        while True:
            place, marker = finder.find(self._text, self._at)
            is_last = self._is_ended and not marker
            self._write((len(self._text) if is_last else place) - self._at, write)
            self._take(len(marker))
            if marker or is_last:
                return marker
            yield

    def take(self, write: Write) -> TextReading[str]:
        """Read and write the next character, and return it; "" at the end."""
        character = yield from self.peek()
        self._write(len(character), write)
        return character

    def _write(self, length: int, write: Write) -> None:
        if text := self._take(length):
            write(text)

    def _take(self, length: int) -> str:
        text = self._text[self._at : self._at + length]
        self._at += length
        if self._record is not None and text:
            self._record.append(text)
        return text


# Reads a scalar, or a key with the mark after it, and writes it as JSON. Returns whether there was
# a whole one.
ReadPart: TypeAlias = Callable[[TextSource, Write], TextReading[bool]]

_BRACKETS = {"{": "}", "[": "]"}


def read_nested(
    source: TextSource, write: Write, read_scalar: ReadPart, read_key: ReadPart
) -> TextReading[bool]:
    """Read a value, and write it as JSON. Return whether it is complete.

    The brackets that are open are a list, not calls in calls: a model may open very many.
    """
    closings: list[str] = []
    while True:
        yield from source.space()
        bracket = yield from _accept_bracket(source)
        if bracket:
            write(bracket)
            closings.append(_BRACKETS[bracket])
        elif not (yield from read_scalar(source, write)):
            return False
        is_first = bool(bracket)
        yield from source.space()
        while closings and (yield from source.accept(closings[-1])):
            write(closings.pop())
            is_first = False
            yield from source.space()
        if not closings:
            return True
        if not is_first:
            if not (yield from source.accept(",")):
                return False
            write(", ")
        if closings[-1] == "}" and not (yield from read_key(source, write)):
            return False


def _accept_bracket(source: TextSource) -> TextReading[str]:
    for bracket in _BRACKETS:
        if (yield from source.accept(bracket)):
            return bracket
    return ""
