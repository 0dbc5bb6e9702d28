"""A pre-norm decoder with gated MLP as a kernel graph, shared by all model families."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Graph, Node
from sagellm.graphs.kernels.kernel import KV
from sagellm.graphs.kernels.token_mixers import Rope


class NodeOutlet(NamedTuple):
    """An outlet of a node."""

    node: str
    outlet: str = "out"


class KernelGraphBuilder:
    """A kernel graph in the making; `state` is the wire that holds the KV state now."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name = name
        self.dtype = dtype
        self.state = NodeOutlet(SOURCE, KV)
        self._nodes: list[Node] = []
        self._edges: list[Edge] = []

    @property
    def graph(self) -> Graph:
        attrs = FrozenMap({"dtype": self.dtype})
        return Graph(self.name, "kernel", tuple(self._nodes), tuple(self._edges), attrs)

    def step_input(self, name: str) -> NodeOutlet:
        return NodeOutlet(SOURCE, name)

    def add(
        self, name: str, op: str, wires: Mapping[str, NodeOutlet], **options: object
    ) -> NodeOutlet:
        """A node fed by `wires` (inlet -> wire); the wire of its outlet `out`."""
        self._nodes.append(Node(name, op).with_attrs(**options))
        for inlet, wire in wires.items():
            self._edges.append(Edge(wire.node, name, wire.outlet, inlet))
        return NodeOutlet(name)

    def add_stateful(
        self,
        name: str,
        op: str,
        wires: Mapping[str, NodeOutlet],
        inputs: tuple[str, ...],
        **options: object,
    ) -> NodeOutlet:
        """A node that the KV state goes through, fed by step inputs of the inlets' names too."""
        given = {inlet: self.step_input(inlet) for inlet in inputs}
        out = self.add(name, op, {**wires, **given, KV: self.state}, **options)
        self.state = NodeOutlet(name, KV)
        return out

    def sink(self, inlet: str, wire: NodeOutlet) -> None:
        self._edges.append(Edge(wire.node, SINK, wire.outlet, inlet))

    @staticmethod
    def record(options: Any) -> dict[str, object]:
        """The attributes that say `options`, a dataclass."""
        return asdict(options)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Everything that decides the graph. Weight names are those of Hugging Face folders."""

    family: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    rope: Rope
    windows: tuple[int | None, ...]  # one a layer
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


# From the normed rows of a layer to what is added to its rows: attention, or what replaces it.
Mixer: TypeAlias = Callable[[KernelGraphBuilder, Decoder, int, NodeOutlet], NodeOutlet]


def decoder_graph(shape: Decoder, mixer: Mixer | None = None) -> Graph:
    """The unfused kernel graph of one forward step of a ragged batch.

    `mixer` builds what tokens of a layer see of each other, where it is not attention in all.
    """
    build = KernelGraphBuilder(shape.family, shape.dtype)
    ids = build.step_input("token_ids")
    weight, sizes = "model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size)
    options = {"weight": weight, "vocab_size": sizes[0], "size": sizes[1], "dtype": shape.dtype}
    rows = build.add("embed", "embedding", {"in": ids}, **options)
    for layer in range(len(shape.windows)):
        rows = _mixed(build, shape, layer, rows, mixer or attention)
        rows = _mlp(build, shape, layer, rows)
    build.sink("logits", _head(build, shape, rows))
    build.sink("kv", build.state)
    return build.graph


def _mixed(
    build: KernelGraphBuilder, shape: Decoder, layer: int, rows: NodeOutlet, mixer: Mixer
) -> NodeOutlet:
    """rows + mixer(norm(rows))."""
    name = f"layer{layer}"
    normed = _norm(build, shape, f"{name}_input_norm", _path(layer, "input_layernorm"), rows)
    out = mixer(build, shape, layer, normed)
    return build.add(f"{name}_attention_add", "add", {"a": rows, "b": out})


def attention(
    build: KernelGraphBuilder, shape: Decoder, layer: int, normed: NodeOutlet
) -> NodeOutlet:
    """Softmax attention with rotated queries and keys: the Mixer of most layers."""
    name = f"layer{layer}"
    q = _heads(build, shape, layer, "q", normed)
    k = _heads(build, shape, layer, "k", normed)
    v = _project(build, shape, layer, "v", normed)
    build.add_stateful(
        f"{name}_kv_write", "kv_write", {"k": k, "v": v}, ("slots",), **_kv(shape, layer)
    )
    mixed = build.add_stateful(
        f"{name}_attention",
        "paged_attention",
        {"q": q},
        ("query_starts", "context_lens", "block_tables"),
        **_kv(shape, layer),
        num_heads=shape.num_heads,
        scale=shape.head_dim**-0.5,
        window=shape.windows[layer],
    )
    sizes = (shape.num_heads * shape.head_dim, shape.hidden_size)
    path = _path(layer, "self_attn.o_proj")
    return linear(build, f"{name}_o_proj", path, mixed, sizes, shape.output_bias)


def _mlp(build: KernelGraphBuilder, shape: Decoder, layer: int, rows: NodeOutlet) -> NodeOutlet:
    """rows + down(silu(gate(norm(rows))) * up(norm(rows)))."""
    name, bias = f"layer{layer}", shape.mlp_bias
    up, down = (
        (shape.hidden_size, shape.intermediate_size),
        (
            shape.intermediate_size,
            shape.hidden_size,
        ),
    )
    path = _path(layer, "post_attention_layernorm")
    normed = _norm(build, shape, f"{name}_post_norm", path, rows)
    gate = linear(build, f"{name}_gate_proj", _path(layer, "mlp.gate_proj"), normed, up, bias)
    raised = linear(build, f"{name}_up_proj", _path(layer, "mlp.up_proj"), normed, up, bias)
    opened = build.add(f"{name}_silu", "silu", {"in": gate})
    product = build.add(f"{name}_mul", "mul", {"a": opened, "b": raised})
    path = _path(layer, "mlp.down_proj")
    out = linear(build, f"{name}_down_proj", path, product, down, bias)
    return build.add(f"{name}_mlp_add", "add", {"a": rows, "b": out})


def _head(build: KernelGraphBuilder, shape: Decoder, rows: NodeOutlet) -> NodeOutlet:
    """Logits of the wanted rows alone: they are chosen before the last norm."""
    chosen = build.step_input("logit_rows")
    rows = build.add("logit_rows", "select_rows", {"in": rows, "rows": chosen})
    rows = _norm(build, shape, "final_norm", "model.norm", rows)
    path = "model.embed_tokens" if shape.tie_embeddings else "lm_head"
    return linear(build, "lm_head", path, rows, (shape.hidden_size, shape.vocab_size), False)


def _heads(
    build: KernelGraphBuilder, shape: Decoder, layer: int, role: str, rows: NodeOutlet
) -> NodeOutlet:
    """Queries or keys: projected, normalised where the family does, rotated."""
    name = f"layer{layer}_{role}"
    heads = _project(build, shape, layer, role, rows)
    if shape.qk_norm:
        weight = _path(layer, f"self_attn.{role}_norm.weight")
        options = {"weight": weight, "size": shape.head_dim, "epsilon": shape.epsilon}
        heads = build.add(f"{name}_norm", "rms_norm", {"in": heads}, **options)
    wires = {"in": heads, "positions": build.step_input("positions")}
    return build.add(f"{name}_rope", "rope", wires, **build.record(shape.rope))


def _project(
    build: KernelGraphBuilder, shape: Decoder, layer: int, role: str, rows: NodeOutlet
) -> NodeOutlet:
    num_heads = shape.num_heads if role == "q" else shape.num_kv_heads
    path, sizes = (
        _path(layer, f"self_attn.{role}_proj"),
        (
            shape.hidden_size,
            num_heads * shape.head_dim,
        ),
    )
    return linear(build, f"layer{layer}_{role}_proj", path, rows, sizes, shape.qkv_bias)


def linear(
    build: KernelGraphBuilder,
    name: str,
    path: str,
    rows: NodeOutlet,
    sizes: tuple[int, int],
    bias: bool,
) -> NodeOutlet:
    """A linear of the weight `path`, `sizes` in and out."""
    options: dict[str, object] = {"in_features": sizes[0], "out_features": sizes[1]}
    if bias:
        options["bias"] = f"{path}.bias"
    return build.add(name, "linear", {"in": rows}, weight=f"{path}.weight", **options)


def _norm(
    build: KernelGraphBuilder, shape: Decoder, name: str, path: str, rows: NodeOutlet
) -> NodeOutlet:
    options = {"weight": f"{path}.weight", "size": shape.hidden_size, "epsilon": shape.epsilon}
    return build.add(name, "rms_norm", {"in": rows}, **options)


def _kv(shape: Decoder, layer: int) -> dict[str, object]:
    return {"layer": layer, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}


def _path(layer: int, rest: str) -> str:
    return f"model.layers.{layer}.{rest}"
