"""A drawing as a Mermaid flowchart."""

import re
from collections.abc import Iterator, Mapping

from sagellm.graphs.ir import SINK, SOURCE, Graph
from sagellm.graphs.text.drawing import Arrow, Drawing, Item, drawing

_PLAIN = re.compile(r"[^\w .,:/=>~-]", re.ASCII)
_SHAPES = {"end": ('(["', '"])'), "operator": ('["', '"]'), "engine": ('["', '"]')}
_LINES = {"edge": "-->", "feedback": "-.->", "channel": "<-.->", "kv": "==>"}


def as_mermaid(graph: Graph, *, unfold: bool = False) -> str:
    """A Mermaid flowchart, with plain ids, so that any name is safe.

    Repeated layers and replicas are drawn once, with their number, unless `unfold`.
    """
    shown = drawing(graph, unfold=unfold)
    inner = (key for key in shown.items if key not in (SOURCE, SINK))
    ids = {key: f"n{number}" for number, key in enumerate((SOURCE, *inner, SINK))}
    return "\n".join(("flowchart TD", *_lines(shown, ids))) + "\n"


def _lines(shown: Drawing, ids: Mapping[str, str]) -> Iterator[str]:
    framed = {key for frame in shown.frames for key in frame.members}
    yield from (
        f"  {_box(ids[key], item)}" for key, item in shown.items.items() if key not in framed
    )
    for number, frame in enumerate(shown.frames):
        yield f'  subgraph f{number}["{_text(frame.title)}"]'
        yield from (f"    {_box(ids[key], shown.items[key])}" for key in frame.members)
        yield "  end"
    yield from (f"  {ids[a.source]} {_arrow(a)} {ids[a.target]}" for a in shown.arrows)


def _box(name: str, item: Item) -> str:
    opening, closing = _SHAPES[item.kind]
    return f"{name}{opening}{'<br/>'.join(map(_text, item.lines))}{closing}"


def _arrow(arrow: Arrow) -> str:
    line = _LINES[arrow.kind]
    return f'{line}|"{_text(arrow.label)}"|' if arrow.label else line


def _text(text: str) -> str:
    return _PLAIN.sub(lambda found: f"#{ord(found.group())};", text)
