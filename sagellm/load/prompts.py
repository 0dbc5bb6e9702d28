"""Prompts of a length: random token ids or words, the same for the same seed."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Literal, TypeAlias

from sagellm.load.trace import BLOCK_LEN

Kind: TypeAlias = Literal["ids", "words"]
_CACHED_BLOCKS = 4096  # of 512 items: some 16 MB
_TEXT = """
a about after all also and any as at back be because but by can come could day do even first for
from get give go good have he her him his how if in into it its just know like look make me most my
new no not now of on one only or other our out over people say see she so some take than that the
their them then there these they think this time to two up us use want way we well what when which
who will with work would year you your
"""
_WORDS = _TEXT.split()


class Prompts:
    """Makes the prompt of each request.

    `ids` are of 0 ... vocab_size - 1; a word is one token or little more in most vocabularies.
    """

    def __init__(self, kind: Kind, *, seed: int, vocab_size: int = 256) -> None:
        self._kind = kind
        self._seed = seed
        self._items: Sequence[int] | Sequence[str]
        self._items = range(vocab_size) if kind == "ids" else _WORDS
        self._block: Callable[[int], list[int] | list[str]]
        self._block = lru_cache(_CACHED_BLOCKS)(self._draw_block)

    def make(self, number: int, length: int, block_ids: Sequence[int] = ()) -> str | list[int]:
        """The prompt of request `number`. Equal block ids begin with equal tokens."""
        drawn: list[int | str] = []
        for block_id in block_ids[: -(-length // BLOCK_LEN)]:
            drawn += self._block(block_id)
        missing = length - len(drawn)
        if missing > 0:
            drawn += Random(f"{self._seed}/request/{number}").choices(self._items, k=missing)
        return self._whole(drawn[:length])

    def _whole(self, drawn: list[int | str]) -> str | list[int]:
        if self._kind == "words":
            return " ".join(map(str, drawn))
        return [item for item in drawn if isinstance(item, int)]

    def _draw_block(self, block_id: int) -> list[int] | list[str]:
        draw = Random(f"{self._seed}/block/{block_id}")
        return draw.choices(self._items, k=BLOCK_LEN)  # type: ignore[return-value]
