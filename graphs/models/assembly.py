"""Putting a kernel graph together, node by node."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Graph, Node
from sagellm.graphs.kernels.kernel import KV


class Wire(NamedTuple):
    """An outlet of a node."""

    node: str
    outlet: str = "out"


class Assembly:
    """A kernel graph in the making; `state` is the wire that holds the KV state now."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name = name
        self.dtype = dtype
        self.state = Wire(SOURCE, KV)
        self._nodes: list[Node] = []
        self._edges: list[Edge] = []

    @property
    def graph(self) -> Graph:
        attrs = FrozenMap({"dtype": self.dtype})
        return Graph(self.name, "kernel", tuple(self._nodes), tuple(self._edges), attrs)

    def step_input(self, name: str) -> Wire:
        return Wire(SOURCE, name)

    def add(self, name: str, op: str, wires: Mapping[str, Wire], **options: object) -> Wire:
        """A node fed by `wires` (inlet -> wire); the wire of its outlet `out`."""
        self._nodes.append(Node(name, op).with_attrs(**options))
        for inlet, wire in wires.items():
            self._edges.append(Edge(wire.node, name, wire.outlet, inlet))
        return Wire(name)

    def thread(
        self,
        name: str,
        op: str,
        wires: Mapping[str, Wire],
        inputs: tuple[str, ...],
        **options: object,
    ) -> Wire:
        """A node that the KV state goes through, fed by step inputs of the inlets' names too."""
        given = {inlet: self.step_input(inlet) for inlet in inputs}
        out = self.add(name, op, {**wires, **given, KV: self.state}, **options)
        self.state = Wire(name, KV)
        return out

    def sink(self, inlet: str, wire: Wire) -> None:
        self._edges.append(Edge(wire.node, SINK, wire.outlet, inlet))

    @staticmethod
    def record(options: Any) -> dict[str, object]:
        """The attributes that say `options`, a dataclass."""
        return asdict(options)
