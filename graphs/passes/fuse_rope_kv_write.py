"""Rotation of queries and keys and the write to the pool become one: `fuse_rope_kv_write`."""

from dataclasses import dataclass

from sagellm.graphs.ir import Graph, Node
from sagellm.graphs.passes.rewrite import Fusion, fed_by, fuse, producer


@dataclass(frozen=True, slots=True)
class FuseRopeKvWrite:
    """rope(q), rope(k) -> kv_write before one attention becomes `rope_kv_write`."""

    name: str = "fuse_rope_kv_write"

    def apply(self, graph: Graph) -> Graph:
        for write in graph.nodes:
            if write.op == "kv_write" and (ropes := _ropes(graph, write)):
                graph = fuse(graph, _fusion(write, *ropes))
        return graph


def _ropes(graph: Graph, write: Node) -> tuple[Node, Node, int] | None:
    """The rotations of queries and keys, and the number of query heads, if they match."""
    (reader,) = (edge.target for edge in graph.outputs(write.name, "kv"))
    if reader not in graph.names or graph.node(reader).op != "paged_attention":
        return None
    q, k = producer(graph, reader, "q"), producer(graph, write.name, "k")
    if q is None or k is None or q.op != "rope" or k.op != "rope" or q.attrs != k.attrs:
        return None
    places = {fed_by(graph, rope.name, "positions").source for rope in (q, k)}
    num_heads = graph.node(reader).attrs["num_heads"]
    return (q, k, num_heads) if len(places) == 1 and isinstance(num_heads, int) else None


def _fusion(write: Node, q: Node, k: Node, num_heads: int) -> Fusion:
    table = {"table": write.attrs["table"]} if "table" in write.attrs else {}
    node = Node(write.name.replace("kv_write", "rope_kv_write"), "rope_kv_write").with_attrs(
        **table,
        layer=write.attrs["layer"],
        num_heads=num_heads,
        num_kv_heads=write.attrs["num_kv_heads"],
        rope=q.attrs,
    )
    inlets = {
        (q.name, "in"): "q",
        (q.name, "positions"): "positions",
        (k.name, "in"): "k",
        **{(write.name, inlet): inlet for inlet in ("v", "slots", "kv")},
    }
    return Fusion(
        node, (q.name, k.name, write.name), inlets, {(q.name, "out"): "q", (write.name, "kv"): "kv"}
    )
