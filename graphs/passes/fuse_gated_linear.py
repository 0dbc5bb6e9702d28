"""Two projections and silu(gate) * up become one kernel: `fuse_gated_linear`."""

from dataclasses import dataclass

from sagellm.graphs.ir import Graph, Node
from sagellm.graphs.passes.rewrite import Fusion, fed_by, fuse, producer


@dataclass(frozen=True, slots=True)
class FuseGatedLinear:
    """gate_up_linear -> silu_mul becomes `gated_linear`."""

    name: str = "fuse_gated_linear"

    def apply(self, graph: Graph) -> Graph:
        for product in graph.nodes:
            if product.op == "silu_mul":
                linear = _gate_and_up(graph, product.name)
                if linear is not None:
                    graph = fuse(graph, _fusion(linear, product))
        return graph


def _gate_and_up(graph: Graph, product: str) -> Node | None:
    """The kernel that makes both inlets of silu_mul, each by the outlet of that name."""
    linear, other = (producer(graph, product, inlet) for inlet in ("gate", "up"))
    if linear is None or linear != other or linear.op != "gate_up_linear":
        return None
    return linear if fed_by(graph, product, "gate").outlet == "gate" else None


def _fusion(linear: Node, product: Node) -> Fusion:
    stem = linear.name.removesuffix("gate_up").rstrip("_")
    node = Node(f"{stem}_gated" if stem else "gated", "gated_linear", linear.attrs)
    inlets, outlets = {(linear.name, "in"): "in"}, {(product.name, "out"): "out"}
    return Fusion(node, (linear.name, product.name), inlets, outlets)
