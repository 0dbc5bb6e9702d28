"""The content of a picture of a graph, in any format: boxes, arrows, frames and their labels."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

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

DrawnNodeKind: TypeAlias = Literal["operator", "end", "engine"]
ArrowKind: TypeAlias = Literal["edge", "feedback", "channel", "kv"]


@dataclass(frozen=True, slots=True)
class DrawnNode:
    """A box with lines of text. The first line is its name. `is_stacked`: it stands for several."""

    lines: tuple[str, ...]
    kind: DrawnNodeKind = "operator"
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Arrow:
    """A line between two boxes, given by their keys. `at_target`: the label is near the target."""

    source: str
    target: str
    label: str = ""
    kind: ArrowKind = "edge"
    at_target: bool = False


@dataclass(frozen=True, slots=True)
class DrawnFrame:
    """A frame around boxes, given by their keys."""

    title: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """Boxes by key, arrows, and frames. The key of an operator or kernel is its name."""

    title: str
    nodes: Mapping[str, DrawnNode]
    arrows: tuple[Arrow, ...]
    frames: tuple[DrawnFrame, ...] = field(default=())


def to_drawing(graph: Graph, *, unfold: bool = False) -> Drawing:
    """The drawing of a graph of either dialect. After the pass `place`, it shows processes.

    Repeated layers and replicas are drawn once, with their count, unless `unfold`.
    """
    if graph.dialect == "kernel":
        return _kernels(fold(graph, unfold=unfold))
    return _placed(graph, unfold) if is_placed(graph) else _operators(graph)


def _operators(graph: Graph) -> Drawing:
    nodes = dict(_ends(graph))
    nodes |= {node.name: DrawnNode(tuple(_operator_lines(node))) for node in graph.nodes}
    return Drawing(graph.name, nodes, tuple(_arrows(graph, nodes)))


def _ends(graph: Graph) -> Iterator[tuple[str, DrawnNode]]:
    joined = {edge.source for edge in graph.edges} | {edge.target for edge in graph.edges}
    yield from ((end, DrawnNode((end,), "end")) for end in (SOURCE, SINK) if end in joined)


def _operator_lines(node: Node) -> Iterator[str]:
    yield node.name
    if node.op != node.name:
        yield node.op
    yield from (truncated(text) for text in option_texts(node.attrs))
    if node.body is not None:
        yield f"body: {len(node.body.nodes)} nodes"


def _arrows(graph: Graph, nodes: Mapping[str, DrawnNode]) -> Iterator[Arrow]:
    for edge in graph.edges:
        if edge.source in nodes and edge.target in nodes:
            kind: ArrowKind = "feedback" if edge.feedback else "edge"
            yield Arrow(edge.source, edge.target, port_label(edge), kind)


def _kernels(folded: Folded) -> Drawing:
    """The drawing of a kernel graph. A kernel's box has the types of its outlets, and its inputs
    from the step.

    Edges from `source` are left out: nearly every kernel has some, and they would hide other edges.
    """
    graph, nodes = folded.graph, {}
    # In a frame of one layer, names need no layer: the title of the frame has it.
    alone = {
        name for repeat, names in folded.members.items() if repeat.period == 1 for name in names
    }
    for node in graph.nodes:
        name = without_layer(node.name) if node.name in alone else node.name
        nodes[node.name] = DrawnNode((name, *_kernel_lines(graph, node, name)))
    nodes |= {end: node for end, node in _ends(graph) if end == SINK}
    arrows = tuple(_kernel_arrow(edge) for edge in graph.edges if edge.source != SOURCE)
    arrows = tuple(arrow for arrow in arrows if arrow.source in nodes and arrow.target in nodes)
    frames = tuple(DrawnFrame(repeat.title, names) for repeat, names in folded.members.items())
    return Drawing(graph.name, nodes, arrows, frames)


def _kernel_lines(graph: Graph, node: Node, name: str) -> Iterator[str]:
    if node.op != name:
        yield node.op
    yield from map(truncated, outlet_types(graph, node))
    if inputs := source_inputs(graph, node):
        yield truncated(f"from source: {', '.join(inputs)}")


def _kernel_arrow(edge: Edge) -> Arrow:
    kind: ArrowKind = "feedback" if edge.feedback else "edge"
    return Arrow(edge.source, edge.target, port_names(edge), kind, at_target=True)


def _placed(graph: Graph, unfold: bool) -> Drawing:
    """The drawing of a placed graph: operators in the frame of their process, workers below it."""
    operators = _operators(graph)
    control, *workers = placed_processes(graph, unfold=unfold)
    inside = {_engine_key(name): _engine(graph, name) for name in control.engines}
    outside = {_engine_key(process.name): _worker(graph, process) for process in workers}
    links = tuple(_link_arrow(link) for link in placed_links(graph, unfold=unfold))
    members = (*operators.nodes, *inside)
    frames = (DrawnFrame(control.title, members),) if members else ()
    nodes = {**operators.nodes, **inside, **outside}
    return Drawing(graph.name, nodes, (*operators.arrows, *links), frames)


def _engine_key(name: str) -> str:
    return f"engine {name}"


def _engine(graph: Graph, name: str, drop: tuple[str, ...] = ()) -> DrawnNode:
    options = graph.engines[name]
    kept = options.items() if isinstance(options, FrozenMap) else ()
    texts = option_texts({key: value for key, value in kept if key not in drop})
    return DrawnNode((f"engine {name}", *map(truncated, texts)), "engine")


def _worker(graph: Graph, process: PlacedProcess) -> DrawnNode:
    lines = _engine(graph, process.engines[0], drop=("replicas",)).lines
    return DrawnNode((process.title, *lines), "engine", process.count > 1)


def _link_arrow(link: PlacedLink) -> Arrow:
    source = _engine_key(link.source) if link.is_kv else link.source
    kind: ArrowKind = "kv" if link.is_kv else "channel"
    return Arrow(source, _engine_key(link.target), link.label, kind)


def option_texts(options: Mapping[str, Value]) -> Iterator[str]:
    """Each option as the text `name: value`."""
    return (f"{scalar(name)}: {flow(value)}" for name, value in options.items())


def port_label(edge: Edge) -> str:
    """The label of an edge: its outlet and inlet, unless they are `out` and `in`, and its type."""
    kind = "" if edge.type is None else str(edge.type)
    return " ".join(part for part in (port_names(edge), kind) if part)


def port_names(edge: Edge) -> str:
    """The outlet and inlet of an edge, unless they are `out` and `in`: `sum > a`, or `q` for two
    equal names.
    """
    outlet = "" if edge.outlet == "out" else edge.outlet
    inlet = "" if edge.inlet in ("in", edge.outlet) else edge.inlet
    return " > ".join(port for port in (outlet, inlet) if port)


def outlet_types(graph: Graph, node: Node) -> Iterator[str]:
    """The type of each outlet of a kernel, such as `float32[T, 64]` or `q float32[T, 64]`."""
    kinds = {edge.outlet: str(edge.type) for edge in graph.outputs(node.name) if edge.type}
    for outlet, kind in kinds.items():
        if kind != outlet:
            yield kind if outlet == "out" else f"{outlet} {kind}"


def source_inputs(graph: Graph, node: Node) -> list[str]:
    """The names of the step inputs that a kernel reads."""
    if graph.dialect != "kernel":
        return []
    return [edge.outlet for edge in graph.inputs(node.name) if edge.source == SOURCE]


def body_summary(body: Graph) -> str:
    """A body in one line: its name, size, most frequent ops, and hash."""
    counts = Counter(node.op for node in body.nodes).most_common(4)
    ops = ", ".join(f"{count} {op}" for op, count in counts)
    return f"body {body.name}: {len(body.nodes)} nodes ({ops}), hash {body.hash}"
