"""A residual add and the norm behind it become one: `fuse_add_norm`."""

from dataclasses import dataclass, replace

from sagellm.graphs.ir import Graph, Node
from sagellm.graphs.passes.rewrite import Fusion, fed_by, fuse


@dataclass(frozen=True, slots=True)
class FuseAddNorm:
    """add -> rms_norm becomes `add_rms_norm`, which hands on the sum as well.

    The sum must have another user (the next add): a norm that is its only one stays as it is.
    """

    name: str = "fuse_add_norm"

    def apply(self, graph: Graph) -> Graph:
        for norm in graph.nodes:
            if norm.op == "rms_norm" and (add := _add(graph, norm)):
                graph = fuse(graph, _fusion(add, norm))
        return graph


def _add(graph: Graph, norm: Node) -> Node | None:
    edge = fed_by(graph, norm.name)
    if edge.source not in graph.names or graph.node(edge.source).op != "add":
        return None
    users = [user for user in graph.outputs(edge.source) if user.target != norm.name]
    return graph.node(edge.source) if users else None


def _fusion(add: Node, norm: Node) -> Fusion:
    inlets = {(add.name, "a"): "a", (add.name, "b"): "b"}
    outlets = {(add.name, "out"): "sum", (norm.name, "out"): "out"}
    node = replace(norm, op="add_rms_norm")
    return Fusion(node, (add.name, norm.name), inlets, outlets)
