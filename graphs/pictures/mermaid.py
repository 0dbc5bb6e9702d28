"""A graph as a Mermaid flow chart (https://mermaid.js.org/syntax/flowchart.html)."""

import re
from collections.abc import Iterator

from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph

_DIRECTION = {"stream": "LR", "kernel": "TB"}
_UNSAFE = re.compile(r"[^\w .,:\[\]()=/+-]")


def to_mermaid(graph: Graph) -> str:
    """Nodes are numbered, so that no name is a word of Mermaid's own. Feedback is dotted."""
    return "\n".join(_lines(graph)) + "\n"


def _lines(graph: Graph) -> Iterator[str]:
    number = {name: f"n{at}" for at, name in enumerate((SOURCE, *graph.names, SINK))}
    yield f"flowchart {_DIRECTION[graph.dialect]}"
    yield f"  {number[SOURCE]}([{SOURCE}])"
    for node in graph.nodes:
        yield f'  {number[node.name]}["{_safe(node.name)}<br/>{_safe(node.op)}"]'
    yield f"  {number[SINK]}([{SINK}])"
    for edge in graph.edges:
        yield f"  {number[edge.source]} {_arrow(edge)} {number[edge.target]}"


def _arrow(edge: Edge) -> str:
    line = "-.->" if edge.feedback else "-->"
    label = edge_label(edge)
    return f'{line}|"{_safe(label)}"|' if label else line


def edge_label(edge: Edge) -> str:
    """The outlet and the inlet where they have names of their own."""
    outlet = "" if edge.outlet == "out" else edge.outlet
    inlet = "" if edge.inlet in ("in", outlet) else f"to {edge.inlet}"
    return " ".join(part for part in (outlet, inlet) if part)


def _safe(text: str) -> str:
    """The text with the characters that could end a quoted label as numeric entities."""
    return _UNSAFE.sub(lambda match: f"#{ord(match[0])};", text)
