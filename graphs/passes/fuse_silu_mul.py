"""silu(gate) * up becomes one kernel: `fuse_silu_mul`."""

from dataclasses import dataclass

from sagellm.graphs.ir import Graph, Node
from sagellm.graphs.passes.rewrite import Fusion, fuse, producer


@dataclass(frozen=True, slots=True)
class FuseSiluMul:
    """silu -> mul.a becomes `silu_mul`."""

    name: str = "fuse_silu_mul"

    def apply(self, graph: Graph) -> Graph:
        for mul in graph.nodes:
            if mul.op == "mul":
                silu = producer(graph, mul.name, "a")
                if silu is not None and silu.op == "silu":
                    graph = fuse(graph, _fusion(silu, mul))
        return graph


def _fusion(silu: Node, mul: Node) -> Fusion:
    name = mul.name.removesuffix("mul").rstrip("_")
    node = Node(f"{name}_silu_mul" if name else "silu_mul", "silu_mul")
    inlets = {(silu.name, "in"): "gate", (mul.name, "b"): "up"}
    return Fusion(node, (silu.name, mul.name), inlets, {(mul.name, "out"): "out"})
