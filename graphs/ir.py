"""The intermediate representation: a frozen graph of nodes and edges, for both dialects."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import msgspec

SOURCE = "source"
SINK = "sink"


class FrozenMap(Mapping[str, "Value"]):
    """A hashable mapping that keeps insertion order. Equality ignores the order."""

    __slots__ = ("_hash", "_items")

    def __init__(self, items: "Mapping[str, Value] | Iterable[tuple[str, Value]]" = ()) -> None:
        self._items: dict[str, Value] = dict(items)
        self._hash: int | None = None  # kept, because computing it visits all values

    def __getitem__(self, key: str) -> "Value":
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._items.items()))
        return self._hash

    def __repr__(self) -> str:
        return f"FrozenMap({self._items!r})"


Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | FrozenMap | None"


def freeze(value: object) -> Value:
    """Convert a JSON-like value to an immutable one. Raises TypeError for any other value."""
    if value is None or isinstance(value, bool | int | float | str | FrozenMap):
        return value
    if isinstance(value, Mapping):
        return FrozenMap((str(key), freeze(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    raise TypeError(f"a graph holds plain data; {type(value).__name__} is not")


def thaw(value: Value) -> object:
    """Convert a frozen value back to dicts and lists."""
    if isinstance(value, FrozenMap):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a kernel edge: a shape, of integers or symbolic names, and a dtype."""

    shape: tuple[int | str, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


EdgeType: TypeAlias = TensorType | str  # str: the name of an item type, or "kv" for the KV state


@dataclass(frozen=True, slots=True)
class Node:
    """An operator or a kernel. `name` is unique in the graph; `op` names a spec of the vocabulary.

    `body`: the kernel graph that the operator's engine runs, if a pass attached it.
    """

    name: str
    op: str
    attrs: FrozenMap = field(default_factory=FrozenMap)
    body: "Graph | None" = None

    def with_attrs(self, **attrs: object) -> "Node":
        frozen = {key: freeze(value) for key, value in attrs.items()}
        return replace(self, attrs=FrozenMap({**self.attrs, **frozen}))


@dataclass(frozen=True, slots=True)
class Edge:
    """A connection from one node's outlet to another node's inlet.

    A `feedback` edge may lead backwards: it does not count in the order of nodes.
    """

    source: str
    target: str
    outlet: str = "out"
    inlet: str = "in"
    feedback: bool = False
    type: EdgeType | None = None

    def __str__(self) -> str:
        outlet = "" if self.outlet == "out" else f".{self.outlet}"
        inlet = "" if self.inlet == "in" else f".{self.inlet}"
        return f"{self.source}{outlet} {'~>' if self.feedback else '->'} {self.target}{inlet}"


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes, edges and attributes. Edges may also join `source` and `sink`, which are not nodes.

    `dialect` is "stream" (the nodes are operators) or "kernel" (the nodes are kernels). The `attrs`
    of a stream graph have the entries `engines`, `models` and `executor`.
    """

    name: str
    dialect: str = "stream"
    nodes: tuple[Node, ...] = ()
    edges: tuple[Edge, ...] = ()
    attrs: FrozenMap = field(default_factory=FrozenMap)

    def node(self, name: str) -> Node:
        """Find a node. Raises KeyError for an unknown name."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)

    @property
    def engines(self) -> FrozenMap:
        engines = self.attrs.get("engines", FrozenMap())
        return engines if isinstance(engines, FrozenMap) else FrozenMap()

    @property
    def models(self) -> FrozenMap:
        """The section `models` as written: key -> options. `sections.py` interprets it."""
        models = self.attrs.get("models", FrozenMap())
        return models if isinstance(models, FrozenMap) else FrozenMap()

    def inputs(self, name: str) -> tuple[Edge, ...]:
        return tuple(edge for edge in self.edges if edge.target == name)

    def outputs(self, name: str, outlet: str | None = None) -> tuple[Edge, ...]:
        return tuple(
            edge for edge in self.edges if edge.source == name and outlet in (None, edge.outlet)
        )

    def topological(self) -> tuple[Node, ...]:
        """The nodes in an order in which every forward edge leads to a later node.

        Raises ValueError on a cycle.
        """
        by_name = {node.name: node for node in self.nodes}
        successors: dict[str, list[str]] = {name: [] for name in by_name}
        num_unmet = dict.fromkeys(by_name, 0)
        for edge in self.edges:
            # Skip `source` and `sink`, which are not nodes, and unknown names of unchecked graphs.
            if not edge.feedback and edge.source in by_name and edge.target in by_name:
                successors[edge.source].append(edge.target)
                num_unmet[edge.target] += 1
        ready = [name for name in by_name if num_unmet[name] == 0]
        order: list[Node] = []
        for name in ready:  # the loop appends to `ready`
            order.append(by_name[name])
            for target in successors[name]:
                num_unmet[target] -= 1
                if num_unmet[target] == 0:
                    ready.append(target)
        if len(order) < len(by_name):
            stuck = sorted(name for name, unmet in num_unmet.items() if unmet > 0)
            raise ValueError(f"cycle through {', '.join(stuck)}")
        return tuple(order)

    @property
    def hash(self) -> str:
        """A hash of 16 hex digits, equal on all machines, whatever the order of options."""
        encoded = msgspec.json.encode(plain(self), order="sorted")
        return hashlib.blake2b(encoded, digest_size=8).hexdigest()


def plain(graph: Graph) -> dict[str, object]:
    """Convert a graph to plain dicts and lists, the form that JSON and MessagePack hold."""
    return {
        "name": graph.name,
        "dialect": graph.dialect,
        "attrs": thaw(graph.attrs),
        "nodes": [_plain_node(node) for node in graph.nodes],
        "edges": [_plain_edge(edge) for edge in graph.edges],
    }


def _plain_node(node: Node) -> dict[str, object]:
    body = plain(node.body) if node.body else None
    return {"name": node.name, "op": node.op, "attrs": thaw(node.attrs), "body": body}


def _plain_edge(edge: Edge) -> dict[str, object]:
    kind = edge.type
    shown = (
        {"shape": list(kind.shape), "dtype": kind.dtype} if isinstance(kind, TensorType) else kind
    )
    return {
        "source": edge.source,
        "outlet": edge.outlet,
        "target": edge.target,
        "inlet": edge.inlet,
        "feedback": edge.feedback,
        "type": shown,
    }


def downstream(graph: Graph, start: str, avoiding: Iterable[str] = ()) -> set[str]:
    """The names that forward edges reach from `start`, including `start`.

    The walk does not enter the nodes `avoiding`.
    """
    successors: dict[str, list[str]] = {}
    for edge in graph.edges:
        if not edge.feedback:
            successors.setdefault(edge.source, []).append(edge.target)
    found, closed, waiting = {start}, set(avoiding), [start]
    while waiting:
        new = set(successors.get(waiting.pop(), ())) - found - closed
        found |= new
        waiting += new
    return found
