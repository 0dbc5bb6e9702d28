"""What a picture of a graph shows, whatever its format: items, arrows between them, frames."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sagellm.graphs.diagnostics import shortened
from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Graph, Node
from sagellm.graphs.text.folding import Folded, fold, without_layer
from sagellm.graphs.text.phrases import (
    entry_inlets,
    outlet_types,
    port_label,
    ports,
    told_options,
)
from sagellm.graphs.text.processes import Channel, Process, channels, is_placed, processes

ItemKind = Literal["operator", "end", "engine"]
ArrowKind = Literal["edge", "feedback", "channel", "kv"]


@dataclass(frozen=True, slots=True)
class Item:
    """A box: its lines of text, the first of which is its name. `is_stacked`: one of many."""

    lines: tuple[str, ...]
    kind: ItemKind = "operator"
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
class Frame:
    """What belongs together."""

    title: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """Items by key; the key of an operator or a kernel is its name."""

    title: str
    items: Mapping[str, Item]
    arrows: tuple[Arrow, ...]
    frames: tuple[Frame, ...] = field(default=())


def drawing(graph: Graph, *, unfold: bool = False) -> Drawing:
    """The drawing of a graph of either dialect; of its processes, once pass `place` was applied.

    Repeated layers and replicas are drawn once, with their number, unless `unfold`.
    """
    if graph.dialect == "kernel":
        return _kernels(fold(graph, unfold=unfold))
    return _placed(graph, unfold) if is_placed(graph) else _operators(graph)


def _operators(graph: Graph) -> Drawing:
    items = dict(_ends(graph))
    items |= {node.name: Item(tuple(_operator_lines(node))) for node in graph.nodes}
    return Drawing(graph.name, items, tuple(_arrows(graph, items)))


def _ends(graph: Graph) -> Iterator[tuple[str, Item]]:
    joined = {edge.source for edge in graph.edges} | {edge.target for edge in graph.edges}
    yield from ((end, Item((end,), "end")) for end in (SOURCE, SINK) if end in joined)


def _operator_lines(node: Node) -> Iterator[str]:
    yield node.name
    if node.op != node.name:
        yield node.op
    yield from (shortened(told) for told in told_options(node.attrs))
    if node.body is not None:
        yield f"body: {len(node.body.nodes)} nodes"


def _arrows(graph: Graph, items: Mapping[str, Item]) -> Iterator[Arrow]:
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
        items[node.name] = Item((name, *_kernel_lines(graph, node, name)))
    items |= {end: item for end, item in _ends(graph) if end == SINK}
    arrows = tuple(_kernel_arrow(edge) for edge in graph.edges if edge.source != SOURCE)
    arrows = tuple(arrow for arrow in arrows if arrow.source in items and arrow.target in items)
    frames = tuple(Frame(repeat.title, names) for repeat, names in folded.members.items())
    return Drawing(graph.name, items, arrows, frames)


def _kernel_lines(graph: Graph, node: Node, name: str) -> Iterator[str]:
    if node.op != name:
        yield node.op
    yield from map(shortened, outlet_types(graph, node))
    if entries := entry_inlets(graph, node):
        yield shortened(f"from source: {', '.join(entries)}")


def _kernel_arrow(edge: Edge) -> Arrow:
    kind: ArrowKind = "feedback" if edge.feedback else "edge"
    return Arrow(edge.source, edge.target, ports(edge), kind, at_target=True)


def _placed(graph: Graph, unfold: bool) -> Drawing:
    """Operators in the frame of the process that they run in, below it the workers."""
    plain = _operators(graph)
    control, *workers = processes(graph, unfold=unfold)
    inside = {_engine_key(name): _engine(graph, name) for name in control.engines}
    outside = {_engine_key(one.name): _worker(graph, one) for one in workers}
    links = tuple(_channel(one) for one in channels(graph, unfold=unfold))
    members = (*plain.items, *inside)
    frames = (Frame(control.title, members),) if members else ()
    items = {**plain.items, **inside, **outside}
    return Drawing(graph.name, items, (*plain.arrows, *links), frames)


def _engine_key(name: str) -> str:
    return f"engine {name}"


def _engine(graph: Graph, name: str, drop: tuple[str, ...] = ()) -> Item:
    options = graph.engines[name]
    kept = options.items() if isinstance(options, FrozenMap) else ()
    told = told_options({key: value for key, value in kept if key not in drop})
    return Item((f"engine {name}", *map(shortened, told)), "engine")


def _worker(graph: Graph, process: Process) -> Item:
    lines = _engine(graph, process.engines[0], drop=("replicas",)).lines
    return Item((process.title, *lines), "engine", process.count > 1)


def _channel(channel: Channel) -> Arrow:
    source = _engine_key(channel.source) if channel.is_kv else channel.source
    kind: ArrowKind = "kv" if channel.is_kv else "channel"
    return Arrow(source, _engine_key(channel.target), channel.label, kind)
