"""Markers in a text that comes in pieces: tags, and special tokens."""

import re
from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache

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
