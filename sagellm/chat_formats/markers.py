"""Markers in a text that comes in pieces: tags, and special tokens."""

import re
from bisect import bisect_left
from collections.abc import Iterable

from sagellm.chat_formats.part_writer import TextReader

MAX_MARKER_LEN = 100  # a longer special token is treated as text


class MarkerFinder:
    """Finds the first of several markers. Of markers at one place, the shortest counts, so that
    the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = sorted(m for m in set(markers) if 0 < len(m) <= MAX_MARKER_LEN)
        self._set = frozenset(self._markers)
        self._lengths = sorted(set(map(len, self._markers)))
        firsts = "".join(sorted({marker[0] for marker in self._markers}))
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else "(?!)")

    def find(self, text: str, start: int = 0) -> tuple[int, str]:
        """Return the place of the first marker and the marker.

        If the text ends where a marker may have begun, returns that place and "". If there is
        neither, returns the length of the text and "".
        """
        for found in self._first.finditer(text, start):
            place = found.start()
            for length in self._lengths:
                if (marker := text[place : place + length]) in self._set:
                    return place, marker
            if self._may_begin(text[place : place + MAX_MARKER_LEN]):
                return place, ""
        return len(text), ""

    def _may_begin(self, tail: str) -> bool:
        at = bisect_left(self._markers, tail)
        return at < len(self._markers) and self._markers[at].startswith(tail)


class DroppedMarkers:
    """Passes a text on without the markers of `finder`. Implements TextReader."""

    def __init__(self, finder: MarkerFinder, then: TextReader) -> None:
        self._finder = finder
        self._then = then
        self._rest = ""

    def read(self, text: str) -> None:
        text, at = self._rest + text, 0
        while True:
            place, marker = self._finder.find(text, at)
            if place > at:
                self._then.read(text[at:place])
            if not marker:
                break
            at = place + len(marker)
        self._rest = text[place:]

    def end(self) -> None:
        if self._rest:
            self._then.read(self._rest)
        self._then.end()
