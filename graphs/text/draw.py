"""A graph as aligned text for a terminal, and as Mermaid for a document."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from sagellm.graphs.diagnostics import truncated
from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Graph, Node, Value
from sagellm.graphs.passes.placement import PROCESSES
from sagellm.graphs.text.drawing import (
    Arrow,
    Drawing,
    DrawnNode,
    body_summary,
    option_texts,
    to_drawing,
)
from sagellm.graphs.text.folding import (
    PlacedProcess,
    Repeat,
    fold,
    is_placed,
    placed_links,
    placed_processes,
)
from sagellm.graphs.text.surface import chains
from sagellm.graphs.text.svg import as_svg
from sagellm.graphs.text.yaml import flow

__all__ = ["as_mermaid", "as_svg", "as_text"]

# Mermaid: characters to escape, the brackets of a box, the line of an arrow.
_SPECIAL = re.compile(r"[^\w .,:/=>~-]", re.ASCII)
_BRACKETS = {"end": ('(["', '"])'), "operator": ('["', '"]'), "engine": ('["', '"]')}
_LINES = {"edge": "-->", "feedback": "-.->", "channel": "<-.->", "kv": "==>"}


def as_text(graph: Graph, *, unfold: bool = False) -> str:
    """A graph in aligned columns. For a stream graph, the text lists operators and chains of edges;
    for a kernel graph, one kernel per line with its types.

    Repeated layers are listed once, and replicas are counted, unless `unfold`.
    """
    is_kernel = graph.dialect == "kernel"
    lines = _kernel_lines(graph, unfold) if is_kernel else _stream_lines(graph, unfold)
    return "\n".join((*_head(graph), *lines)) + "\n"


def _head(graph: Graph) -> Iterator[str]:
    size = f"{len(graph.nodes)} nodes, {len(graph.edges)} edges"
    yield f"{graph.dialect} graph {graph.name}: {size}, hash {graph.hash}"


def _stream_lines(graph: Graph, unfold: bool) -> Iterator[str]:
    for name, value in graph.attrs.items():
        if name != PROCESSES:
            yield ""
            yield name
            rows = value if isinstance(value, FrozenMap) else {"": value}
            yield from _table([(key, _options(item)) for key, item in rows.items()])
    if is_placed(graph):
        yield from _process_lines(graph, unfold)
    yield ""
    yield "operators"
    yield from _table([_operator(node) for node in graph.nodes])
    yield ""
    yield "edges"
    yield from (f"  {chain}" for chain in chains(graph.edges))


def _process_lines(graph: Graph, unfold: bool) -> Iterator[str]:
    control, *workers = placed_processes(graph, unfold=unfold)
    engines = f"; engines: {', '.join(control.engines)}" if control.engines else ""
    yield ""
    yield PROCESSES
    rows = [(control.name, "", f"operators: {', '.join(graph.names)}{engines}")]
    yield from _table([*rows, *(_worker(graph, worker) for worker in workers)])
    yield ""
    yield "links"
    labelled: list[tuple[str, ...]] = [
        (f"{link.source} -> {link.target}", link.label)
        for link in placed_links(graph, unfold=unfold)
    ]
    yield from _table(labelled)


def _worker(graph: Graph, worker: PlacedProcess) -> tuple[str, ...]:
    users = [node.name for node in graph.nodes if node.attrs.get("engine") in worker.engines]
    times = f"x {worker.count}" if worker.count > 1 else ""
    return worker.name, times, f"engine {worker.engines[0]}, for {', '.join(users) or 'nothing'}"


def _options(value: Value) -> str:
    return ", ".join(option_texts(value)) if isinstance(value, FrozenMap) else flow(value)


def _operator(node: Node) -> tuple[str, ...]:
    options = ", ".join(option_texts(node.attrs))
    body = body_summary(node.body) if node.body else ""
    return node.name, node.op, options, body


def _kernel_lines(graph: Graph, unfold: bool) -> Iterator[str]:
    if graph.attrs:
        yield "  " + ", ".join(option_texts(graph.attrs))
    yield ""
    folded = fold(graph, unfold=unfold)
    repeats = {name: repeat for repeat, names in folded.members.items() for name in names}
    nodes = [node for node in _in_order(graph) if node.name in folded.graph.names]
    indent = 4 if repeats else 2
    widths = _widths(nodes)
    for repeat, lines in groupby(nodes, key=lambda node: repeats.get(node.name)):
        yield from _title(repeat)
        margin = " " * (indent if repeat else 2)
        for node in lines:
            yield f"{margin}{_kernel_line(graph, node, widths)}".rstrip()
    yield f"  {SINK:{sum(widths) + 2}}  {_inputs(graph, SINK)}"


def _widths(nodes: Sequence[Node]) -> tuple[int, int]:
    """The widths of the column of names and of the column of ops."""
    return (
        max((len(node.name) for node in nodes), default=0),
        max((len(node.op) for node in nodes), default=0),
    )


def _title(repeat: Repeat | None) -> Iterator[str]:
    """The title line of a repeat; nothing for kernels outside of repeats."""
    if repeat:
        shown = f" (layer {repeat.first} is shown)" if repeat.count > 1 else ""
        yield f"  {repeat.title}{shown}"


def _kernel_line(graph: Graph, node: Node, widths: tuple[int, int]) -> str:
    parts = (_inputs(graph, node.name), _outputs(graph, node), _option_text(node))
    return f"{node.name:{widths[0]}}  {node.op:{widths[1]}}  {'  '.join(filter(None, parts))}"


def _in_order(graph: Graph) -> tuple[Node, ...]:
    """The nodes in topological order, or in the order of the graph if it has a cycle."""
    try:
        return graph.topological()
    except ValueError:
        return graph.nodes


def _option_text(node: Node) -> str:
    options = truncated(", ".join(option_texts(node.attrs)), 96)
    return f"{{{options}}}" if options else ""


def _inputs(graph: Graph, name: str) -> str:
    return "<- " + ", ".join(map(_input, graph.inputs(name)))


def _input(edge: Edge) -> str:
    outlet = "" if edge.outlet == "out" else f".{edge.outlet}"
    inlet = "" if edge.inlet in ("in", edge.outlet) else f"{edge.inlet}="
    return f"{inlet}{edge.source}{outlet}"


def _outputs(graph: Graph, node: Node) -> str:
    kinds = {edge.outlet: str(edge.type) for edge in graph.outputs(node.name) if edge.type}
    types = (kind if name == "out" else f"{name} {kind}" for name, kind in kinds.items())
    return "-> " + ", ".join(types) if kinds else ""


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Align rows of equal length in columns. Empty columns are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        yield ("  " + "  ".join(cells)).rstrip()


def as_mermaid(graph: Graph, *, unfold: bool = False) -> str:
    """A graph as a Mermaid flowchart. Ids are numbers, because a name may be a Mermaid keyword.

    Repeated layers and replicas are drawn once, with their count, unless `unfold`.
    """
    shown = to_drawing(graph, unfold=unfold)
    inner = (key for key in shown.nodes if key not in (SOURCE, SINK))
    ids = {key: f"n{number}" for number, key in enumerate((SOURCE, *inner, SINK))}
    return "\n".join(("flowchart TD", *_mermaid_lines(shown, ids))) + "\n"


def _mermaid_lines(shown: Drawing, ids: Mapping[str, str]) -> Iterator[str]:
    framed = {key for frame in shown.frames for key in frame.members}
    yield from (
        f"  {_box(ids[key], node)}" for key, node in shown.nodes.items() if key not in framed
    )
    for number, frame in enumerate(shown.frames):
        yield f'  subgraph f{number}["{_text(frame.title)}"]'
        yield from (f"    {_box(ids[key], shown.nodes[key])}" for key in frame.members)
        yield "  end"
    yield from (f"  {ids[a.source]} {_arrow(a)} {ids[a.target]}" for a in shown.arrows)


def _box(name: str, node: DrawnNode) -> str:
    opening, closing = _BRACKETS[node.kind]
    return f"{name}{opening}{'<br/>'.join(map(_text, node.lines))}{closing}"


def _arrow(arrow: Arrow) -> str:
    line = _LINES[arrow.kind]
    return f'{line}|"{_text(arrow.label)}"|' if arrow.label else line


def _text(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"#{ord(found.group())};", text)
