"""The rows of cells of a layered layout, ordered so that few edges cross."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean
from typing import TypeAlias

from sagellm.graphs.layout.alignment import COLUMN_GAP, centres
from sagellm.graphs.layout.ranks import Band, GridCell, LayoutEdge, Size, ranks, shortcuts, spine

# The cells of one edge from top to bottom; empty for a loop.
EdgePath: TypeAlias = tuple[GridCell, ...]

EDGE_WIDTH = 10.0  # the space of an edge in a row that it crosses
_NUM_SWEEPS = 12


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of each row from left to right, with their widths and the x of their centres.

    `paths`: the path of each edge. `labels`: the row of an edge's label, by the edge's number.
    """

    rows: Sequence[Sequence[GridCell]]
    row_of: Mapping[str, int]
    paths: Sequence[EdgePath]
    labels: Mapping[int, int]
    widths: Mapping[GridCell, float]
    centres: Mapping[GridCell, float]

    def is_label(self, cell: GridCell) -> bool:
        return isinstance(cell, tuple) and self.labels.get(cell[0]) == cell[1]


def grid(sizes: Mapping[str, Size], edges: Sequence[LayoutEdge], bands: Sequence[Band]) -> Grid:
    """Arrange boxes and edges in rows of cells, with few crossings and COLUMN_GAP between cells."""
    rank = ranks(list(sizes), edges, bands)
    row_of, labels = _numbered(rank, edges)
    paths = [_edge_path(number, edge, row_of) for number, edge in enumerate(edges)]
    rows: list[list[GridCell]] = [[] for _ in range(max(row_of.values(), default=-1) + 1)]
    for name, row in row_of.items():
        rows[row].append(name)
    for cell in (cell for path in paths for cell in path if isinstance(cell, tuple)):
        rows[cell[1]].append(cell)
    upper, lower = _neighbours(rows, paths)
    first: frozenset[GridCell] = frozenset(band.title for band in bands)
    in_order = ordered(rows, upper, lower, first)
    widths = _widths(in_order, sizes, edges, labels)
    near = _neighbours(rows, paths, _grades(rank, edges))
    x = centres(in_order, lower, near, widths)
    return Grid(in_order, row_of, paths, labels, widths, x)


def _numbered(
    rank: Mapping[str, int], edges: Sequence[LayoutEdge]
) -> tuple[dict[str, int], dict[int, int]]:
    """The row of each box, and the row of each label by edge number. A row of labels lies between
    the rows of two ranks.
    """
    gaps = {n: _label_gap(edge, rank) for n, edge in enumerate(edges) if _has_row(edge)}
    labelled = sorted(set(gaps.values()))
    row_of = {name: value + sum(gap < value for gap in labelled) for name, value in rank.items()}
    row_of_gap = {gap: gap + 1 + number for number, gap in enumerate(labelled)}
    return row_of, {number: row_of_gap[gap] for number, gap in gaps.items()}


def _has_row(edge: LayoutEdge) -> bool:
    return edge.label_width > 0 and not edge.is_loop


def _label_gap(edge: LayoutEdge, rank: Mapping[str, int]) -> int:
    """The rank above the label of an edge."""
    upper, lower = sorted((edge.source, edge.target), key=lambda name: rank[name])
    return rank[lower] - 1 if edge.at_target == (lower == edge.target) else rank[upper]


def _edge_path(number: int, edge: LayoutEdge, row_of: Mapping[str, int]) -> EdgePath:
    if edge.is_loop:
        return ()
    upper, lower = sorted((edge.source, edge.target), key=lambda name: row_of[name])
    crossed = range(row_of[upper] + 1, row_of[lower])
    return (upper, *((number, row) for row in crossed), lower)


def _grades(rank: Mapping[str, int], edges: Sequence[LayoutEdge]) -> list[int]:
    """The grade of each edge: edges of a lower grade align their boxes first. The spine has 0."""
    # A shortcut comes after other edges, so that the longer path is straight and not the shortcut.
    first, last = spine(rank, edges), shortcuts(rank, edges)
    return [
        0 if number in first else 1 + max(edge.priority, number in last)
        for number, edge in enumerate(edges)
    ]


def _neighbours(
    rows: Sequence[Sequence[GridCell]], paths: Sequence[EdgePath], grades: Sequence[int] = ()
) -> tuple[dict[GridCell, list[GridCell]], dict[GridCell, list[GridCell]]]:
    """The neighbours above each cell, and the neighbours below each cell.

    At each side of a box, only the edges of the lowest grade count.
    """
    grades = grades or [0] * len(paths)
    sides: tuple[dict[GridCell, list[GridCell]], ...] = ({}, {})
    for cell in (cell for row in rows for cell in row):
        sides[0][cell], sides[1][cell] = [], []
    best: dict[tuple[int, GridCell], int] = {}
    for number in sorted(range(len(paths)), key=lambda n: grades[n]):
        for above, below in pairwise(paths[number]):
            for side, cell, other in ((0, below, above), (1, above, below)):
                if best.setdefault((side, cell), grades[number]) == grades[number]:
                    sides[side][cell].append(other)
    return sides[0], sides[1]


def _widths(
    rows: Sequence[Sequence[GridCell]],
    sizes: Mapping[str, Size],
    edges: Sequence[LayoutEdge],
    labels: Mapping[int, int],
) -> dict[GridCell, float]:
    widths: dict[GridCell, float] = {}
    for cell in (cell for row in rows for cell in row):
        if isinstance(cell, str):
            widths[cell] = sizes[cell][0]
        else:
            is_label = labels.get(cell[0]) == cell[1]
            widths[cell] = edges[cell[0]].label_width if is_label else EDGE_WIDTH
    beside: dict[str, float] = {}
    for edge in edges:
        if edge.is_loop:
            needed = COLUMN_GAP + edge.label_width
            beside[edge.source] = max(beside.get(edge.source, 0.0), needed)
    for name, width in beside.items():
        widths[name] += 2 * width  # at both sides, so that the box stays in the middle of its cell
    return widths


def ordered(
    rows: Sequence[Sequence[GridCell]],
    upper: Mapping[GridCell, Sequence[GridCell]],
    lower: Mapping[GridCell, Sequence[GridCell]],
    first: frozenset[GridCell],
) -> list[list[GridCell]]:
    """Sort each row by the mean place of each cell's neighbours, sweeping down and up in turn.

    Returns the rows of the sweep with the fewest crossings. The cells `first` stay leftmost.
    """
    current = [sorted(row, key=lambda cell: cell not in first) for row in rows]
    best, fewest = [list(row) for row in current], num_crossings(current, lower)
    for sweep in range(_NUM_SWEEPS):  # a sweep may add crossings, so the best rows are kept
        near = lower if sweep % 2 else upper
        _sweep(current[::-1] if sweep % 2 else current, near, first)
        if (count := num_crossings(current, lower)) < fewest:
            best, fewest = [list(row) for row in current], count
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
    """The number of pairs of edges that cross between neighbouring rows."""
    return sum(_between(row, below, lower) for row, below in pairwise(rows))


def _between(
    row: Sequence[GridCell], below: Sequence[GridCell], lower: Mapping[GridCell, Sequence[GridCell]]
) -> int:
    place = {cell: n for n, cell in enumerate(below)}
    ends = [[place[end] for end in lower[cell]] for cell in row]
    return sum(
        right < left for one, other in combinations(ends, 2) for left in one for right in other
    )
