"""Fusion passes: a table of patterns of kernels, each of which one kernel replaces."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from sagellm.graphs.ir import Edge, Graph, Node

NodePort = tuple[str, str]  # (node, inlet or outlet)


@dataclass(frozen=True, slots=True)
class Fusion:
    """One match of a pattern: `node` replaces the nodes `removed`.

    `inlets` maps inlets of removed nodes to inlets of `node`; `outlets` does the same for outlets.
    Edges between removed nodes, and edges into inlets that `inlets` does not name, are dropped.
    """

    node: Node
    removed: tuple[str, ...]
    inlets: Mapping[NodePort, str]
    outlets: Mapping[NodePort, str]


# (graph, a node with the anchor's op) -> the fusion; None if the pattern does not match there.
Match: TypeAlias = Callable[[Graph, Node], Fusion | None]


@dataclass(frozen=True, slots=True)
class FusionPass:
    """A pass that replaces every match of one pattern.

    `match` is tried at every node whose op is `anchor`.
    """

    name: str
    anchor: str
    match: Match

    def apply(self, graph: Graph) -> Graph:
        for node in graph.nodes:
            if node.op == self.anchor and (fusion := self.match(graph, node)) is not None:
                graph = fuse(graph, fusion)
        return graph


def fuse(graph: Graph, fusion: Fusion) -> Graph:
    """Replace the removed nodes by the new node, at the position of the last removed node."""
    removed = fusion.removed
    # At that position, the producers of all its inputs are before the new node.
    last = [node.name for node in graph.nodes if node.name in removed][-1]
    nodes = [
        fusion.node if node.name == last else node
        for node in graph.nodes
        if node.name == last or node.name not in removed
    ]
    return replace(graph, nodes=tuple(nodes), edges=tuple(_moved_edges(graph, fusion)))


def _moved_edges(graph: Graph, fusion: Fusion) -> Iterator[Edge]:
    """The edges after the fusion. Most do not touch it, and large models have hundreds."""
    removed = fusion.removed
    for edge in graph.edges:
        if edge.source not in removed and edge.target not in removed:
            yield edge
        elif (moved := _moved(edge, fusion)) is not None:
            yield moved


def _moved(edge: Edge, fusion: Fusion) -> Edge | None:
    """An edge of a removed node after the fusion, or None if the edge is dropped."""
    into = edge.target in fusion.removed
    out_of = edge.source in fusion.removed
    if into and (out_of or (edge.target, edge.inlet) not in fusion.inlets):
        return None
    if into:
        inlet = fusion.inlets[edge.target, edge.inlet]
        return replace(edge, target=fusion.node.name, inlet=inlet)
    outlet = fusion.outlets[edge.source, edge.outlet]
    return replace(edge, source=fusion.node.name, outlet=outlet)


def _fed_by(graph: Graph, node: str, inlet: str = "in") -> Edge:
    """The edge into an inlet. Raises KeyError if nothing feeds the inlet."""
    for edge in graph.edges:
        if edge.target == node and edge.inlet == inlet:
            return edge
    raise KeyError((node, inlet))


def _sole_producer(graph: Graph, node: str, inlet: str = "in") -> Node | None:
    """The node that feeds an inlet; None if it is `source`, or if the same outlet has other users.

    A fused kernel has no outlets for inner results, so a result with another user must stay.
    """
    edge = _fed_by(graph, node, inlet)
    if edge.source not in graph.names or len(graph.outputs(edge.source, edge.outlet)) > 1:
        return None
    return graph.node(edge.source)


def _attention_after(graph: Graph, write: Node) -> Node | None:
    """The paged attention that takes the KV state of a `kv_write`, if it is the only user."""
    readers = [edge.target for edge in graph.outputs(write.name, "kv")]
    if len(readers) != 1 or readers[0] not in graph.names:
        return None
    node = graph.node(readers[0])
    return node if node.op == "paged_attention" else None


def _prefix(name: str, suffix: str) -> str:
    """`name` without the suffix: `layer0` for `layer0_mul` and `mul`, empty for `mul` and `mul`."""
    return name.removesuffix(suffix).rstrip("_")


def _qkv(graph: Graph, write: Node) -> Fusion | None:
    """Fuse the projections to queries, keys and values of one attention to `qkv_linear`."""
    attention = _attention_after(graph, write)
    if attention is None:
        return None
    q = _projection(graph, attention.name, "q")
    k, v = (_projection(graph, write.name, inlet) for inlet in ("k", "v"))
    return _merged_linears(graph, (q, k, v), "qkv_linear", ("q", "k", "v"))


def _packed_qkv(graph: Graph, attention: Node) -> Fusion | None:
    """Fuse the projections of one attention over packed rows to `qkv_linear`."""
    linears = tuple(_projection(graph, attention.name, inlet) for inlet in ("q", "k", "v"))
    return _merged_linears(graph, linears, "qkv_linear", ("q", "k", "v"))


def _gate_up(graph: Graph, mul: Node) -> Fusion | None:
    """Fuse the projections to gate and up of silu(gate) * up to `gate_up_linear`."""
    silu = _sole_producer(graph, mul.name, "a")
    if silu is None or silu.op != "silu":
        return None
    linears = _projection(graph, silu.name), _projection(graph, mul.name, "b")
    return _merged_linears(graph, linears, "gate_up_linear", ("gate", "up"))


def _projection(graph: Graph, name: str, inlet: str = "in") -> Node | None:
    """The linear that feeds an inlet, directly or through a norm and a rotation of heads."""
    node = _sole_producer(graph, name, inlet)
    while node is not None and node.op in ("rope", "rms_norm"):
        node = _sole_producer(graph, node.name)
    return node if node is not None and node.op == "linear" else None


def _merged_linears(
    graph: Graph, nodes: tuple[Node | None, ...], op: str, outlets: tuple[str, ...]
) -> Fusion | None:
    """Fuse `nodes` to one linear with an outlet for each; None unless all are linears of the same
    rows.
    """
    linears = tuple(node for node in nodes if node is not None)
    rows = {(edge.source, edge.outlet) for edge in (_fed_by(graph, n.name) for n in linears)}
    if len(linears) < len(nodes) or len(rows) > 1:
        return None
    first = linears[0]
    prefix = _prefix(first.name, f"{outlets[0]}_proj")
    node = Node(f"{prefix}_{op.removesuffix('_linear')}" if prefix else op, op).with_attrs(
        weights=tuple(linear.attrs["weight"] for linear in linears),
        in_features=first.attrs["in_features"],
        out_features=tuple(linear.attrs["out_features"] for linear in linears),
        biases=tuple(linear.attrs.get("bias") for linear in linears),
    )
    names = tuple(linear.name for linear in linears)
    users = {(name, "out"): outlet for name, outlet in zip(names, outlets, strict=True)}
    # One edge brings the rows; those into the other linears are dropped.
    return Fusion(node, names, {(first.name, "in"): "in"}, users)


def _add_norm(graph: Graph, norm: Node) -> Fusion | None:
    """Fuse add -> rms_norm to `add_rms_norm`, which has an outlet for the sum too.

    The sum must have another user, such as the next add, because every outlet must be used.
    """
    source = _fed_by(graph, norm.name).source
    if source not in graph.names or graph.node(source).op != "add":
        return None
    if all(user.target == norm.name for user in graph.outputs(source)):
        return None
    inlets = {(source, "a"): "a", (source, "b"): "b"}
    outlets = {(source, "out"): "sum", (norm.name, "out"): "out"}
    return Fusion(replace(norm, op="add_rms_norm"), (source, norm.name), inlets, outlets)


def _add_layer_norm(graph: Graph, norm: Node) -> Fusion | None:
    """Fuse add -> layer_norm to `add_layer_norm`, if nothing else uses the sum."""
    add = _sole_producer(graph, norm.name)
    if add is None or add.op != "add":
        return None
    inlets = {(add.name, "a"): "a", (add.name, "b"): "b"}
    outlets = {(norm.name, "out"): "out"}
    return Fusion(replace(norm, op="add_layer_norm"), (add.name, norm.name), inlets, outlets)


def _gelu_linear(graph: Graph, gelu: Node) -> Fusion | None:
    """Fuse linear -> gelu to `gelu_linear`."""
    linear = _sole_producer(graph, gelu.name)
    if linear is None or linear.op != "linear":
        return None
    node = replace(linear, op="gelu_linear")
    inlets, outlets = {(linear.name, "in"): "in"}, {(gelu.name, "out"): "out"}
    return Fusion(node, (linear.name, gelu.name), inlets, outlets)


def _silu_mul(graph: Graph, mul: Node) -> Fusion | None:
    """Fuse silu(gate) * up to `silu_mul`."""
    silu = _sole_producer(graph, mul.name, "a")
    if silu is None or silu.op != "silu":
        return None
    prefix = _prefix(mul.name, "mul")
    node = Node(f"{prefix}_silu_mul" if prefix else "silu_mul", "silu_mul")
    inlets = {(silu.name, "in"): "gate", (mul.name, "b"): "up"}
    return Fusion(node, (silu.name, mul.name), inlets, {(mul.name, "out"): "out"})


def _gated_linear(graph: Graph, product: Node) -> Fusion | None:
    """Fuse gate_up_linear -> silu_mul to `gated_linear`."""
    linear, other = (_sole_producer(graph, product.name, inlet) for inlet in ("gate", "up"))
    if linear is None or linear != other or linear.op != "gate_up_linear":
        return None
    if _fed_by(graph, product.name, "gate").outlet != "gate":
        return None  # gate and up are exchanged
    prefix = _prefix(linear.name, "gate_up")
    node = Node(f"{prefix}_gated" if prefix else "gated", "gated_linear", linear.attrs)
    inlets, outlets = {(linear.name, "in"): "in"}, {(product.name, "out"): "out"}
    return Fusion(node, (linear.name, product.name), inlets, outlets)


def _rope_kv_write(graph: Graph, write: Node) -> Fusion | None:
    """Fuse rope(q), rope(k) and kv_write before one attention to `rope_kv_write`."""
    attention = _attention_after(graph, write)
    if attention is None:
        return None
    q, k = _sole_producer(graph, attention.name, "q"), _sole_producer(graph, write.name, "k")
    if q is None or k is None or q.op != "rope" or k.op != "rope" or q.attrs != k.attrs:
        return None
    positions = {_fed_by(graph, rope.name, "positions").source for rope in (q, k)}
    num_heads = attention.attrs["num_heads"]
    if len(positions) > 1 or not isinstance(num_heads, int):
        return None
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
    outlets = {(q.name, "out"): "q", (write.name, "kv"): "kv"}
    return Fusion(node, (q.name, k.name, write.name), inlets, outlets)


# The fusions of linears come first: later fusions remove nodes that their patterns contain.
KERNEL_PASSES: tuple[FusionPass, ...] = (
    FusionPass("fuse_qkv", "kv_write", _qkv),
    FusionPass("fuse_packed_qkv", "packed_attention", _packed_qkv),
    FusionPass("fuse_gate_up", "mul", _gate_up),
    FusionPass("fuse_add_norm", "rms_norm", _add_norm),
    FusionPass("fuse_add_layer_norm", "layer_norm", _add_layer_norm),
    FusionPass("fuse_gelu_linear", "gelu", _gelu_linear),
    FusionPass("fuse_silu_mul", "mul", _silu_mul),
    FusionPass("fuse_gated_linear", "silu_mul", _gated_linear),
    FusionPass("fuse_rope_kv_write", "kv_write", _rope_kv_write),
)
