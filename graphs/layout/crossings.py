"""The order of cells in each row of a layered layout, with few crossings."""

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from statistics import fmean

from sagellm.graphs.layout.geometry import Cell

_NUM_SWEEPS = 12


def ordered(
    rows: Sequence[Sequence[Cell]],
    upper: Mapping[Cell, Sequence[Cell]],
    lower: Mapping[Cell, Sequence[Cell]],
    first: frozenset[Cell],
) -> list[list[Cell]]:
    """The rows, each sorted by the mean place of its neighbours, sweeping down and up in turn.

    The best of all sweeps is returned. Cells of `first` stay at the left of their rows.
    """
    now = [sorted(row, key=lambda cell: cell not in first) for row in rows]
    best, fewest = [list(row) for row in now], num_crossings(now, lower)
    for sweep in range(_NUM_SWEEPS):
        near = lower if sweep % 2 else upper
        _sweep(now[::-1] if sweep % 2 else now, near, first)
        if (count := num_crossings(now, lower)) < fewest:
            best, fewest = [list(row) for row in now], count
    return best


def _sweep(
    rows: Sequence[list[Cell]], near: Mapping[Cell, Sequence[Cell]], first: frozenset[Cell]
) -> None:
    place = {cell: float(n) for row in rows for n, cell in enumerate(row)}
    for row in rows:
        wish = {c: fmean(place[o] for o in near[c]) if near[c] else place[c] for c in row}
        row.sort(key=lambda cell: (cell not in first, wish[cell]))
        place.update({cell: float(n) for n, cell in enumerate(row)})


def num_crossings(rows: Sequence[Sequence[Cell]], lower: Mapping[Cell, Sequence[Cell]]) -> int:
    """How many pairs of edges between two rows cross."""
    return sum(_between(row, below, lower) for row, below in pairwise(rows))


def _between(
    row: Sequence[Cell], below: Sequence[Cell], lower: Mapping[Cell, Sequence[Cell]]
) -> int:
    place = {cell: n for n, cell in enumerate(below)}
    ends = [[place[end] for end in lower[cell]] for cell in row]
    return sum(
        right < left for one, other in combinations(ends, 2) for left in one for right in other
    )
