"""Drafts from a sequence's own tokens: what followed the last few the time before.

Prompt lookup, as in vLLM and transformers: answers repeat their prompts and themselves.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Items

from sagellm.runtime.engine.sequence import Sequence

_LONGEST = 4  # tokens of a match that are as good as any more
_NUM_PLACES = 16  # earlier places of the last two tokens that are compared


class NgramIndex:
    """Where each pair of tokens occurred, newest first; it reads every token once."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], int] = {}  # a pair -> the position behind it
        self._before: list[int] = []  # position -> the one before it behind the same pair; 0: none

    def draft(self, tokens: Items[int], count: int) -> list[int]:
        """What followed the newest of the longest matches (4 to 2 tokens) with the end of `tokens`.

        A match that overlaps the end goes on in its own period. Empty where nothing matches.
        """
        self._read(tokens)
        place = self._place(tokens)
        if not place:
            return []
        drafts: list[int] = []
        for at in range(place, place + count):
            drafts.append(tokens[at] if at < len(tokens) else drafts[at - len(tokens)])
        return drafts

    def _read(self, tokens: Items[int]) -> None:
        """The pair at the end has nothing behind it yet, and is read with the next token."""
        for at in range(len(self._before), len(tokens)):
            if at < 2:
                self._before.append(0)
                continue
            pair = tokens[at - 2], tokens[at - 1]
            self._before.append(self._latest.get(pair, 0))
            self._latest[pair] = at

    def _place(self, tokens: Items[int]) -> int:
        place = self._latest.get((tokens[-2], tokens[-1]), 0) if len(tokens) > 2 else 0
        best, most = place, 2
        for _ in range(_NUM_PLACES):
            if not place or most == _LONGEST:
                break
            size = _match(tokens, place)
            if size > most:
                best, most = place, size
            place = self._before[place]
        return best


def _match(tokens: Items[int], place: int) -> int:
    """How many tokens before `place` equal the last ones; two are known to."""
    size = 2
    while size < _LONGEST and size < place and tokens[place - 1 - size] == tokens[-1 - size]:
        size += 1
    return size


class NgramDrafter:
    """An index a sequence. Takes microseconds, so nothing is awaited."""

    token_s = 0.0

    def __init__(self) -> None:
        self._indices: dict[Sequence, NgramIndex] = {}

    async def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        return {sequence: self._drafts(sequence, count) for sequence, count in wanted.items()}

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence, None)

    def clear(self) -> None:
        self._indices.clear()

    def _drafts(self, sequence: Sequence, count: int) -> list[int]:
        index = self._indices.setdefault(sequence, NgramIndex())
        return index.draft(sequence.tokens, count)
