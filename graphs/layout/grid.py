"""Rows of cells of a layered layout, ordered so that few edges cross."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean
from typing import TypeAlias

from sagellm.graphs.layout.alignment import COLUMN_GAP, centres
from sagellm.graphs.layout.geometry import GridCell, Size
from sagellm.graphs.layout.ranks import Band, LayoutEdge, ranks, shortcuts, spine

_NUM_SWEEPS = 12


def ordered(
    rows: Sequence[Sequence[GridCell]],
    upper: Mapping[GridCell, Sequence[GridCell]],
    lower: Mapping[GridCell, Sequence[GridCell]],
    first: frozenset[GridCell],
) -> list[list[GridCell]]:
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
    rows: Sequence[list[GridCell]],
    near: Mapping[GridCell, Sequence[GridCell]],
    first: frozenset[GridCell],
) -> None:
    place = {cell: float(n) for row in rows for n, cell in enumerate(row)}
    for row in rows:
        wish = {c: fmean(place[o] for o in near[c]) if near[c] else place[c] for c in row}
        row.sort(key=lambda cell: (cell not in first, wish[cell]))
        place.update({cell: float(n) for n, cell in enumerate(row)})


def num_crossings(
    rows: Sequence[Sequence[GridCell]], lower: Mapping[GridCell, Sequence[GridCell]]
) -> int:
    """How many pairs of edges between two rows cross."""
    return sum(_between(row, below, lower) for row, below in pairwise(rows))


def _between(
    row: Sequence[GridCell], below: Sequence[GridCell], lower: Mapping[GridCell, Sequence[GridCell]]
) -> int:
    place = {cell: n for n, cell in enumerate(below)}
    ends = [[place[end] for end in lower[cell]] for cell in row]
    return sum(
        right < left for one, other in combinations(ends, 2) for left in one for right in other
    )


THREAD_WIDTH = 10.0  # what an edge needs in a row that it only crosses

Thread: TypeAlias = tuple[GridCell, ...]  # the cells of one edge from top to bottom; none of a loop


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of each row from left to right. `labels`: the row of the label of an edge."""

    rows: Sequence[Sequence[GridCell]]
    row_of: Mapping[str, int]
    threads: Sequence[Thread]
    labels: Mapping[int, int]
    widths: Mapping[GridCell, float]
    centres: Mapping[GridCell, float]

    def is_label(self, cell: GridCell) -> bool:
        return isinstance(cell, tuple) and self.labels.get(cell[0]) == cell[1]


def grid(sizes: Mapping[str, Size], links: Sequence[LayoutEdge], bands: Sequence[Band]) -> Grid:
    """Cells in rows, in an order with few crossings, neighbours apart."""
    rank = ranks(list(sizes), links, bands)
    row_of, labels = _numbered(rank, links)
    threads = [_thread(number, link, row_of) for number, link in enumerate(links)]
    rows: list[list[GridCell]] = [[] for _ in range(max(row_of.values(), default=-1) + 1)]
    for name, row in row_of.items():
        rows[row].append(name)
    for cell in (cell for thread in threads for cell in thread if isinstance(cell, tuple)):
        rows[cell[1]].append(cell)
    upper, lower = _neighbours(rows, threads)
    first: frozenset[GridCell] = frozenset(band.title for band in bands)
    in_order = ordered(rows, upper, lower, first)
    widths = _widths(in_order, sizes, links, labels)
    near = _neighbours(rows, threads, _grades(rank, links))
    x = centres(in_order, lower, near, widths)
    return Grid(in_order, row_of, threads, labels, widths, x)


def _numbered(
    rank: Mapping[str, int], links: Sequence[LayoutEdge]
) -> tuple[dict[str, int], dict[int, int]]:
    """The row of each box, and that of each label: a row between two ranks, where one is needed."""
    gaps = {n: _label_gap(link, rank) for n, link in enumerate(links) if _has_row(link)}
    labelled = sorted(set(gaps.values()))
    row_of = {name: value + sum(gap < value for gap in labelled) for name, value in rank.items()}
    row_of_gap = {gap: gap + 1 + number for number, gap in enumerate(labelled)}
    return row_of, {number: row_of_gap[gap] for number, gap in gaps.items()}


def _has_row(link: LayoutEdge) -> bool:
    return link.label_width > 0 and not link.is_loop


def _label_gap(link: LayoutEdge, rank: Mapping[str, int]) -> int:
    """The number of the rank after which the label stands."""
    upper, lower = sorted((link.source, link.target), key=lambda name: rank[name])
    return rank[lower] - 1 if link.at_target == (lower == link.target) else rank[upper]


def _thread(number: int, link: LayoutEdge, row_of: Mapping[str, int]) -> Thread:
    if link.is_loop:
        return ()
    upper, lower = sorted((link.source, link.target), key=lambda name: row_of[name])
    crossed = range(row_of[upper] + 1, row_of[lower])
    return (upper, *((number, row) for row in crossed), lower)


def _grades(rank: Mapping[str, int], links: Sequence[LayoutEdge]) -> list[int]:
    """How much a box shall stand in line with its neighbour along each link; 0 comes first."""
    first, last = spine(rank, links), shortcuts(rank, links)
    return [
        0 if number in first else 1 + max(link.priority, number in last)
        for number, link in enumerate(links)
    ]


def _neighbours(
    rows: Sequence[Sequence[GridCell]], threads: Sequence[Thread], grades: Sequence[int] = ()
) -> tuple[dict[GridCell, list[GridCell]], dict[GridCell, list[GridCell]]]:
    """For each cell those above, and those below, that an edge joins it to.

    Of the edges at one side of a box only those of the first grade there count.
    """
    grades = grades or [0] * len(threads)
    sides: tuple[dict[GridCell, list[GridCell]], ...] = ({}, {})
    for cell in (cell for row in rows for cell in row):
        sides[0][cell], sides[1][cell] = [], []
    best: dict[tuple[int, GridCell], int] = {}
    for number in sorted(range(len(threads)), key=lambda n: grades[n]):
        for above, below in pairwise(threads[number]):
            for side, cell, other in ((0, below, above), (1, above, below)):
                if best.setdefault((side, cell), grades[number]) == grades[number]:
                    sides[side][cell].append(other)
    return sides[0], sides[1]


def _widths(
    rows: Sequence[Sequence[GridCell]],
    sizes: Mapping[str, Size],
    links: Sequence[LayoutEdge],
    labels: Mapping[int, int],
) -> dict[GridCell, float]:
    widths: dict[GridCell, float] = {}
    for cell in (cell for row in rows for cell in row):
        if isinstance(cell, str):
            widths[cell] = sizes[cell][0]
        else:
            is_label = labels.get(cell[0]) == cell[1]
            widths[cell] = links[cell[0]].label_width if is_label else THREAD_WIDTH
    beside: dict[str, float] = {}
    for link in links:
        if link.is_loop:
            needed = COLUMN_GAP + link.label_width
            beside[link.source] = max(beside.get(link.source, 0.0), needed)
    for name, width in beside.items():
        widths[name] += 2 * width  # left too, where nothing is, to keep the box in the middle
    return widths
