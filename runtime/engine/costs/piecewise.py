"""Piecewise linear functions of one variable, and grids of them over two."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class PiecewiseLinear:
    """A function through points. Before the first point it has the first value; after the last
    point it goes on with the slope of the last segment. Raises ValueError unless `at` increases.
    """

    at: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.at or len(self.at) != len(self.values):
            raise ValueError(f"{len(self.at)} points have {len(self.values)} values")
        if any(left >= right for left, right in zip(self.at, self.at[1:], strict=False)):
            raise ValueError("the points do not increase")

    def __call__(self, x: float) -> float:
        start, value, slope = self._piece(x)
        return value + (x - start) * slope

    def total(self, first: float, count: int, stride: int = 1) -> float:
        """The sum of the values at `first`, `first` + `stride`, ..., `count` of them. The running
        time grows with the number of points, not with `count`.
        """
        if not stride:
            return count * self(first)
        done, total = 0, 0.0
        while done < count:
            x = first + done * stride
            start, value, slope = self._piece(x)
            end = self._end(x)
            fitting = count if end is None else max(1, ceil((end - x) / stride))
            num = min(count - done, fitting)
            total += num * (value + (x - start) * slope) + slope * stride * (num * (num - 1) // 2)
            done += num
        return total

    def _piece(self, x: float) -> tuple[float, float, float]:
        """The beginning, the first value and the slope of the segment of `x`."""
        if x < self.at[0] or len(self.at) == 1:
            return self.at[0], self.values[0], 0.0
        index = min(bisect_right(self.at, x), len(self.at) - 1) - 1
        width = self.at[index + 1] - self.at[index]
        rise = self.values[index + 1] - self.values[index]
        return self.at[index], self.values[index], rise / width

    def _end(self, x: float) -> float | None:
        """The end of the segment of `x`; None: it has none."""
        index = bisect_right(self.at, x)
        return self.at[index] if index < len(self.at) and len(self.at) > 1 else None


@dataclass(frozen=True, slots=True)
class TimeGrid:
    """Functions of y at some x, with linear interpolation between two neighbours in x. Below the
    first x, the first function holds; above the last, values go on linearly.
    """

    at: tuple[float, ...]
    functions: tuple[PiecewiseLinear, ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float, float]]) -> "TimeGrid":
        """A grid through points (x, y, value). Points of equal x and y count with their mean.
        Raises ValueError without points.
        """
        found: dict[float, dict[float, list[float]]] = {}
        for x, y, value in points:
            found.setdefault(x, {}).setdefault(y, []).append(value)
        if not found:
            raise ValueError("a grid needs points")
        functions = []
        for x in sorted(found):
            column = found[x]
            means = tuple(sum(column[y]) / len(column[y]) for y in sorted(column))
            functions.append(PiecewiseLinear(tuple(sorted(column)), means))
        return cls(tuple(sorted(found)), tuple(functions))

    def __call__(self, x: float, y: float) -> float:
        return sum(weight * function(y) for weight, function in self._neighbours(x))

    def total(self, x: float, first: float, count: int) -> float:
        """The sum of the values at y = `first`, `first` + 1, ..., `count` of them."""
        return sum(
            weight * function.total(first, count) for weight, function in self._neighbours(x)
        )

    def _neighbours(self, x: float) -> list[tuple[float, PiecewiseLinear]]:
        if x <= self.at[0] or len(self.at) == 1:
            return [(1.0, self.functions[0])]
        right = min(bisect_left(self.at, x), len(self.at) - 1)
        share = (x - self.at[right - 1]) / (self.at[right] - self.at[right - 1])
        return [(1 - share, self.functions[right - 1]), (share, self.functions[right])]
