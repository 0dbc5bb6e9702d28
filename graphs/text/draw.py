"""A graph as text for a terminal, as Mermaid for a document, as SVG for a browser."""

import re
from collections.abc import Iterator, Sequence

from sagellm.graphs.diagnostics import shortened
from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Graph, Node, Value
from sagellm.graphs.text.arrows import chains
from sagellm.graphs.text.phrases import port_label, told_body, told_options
from sagellm.graphs.text.svg import as_svg
from sagellm.graphs.text.writing import flow

__all__ = ["as_mermaid", "as_svg", "as_text"]

_MERMAID_PLAIN = re.compile(r"[^\w .,:/=>~-]", re.ASCII)


def as_text(graph: Graph) -> str:
    """The graph in aligned columns: operators and chains, or one kernel a line with its types."""
    lines = _kernel_lines(graph) if graph.dialect == "kernel" else _stream_lines(graph)
    return "\n".join((*_head(graph), *lines)) + "\n"


def _head(graph: Graph) -> Iterator[str]:
    size = f"{len(graph.nodes)} nodes, {len(graph.edges)} edges"
    yield f"{graph.dialect} graph {graph.name}: {size}, hash {graph.hash}"


def _stream_lines(graph: Graph) -> Iterator[str]:
    for name, value in graph.attrs.items():
        yield ""
        yield name
        rows = value if isinstance(value, FrozenMap) else {"": value}
        yield from _table([(key, _options(item)) for key, item in rows.items()])
    yield ""
    yield "operators"
    yield from _table([_operator(node) for node in graph.nodes])
    yield ""
    yield "edges"
    yield from (f"  {chain}" for chain in chains(graph.edges))


def _options(value: Value) -> str:
    return ", ".join(told_options(value)) if isinstance(value, FrozenMap) else flow(value)


def _operator(node: Node) -> tuple[str, ...]:
    options = ", ".join(told_options(node.attrs))
    body = told_body(node.body) if node.body else ""
    return node.name, node.op, options, body


def _kernel_lines(graph: Graph) -> Iterator[str]:
    if graph.attrs:
        yield "  " + ", ".join(told_options(graph.attrs))
    yield ""
    nodes = _in_order(graph)
    name_width = max((len(node.name) for node in nodes), default=0)
    op_width = max((len(node.op) for node in nodes), default=0)
    for node in nodes:
        told = (_inputs(graph, node.name), _outputs(graph, node), _told(node))
        line = f"  {node.name:{name_width}}  {node.op:{op_width}}  {'  '.join(filter(None, told))}"
        yield line.rstrip()
    yield f"  {SINK:{name_width + op_width + 2}}  {_inputs(graph, SINK)}"


def _in_order(graph: Graph) -> tuple[Node, ...]:
    """Producers first; as they stand where a cycle leaves no such order."""
    try:
        return graph.topological()
    except ValueError:
        return graph.nodes


def _told(node: Node) -> str:
    options = shortened(", ".join(told_options(node.attrs)), 96)
    return f"{{{options}}}" if options else ""


def _inputs(graph: Graph, name: str) -> str:
    return "<- " + ", ".join(map(_input, graph.inputs(name)))


def _input(edge: Edge) -> str:
    outlet = "" if edge.outlet == "out" else f".{edge.outlet}"
    inlet = "" if edge.inlet in ("in", edge.outlet) else f"{edge.inlet}="
    return f"{inlet}{edge.source}{outlet}"


def _outputs(graph: Graph, node: Node) -> str:
    kinds = {edge.outlet: str(edge.type) for edge in graph.outputs(node.name) if edge.type}
    told = (kind if name == "out" else f"{name} {kind}" for name, kind in kinds.items())
    return "-> " + ", ".join(told) if kinds else ""


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows of equal length, columns aligned, empty columns left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        yield ("  " + "  ".join(cells)).rstrip()


def as_mermaid(graph: Graph) -> str:
    """A Mermaid flowchart, with plain ids, so that any name is safe."""
    ends = (edge.source for edge in graph.edges), (edge.target for edge in graph.edges)
    names = dict.fromkeys((SOURCE, *graph.names, SINK, *ends[0], *ends[1]))
    ids = {name: f"n{number}" for number, name in enumerate(names)}
    lines = ["flowchart TD"]
    lines += [f'  {ids[end]}(["{end}"])' for end in (SOURCE, SINK)]
    lines += [f'  {ids[node.name]}["{_mermaid_box(node)}"]' for node in graph.nodes]
    lines += [
        f"  {ids[edge.source]} {_mermaid_arrow(edge)} {ids[edge.target]}" for edge in graph.edges
    ]
    return "\n".join(lines) + "\n"


def _mermaid_box(node: Node) -> str:
    told = [node.name, *([node.op] if node.op != node.name else []), *told_options(node.attrs)]
    return "<br/>".join(_mermaid_text(shortened(line)) for line in told)


def _mermaid_arrow(edge: Edge) -> str:
    label = _mermaid_text(port_label(edge))
    arrow = "-.->" if edge.feedback else "-->"
    return f'{arrow}|"{label}"|' if label else arrow


def _mermaid_text(text: str) -> str:
    return _MERMAID_PLAIN.sub(lambda found: f"#{ord(found.group())};", text)
