"""Fusion passes: each replaces a pattern of kernels by one kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sagellm.graphs.ir import Edge, Graph, Node

NodePort = tuple[str, str]  # (node, inlet or outlet)


@dataclass(frozen=True, slots=True)
class Fusion:
    """`node` takes the place of `removed`.

    `inlets` says which inlet of a removed node feeds which inlet of the new one, `outlets` where
    the users of a removed outlet go. Edges between removed nodes, and into inlets not named, fall.
    """

    node: Node
    removed: tuple[str, ...]
    inlets: Mapping[NodePort, str]
    outlets: Mapping[NodePort, str]


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


@dataclass(frozen=True, slots=True)
class FuseQkv:
    """The projections behind one attention become `qkv_linear`."""

    name: str = "fuse_qkv"

    def apply(self, graph: Graph) -> Graph:
        for node in graph.nodes:
            if node.op == "kv_write" and (linears := _qkv(graph, node)):
                graph = _fuse_linears(graph, linears, "qkv_linear", ("q", "k", "v"))
        return graph


@dataclass(frozen=True, slots=True)
class FuseGateUp:
    """The two projections into silu(gate) * up become `gate_up_linear`."""

    name: str = "fuse_gate_up"

    def apply(self, graph: Graph) -> Graph:
        for node in graph.nodes:
            if node.op == "mul" and (linears := _gate_up(graph, node)):
                graph = _fuse_linears(graph, linears, "gate_up_linear", ("gate", "up"))
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


def _fuse_linears(
    graph: Graph, linears: tuple[Node, ...], op: str, outlets: tuple[str, ...]
) -> Graph:
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


@dataclass(frozen=True, slots=True)
class FuseAddNorm:
    """add -> rms_norm becomes `add_rms_norm`, which hands on the sum as well.

    The sum must have another user (the next add): a norm that is its only one stays as it is.
    """

    name: str = "fuse_add_norm"

    def apply(self, graph: Graph) -> Graph:
        for norm in graph.nodes:
            if norm.op == "rms_norm" and (add := _add(graph, norm)):
                graph = fuse(graph, _add_norm_fusion(add, norm))
        return graph


def _add(graph: Graph, norm: Node) -> Node | None:
    edge = fed_by(graph, norm.name)
    if edge.source not in graph.names or graph.node(edge.source).op != "add":
        return None
    users = [user for user in graph.outputs(edge.source) if user.target != norm.name]
    return graph.node(edge.source) if users else None


def _add_norm_fusion(add: Node, norm: Node) -> Fusion:
    inlets = {(add.name, "a"): "a", (add.name, "b"): "b"}
    outlets = {(add.name, "out"): "sum", (norm.name, "out"): "out"}
    node = replace(norm, op="add_rms_norm")
    return Fusion(node, (add.name, norm.name), inlets, outlets)


@dataclass(frozen=True, slots=True)
class FuseSiluMul:
    """silu -> mul.a becomes `silu_mul`."""

    name: str = "fuse_silu_mul"

    def apply(self, graph: Graph) -> Graph:
        for mul in graph.nodes:
            if mul.op == "mul":
                silu = producer(graph, mul.name, "a")
                if silu is not None and silu.op == "silu":
                    graph = fuse(graph, _silu_mul_fusion(silu, mul))
        return graph


def _silu_mul_fusion(silu: Node, mul: Node) -> Fusion:
    name = mul.name.removesuffix("mul").rstrip("_")
    node = Node(f"{name}_silu_mul" if name else "silu_mul", "silu_mul")
    inlets = {(silu.name, "in"): "gate", (mul.name, "b"): "up"}
    return Fusion(node, (silu.name, mul.name), inlets, {(mul.name, "out"): "out"})


@dataclass(frozen=True, slots=True)
class FuseGatedLinear:
    """gate_up_linear -> silu_mul becomes `gated_linear`."""

    name: str = "fuse_gated_linear"

    def apply(self, graph: Graph) -> Graph:
        for product in graph.nodes:
            if product.op == "silu_mul":
                linear = _gate_and_up(graph, product.name)
                if linear is not None:
                    graph = fuse(graph, _gated_linear_fusion(linear, product))
        return graph


def _gate_and_up(graph: Graph, product: str) -> Node | None:
    """The kernel that makes both inlets of silu_mul, each by the outlet of that name."""
    linear, other = (producer(graph, product, inlet) for inlet in ("gate", "up"))
    if linear is None or linear != other or linear.op != "gate_up_linear":
        return None
    return linear if fed_by(graph, product, "gate").outlet == "gate" else None


def _gated_linear_fusion(linear: Node, product: Node) -> Fusion:
    stem = linear.name.removesuffix("gate_up").rstrip("_")
    node = Node(f"{stem}_gated" if stem else "gated", "gated_linear", linear.attrs)
    inlets, outlets = {(linear.name, "in"): "in"}, {(product.name, "out"): "out"}
    return Fusion(node, (linear.name, product.name), inlets, outlets)


@dataclass(frozen=True, slots=True)
class FuseRopeKvWrite:
    """rope(q), rope(k) -> kv_write before one attention becomes `rope_kv_write`."""

    name: str = "fuse_rope_kv_write"

    def apply(self, graph: Graph) -> Graph:
        for write in graph.nodes:
            if write.op == "kv_write" and (ropes := _ropes(graph, write)):
                graph = fuse(graph, _rope_kv_write_fusion(write, *ropes))
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


def _rope_kv_write_fusion(write: Node, q: Node, k: Node, num_heads: int) -> Fusion:
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
