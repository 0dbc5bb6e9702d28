"""A sorted sequence as a value: an insertion copies a few hundred pointers, however long it is."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from operator import itemgetter
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=tuple[Any, ...])

_MOST = 128  # in a chunk; it is then cut in two
_first = itemgetter(0)


class SortedChunks(Generic[T]):
    """Ascending, immutable. Equal items may be in it several times."""

    __slots__ = ("_chunks", "_len")

    def __init__(self, items: Iterable[T] = ()) -> None:
        ascending = tuple(sorted(items))
        starts = range(0, len(ascending), _MOST // 2)
        self._chunks = tuple(ascending[start : start + _MOST // 2] for start in starts)
        self._len = len(ascending)

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self._chunks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SortedChunks) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"SortedChunks({list(self)!r})"

    @property
    def first(self) -> T | None:
        return self._chunks[0][0] if self._chunks else None

    def head(self, number: int) -> tuple[T, ...]:
        """The first `number` items, or all."""
        if self._chunks and len(self._chunks[0]) >= number:
            return self._chunks[0][:number]
        return tuple(islice(self, number))

    def inserted(self, item: T) -> "SortedChunks[T]":
        if not self._chunks:
            return self._with(0, 0, ((item,),), 1)
        if item >= self._chunks[-1][-1]:  # often
            index = len(self._chunks) - 1
            chunk = self._chunks[index] + (item,)
        else:
            index = max(bisect_right(self._chunks, item, key=_first) - 1, 0)
            chunk = self._chunks[index]
            place = bisect_right(chunk, item)
            chunk = chunk[:place] + (item,) + chunk[place:]  # noqa: RUF005 (quicker)
        middle = len(chunk) // 2
        cut = (chunk[:middle], chunk[middle:]) if len(chunk) > _MOST else (chunk,)
        return self._with(index, index + 1, cut, 1)

    def removed(self, item: T) -> "SortedChunks[T]":
        """Without an item that is in it. Raises KeyError where it is not."""
        if self._chunks and self._chunks[0][0] is item:  # often
            rest = self._chunks[0][1:]
            return self._with(0, 1, (rest,) if rest else (), -1)
        index = max(bisect_right(self._chunks, item, key=_first) - 1, 0)
        chunk = self._chunks[index] if self._chunks else ()
        place = bisect_left(chunk, item)
        if place == len(chunk) or chunk[place] != item:
            raise KeyError(item)
        rest = chunk[:place] + chunk[place + 1 :]
        return self._with(index, index + 1, (rest,) if rest else (), -1)

    def _with(
        self, start: int, end: int, chunks: tuple[tuple[T, ...], ...], growth: int
    ) -> "SortedChunks[T]":
        changed: SortedChunks[T] = SortedChunks.__new__(SortedChunks)
        others = self._chunks
        if end == len(others):
            changed._chunks = others[:start] + chunks
        else:
            changed._chunks = others[:start] + chunks + others[end:]
        changed._len = self._len + growth
        return changed
