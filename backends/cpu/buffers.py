"""Where the results of a native step lie: buffers that are used again once they are dead."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Columns `column` .. `column + width` of the rows of a buffer; LOGITS is no arena's."""

    buffer: int
    column: int
    width: int


LOGITS = -1


class Buffers:
    """Hands out buffers as a plan goes by; each becomes as wide as the widest of its users."""

    def __init__(self) -> None:
        self._widths: list[int] = []
        self._users: list[int] = []

    def take(self, widths: Sequence[int]) -> tuple[Place, ...]:
        """Matrices side by side in one buffer that nothing else uses."""
        buffer = self._free_one(sum(widths))
        self._widths[buffer] = max(self._widths[buffer], sum(widths))
        self._users[buffer] = len(widths)
        columns = [sum(widths[:index]) for index in range(len(widths))]
        pairs = zip(columns, widths, strict=True)
        return tuple(Place(buffer, column, width) for column, width in pairs)

    def drop(self, place: Place) -> None:
        """Nothing reads this matrix any more."""
        if place.buffer != LOGITS:
            self._users[place.buffer] -= 1

    def stride(self, buffer: int) -> int:
        """Floats from row to row."""
        return self._widths[buffer]

    def firsts(self) -> tuple[int, ...]:
        """Floats a row of all buffers before each, and of all together at the end."""
        return tuple(sum(self._widths[:index]) for index in range(len(self._widths) + 1))

    def _free_one(self, width: int) -> int:
        free = [index for index, users in enumerate(self._users) if users == 0]
        wide = [index for index in free if self._widths[index] >= width]
        if wide:
            return min(wide, key=self._widths.__getitem__)
        if free:
            return max(free, key=self._widths.__getitem__)
        self._widths.append(0)
        self._users.append(0)
        return len(self._widths) - 1
