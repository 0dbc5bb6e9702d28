"""A graph as a stand-alone SVG picture, laid out in layers by the longest way from the source."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph
from sagellm.graphs.pictures.mermaid import edge_label

# Pixels. A character of the 12 px monospace font is about 7.3 wide.
CHARACTER, HEIGHT, GAP, MARGIN = 7.3, 44, 36, 20

_STYLE = (
    "text{font:12px monospace;text-anchor:middle;fill:#222}"
    "rect{fill:#eef3fb;stroke:#4a6fa5}path{fill:none;stroke:#777}"
    ".op{fill:#666}.edge{font-size:10px;fill:#955}.feedback{stroke-dasharray:4 3}"
)


@dataclass(frozen=True, slots=True)
class Box:
    """A node's place: its middle, and its width."""

    x: float
    y: float
    width: float


def to_svg(graph: Graph) -> str:
    """Stream graphs run from left to right, kernel graphs from top to bottom."""
    boxes = _boxes(graph)
    right = max(box.x + box.width / 2 for box in boxes.values()) + MARGIN
    bottom = max(box.y for box in boxes.values()) + HEIGHT / 2 + MARGIN
    size = f'width="{right:.0f}" height="{bottom:.0f}" viewBox="0 0 {right:.0f} {bottom:.0f}"'
    is_down = graph.dialect == "kernel"
    drawn = [line for edge in graph.edges for line in _edge(edge, boxes, is_down)]
    drawn += [line for name in boxes for line in _box(name, _op(graph, name), boxes[name])]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    title = f"<title>{escape(graph.name)}</title><style>{_STYLE}</style>"
    return "\n".join((head, title, _ARROW, *drawn, "</svg>")) + "\n"


_ARROW = (
    '<defs><marker id="to" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"'
    ' orient="auto"><path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>'
)


def _op(graph: Graph, name: str) -> str:
    return "" if name in (SOURCE, SINK) else graph.node(name).op


def _layers(graph: Graph) -> list[list[str]]:
    """The nodes by their depth, source first and sink alone in the last layer."""
    depth = {SOURCE: 0}
    for node in graph.topological():
        before = (depth[edge.source] for edge in graph.inputs(node.name) if not edge.feedback)
        depth[node.name] = 1 + max(before, default=0)
    depth[SINK] = 1 + max(depth.values())
    return [[name for name in depth if depth[name] == at] for at in range(depth[SINK] + 1)]


def _boxes(graph: Graph) -> dict[str, Box]:
    layers = _layers(graph)
    widths = {
        name: CHARACTER * max(len(name), len(_op(graph, name))) + 20
        for layer in layers
        for name in layer
    }
    place = _down if graph.dialect == "kernel" else _across
    return place(layers, widths)


def _across(layers: list[list[str]], widths: dict[str, float]) -> dict[str, Box]:
    """One column a layer, each in the middle of the tallest."""
    tallest = max(len(layer) for layer in layers)
    boxes, left = {}, float(MARGIN)
    for layer in layers:
        widest = max(widths[name] for name in layer)
        top = MARGIN + (tallest - len(layer)) * (HEIGHT + GAP) / 2 + HEIGHT / 2
        for row, name in enumerate(layer):
            x, y = left + widest / 2, top + row * (HEIGHT + GAP)
            boxes[name] = Box(x, y, widths[name])
        left += widest + 2 * GAP
    return boxes


def _down(layers: list[list[str]], widths: dict[str, float]) -> dict[str, Box]:
    """One row a layer, each in the middle of the widest."""
    lengths = [sum(widths[name] + GAP for name in layer) - GAP for layer in layers]
    boxes = {}
    for row, (layer, length) in enumerate(zip(layers, lengths, strict=True)):
        left = MARGIN + (max(lengths) - length) / 2
        for name in layer:
            y = MARGIN + HEIGHT / 2 + row * (HEIGHT + GAP)
            boxes[name] = Box(left + widths[name] / 2, y, widths[name])
            left += widths[name] + GAP
    return boxes


def _box(name: str, op: str, box: Box) -> Iterator[str]:
    left, top = box.x - box.width / 2, box.y - HEIGHT / 2
    size = f'width="{box.width:.1f}" height="{HEIGHT}"'
    yield f'<rect x="{left:.1f}" y="{top:.1f}" {size} rx="6"/>'
    yield f'<text x="{box.x:.1f}" y="{box.y - (3 if op else -4):.1f}">{escape(name)}</text>'
    if op:
        yield f'<text class="op" x="{box.x:.1f}" y="{box.y + 14:.1f}">{escape(op)}</text>'


def _edge(edge: Edge, boxes: dict[str, Box], is_down: bool) -> Iterator[str]:
    """A curve from the side of one box to that of the next."""
    start, end = boxes[edge.source], boxes[edge.target]
    if is_down:
        x1, y1, x2, y2 = start.x, start.y + HEIGHT / 2, end.x, end.y - HEIGHT / 2
        bend = f"{x1:.1f} {(y1 + y2) / 2:.1f} {x2:.1f} {(y1 + y2) / 2:.1f}"
    else:
        x1, y1, x2, y2 = start.x + start.width / 2, start.y, end.x - end.width / 2, end.y
        bend = f"{(x1 + x2) / 2:.1f} {y1:.1f} {(x1 + x2) / 2:.1f} {y2:.1f}"
    kind = ' class="feedback"' if edge.feedback else ""
    yield f'<path{kind} d="M{x1:.1f} {y1:.1f}C{bend} {x2:.1f} {y2:.1f}" marker-end="url(#to)"/>'
    if not is_down and (label := edge_label(edge)):
        x, y = (x1 + x2) / 2, (y1 + y2) / 2 - 4
        yield f'<text class="edge" x="{x:.1f}" y="{y:.1f}">{escape(label)}</text>'
