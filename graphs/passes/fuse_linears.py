"""Linears that read the same rows become one: `fuse_qkv` and `fuse_gate_up`."""

from dataclasses import dataclass

from sagellm.graphs.ir import Edge, Graph, Node
from sagellm.graphs.passes.rewrite import Fusion, fed_by, fuse, producer


@dataclass(frozen=True, slots=True)
class FuseQkv:
    """The projections behind one attention become `qkv_linear`."""

    name: str = "fuse_qkv"

    def apply(self, graph: Graph) -> Graph:
        for node in graph.nodes:
            if node.op == "kv_write" and (linears := _qkv(graph, node)):
                graph = _fused(graph, linears, "qkv_linear", ("q", "k", "v"))
        return graph


@dataclass(frozen=True, slots=True)
class FuseGateUp:
    """The two projections into silu(gate) * up become `gate_up_linear`."""

    name: str = "fuse_gate_up"

    def apply(self, graph: Graph) -> Graph:
        for node in graph.nodes:
            if node.op == "mul" and (linears := _gate_up(graph, node)):
                graph = _fused(graph, linears, "gate_up_linear", ("gate", "up"))
        return graph


def _qkv(graph: Graph, write: Node) -> tuple[Node, ...] | None:
    readers = [edge.target for edge in graph.outputs(write.name, "kv")]
    if len(readers) != 1 or readers[0] not in graph.names:
        return None
    if graph.node(readers[0]).op != "paged_attention":
        return None
    q = _projection(graph, readers[0], "q")
    k, v = (_projection(graph, write.name, inlet) for inlet in ("k", "v"))
    return _same_rows(graph, q, k, v)


def _gate_up(graph: Graph, mul: Node) -> tuple[Node, ...] | None:
    silu = producer(graph, mul.name, "a")
    if silu is None or silu.op != "silu":
        return None
    return _same_rows(graph, _projection(graph, silu.name), _projection(graph, mul.name, "b"))


def _projection(graph: Graph, name: str, inlet: str = "in") -> Node | None:
    """The linear behind an inlet, past norms and rotations of its heads."""
    node = producer(graph, name, inlet)
    while node is not None and node.op in ("rope", "rms_norm"):
        node = producer(graph, node.name)
    return node if node is not None and node.op == "linear" else None


def _same_rows(graph: Graph, *linears: Node | None) -> tuple[Node, ...] | None:
    found = tuple(linear for linear in linears if linear is not None)
    rows = {_wire(fed_by(graph, linear.name)) for linear in found}
    return found if len(found) == len(linears) and len(rows) == 1 else None


def _wire(edge: Edge) -> tuple[str, str]:
    return edge.source, edge.outlet


def _fused(graph: Graph, linears: tuple[Node, ...], op: str, outlets: tuple[str, ...]) -> Graph:
    first = linears[0]
    stem = first.name.removesuffix(f"{outlets[0]}_proj").rstrip("_")
    node = Node(f"{stem}_{op.removesuffix('_linear')}" if stem else op, op).with_attrs(
        weights=tuple(linear.attrs["weight"] for linear in linears),
        in_features=first.attrs["in_features"],
        out_features=tuple(linear.attrs["out_features"] for linear in linears),
        biases=tuple(linear.attrs.get("bias") for linear in linears),
    )
    names = tuple(linear.name for linear in linears)
    users = {(name, "out"): outlet for name, outlet in zip(names, outlets, strict=True)}
    return fuse(graph, Fusion(node, names, {(first.name, "in"): "in"}, users))
