"""Replacing several nodes of a graph by one: what every fusion does once it has found its match."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sagellm.graphs.ir import Edge, Graph, Node

Port = tuple[str, str]  # (node, inlet or outlet)


@dataclass(frozen=True, slots=True)
class Fusion:
    """`node` takes the place of `removed`.

    `inlets` says which inlet of a removed node feeds which inlet of the new one, `outlets` where
    the users of a removed outlet go. Edges between removed nodes, and into inlets not named, fall.
    """

    node: Node
    removed: tuple[str, ...]
    inlets: Mapping[Port, str]
    outlets: Mapping[Port, str]


def fuse(graph: Graph, fusion: Fusion) -> Graph:
    """The graph with the fusion done; the new node stands where the last removed one stood."""
    last = max(index for index, node in enumerate(graph.nodes) if node.name in fusion.removed)
    nodes = tuple(
        fusion.node if index == last else node
        for index, node in enumerate(graph.nodes)
        if index == last or node.name not in fusion.removed
    )
    edges = tuple(moved for edge in graph.edges if (moved := _moved(edge, fusion)) is not None)
    return replace(graph, nodes=nodes, edges=edges)


def _moved(edge: Edge, fusion: Fusion) -> Edge | None:
    into = edge.target in fusion.removed
    out_of = edge.source in fusion.removed
    if into and (out_of or (edge.target, edge.inlet) not in fusion.inlets):
        return None
    if into:
        inlet = fusion.inlets[edge.target, edge.inlet]
        return replace(edge, target=fusion.node.name, inlet=inlet)
    if out_of:
        outlet = fusion.outlets[edge.source, edge.outlet]
        return replace(edge, source=fusion.node.name, outlet=outlet)
    return edge


def fed_by(graph: Graph, node: str, inlet: str = "in") -> Edge:
    """The edge into that inlet. Raises KeyError if nothing feeds it."""
    for edge in graph.edges:
        if edge.target == node and edge.inlet == inlet:
            return edge
    raise KeyError((node, inlet))


def producer(graph: Graph, node: str, inlet: str = "in") -> Node | None:
    """The node that feeds that inlet, if it is a node and feeds nothing else with that outlet."""
    edge = fed_by(graph, node, inlet)
    if edge.source not in graph.names or len(graph.outputs(edge.source, edge.outlet)) > 1:
        return None
    return graph.node(edge.source)
