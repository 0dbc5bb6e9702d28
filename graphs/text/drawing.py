"""A picture of a graph in any format: nodes, arrows, frames and their labels."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sagellm.graphs.diagnostics import truncated
from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Graph, Node, Value
from sagellm.graphs.text.folding import (
    Folded,
    PlacedLink,
    PlacedProcess,
    fold,
    is_placed,
    placed_links,
    placed_processes,
    without_layer,
)
from sagellm.graphs.text.yaml import flow, scalar


def option_texts(options: Mapping[str, Value]) -> Iterator[str]:
    """Each option as `name: value`."""
    return (f"{scalar(name)}: {flow(value)}" for name, value in options.items())


def port_label(edge: Edge) -> str:
    """What an edge says of itself: ports that are not the usual ones, and its type."""
    kind = "" if edge.type is None else str(edge.type)
    return " ".join(part for part in (port_names(edge), kind) if part)


def port_names(edge: Edge) -> str:
    """The ports of an edge that are not the usual ones; an inlet after `>` beside an outlet."""
    outlet = "" if edge.outlet == "out" else edge.outlet
    inlet = "" if edge.inlet in ("in", edge.outlet) else edge.inlet
    return " > ".join(port for port in (outlet, inlet) if port)


def outlet_types(graph: Graph, node: Node) -> Iterator[str]:
    """What a kernel gives, an outlet each: `float32[T, 64]`, `q float32[T, 64]`."""
    kinds = {edge.outlet: str(edge.type) for edge in graph.outputs(node.name) if edge.type}
    for outlet, kind in kinds.items():
        if kind != outlet:
            yield kind if outlet == "out" else f"{outlet} {kind}"


def entry_inlets(graph: Graph, node: Node) -> list[str]:
    """What a kernel takes from `source`."""
    if graph.dialect != "kernel":
        return []
    return [edge.outlet for edge in graph.inputs(node.name) if edge.source == SOURCE]


def body_summary(body: Graph) -> str:
    """A body in one line: its name, its size and its commonest ops."""
    counts = Counter(node.op for node in body.nodes).most_common(4)
    ops = ", ".join(f"{count} {op}" for op, count in counts)
    return f"body {body.name}: {len(body.nodes)} nodes ({ops}), hash {body.hash}"


DrawnNodeKind = Literal["operator", "end", "engine"]
ArrowKind = Literal["edge", "feedback", "channel", "kv"]


@dataclass(frozen=True, slots=True)
class DrawnNode:
    """A box: its lines of text, the first of which is its name. `is_stacked`: one of many."""

    lines: tuple[str, ...]
    kind: DrawnNodeKind = "operator"
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Arrow:
    """A line between two items, by their keys. `at_target`: the label names the target's inlet."""

    source: str
    target: str
    label: str = ""
    kind: ArrowKind = "edge"
    at_target: bool = False


@dataclass(frozen=True, slots=True)
class DrawnFrame:
    """What belongs together."""

    title: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """Items by key; the key of an operator or a kernel is its name."""

    title: str
    items: Mapping[str, DrawnNode]
    arrows: tuple[Arrow, ...]
    frames: tuple[DrawnFrame, ...] = field(default=())


def to_drawing(graph: Graph, *, unfold: bool = False) -> Drawing:
    """The drawing of a graph of either dialect; of its processes, once pass `place` was applied.

    Repeated layers and replicas are drawn once, with their number, unless `unfold`.
    """
    if graph.dialect == "kernel":
        return _kernels(fold(graph, unfold=unfold))
    return _placed(graph, unfold) if is_placed(graph) else _operators(graph)


def _operators(graph: Graph) -> Drawing:
    items = dict(_ends(graph))
    items |= {node.name: DrawnNode(tuple(_operator_lines(node))) for node in graph.nodes}
    return Drawing(graph.name, items, tuple(_arrows(graph, items)))


def _ends(graph: Graph) -> Iterator[tuple[str, DrawnNode]]:
    joined = {edge.source for edge in graph.edges} | {edge.target for edge in graph.edges}
    yield from ((end, DrawnNode((end,), "end")) for end in (SOURCE, SINK) if end in joined)


def _operator_lines(node: Node) -> Iterator[str]:
    yield node.name
    if node.op != node.name:
        yield node.op
    yield from (truncated(told) for told in option_texts(node.attrs))
    if node.body is not None:
        yield f"body: {len(node.body.nodes)} nodes"


def _arrows(graph: Graph, items: Mapping[str, DrawnNode]) -> Iterator[Arrow]:
    for edge in graph.edges:
        if edge.source in items and edge.target in items:
            kind: ArrowKind = "feedback" if edge.feedback else "edge"
            yield Arrow(edge.source, edge.target, port_label(edge), kind)


def _kernels(folded: Folded) -> Drawing:
    """Every kernel's output types are in its box, and what it takes from `source`.

    Nearly every kernel reads the step's inputs: edges from there would hide the others.
    """
    graph, items = folded.graph, {}
    alone = {
        name for repeat, names in folded.members.items() if repeat.period == 1 for name in names
    }
    for node in graph.nodes:
        name = without_layer(node.name) if node.name in alone else node.name
        items[node.name] = DrawnNode((name, *_kernel_lines(graph, node, name)))
    items |= {end: item for end, item in _ends(graph) if end == SINK}
    arrows = tuple(_kernel_arrow(edge) for edge in graph.edges if edge.source != SOURCE)
    arrows = tuple(arrow for arrow in arrows if arrow.source in items and arrow.target in items)
    frames = tuple(DrawnFrame(repeat.title, names) for repeat, names in folded.members.items())
    return Drawing(graph.name, items, arrows, frames)


def _kernel_lines(graph: Graph, node: Node, name: str) -> Iterator[str]:
    if node.op != name:
        yield node.op
    yield from map(truncated, outlet_types(graph, node))
    if entries := entry_inlets(graph, node):
        yield truncated(f"from source: {', '.join(entries)}")


def _kernel_arrow(edge: Edge) -> Arrow:
    kind: ArrowKind = "feedback" if edge.feedback else "edge"
    return Arrow(edge.source, edge.target, port_names(edge), kind, at_target=True)


def _placed(graph: Graph, unfold: bool) -> Drawing:
    """Operators in the frame of the process that they run in, below it the workers."""
    plain = _operators(graph)
    control, *workers = placed_processes(graph, unfold=unfold)
    inside = {_engine_key(name): _engine(graph, name) for name in control.engines}
    outside = {_engine_key(one.name): _worker(graph, one) for one in workers}
    links = tuple(_channel(one) for one in placed_links(graph, unfold=unfold))
    members = (*plain.items, *inside)
    frames = (DrawnFrame(control.title, members),) if members else ()
    items = {**plain.items, **inside, **outside}
    return Drawing(graph.name, items, (*plain.arrows, *links), frames)


def _engine_key(name: str) -> str:
    return f"engine {name}"


def _engine(graph: Graph, name: str, drop: tuple[str, ...] = ()) -> DrawnNode:
    options = graph.engines[name]
    kept = options.items() if isinstance(options, FrozenMap) else ()
    told = option_texts({key: value for key, value in kept if key not in drop})
    return DrawnNode((f"engine {name}", *map(truncated, told)), "engine")


def _worker(graph: Graph, process: PlacedProcess) -> DrawnNode:
    lines = _engine(graph, process.engines[0], drop=("replicas",)).lines
    return DrawnNode((process.title, *lines), "engine", process.count > 1)


def _channel(channel: PlacedLink) -> Arrow:
    source = _engine_key(channel.source) if channel.is_kv else channel.source
    kind: ArrowKind = "kv" if channel.is_kv else "channel"
    return Arrow(source, _engine_key(channel.target), channel.label, kind)
