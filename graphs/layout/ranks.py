"""Boxes and edges of a layered layout, and the row of each box. Every edge leads down, except in
cycles and for feedback.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]
Size: TypeAlias = tuple[float, float]  # width and height
Stroke: TypeAlias = tuple[
    Point, ...
]  # a line, with a bend between points that share neither x nor y
# The name of a box; or (edge number, row) for the place where an edge crosses a row.
GridCell: TypeAlias = str | tuple[int, int]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, given by its left side, its top and its size."""

    x: float
    y: float
    width: float
    height: float

    @property
    def centre(self) -> float:
        return self.x + self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    def moved(self, dx: float, dy: float) -> "Box":
        return replace(self, x=self.x + dx, y=self.y + dy)


@dataclass(frozen=True, slots=True)
class EdgeRoute:
    """The strokes of an edge from source to target. The label is between two strokes."""

    strokes: tuple[Stroke, ...]
    label: Box | None = None

    def moved(self, dx: float, dy: float) -> "EdgeRoute":
        strokes = tuple(tuple((x + dx, y + dy) for x, y in stroke) for stroke in self.strokes)
        return EdgeRoute(strokes, self.label and self.label.moved(dx, dy))


@dataclass(frozen=True, slots=True)
class Layout:
    """The boxes and frames by name, the route of each edge in order, and the picture's size."""

    boxes: Mapping[str, Box]
    frames: Mapping[str, Box]
    routes: tuple[EdgeRoute, ...]
    width: float
    height: float


Pair: TypeAlias = tuple[str, str]  # an upper and a lower box

_END = "\0end"  # suffix for the end of a band; no name of a box contains it


@dataclass(frozen=True, slots=True)
class LayoutEdge:
    """An edge to draw. `is_back`: the edge may lead up. `label_width` 0: the edge has no label.

    The label is below the row of the source or, with `at_target`, above the row of the target.
    A box is aligned with its neighbours along its edges of the lowest `priority` number.
    """

    source: str
    target: str
    is_back: bool = False
    label_width: float = 0.0
    at_target: bool = False
    priority: int = 0

    @property
    def is_loop(self) -> bool:
        return self.source == self.target


@dataclass(frozen=True, slots=True)
class Band:
    """A frame around boxes that share no row with other boxes. `title`: the box of its title."""

    title: str
    members: tuple[str, ...]


def ranks(
    names: Sequence[str], edges: Sequence[LayoutEdge], bands: Sequence[Band]
) -> dict[str, int]:
    """The rank of each box, from 0: the length of the longest path that leads to it from above.

    The two ends of an edge have different ranks, unless the edge is a loop. The title of a band is
    above its members. Boxes that feed a member are above the title; boxes that a member feeds are
    below all members.
    """
    # Edges that may lead up do not decide the sequence, so that they never turn other edges.
    firm = [*_forward(edges), *_around(edges, bands)]
    ends = [band.title + _END for band in bands]
    place = {name: n for n, name in enumerate(_sequence([*names, *ends], firm))}
    loose = [(edge.source, edge.target) for edge in edges if edge.is_back and not edge.is_loop]
    found = _longest(place, [*firm, *loose])
    return _dense({name: found[name] for name in names})


def _forward(edges: Iterable[LayoutEdge]) -> list[Pair]:
    return [(edge.source, edge.target) for edge in edges if not (edge.is_back or edge.is_loop)]


def _around(edges: Sequence[LayoutEdge], bands: Iterable[Band]) -> Iterable[Pair]:
    """The pairs that keep the members of a band between its title and its end, and all other boxes
    above the title or below the end.
    """
    forward = _forward(edges)
    for band in bands:
        members, end = set(band.members), band.title + _END
        for member in band.members:
            yield band.title, member
            yield member, end
        for source, target in forward:
            if target in members and source not in members:
                yield source, band.title
            if source in members and target not in members:
                yield end, target


def _sequence(names: Sequence[str], pairs: Iterable[Pair]) -> list[str]:
    """The boxes in an order with upper boxes first. If only cycles are left, the first remaining
    box comes next.
    """
    above: dict[str, set[str]] = {name: set() for name in names}
    for upper, lower in pairs:
        above[lower].add(upper)
    done: dict[str, None] = {}
    while above:
        free = next((name for name in above if above[name] <= done.keys()), next(iter(above)))
        del above[free]
        done[free] = None
    return list(done)


def _longest(place: Mapping[str, int], pairs: Iterable[Pair]) -> dict[str, int]:
    """Ranks by longest path. A pair that leads backwards in the sequence `place` is turned."""
    above: dict[str, list[str]] = {name: [] for name in place}
    for pair in pairs:
        upper, lower = sorted(pair, key=lambda name: place[name])
        above[lower].append(upper)
    rank: dict[str, int] = {}
    for name in place:
        rank[name] = 1 + max((rank[upper] for upper in above[name]), default=-1)
    return rank


def _dense(rank: Mapping[str, int]) -> dict[str, int]:
    number = {value: n for n, value in enumerate(sorted(set(rank.values())))}
    return {name: number[value] for name, value in rank.items()}


def shortcuts(rank: Mapping[str, int], edges: Sequence[LayoutEdge]) -> frozenset[int]:
    """The indexes in `edges` of the edges whose two ends a longer path joins as well."""
    below: dict[str, set[str]] = {name: set() for name in rank}
    for edge in edges:
        if not edge.is_loop:
            upper, lower = _ends(rank, edge)
            below[upper].add(lower)
    # Sets of boxes as bits of an integer: a graph of all layers has thousands of boxes.
    bit = {name: 1 << number for number, name in enumerate(rank)}
    reached: dict[str, int] = {}
    for name in sorted(rank, key=lambda name: -rank[name]):
        reached[name] = 0
        for lower in below[name]:
            reached[name] |= reached[lower] | bit[lower]
    return frozenset(
        number
        for number, (upper, lower) in enumerate(_ends(rank, edge) for edge in edges)
        if any(reached[other] & bit[lower] for other in below[upper])
    )


def _ends(rank: Mapping[str, int], edge: LayoutEdge) -> Pair:
    upper, lower = sorted((edge.source, edge.target), key=lambda name: rank[name])
    return upper, lower


def spine(rank: Mapping[str, int], edges: Sequence[LayoutEdge]) -> frozenset[int]:
    """The numbers of the edges on a path from the lowest box upwards, all of them of priority 0.

    At each box, the path takes an edge to the nearest row above.
    """
    above: dict[str, list[int]] = {name: [] for name in rank}
    for number, edge in enumerate(edges):
        if edge.priority == 0 and not edge.is_loop:
            above[_ends(rank, edge)[1]].append(number)
    reached = [name for name, numbers in above.items() if numbers]
    at = max(reached, key=lambda name: rank[name], default=None)
    found = []
    while at is not None and above[at]:
        near = max(rank[_ends(rank, edges[number])[0]] for number in above[at])
        nearest = [number for number in above[at] if rank[_ends(rank, edges[number])[0]] == near]
        found.append(nearest[(len(nearest) - 1) // 2])
        at = _ends(rank, edges[found[-1]])[0]
    return frozenset(found)
