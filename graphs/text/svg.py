"""A graph as SVG: boxes in rows, curves for edges, and frames."""

from collections.abc import Iterator
from itertools import pairwise
from unicodedata import east_asian_width
from xml.sax.saxutils import escape

from sagellm.graphs.ir import Graph
from sagellm.graphs.layout.layers import lay_out
from sagellm.graphs.layout.ranks import (
    Band,
    Box,
    EdgeRoute,
    Layout,
    LayoutEdge,
    Point,
    Size,
    Stroke,
)
from sagellm.graphs.text.drawing import Arrow, ArrowKind, Drawing, DrawnNode, to_drawing

FONT_SIZE = 12.0
LABEL_SIZE = 11.0
_LETTER = 0.62  # width of a letter / font size, for the widest monospace font of the style
_WIDE_LETTER = 1.35  # the same for Chinese, Japanese, Korean and emoji, the widest of all
_LINE_HEIGHT = 16.0
_PADDING = 9.0
_STACK = 5.0  # the offset between the boxes of a stack
_STYLE = """\
.paper{fill:#ffffff}text{font:12px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;\
fill:#1f2933}
.operator{fill:#f5f7fa;stroke:#7b8794}.end{fill:#d9e2ec;stroke:#7b8794}
.engine{fill:#e6f0fb;stroke:#2563a8}.frame{fill:none;stroke:#9aa5b1;stroke-dasharray:2 3}
.name{font-weight:bold}.quiet{fill:#52606d}.title{fill:#52606d;font-weight:bold}
.label{font-size:11px;text-anchor:middle;fill:#52606d}
.label-channel{fill:#2563a8}.label-kv{fill:#b4470f}
.edge{fill:none;stroke:#52606d}.feedback{stroke-dasharray:5 4}
.channel{stroke:#2563a8;stroke-dasharray:2 3}.kv{stroke:#b4470f;stroke-width:2}
.head{fill:#52606d}.head-channel{fill:#2563a8}.head-kv{fill:#b4470f}
@media (prefers-color-scheme:dark){.paper{fill:#0d1117}text{fill:#e6edf3}
.operator{fill:#1a212b;stroke:#6e7b8a}.end{fill:#2d3947;stroke:#6e7b8a}
.engine{fill:#10263f;stroke:#6cb0f5}.frame{stroke:#58636f}
.quiet,.title,.label{fill:#a3b0bd}.edge{stroke:#a3b0bd}.head{fill:#a3b0bd}
.channel{stroke:#6cb0f5}.head-channel,.label-channel{fill:#6cb0f5}
.kv{stroke:#f0a06a}.head-kv,.label-kv{fill:#f0a06a}}"""
_PRIORITIES: dict[ArrowKind, int] = {"edge": 0, "kv": 1, "feedback": 2, "channel": 2}
_HEADS = {"edge": "head", "channel": "head head-channel", "kv": "head head-kv"}


def as_svg(graph: Graph, *, unfold: bool = False) -> str:
    """A graph as SVG for light and dark pages, from `source` at the top to `sink` at the bottom.

    Repeated layers and replicas are drawn once, with their count, unless `unfold`.
    """
    shown = to_drawing(graph, unfold=unfold)
    layout = _laid_out(shown)
    return "\n".join(_document(shown, layout)) + "\n"


def text_width(text: str, size: float = FONT_SIZE) -> float:
    """The largest possible width of a text: the page's font is unknown."""
    wide = sum(east_asian_width(letter) in "WF" for letter in text)
    return size * ((len(text) - wide) * _LETTER + wide * _WIDE_LETTER)


def _laid_out(shown: Drawing) -> Layout:
    sizes = {key: _size(node) for key, node in shown.nodes.items()}
    # Titles of frames are boxes of the layout too; no operator's name contains \0.
    titles = [f"\0frame {number}" for number in range(len(shown.frames))]
    for title, frame in zip(titles, shown.frames, strict=True):
        sizes[title] = text_width(frame.title), _LINE_HEIGHT
    bands = [Band(title, frame.members) for title, frame in zip(titles, shown.frames, strict=True)]
    return lay_out(sizes, [_link(arrow) for arrow in shown.arrows], bands)


def _link(arrow: Arrow) -> LayoutEdge:
    width = text_width(arrow.label, LABEL_SIZE)
    is_back, priority = arrow.kind == "feedback", _PRIORITIES[arrow.kind]
    return LayoutEdge(arrow.source, arrow.target, is_back, width, arrow.at_target, priority)


def _size(node: DrawnNode) -> Size:
    width = max(map(text_width, node.lines)) + 2 * _PADDING
    height = len(node.lines) * _LINE_HEIGHT + 2 * _PADDING - 4
    return (width + _STACK, height + _STACK) if node.is_stacked else (width, height)


def _document(shown: Drawing, layout: Layout) -> Iterator[str]:
    width, height = layout.width, layout.height
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
    )
    heads = "".join(_head(kind, style) for kind, style in _HEADS.items())
    yield f"<title>{escape(shown.title)}</title><style>{_STYLE}</style><defs>{heads}</defs>"
    yield '<rect class="paper" width="100%" height="100%"/>'
    for (title, box), frame in zip(layout.frames.items(), shown.frames, strict=True):
        yield _rectangle(box, "frame", 8)
        at = layout.boxes[title]
        yield _text((at.x, at.y + 12), frame.title, "title")
    for route, arrow in zip(layout.routes, shown.arrows, strict=True):
        yield from _curves(route, arrow)
    for key, node in shown.nodes.items():
        yield from _drawn(layout.boxes[key], node)
    for route, arrow in zip(layout.routes, shown.arrows, strict=True):
        if route.label:
            point = route.label.centre, route.label.bottom - 4
            yield _text(point, arrow.label, f"label label-{arrow.kind}")
    yield "</svg>"


def _head(kind: str, style: str) -> str:
    return (
        f'<marker id="head-{kind}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
        f'<path class="{style}" d="M0 0L8 4L0 8z"/></marker>'
    )


def _curves(route: EdgeRoute, arrow: Arrow) -> Iterator[str]:
    style = "edge" if arrow.kind == "edge" else f"edge {arrow.kind}"
    head = f"url(#head-{'edge' if arrow.kind == 'feedback' else arrow.kind})"
    last = len(route.strokes) - 1
    for number, stroke in enumerate(route.strokes):
        ends = f' marker-end="{head}"' if number == last else ""
        if arrow.kind == "channel" and number == 0:
            ends += f' marker-start="{head}"'
        yield f'<path class="{style}" d="{_path(stroke)}"{ends}/>'


def _path(stroke: Stroke) -> str:
    path = f"M{_at(stroke[0])}"
    for start, stop in pairwise(stroke):
        straight = start[0] == stop[0] or start[1] == stop[1]
        path += f"L{_at(stop)}" if straight else _bend(start, stop)
    return path


def _bend(start: Point, stop: Point) -> str:
    middle = (start[1] + stop[1]) / 2
    return f"C{_at((start[0], middle))} {_at((stop[0], middle))} {_at(stop)}"


def _at(point: Point) -> str:
    return f"{point[0]:.1f},{point[1]:.1f}"


def _drawn(box: Box, node: DrawnNode) -> Iterator[str]:
    if node.is_stacked:
        box = Box(box.x, box.y, box.width - _STACK, box.height - _STACK)
        yield _rectangle(box.moved(_STACK, _STACK), node.kind, 5)
    yield _rectangle(box, node.kind, 5)
    for number, line in enumerate(node.lines):
        point = box.x + _PADDING, box.y + _PADDING + 9 + number * _LINE_HEIGHT
        yield _text(point, line, "quiet" if number else "name")


def _rectangle(box: Box, style: str, radius: int) -> str:
    return (
        f'<rect class="{style}" x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="{radius}"/>'
    )


def _text(point: Point, text: str, style: str) -> str:
    return f'<text class="{style}" x="{point[0]:.1f}" y="{point[1]:.1f}">{escape(text)}</text>'
