"""Where edges meet boxes: straight below or above what they come from, where there is room."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

from sagellm.graphs.layout.geometry import Cell, Size
from sagellm.graphs.layout.grid import Grid

PORT_GAP = 14.0
_INSET = 8.0  # from the corner of a box

Lines: TypeAlias = list[list[float]]  # of each edge the x of each cell of its thread


def lines(grid: Grid, sizes: Mapping[str, Size]) -> Lines:
    """The x of each edge in each row from its upper box to its lower one; empty for a loop."""
    found = [[grid.centres[cell] for cell in thread] for thread in grid.threads]
    for at, towards in ((0, 1), (-1, -2)):
        sides: dict[Cell, list[int]] = defaultdict(list)
        for number, thread in enumerate(grid.threads):
            if thread:
                sides[thread[at]].append(number)
        for name, numbers in sides.items():
            places = _places(grid, numbers, towards)
            wish = [found[number][towards] for number in places]
            ports = spread(wish, grid.centres[name], sizes[str(name)][0])
            for number, x in zip(places, ports, strict=True):
                found[number][at] = x
    return found


def _places(grid: Grid, numbers: Sequence[int], towards: int) -> list[int]:
    """The edges of one side of a box, from left to right."""
    return sorted(numbers, key=lambda number: grid.centres[grid.threads[number][towards]])


def spread(wish: Sequence[float], centre: float, width: float) -> list[float]:
    """The places nearest to the sorted `wish` on a side of that width, PORT_GAP apart.

    Where they have no room they share the side evenly.
    """
    room = width - 2 * _INSET
    if (len(wish) - 1) * PORT_GAP > room:
        step = width / (len(wish) + 1)
        return [centre - width / 2 + step * (n + 1) for n in range(len(wish))]
    apart = [wanted - PORT_GAP * n for n, wanted in enumerate(wish)]
    left, right = centre - room / 2, centre + room / 2 - PORT_GAP * (len(wish) - 1)
    held = (min(max(x, left), right) for x in _rising(apart))
    return [x + PORT_GAP * n for n, x in enumerate(held)]


def _rising(values: Sequence[float]) -> list[float]:
    """The nearest values, by least squares, that never fall: pool adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] >= mean:
            before, others = pools.pop()
            mean, size = (before * others + mean * size) / (others + size), others + size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


def widest_bends(grid: Grid, found: Lines) -> list[float]:
    """After each row, how far to the side an edge goes on its way to the next row at most."""
    widest = [0.0] * len(grid.rows)
    for thread, line in zip(grid.threads, found, strict=True):
        row = grid.row_of[str(thread[0])] if thread else 0
        for step, (x, next_x) in enumerate(pairwise(line)):
            widest[row + step] = max(widest[row + step], abs(next_x - x))
    return widest
