"""Boxes, and the ways of edges between them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]
Size: TypeAlias = tuple[float, float]  # width and height
Stroke: TypeAlias = tuple[Point, ...]  # a line; neighbours that share neither x nor y are a bend
GridCell: TypeAlias = (
    str | tuple[int, int]
)  # a box by name, or an edge's number and the row it crosses


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
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    def moved(self, dx: float, dy: float) -> "Box":
        return replace(self, x=self.x + dx, y=self.y + dy)


@dataclass(frozen=True, slots=True)
class EdgeRoute:
    """An edge from its source to its target: strokes, interrupted by the label where it has one."""

    strokes: tuple[Stroke, ...]
    label: Box | None = None

    def moved(self, dx: float, dy: float) -> "EdgeRoute":
        strokes = tuple(tuple((x + dx, y + dy) for x, y in stroke) for stroke in self.strokes)
        return EdgeRoute(strokes, self.label and self.label.moved(dx, dy))


@dataclass(frozen=True, slots=True)
class Layout:
    """Boxes and frames by name, one route a link in the order of the links, and the whole size."""

    boxes: Mapping[str, Box]
    frames: Mapping[str, Box]
    routes: tuple[EdgeRoute, ...]
    width: float
    height: float
