"""Draws a graph as SVG: boxes for nodes, curves for edges, dashes for feedback."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from xml.sax.saxutils import escape

from sagellm.graphs.diagnostics import shortened
from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph, Node
from sagellm.graphs.text.layers import MARGIN, Box, Layout, Link, Point, Route, lay_out
from sagellm.graphs.text.phrases import entry_inlets, port_label, told_options

_LETTER_WIDTH = 7.3  # of 12 px monospace, rounded up
_LINE_HEIGHT = 16.0
_PADDING = 9.0
_STYLE = (
    "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1f2933}"
    ".box{fill:#f5f7fa;stroke:#52606d}.end{fill:#d9e2ec;stroke:#52606d}"
    ".name{font-weight:bold}.quiet{fill:#52606d}"
    ".edge{fill:none;stroke:#52606d}.feedback{stroke-dasharray:5 4}"
    ".label{font-size:11px;text-anchor:middle;paint-order:stroke;stroke:#fff;stroke-width:4px}"
)
_ARROW = (
    '<marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
    'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="#52606d"/></marker>'
)


def as_svg(graph: Graph) -> str:
    """A picture of the graph, rows from `source` down to `sink`.

    What a kernel graph takes from `source` is written in the boxes: nearly every kernel reads the
    step's inputs, and their edges would hide the rest.
    """
    texts = {name: tuple(lines) for name, lines in _boxes(graph)}
    edges = [edge for edge in graph.edges if edge.source in texts and edge.target in texts]
    links = [Link(edge.source, edge.target, edge.feedback) for edge in edges]
    needed = _label_widths(edges)
    sizes = {name: _size(lines, needed.get(name, 0.0)) for name, lines in texts.items()}
    layout = lay_out(sizes, links)
    return "\n".join(_document(graph, layout, texts, edges)) + "\n"


def _boxes(graph: Graph) -> Iterator[tuple[str, Iterator[str]]]:
    ends = {edge.source for edge in graph.edges} | {edge.target for edge in graph.edges}
    if SOURCE in ends and graph.dialect != "kernel":
        yield SOURCE, iter([SOURCE])
    for node in graph.nodes:
        yield node.name, _lines(graph, node)
    if SINK in ends:
        yield SINK, iter([SINK])


def _lines(graph: Graph, node: Node) -> Iterator[str]:
    yield node.name
    if node.op != node.name:
        yield node.op
    if node.attrs and graph.dialect != "kernel":
        yield from (shortened(told) for told in told_options(node.attrs))
    if entries := entry_inlets(graph, node):
        yield shortened(f"from source: {', '.join(entries)}")
    if node.body is not None:
        yield f"body: {len(node.body.nodes)} nodes"


def _label_widths(edges: list[Edge]) -> dict[str, float]:
    """How wide boxes must be for the labels of edges that run side by side between them."""
    pairs = Counter((edge.source, edge.target) for edge in edges)
    widths: dict[str, float] = {}
    for edge in edges:
        count = pairs[edge.source, edge.target]
        needed = (count + 1) * len(port_label(edge)) * _LETTER_WIDTH if count > 1 else 0.0
        for name in (edge.source, edge.target):
            widths[name] = max(widths.get(name, 0.0), needed)
    return widths


def _size(lines: tuple[str, ...], least: float) -> tuple[float, float]:
    width = max(least, max(map(len, lines)) * _LETTER_WIDTH + 2 * _PADDING)
    return width, len(lines) * _LINE_HEIGHT + 2 * _PADDING - 4


def _document(
    graph: Graph, layout: Layout, texts: Mapping[str, tuple[str, ...]], edges: list[Edge]
) -> Iterator[str]:
    labels = [port_label(edge) for edge in edges]
    reach = [
        _label_point(route)[0] + len(label) * _LETTER_WIDTH / 2 + MARGIN
        for route, label in zip(layout.routes, labels, strict=True)
    ]
    width, height = max([layout.width, *reach]), layout.height
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
    )
    yield f"<title>{escape(graph.name)}</title><style>{_STYLE}</style><defs>{_ARROW}</defs>"
    yield '<rect width="100%" height="100%" fill="#fff"/>'
    yield from (_curve(route, edge) for route, edge in zip(layout.routes, edges, strict=True))
    for name, lines in texts.items():
        yield from _drawn(layout.boxes[name], lines, "end" if name in (SOURCE, SINK) else "box")
    for route, label in zip(layout.routes, labels, strict=True):
        if label:
            yield _text(_label_point(route), label, "quiet label")
    yield "</svg>"


def _curve(route: Route, edge: Edge) -> str:
    style = "edge feedback" if edge.feedback else "edge"
    path = f"M{_at(route.points[0])}"
    for start, stop in pairwise(route.points):
        straight = route.is_back or start[0] == stop[0]
        path += f"L{_at(stop)}" if straight else _bend(start, stop)
    return f'<path class="{style}" d="{path}" marker-end="url(#arrow)"/>'


def _bend(start: Point, stop: Point) -> str:
    middle = (start[1] + stop[1]) / 2
    return f"C{_at((start[0], middle))} {_at((stop[0], middle))} {_at(stop)}"


def _at(point: Point) -> str:
    return f"{point[0]:.1f},{point[1]:.1f}"


def _label_point(route: Route) -> Point:
    """The middle of a label: where an edge first bends, or over its beginning if it goes back."""
    (x, y), (next_x, next_y) = route.points[:2]
    return ((x + next_x) / 2, y - 5) if route.is_back else ((x + next_x) / 2, (y + next_y) / 2 + 2)


def _drawn(box: Box, lines: tuple[str, ...], style: str) -> Iterator[str]:
    yield (
        f'<rect class="{style}" x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="5"/>'
    )
    for number, line in enumerate(lines):
        point = box.x + _PADDING, box.y + _PADDING + 9 + number * _LINE_HEIGHT
        yield _text(point, line, "quiet" if number else "name")


def _text(point: Point, text: str, style: str) -> str:
    return f'<text class="{style}" x="{point[0]:.1f}" y="{point[1]:.1f}">{escape(text)}</text>'
