"""attach_bodies: gives each engine operator of a stream graph the kernel graph that it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sagellm.graphs.ir import Graph


@dataclass(frozen=True, slots=True)
class AttachBodies:
    """`bodies`: engine name -> kernel graph, built from that engine's config.json.

    Operators of one engine share one body; the result has a hash of its own.
    """

    bodies: Mapping[str, Graph] = field(default_factory=dict)
    name: str = "attach_bodies"

    def apply(self, graph: Graph) -> Graph:
        nodes = tuple(
            replace(node, body=self.bodies.get(str(node.attrs.get("engine")), node.body))
            for node in graph.nodes
        )
        return replace(graph, nodes=nodes)
