"""Numbers that several gateway processes add up to: each changes its own, all see the sum."""

import mmap
import os
from collections.abc import Sequence
from typing import Protocol

_ITEM_BYTES = 8  # written and read in one access of memory


class Count(Protocol):
    """How much of something there is, here and elsewhere."""

    def add(self, number: int) -> None:
        """Here; it may be negative."""

    @property
    def total(self) -> int: ...


class LocalCount:
    """There is nobody else."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, number: int) -> None:
        self.total += number


class Tally:
    """A table in memory that processes share: a row a gateway, a column a name.

    No row has two writers, so that there is nothing to lock. A sum may be a moment old.
    """

    def __init__(self, descriptor: int, num_rows: int, names: Sequence[str]) -> None:
        self.descriptor = descriptor
        self._num_rows = num_rows
        self._columns = {name: number for number, name in enumerate(names)}
        self._map = mmap.mmap(descriptor, max(1, num_rows * len(names)) * _ITEM_BYTES)
        self._cells = memoryview(self._map).cast("q")

    @classmethod
    def make(cls, num_rows: int, names: Sequence[str]) -> "Tally":
        """A new table, all zero; its descriptor is for those who share it."""
        descriptor = os.memfd_create("sagellm-tally")
        os.ftruncate(descriptor, max(1, num_rows * len(names)) * _ITEM_BYTES)
        return cls(descriptor, num_rows, names)

    def count(self, name: str, row: int) -> Count:
        """Of one column, as one row changes it. A name that is not in the table is counted here."""
        column = self._columns.get(name)
        if column is None:
            return LocalCount()
        return _SharedCount(self._cells, len(self._columns), column, row)

    def clear(self, row: int) -> None:
        """Whoever wrote that row is no more."""
        width = len(self._columns)
        for cell in range(row * width, (row + 1) * width):
            self._cells[cell] = 0

    def close(self) -> None:
        self._cells.release()
        self._map.close()
        os.close(self.descriptor)


class _SharedCount:
    def __init__(self, cells: memoryview, width: int, column: int, row: int) -> None:
        self._cells = cells
        self._width = width
        self._column = column
        self._own = row * width + column

    def add(self, number: int) -> None:
        self._cells[self._own] += number

    @property
    def total(self) -> int:
        return sum(self._cells[self._column :: self._width])
