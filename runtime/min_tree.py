"""A sequence of numbers whose smallest is found without looking at all of them, as a value."""

import math
from typing import TypeVar

_WIDTH = 32  # an update copies one leaf and the minima of all leaves: a microsecond for a thousand

_EMPTY = (math.inf,) * _WIDTH


T = TypeVar("T")


def _exchanged(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return items[:index] + (item,) + items[index + 1 :]  # noqa: RUF005 (quicker)


class MutableMinTree:
    """The same for one owner: a change copies nothing. Values never set are infinite."""

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
    """Immutable. Values that were never set are infinite, and an infinite value is never found."""

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
        leaf = _exchanged(leaf, offset, value)
        changed = MinTree.__new__(MinTree)
        changed._leaves = _exchanged(leaves, number, leaf)
        changed._minima, changed.minimum = minima, self.minimum
        lowest = value if value <= minima[number] else min(leaf)
        if lowest != minima[number]:
            changed._minima = _exchanged(minima, number, lowest)
            changed.minimum = min(changed._minima)
        return changed

    def argmin(self, start: int = 0) -> int | None:
        """The index of the smallest value, of equal ones the first at or after `start`, else the
        first of all; None where every value is infinite.
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
