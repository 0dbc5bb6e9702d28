"""A layered layout: boxes in rows from top to bottom, edges as points from row to row.

After Sugiyama, Tagawa, Toda (1981): ranks by longest path, order by barycentres, and x by
isotonic regression towards the neighbours' mean, which keeps the order and the distances.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean
from typing import TypeAlias

MARGIN = 24.0
COLUMN_GAP = 28.0
ROW_GAP = 46.0  # room for one line of label
THREAD_WIDTH = 10.0  # what an edge needs in a row that it only crosses
NUM_SWEEPS = 12

Point: TypeAlias = tuple[float, float]
Cell: TypeAlias = str | tuple[int, int]  # a box by name, or an edge's number and the row it crosses


@dataclass(frozen=True, slots=True)
class Link:
    """An edge to draw; `is_back` where it must not count for the order of rows."""

    source: str
    target: str
    is_back: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle: left, top, and its size."""

    x: float
    y: float
    width: float
    height: float

    @property
    def centre(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass(frozen=True, slots=True)
class Route:
    """Where an edge runs: pairs of points, one pair a gap between rows, or a way round."""

    points: tuple[Point, ...]
    is_back: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Boxes by name, one route a link in the order of the links, and the size of the whole."""

    boxes: Mapping[str, Box]
    routes: tuple[Route, ...]
    width: float
    height: float


Thread: TypeAlias = tuple[Cell, ...]  # the cells of one forward edge, row by row
Rows: TypeAlias = list[list[Cell]]


def lay_out(sizes: Mapping[str, tuple[float, float]], links: Sequence[Link]) -> Layout:
    """Place boxes of the given (width, height); no two touch, and no forward edge climbs."""
    rank = _ranks(list(sizes), links)
    threads = [_thread(number, link, rank) for number, link in enumerate(links)]
    rows = _rows(rank, threads)
    neighbours = _neighbours(rows, threads)
    _order(rows, neighbours)
    widths = {
        cell: sizes[cell][0] if isinstance(cell, str) else THREAD_WIDTH for cell in neighbours
    }
    centres = _centres(rows, neighbours, widths)
    spans = _spans(rows, sizes)
    boxes = _boxes(sizes, rank, centres, spans)
    return _routed(links, _Ways(threads, boxes, centres, spans))


def _ranks(names: list[str], links: Sequence[Link]) -> dict[str, int]:
    """Longest path from above; where only cycles are left, the first node left is cut free."""
    above: dict[str, set[str]] = {name: set() for name in names}
    for link in links:
        if not link.is_back and link.source != link.target:
            above[link.target].add(link.source)
    rank: dict[str, int] = {}
    while above:
        free = next((name for name in above if above[name] <= rank.keys()), next(iter(above)))
        rank[free] = 1 + max((rank[name] for name in above.pop(free) if name in rank), default=-1)
    return rank


def _thread(number: int, link: Link, rank: Mapping[str, int]) -> Thread:
    """Empty for an edge that goes back: it runs round the rows, not through them."""
    if link.is_back or rank[link.target] <= rank[link.source]:
        return ()
    crossed = range(rank[link.source] + 1, rank[link.target])
    return (link.source, *((number, row) for row in crossed), link.target)


def _rows(rank: Mapping[str, int], threads: Sequence[Thread]) -> Rows:
    rows: Rows = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for name, row in rank.items():
        rows[row].append(name)
    for cell in (cell for thread in threads for cell in thread[1:-1]):
        assert isinstance(cell, tuple)
        rows[cell[1]].append(cell)
    return rows


def _neighbours(rows: Rows, threads: Sequence[Thread]) -> dict[Cell, tuple[list[Cell], list[Cell]]]:
    """For each cell those above and those below that an edge joins it to."""
    found: dict[Cell, tuple[list[Cell], list[Cell]]] = {c: ([], []) for row in rows for c in row}
    for thread in threads:
        for upper, lower in pairwise(thread):
            found[upper][1].append(lower)
            found[lower][0].append(upper)
    return found


def _order(rows: Rows, neighbours: Mapping[Cell, tuple[list[Cell], list[Cell]]]) -> None:
    """Sort each row by the mean place of its neighbours, sweeping down and up in turn."""
    place: dict[Cell, float] = {cell: float(n) for row in rows for n, cell in enumerate(row)}
    for sweep in range(NUM_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wish = {c: _mean(neighbours[c][sweep % 2], place, place[c]) for c in row}
            row.sort(key=lambda cell: wish[cell])
            place.update({cell: float(n) for n, cell in enumerate(row)})


def _mean(cells: Sequence[Cell], place: Mapping[Cell, float], otherwise: float) -> float:
    return fmean(place[cell] for cell in cells) if cells else otherwise


def _centres(
    rows: Rows,
    neighbours: Mapping[Cell, tuple[list[Cell], list[Cell]]],
    widths: Mapping[Cell, float],
) -> dict[Cell, float]:
    """The x of each cell: as near to its neighbours' mean as order and distances let it be."""
    centre: dict[Cell, float] = {}
    for row in rows:
        centre.update(zip(row, _spread([0.0] * len(row), row, widths), strict=True))
    for sweep in range(NUM_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wish = [_mean([*neighbours[c][0], *neighbours[c][1]], centre, centre[c]) for c in row]
            centre.update(zip(row, _spread(wish, row, widths), strict=True))
    leftmost = min((x - widths[cell] / 2 for cell, x in centre.items()), default=0.0)
    return {cell: x - leftmost + MARGIN for cell, x in centre.items()}


def _spread(
    wish: Sequence[float], row: Sequence[Cell], widths: Mapping[Cell, float]
) -> list[float]:
    """The places nearest to `wish` (least squares) in the given order without overlap."""
    steps = [(widths[left] + widths[right]) / 2 + COLUMN_GAP for left, right in pairwise(row)]
    offsets = list(accumulate(steps, initial=0.0))
    pools: list[tuple[float, int]] = []  # (mean, size): pool adjacent violators
    for wanted, offset in zip(wish, offsets, strict=False):
        mean, size = wanted - offset, 1
        while pools and pools[-1][0] >= mean:
            before, others = pools.pop()
            mean, size = (before * others + mean * size) / (others + size), others + size
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    return [mean + offset for mean, offset in zip(flat, offsets, strict=False)]


def _spans(rows: Rows, sizes: Mapping[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """Top and bottom of each row."""
    heights = [max((sizes[c][1] for c in row if isinstance(c, str)), default=0.0) for row in rows]
    tops = accumulate((height + ROW_GAP for height in heights), initial=MARGIN)
    return [(top, top + height) for top, height in zip(tops, heights, strict=False)]


def _boxes(
    sizes: Mapping[str, tuple[float, float]],
    rank: Mapping[str, int],
    centres: Mapping[Cell, float],
    spans: Sequence[tuple[float, float]],
) -> dict[str, Box]:
    """Each box in the middle of its row's height."""
    return {
        name: Box(centres[name] - width / 2, sum(spans[rank[name]]) / 2 - height / 2, width, height)
        for name, (width, height) in sizes.items()
    }


@dataclass(frozen=True, slots=True)
class _Ways:
    """All that the way of an edge depends on."""

    threads: Sequence[Thread]
    boxes: Mapping[str, Box]
    centres: Mapping[Cell, float]
    spans: Sequence[tuple[float, float]]

    def through(self, number: int) -> Route:
        """From the bottom of a box to the top of another, straight through each row between."""
        thread = self.threads[number]
        first, last = self.boxes[str(thread[0])], self.boxes[str(thread[-1])]
        start = self._port(first, number, at=0, towards=1), first.bottom
        stop = self._port(last, number, at=-1, towards=-2), last.y
        between = [
            (self.centres[cell], y)
            for cell in thread[1:-1]
            if isinstance(cell, tuple)
            for y in self.spans[cell[1]]
        ]
        return Route((start, *between, stop), is_back=False)

    def _port(self, box: Box, number: int, *, at: int, towards: int) -> float:
        """The x where an edge meets a box: edges at one side stand apart, ordered by their ways."""
        mine = self.threads[number][at]
        beside = [n for n, thread in enumerate(self.threads) if thread and thread[at] == mine]
        beside.sort(key=lambda n: self.centres[self.threads[n][towards]])
        return box.x + box.width * (beside.index(number) + 1) / (len(beside) + 1)

    def around(self, link: Link, lane: float) -> Route:
        """From the right side of a box to that of another, along a lane right of everything."""
        source, target = self.boxes[link.source], self.boxes[link.target]
        out, back = source.y + source.height * 0.7, target.y + target.height * 0.3
        right, left = source.x + source.width, target.x + target.width
        return Route(((right, out), (lane, out), (lane, back), (left, back)), is_back=True)


def _routed(links: Sequence[Link], ways: _Ways) -> Layout:
    edges = [box.x + box.width for box in ways.boxes.values()]
    threads = [x for cell, x in ways.centres.items() if isinstance(cell, tuple)]
    lane = max([*edges, *threads], default=0.0)
    routes = []
    for number, link in enumerate(links):
        is_back = not ways.threads[number]
        lane += COLUMN_GAP if is_back else 0
        routes.append(ways.around(link, lane) if is_back else ways.through(number))
    bottom = max((bottom for _, bottom in ways.spans), default=MARGIN)
    return Layout(ways.boxes, tuple(routes), lane + MARGIN, bottom + MARGIN)
