"""Data structures: histograms, and immutable sequences that copy only a small part on a change."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, Generic, TypeVar

import msgspec
from immutables import Map


class Buckets:
    """A mutable histogram with fixed upper bounds; `observe` takes 0.1 us.

    A sample counts in the first bucket whose bound it does not exceed; the last bucket is
    unbounded. `total`: the sum of all samples.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> "Buckets":
        """An independent copy."""
        copied = Buckets(self.bounds)
        copied.counts, copied.total = self.counts.copy(), self.total
        return copied

    def add(self, other: "Buckets") -> None:
        """Add the counts of another histogram with the same bounds."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Yield (bound, number of samples up to the bound) as Prometheus does, infinity last."""
        passed = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            passed += count
            yield bound, passed


GROWTH = 1.02  # each bucket is 2 % wider than the previous bucket: quantiles are exact within 1 %
_LEAST = 1e-9  # smaller samples, including zero, count in the first bucket
_LOG_GROWTH = math.log(GROWTH)


class LogHistogram(msgspec.Struct, frozen=True):
    """An immutable histogram of seconds with logarithmic buckets, from nanoseconds to days."""

    counts: Map[int, int] = Map()
    num_samples: int = 0

    def with_sample(self, value: float) -> "LogHistogram":
        bucket = bucket_of(value)
        return LogHistogram(
            self.counts.set(bucket, self.counts.get(bucket, 0) + 1), self.num_samples + 1
        )

    def with_samples(self, values: Sequence[float]) -> "LogHistogram":
        """The histogram with several samples added. Equal samples in a row are added at once."""
        counts = self.counts
        for value, equal in groupby(values):
            bucket = bucket_of(value)
            counts = counts.set(bucket, counts.get(bucket, 0) + sum(1 for _ in equal))
        return LogHistogram(counts, self.num_samples + len(values))

    def quantile(self, share: float) -> float | None:
        """The smallest value that at least `share` (0 ... 1) of the samples do not exceed.

        Exact within 1 %. None without samples.
        """
        rank = max(math.ceil(share * self.num_samples), 1)
        for bucket in sorted(self.counts):
            rank -= self.counts[bucket]
            if rank <= 0:
                return value_of(bucket)
        return None


def bucket_of(value: float) -> int:
    """The number of the logarithmic bucket of a value."""
    return int(math.log(value / _LEAST) / _LOG_GROWTH) if value > _LEAST else 0


def value_of(bucket: int) -> float:
    """The middle of a logarithmic bucket; 0 for the first."""
    return _LEAST * GROWTH ** (bucket + 0.5) if bucket else 0.0


_WIDTH = 32  # an update copies one leaf and all minima: 1 us for a thousand values

_EMPTY = (math.inf,) * _WIDTH


T = TypeVar("T")


def _with_item(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return items[:index] + (item,) + items[index + 1 :]  # noqa: RUF005 (quicker)


class MutableMinTree:
    """A mutable `MinTree`: numbers by index, with their minimum. Unset values are infinite."""

    __slots__ = ("_leaves", "_minima", "minimum")

    def __init__(self) -> None:
        self._leaves: list[list[float]] = []
        self._minima: list[float] = []
        self.minimum = math.inf

    def __setitem__(self, index: int, value: float) -> None:
        number = index // _WIDTH
        while number >= len(self._leaves):
            self._leaves.append([math.inf] * _WIDTH)
            self._minima.append(math.inf)
        leaf = self._leaves[number]
        leaf[index % _WIDTH] = value
        lowest = min(leaf)
        if lowest != self._minima[number]:
            self._minima[number] = lowest
            self.minimum = min(self._minima)


class MinTree:
    """Immutable numbers by index, with their minimum. Unset values are infinite.

    `minimum` is infinite only if all values are.
    """

    __slots__ = ("_leaves", "_minima", "minimum")

    def __init__(self) -> None:
        self._leaves: tuple[tuple[float, ...], ...] = ()
        self._minima: tuple[float, ...] = ()
        self.minimum = math.inf

    def __getitem__(self, index: int) -> float:
        leaf = index // _WIDTH
        return self._leaves[leaf][index % _WIDTH] if leaf < len(self._leaves) else math.inf

    def with_value(self, index: int, value: float) -> "MinTree":
        number, offset = divmod(index, _WIDTH)
        leaves, minima = self._leaves, self._minima
        if number >= len(leaves):
            leaves += (_EMPTY,) * (number + 1 - len(leaves))
            minima += (math.inf,) * (number + 1 - len(minima))
        leaf = leaves[number]
        if leaf[offset] == value:
            return self
        leaf = _with_item(leaf, offset, value)
        changed = MinTree.__new__(MinTree)
        changed._leaves = _with_item(leaves, number, leaf)
        changed._minima, changed.minimum = minima, self.minimum
        lowest = value if value <= minima[number] else min(leaf)
        if lowest != minima[number]:
            changed._minima = _with_item(minima, number, lowest)
            changed.minimum = min(changed._minima)
        return changed

    def argmin(self, start: int = 0) -> int | None:
        """The index of the smallest value; None if all values are infinite.

        Among equal values, the first index from `start` on, or else the first index.
        """
        lowest = self.minimum
        if lowest == math.inf:
            return None
        number, offset = divmod(start, _WIDTH)
        if number < len(self._leaves) and lowest in self._leaves[number][offset:]:
            return number * _WIDTH + self._leaves[number].index(lowest, offset)
        if lowest in self._minima[number + 1 :]:
            number = self._minima.index(lowest, number + 1)
        else:
            number = self._minima.index(lowest)
        return number * _WIDTH + self._leaves[number].index(lowest)


ItemT = TypeVar("ItemT", bound=tuple[Any, ...])

_MAX_CHUNK = 128  # items; a longer chunk is split in two
_first = itemgetter(0)


class SortedChunks(Generic[ItemT]):
    """An immutable sequence of tuples in ascending order; equal items may occur several times.

    A change copies one chunk of at most `_MAX_CHUNK` items.
    """

    __slots__ = ("_chunks", "_len")

    def __init__(self, items: Iterable[ItemT] = ()) -> None:
        ascending = tuple(sorted(items))
        starts = range(0, len(ascending), _MAX_CHUNK // 2)
        self._chunks = tuple(ascending[start : start + _MAX_CHUNK // 2] for start in starts)
        self._len = len(ascending)

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[ItemT]:
        return chain.from_iterable(self._chunks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SortedChunks) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"SortedChunks({list(self)!r})"

    @property
    def first(self) -> ItemT | None:
        return self._chunks[0][0] if self._chunks else None

    def head(self, number: int) -> tuple[ItemT, ...]:
        """The first `number` items, or all items if there are fewer."""
        if self._chunks and len(self._chunks[0]) >= number:
            return self._chunks[0][:number]
        return tuple(islice(self, number))

    def inserted(self, item: ItemT) -> "SortedChunks[ItemT]":
        if not self._chunks:
            return self._with(0, 0, ((item,),), 1)
        if item >= self._chunks[-1][-1]:  # a fast path: in FIFO order, new items come last
            index = len(self._chunks) - 1
            chunk = self._chunks[index] + (item,)
        else:
            index = max(bisect_right(self._chunks, item, key=_first) - 1, 0)
            chunk = self._chunks[index]
            place = bisect_right(chunk, item)
            chunk = chunk[:place] + (item,) + chunk[place:]  # noqa: RUF005 (quicker)
        middle = len(chunk) // 2
        cut = (chunk[:middle], chunk[middle:]) if len(chunk) > _MAX_CHUNK else (chunk,)
        return self._with(index, index + 1, cut, 1)

    def removed(self, item: ItemT) -> "SortedChunks[ItemT]":
        """The sequence without one occurrence of `item`. Raises KeyError without any."""
        if self._chunks and self._chunks[0][0] is item:  # a fast path: queues remove the first item
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
        self, start: int, end: int, chunks: tuple[tuple[ItemT, ...], ...], growth: int
    ) -> "SortedChunks[ItemT]":
        changed: SortedChunks[ItemT] = SortedChunks.__new__(SortedChunks)
        others = self._chunks
        if end == len(others):
            changed._chunks = others[:start] + chunks
        else:
            changed._chunks = others[:start] + chunks + others[end:]
        changed._len = self._len + growth
        return changed
