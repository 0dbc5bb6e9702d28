"""Boxes, and the routes of edges between them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]
Size: TypeAlias = tuple[float, float]  # width and height
Stroke: TypeAlias = tuple[
    Point, ...
]  # a line, with a bend between points that share neither x nor y
# A box, by name; or the place where an edge crosses a row, by the numbers of edge and row.
GridCell: TypeAlias = str | tuple[int, int]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle: its left, its top, and its size."""

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
    """The strokes of an edge from source to target. The label stands between two strokes."""

    strokes: tuple[Stroke, ...]
    label: Box | None = None

    def moved(self, dx: float, dy: float) -> "EdgeRoute":
        strokes = tuple(tuple((x + dx, y + dy) for x, y in stroke) for stroke in self.strokes)
        return EdgeRoute(strokes, self.label and self.label.moved(dx, dy))


@dataclass(frozen=True, slots=True)
class Layout:
    """Boxes and frames by name, a route for each edge in order, and the size of the picture."""

    boxes: Mapping[str, Box]
    frames: Mapping[str, Box]
    routes: tuple[EdgeRoute, ...]
    width: float
    height: float
