"""Folds repeated layers and replicas, so that a picture shows one for all equal ones."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node, Value
from sagellm.graphs.passes.placement import CONTROL, PROCESSES, replicas_of
from sagellm.graphs.sections import executor_kind

_LAYER = re.compile(r"layer(\d+)_(.+)")
_TRANSFER = "kv_transfer"
_KV = "KV blocks"
_WEIGHT_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Repeat:
    """Layers `first` to `last`: a sequence of `period` different layers, repeated."""

    first: int
    last: int
    period: int = 1

    @property
    def count(self) -> int:
        return (self.last - self.first + 1) // self.period

    @property
    def title(self) -> str:
        if self.first == self.last:
            return f"layer {self.first}"
        several = f"{self.period} layers " if self.period > 1 else ""
        return f"layers {self.first}-{self.last}: {several}x {self.count}"

    @property
    def shown(self) -> range:
        """The layers that a picture shows for all layers of the repeat."""
        return range(self.first, self.first + self.period)


@dataclass(frozen=True, slots=True)
class Folded:
    """A folded graph. `graph`: without the hidden layers of repeats. `members`: the names of the
    shown nodes of each repeat.
    """

    graph: Graph
    members: Mapping[Repeat, tuple[str, ...]]


def fold(graph: Graph, *, unfold: bool = False) -> Folded:
    """Hide all repetitions of a repeat but the first. With `unfold`, each layer is its own repeat.

    An edge between a hidden layer and a node outside its repeat is moved to the shown layer. An
    edge between two repetitions of a repeat is left out.
    """
    layers = _layers(graph)
    repeats = [Repeat(n, n) for n in sorted(layers)] if unfold else _repeats(graph, layers)
    repeat_of = {
        node.name: repeat
        for repeat in repeats
        for number in range(repeat.first, repeat.last + 1)
        for node in layers[number]
    }
    nodes = tuple(node for node in graph.nodes if _shown_name(node.name, repeat_of) == node.name)
    members = {
        repeat: tuple(node.name for n in repeat.shown for node in layers[n]) for repeat in repeats
    }
    shown = replace(graph, nodes=nodes, edges=tuple(_edges(graph, repeat_of)))
    return Folded(shown, members)


def layer_of(name: str) -> int | None:
    """The layer of a kernel, from the name of its node; None if it belongs to no layer."""
    found = _LAYER.fullmatch(name)
    return int(found[1]) if found else None


def without_layer(name: str) -> str:
    """The name of a kernel without its layer: `q_proj` for `layer0_q_proj`."""
    found = _LAYER.fullmatch(name)
    return found[2] if found else name


def _layers(graph: Graph) -> dict[int, list[Node]]:
    layers: dict[int, list[Node]] = {}
    for node in graph.nodes if graph.dialect == "kernel" else ():
        if (number := layer_of(node.name)) is not None:
            layers.setdefault(number, []).append(node)
    return layers


def _repeats(graph: Graph, layers: Mapping[int, Sequence[Node]]) -> list[Repeat]:
    """Cover the layers with repeats from the first layer on. Each repeat is the longest that begins
    at its layer, with the shortest period.
    """
    signatures = {
        number: _layer_signature(graph, nodes, number) for number, nodes in layers.items()
    }
    repeats: list[Repeat] = []
    first, num_left = min(signatures, default=0), len(signatures)
    while first in signatures:
        # There are at least two repetitions, so a period is at most half of the remaining layers.
        choices = (
            Repeat(first, _last_repeated(signatures, first, p), p)
            for p in range(1, num_left // 2 + 1)
        )
        longest = max(choices, key=lambda repeat: repeat.last, default=Repeat(first, first))
        repeats.append(longest)
        num_left -= longest.last - first + 1
        first = longest.last + 1
    return [*repeats, *(Repeat(n, n) for n in signatures if n >= first)]


def _last_repeated(signatures: Mapping[int, object], first: int, period: int) -> int:
    """The last layer of a repeat of `period` layers from `first` on; `first` if nothing repeats."""
    end = first + period
    while signatures.get(end, end) == signatures.get(end - period):
        end += 1
    count = (end - first) // period
    return first + count * period - 1 if count > 1 or period == 1 else first


def _layer_signature(graph: Graph, nodes: Sequence[Node], number: int) -> object:
    """A value that is equal for equal layers: their kernels, options and inner edges."""
    names = {node.name for node in nodes}
    kernels = tuple((without_layer(n.name), n.op, _without_number(n.attrs, number)) for n in nodes)
    inner = tuple(
        (without_layer(edge.source), edge.outlet, without_layer(edge.target), edge.inlet, edge.type)
        for name in sorted(names)
        for edge in graph.inputs(name)
        if edge.source in names
    )
    return kernels, frozenset(inner)


def _without_number(value: Value, number: int) -> Value:
    """The options of a kernel without the number of its layer."""
    if isinstance(value, FrozenMap):
        return FrozenMap(
            (key, None if key == "layer" and item == number else _without_number(item, number))
            for key, item in value.items()
        )
    if isinstance(value, tuple):
        return tuple(_without_number(item, number) for item in value)
    if isinstance(value, str):
        return _WEIGHT_LAYER.sub(lambda m: ".*." if int(m[1]) == number else m[0], value)
    return value


def _shown_name(name: str, repeat_of: Mapping[str, Repeat]) -> str:
    """The name of the kernel that a picture shows in place of the kernel `name`."""
    number = layer_of(name)
    if name not in repeat_of or number is None:
        return name
    repeat = repeat_of[name]
    shown = repeat.first + (number - repeat.first) % repeat.period
    return f"layer{shown}_{without_layer(name)}"


def _edges(graph: Graph, repeat_of: Mapping[str, Repeat]) -> Iterator[Edge]:
    """The edges of the folded graph, each once."""
    seen: set[Edge] = set()
    for edge in graph.edges:
        source, target = _shown_name(edge.source, repeat_of), _shown_name(edge.target, repeat_of)
        moved = replace(edge, source=source, target=target)
        crosses = edge.source not in repeat_of or repeat_of[edge.source] is not repeat_of.get(
            edge.target
        )
        if (moved == edge or crosses) and moved not in seen:
            seen.add(moved)
            yield moved


@dataclass(frozen=True, slots=True)
class PlacedProcess:
    """`count` equal processes, with the engines that compute in each."""

    name: str
    title: str
    engines: tuple[str, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class PlacedLink:
    """A link from an operator to the engine that it drives or, with `is_kv`, between two engines.

    An engine is named by its process: `p`, or `p[0]` if each replica is shown.
    """

    source: str
    target: str
    label: str
    is_kv: bool = False


def is_placed(graph: Graph) -> bool:
    return PROCESSES in graph.attrs


def placed_processes(placed: Graph, *, unfold: bool = False) -> tuple[PlacedProcess, ...]:
    """The process of the operators, then the workers; with `unfold`, one for each replica."""
    if executor_kind(placed) == "tasks":
        return (PlacedProcess(CONTROL, "one process: executor tasks", tuple(placed.engines)),)
    control = PlacedProcess(CONTROL, f"process {CONTROL}: gateway and operators", ())
    counts = replicas_of(placed)
    workers = (_workers(engine, count, unfold) for engine, count in counts.items())
    return (control, *(worker for group in workers for worker in group))


def _workers(engine: str, count: int, unfold: bool) -> tuple[PlacedProcess, ...]:
    if unfold:
        names = [f"{engine}[{number}]" for number in range(count)]
        return tuple(PlacedProcess(name, f"worker {name}", (engine,)) for name in names)
    times = f": x {count}" if count > 1 else ""
    return (PlacedProcess(engine, f"worker {engine}{times}", (engine,), count),)


def placed_links(placed: Graph, *, unfold: bool = False) -> Iterator[PlacedLink]:
    """The links from operators to engines, then the links for KV blocks between engines."""
    names = {engine: (engine,) for engine in placed.engines}
    for process in placed_processes(placed, unfold=unfold)[1:]:
        (engine,) = process.engines
        before = names[engine] if process.name != engine and names[engine] != (engine,) else ()
        names[engine] = (*before, process.name)
    for node in placed.nodes:
        for target in names.get(str(node.attrs.get("engine")), ()):
            yield PlacedLink(node.name, target, _link(placed))
    for sender, receiver in _transfers(placed):
        for source in names[sender]:
            yield from (PlacedLink(source, target, _kv(placed), True) for target in names[receiver])


def _link(placed: Graph) -> str:
    """The label of a link: `ipc` or `tcp`; empty within one process."""
    return str(_executor(placed).get("address", "")).partition("://")[0]


def _kv(placed: Graph) -> str:
    transport = _executor(placed).get("kv")
    return f"{_KV}: {transport}" if transport else _KV


def _executor(graph: Graph) -> FrozenMap:
    executor = graph.attrs.get("executor")
    return executor if isinstance(executor, FrozenMap) else FrozenMap()


def _transfers(graph: Graph) -> dict[tuple[str, str], None]:
    """The pairs of engines between which an operator moves KV blocks."""
    return {
        (sender, receiver): None
        for node in graph.nodes
        if node.op == _TRANSFER
        for sender in _nearest(graph, node.name, graph.inputs, lambda edge: edge.source)
        for receiver in _nearest(graph, node.name, graph.outputs, lambda edge: edge.target)
        if sender != receiver
    }


def _nearest(
    graph: Graph,
    name: str,
    edges: Callable[[str], tuple[Edge, ...]],
    other: Callable[[Edge], str],
) -> tuple[str, ...]:
    """The engine of the nearest operator with an engine on each path from the operator `name`.

    `edges` and `other` give the direction: the edges to follow, and the far end of an edge.
    """
    found: dict[str, None] = {}
    seen, waiting = {name}, [name]
    for at in waiting:  # the loop appends to `waiting`
        for near in (other(edge) for edge in edges(at) if not edge.feedback):
            engine = graph.node(near).attrs.get("engine") if near in graph.names else None
            if isinstance(engine, str) and engine in graph.engines:
                found[engine] = None
            elif near not in seen:
                seen.add(near)
                waiting.append(near)
    return tuple(found)
