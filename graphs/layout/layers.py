"""A layered layout (Sugiyama, Tagawa, Toda 1981): boxes and labels in rows, edges as lines between
rows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from sagellm.graphs.layout.alignment import COLUMN_GAP
from sagellm.graphs.layout.grid import Grid, grid
from sagellm.graphs.layout.ranks import (
    Band,
    Box,
    EdgeRoute,
    GridCell,
    Layout,
    LayoutEdge,
    Point,
    Size,
)

# For each edge, the x of each cell of its path.
Lines: TypeAlias = list[list[float]]

MARGIN = 24.0
LABEL_HEIGHT = 15.0
FRAME_PADDING = 14.0
LOOP_HEIGHT = 18.0
HEAD_ROOM = 10.0  # edges are straight next to a box, so that arrow heads stand upright
_BENDS = 12.0, 32.0  # the smallest and the largest height of a bend
PORT_GAP = 14.0  # between the ends of two edges at the same side of a box
_INSET = 8.0  # between the end of an edge and the corner of its box


def lay_out(
    sizes: Mapping[str, Size], edges: Sequence[LayoutEdge], bands: Sequence[Band] = ()
) -> Layout:
    """Place boxes of the given `sizes` (width, height). The titles of bands are boxes too.

    No two boxes or labels touch, and no edge crosses a box or a label. A box with loops may become
    taller than its given height.
    """
    sizes = _with_loops(sizes, edges)
    cells = grid(sizes, edges, bands)
    tracks = lines(cells, sizes)
    spans = _spans(cells, sizes, bands, widest_bends(cells, tracks))
    boxes = {name: _box(name, size, cells, spans) for name, size in sizes.items()}
    _to_the_left(boxes, cells, bands)
    drawn = _Drawn(cells, edges, tracks, spans, boxes)
    frames = {band.title: drawn.frame(band) for band in bands}
    return _in_view(boxes, frames, [drawn.route(number) for number in range(len(edges))])


def _with_loops(sizes: Mapping[str, Size], edges: Sequence[LayoutEdge]) -> dict[str, Size]:
    num_loops = Counter(edge.source for edge in edges if edge.is_loop)
    return {
        name: (width, max(height, num_loops[name] * LOOP_HEIGHT))
        for name, (width, height) in sizes.items()
    }


def lines(grid: Grid, sizes: Mapping[str, Size]) -> Lines:
    """For each edge, its x in each row from its upper box to its lower box; empty for a loop."""
    found = [[grid.centres[cell] for cell in path] for path in grid.paths]
    for at, towards in ((0, 1), (-1, -2)):
        sides: dict[GridCell, list[int]] = defaultdict(list)
        for number, path in enumerate(grid.paths):
            if path:
                sides[path[at]].append(number)
        for name, numbers in sides.items():
            places = _places(grid, numbers, towards)
            wish = [found[number][towards] for number in places]
            ports = spread(wish, grid.centres[name], sizes[str(name)][0])
            for number, x in zip(places, ports, strict=True):
                found[number][at] = x
    return found


def _places(grid: Grid, numbers: Sequence[int], towards: int) -> list[int]:
    """Sort the edges at one side of a box from left to right. `towards`: the next cell's index."""
    return sorted(numbers, key=lambda number: grid.centres[grid.paths[number][towards]])


def spread(wish: Sequence[float], centre: float, width: float) -> list[float]:
    """The places on a side of a box that are nearest to the sorted `wish` and PORT_GAP apart.

    If the side is too short for the gaps, the places are spread evenly.
    """
    room = width - 2 * _INSET
    if (len(wish) - 1) * PORT_GAP > room:
        step = width / (len(wish) + 1)
        return [centre - width / 2 + step * (n + 1) for n in range(len(wish))]
    # After PORT_GAP * n is subtracted from place n, the condition is only that values never fall.
    apart = [wanted - PORT_GAP * n for n, wanted in enumerate(wish)]
    left, right = centre - room / 2, centre + room / 2 - PORT_GAP * (len(wish) - 1)
    held = (min(max(x, left), right) for x in _rising(apart))
    return [x + PORT_GAP * n for n, x in enumerate(held)]


def _rising(values: Sequence[float]) -> list[float]:
    """The nearest non-decreasing values by least squares, by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] >= mean:
            before, others = pools.pop()
            mean, size = (before * others + mean * size) / (others + size), others + size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


def widest_bends(grid: Grid, found: Lines) -> list[float]:
    """For each row, the widest horizontal step of an edge to the row below."""
    widest = [0.0] * len(grid.rows)
    for path, line in zip(grid.paths, found, strict=True):
        row = grid.row_of[str(path[0])] if path else 0
        for step, (x, next_x) in enumerate(pairwise(line)):
            widest[row + step] = max(widest[row + step], abs(next_x - x))
    return widest


def _spans(
    cells: Grid, sizes: Mapping[str, Size], bands: Sequence[Band], bends: Sequence[float]
) -> list[Point]:
    """The top and the bottom of each row."""
    label_rows = set(cells.labels.values())
    opening = {cells.row_of[band.title] for band in bands}
    closing = {max(cells.row_of[name] for name in band.members) for band in bands}
    top, spans = MARGIN, []
    for number, row in enumerate(cells.rows):
        heights = (sizes[cell][1] for cell in row if isinstance(cell, str))
        bottom = top + (LABEL_HEIGHT if number in label_rows else max(heights, default=0.0))
        spans.append((top, bottom))
        # Arrow heads are at boxes only, so a row of labels needs no room for them.
        heads = (number not in label_rows) + (number + 1 not in label_rows)
        around = (number in closing) + (number + 1 in opening)
        # A wide bend needs height, because its curve would be nearly horizontal otherwise.
        bend = min(max(bends[number] / 7, _BENDS[0]), _BENDS[1])
        top = bottom + bend + heads * HEAD_ROOM + around * FRAME_PADDING
    return spans


def _box(name: str, size: Size, cells: Grid, spans: Sequence[Point]) -> Box:
    """Place a box in the vertical middle of its row."""
    width, height = size
    middle = sum(spans[cells.row_of[name]]) / 2
    return Box(cells.centres[name] - width / 2, middle - height / 2, width, height)


def _to_the_left(boxes: dict[str, Box], cells: Grid, bands: Sequence[Band]) -> None:
    """Move the titles of frames to the left, past the edges that cross their rows."""
    for band in bands:
        title, row = boxes[band.title], cells.rows[cells.row_of[band.title]]
        room = [
            cells.centres[cell] - cells.widths[cell] / 2 - COLUMN_GAP - title.width
            for cell in row[1:2]
        ]
        left = min([*room, *(boxes[name].x for name in band.members)])
        boxes[band.title] = title.moved(left - title.x, 0)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The placed boxes and lines, from which frames and routes are computed."""

    cells: Grid
    edges: Sequence[LayoutEdge]
    tracks: Lines
    spans: Sequence[Point]
    boxes: Mapping[str, Box]

    def frame(self, band: Band) -> Box:
        """A frame around the title, the members, and all labels and edges in the members' rows."""
        held = [self.boxes[name] for name in (band.title, *band.members)]
        top, bottom = min(box.y for box in held), max(box.bottom for box in held)
        held += [Box(x, top, width, 0) for x, width in self._between(top, bottom)]
        for number, edge in enumerate(self.edges):
            if edge.is_loop and edge.source in band.members:
                held += _covered([self._loop(number)])
        x, right = min(box.x for box in held), max(box.right for box in held)
        pad = FRAME_PADDING
        return Box(x - pad, top - pad / 2, right - x + 2 * pad, bottom - top + 1.5 * pad)

    def _between(self, top: float, bottom: float) -> Iterator[Point]:
        """The left side and the width of each edge and label in the rows between two heights."""
        for number, path in enumerate(self.cells.paths):
            for cell, x in zip(path, self.tracks[number], strict=True):
                if isinstance(cell, tuple) and top <= self.spans[cell[1]][0] <= bottom:
                    width = self.edges[number].label_width if self.cells.is_label(cell) else 0.0
                    yield x - width / 2, width

    def route(self, number: int) -> EdgeRoute:
        edge, path = self.edges[number], self.cells.paths[number]
        if edge.is_loop:
            return self._loop(number)
        strokes: list[list[Point]] = [[]]
        label = None
        for cell, x in zip(path, self.tracks[number], strict=True):
            before, after = self._passed(cell, x, is_first=cell == path[0])
            strokes[-1] += before
            if self.cells.is_label(cell):
                label = Box(x - edge.label_width / 2, before[0][1], edge.label_width, LABEL_HEIGHT)
                strokes.append([])
            strokes[-1] += after
        if path[0] != edge.source:
            strokes = [stroke[::-1] for stroke in reversed(strokes)]
        return EdgeRoute(tuple(tuple(dict.fromkeys(stroke)) for stroke in strokes), label)

    def _passed(
        self, cell: GridCell, x: float, *, is_first: bool
    ) -> tuple[list[Point], list[Point]]:
        """The points of an edge at the top and at the bottom of a row.

        At a box, an edge has points at one side only. They lead straight to the end of the row,
        because other boxes in the row may be taller.
        """
        if not isinstance(cell, str):
            top, bottom = self.spans[cell[1]]
            return [(x, top)], [(x, bottom)]
        top, bottom = self.spans[self.cells.row_of[cell]]
        if is_first:
            return [], [(x, self.boxes[cell].bottom), (x, bottom + HEAD_ROOM)]
        return [(x, top - HEAD_ROOM), (x, self.boxes[cell].y)], []

    def _loop(self, number: int) -> EdgeRoute:
        """Route a loop at the right side of a box. Loops of one box share its height evenly."""
        edge, box = self.edges[number], self.boxes[self.edges[number].source]
        mine = [n for n, one in enumerate(self.edges) if one.is_loop and one.source == edge.source]
        room = box.height / len(mine)
        middle, lane = box.y + room * (mine.index(number) + 0.5), box.right + COLUMN_GAP / 2
        out, back = middle + room * 0.3, middle - room * 0.3
        stroke = ((box.right, out), (lane, out), (lane, back), (box.right, back))
        corner = lane + 5, middle - LABEL_HEIGHT / 2
        label = Box(*corner, edge.label_width, LABEL_HEIGHT) if edge.label_width else None
        return EdgeRoute((stroke,), label)


def _in_view(
    boxes: Mapping[str, Box], frames: Mapping[str, Box], routes: Sequence[EdgeRoute]
) -> Layout:
    """Move everything so that it begins at the left and the upper margin, and add up the size."""
    held = [*boxes.values(), *frames.values(), *_covered(routes)]
    dx = MARGIN - min((box.x for box in held), default=0.0)
    dy = MARGIN - min((box.y for box in held), default=0.0)
    return Layout(
        {name: box.moved(dx, dy) for name, box in boxes.items()},
        {name: box.moved(dx, dy) for name, box in frames.items()},
        tuple(route.moved(dx, dy) for route in routes),
        max((box.right for box in held), default=0.0) + dx + MARGIN,
        max((box.bottom for box in held), default=0.0) + dy + MARGIN,
    )


def _covered(routes: Sequence[EdgeRoute]) -> Iterator[Box]:
    """The points of the routes, as boxes without a size, and the boxes of their labels."""
    for route in routes:
        yield from (Box(x, y, 0, 0) for stroke in route.strokes for x, y in stroke)
        if route.label:
            yield route.label
