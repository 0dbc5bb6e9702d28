"""The kernel graph of a pre-norm decoder with gated MLP, which all model families share."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeAlias

from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Graph, Node
from sagellm.graphs.kernels.kernel import KV
from sagellm.graphs.kernels.token_mixers import Rope


class NodeOutlet(NamedTuple):
    """An outlet of a node: a tensor, or the KV state."""

    node: str
    outlet: str = "out"


class KernelGraphBuilder:
    """Builds a kernel graph node by node. `state`: the outlet that has the latest KV state."""

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
        """The outlet of the step input `name`, one of `STEP_INPUTS`."""
        return NodeOutlet(SOURCE, name)

    def add(
        self, name: str, op: str, inlets: Mapping[str, NodeOutlet], **options: object
    ) -> NodeOutlet:
        """Add a node whose inlets are fed by the given outlets. Returns the node's outlet `out`."""
        self._nodes.append(Node(name, op).with_attrs(**options))
        for inlet, outlet in inlets.items():
            self._edges.append(Edge(outlet.node, name, outlet.outlet, inlet))
        return NodeOutlet(name)

    def add_stateful(
        self,
        name: str,
        op: str,
        inlets: Mapping[str, NodeOutlet],
        step_inputs: tuple[str, ...],
        **options: object,
    ) -> NodeOutlet:
        """Add a node that reads or writes the KV state. Returns the node's outlet `out`.

        `step_inputs`: step inputs, each of which feeds the inlet of the same name.
        """
        given = {inlet: self.step_input(inlet) for inlet in step_inputs}
        out = self.add(name, op, {**inlets, **given, KV: self.state}, **options)
        self.state = NodeOutlet(name, KV)
        return out

    def sink(self, inlet: str, outlet: NodeOutlet) -> None:
        """Connect an outlet to the sink of the graph."""
        self._edges.append(Edge(outlet.node, SINK, outlet.outlet, inlet))


@dataclass(frozen=True, slots=True)
class Decoder:
    """The sizes and features that determine a decoder's graph. Weights are named as by HF."""

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
    windows: tuple[int | None, ...]  # the sliding window of each layer in tokens; None: no window
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


# (builder, decoder, layer, normed rows) -> rows that are added to the layer's input rows. A mixer
# combines the tokens of a sequence: attention, or linear attention.
Mixer: TypeAlias = Callable[[KernelGraphBuilder, Decoder, int, NodeOutlet], NodeOutlet]


def decoder_graph(shape: Decoder, mixer: Mixer | None = None) -> Graph:
    """Build the unfused kernel graph of one forward step of a ragged batch.

    `mixer` builds the token mixer of each layer; `attention` by default.
    """
    build = KernelGraphBuilder(shape.family, shape.dtype)
    rows = decoder_rows(build, shape, mixer or attention)
    build.sink("logits", _head(build, shape, rows))
    build.sink("kv", build.state)
    return build.graph


def decoder_rows(build: KernelGraphBuilder, shape: Decoder, mixer: Mixer) -> NodeOutlet:
    """Build the embedding and all layers. Returns the rows before the last norm."""
    rows = build.add(
        "embed",
        "embedding",
        {"in": build.step_input("token_ids")},
        weight="model.embed_tokens.weight",
        vocab_size=shape.vocab_size,
        size=shape.hidden_size,
        dtype=shape.dtype,
    )
    for layer in range(len(shape.windows)):
        rows = _mixed(build, shape, layer, rows, mixer)
        rows = _mlp(build, shape, layer, rows)
    return rows


def _mixed(
    build: KernelGraphBuilder, shape: Decoder, layer: int, rows: NodeOutlet, mixer: Mixer
) -> NodeOutlet:
    """Build rows + mixer(norm(rows))."""
    name = f"layer{layer}"
    normed = _norm(build, shape, f"{name}_input_norm", _path(layer, "input_layernorm"), rows)
    out = mixer(build, shape, layer, normed)
    return build.add(f"{name}_attention_add", "add", {"a": rows, "b": out})


def attention(
    build: KernelGraphBuilder, shape: Decoder, layer: int, normed: NodeOutlet
) -> NodeOutlet:
    """Build softmax attention with rotated queries and keys: the usual mixer."""
    name = f"layer{layer}"
    q = heads_of(build, shape, layer, "q", normed)
    k = heads_of(build, shape, layer, "k", normed)
    v = project(build, shape, layer, "v", normed)
    kv = {"layer": layer, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    build.add_stateful(f"{name}_kv_write", "kv_write", {"k": k, "v": v}, ("slots",), **kv)
    mixed = build.add_stateful(
        f"{name}_attention",
        "paged_attention",
        {"q": q},
        ("query_starts", "context_lens", "block_tables"),
        **kv,
        num_heads=shape.num_heads,
        scale=shape.head_dim**-0.5,
        window=shape.windows[layer],
    )
    sizes = (shape.num_heads * shape.head_dim, shape.hidden_size)
    path = _path(layer, "self_attn.o_proj")
    return linear(build, f"{name}_o_proj", path, mixed, sizes, shape.output_bias)


def _mlp(build: KernelGraphBuilder, shape: Decoder, layer: int, rows: NodeOutlet) -> NodeOutlet:
    """Build rows + down(silu(gate(norm(rows))) * up(norm(rows)))."""
    name, bias = f"layer{layer}", shape.mlp_bias
    widen = shape.hidden_size, shape.intermediate_size
    narrow = shape.intermediate_size, shape.hidden_size
    path = _path(layer, "post_attention_layernorm")
    normed = _norm(build, shape, f"{name}_post_norm", path, rows)
    gate = linear(build, f"{name}_gate_proj", _path(layer, "mlp.gate_proj"), normed, widen, bias)
    up = linear(build, f"{name}_up_proj", _path(layer, "mlp.up_proj"), normed, widen, bias)
    gate = build.add(f"{name}_silu", "silu", {"in": gate})
    product = build.add(f"{name}_mul", "mul", {"a": gate, "b": up})
    path = _path(layer, "mlp.down_proj")
    out = linear(build, f"{name}_down_proj", path, product, narrow, bias)
    return build.add(f"{name}_mlp_add", "add", {"a": rows, "b": out})


def _head(build: KernelGraphBuilder, shape: Decoder, rows: NodeOutlet) -> NodeOutlet:
    """Build the logits. Rows that need no logits are dropped before the last norm, to save work."""
    chosen = build.step_input("logit_rows")
    rows = build.add("logit_rows", "select_rows", {"in": rows, "rows": chosen})
    rows = final_norm(build, shape, rows)
    path = "model.embed_tokens" if shape.tie_embeddings else "lm_head"
    return linear(build, "lm_head", path, rows, (shape.hidden_size, shape.vocab_size), False)


def final_norm(build: KernelGraphBuilder, shape: Decoder, rows: NodeOutlet) -> NodeOutlet:
    """Build the norm after the last layer."""
    return _norm(build, shape, "final_norm", "model.norm", rows)


def heads_of(
    build: KernelGraphBuilder, shape: Decoder, layer: int, role: str, rows: NodeOutlet
) -> NodeOutlet:
    """Build queries or keys: a projection, a norm if the decoder has `qk_norm`, and a rotation."""
    name = f"layer{layer}_{role}"
    heads = project(build, shape, layer, role, rows)
    if shape.qk_norm:
        weight = _path(layer, f"self_attn.{role}_norm.weight")
        options = {"weight": weight, "size": shape.head_dim, "epsilon": shape.epsilon}
        heads = build.add(f"{name}_norm", "rms_norm", {"in": heads}, **options)
    inlets = {"in": heads, "positions": build.step_input("positions")}
    return build.add(f"{name}_rope", "rope", inlets, **asdict(shape.rope))


def project(
    build: KernelGraphBuilder, shape: Decoder, layer: int, role: str, rows: NodeOutlet
) -> NodeOutlet:
    num_heads = shape.num_heads if role == "q" else shape.num_kv_heads
    path, size = _path(layer, f"self_attn.{role}_proj"), num_heads * shape.head_dim
    name = f"layer{layer}_{role}_proj"
    return linear(build, name, path, rows, (shape.hidden_size, size), shape.qkv_bias)


def linear(
    build: KernelGraphBuilder,
    name: str,
    path: str,
    rows: NodeOutlet,
    sizes: tuple[int, int],
    bias: bool,
) -> NodeOutlet:
    """Add a linear with the weight `path`.weight, and the bias `path`.bias if `bias`.

    `sizes`: (input features, output features).
    """
    options: dict[str, object] = {"in_features": sizes[0], "out_features": sizes[1]}
    if bias:
        options["bias"] = f"{path}.bias"
    return build.add(name, "linear", {"in": rows}, weight=f"{path}.weight", **options)


def _norm(
    build: KernelGraphBuilder, shape: Decoder, name: str, path: str, rows: NodeOutlet
) -> NodeOutlet:
    options = {"weight": f"{path}.weight", "size": shape.hidden_size, "epsilon": shape.epsilon}
    return build.add(name, "rms_norm", {"in": rows}, **options)


def _path(layer: int, rest: str) -> str:
    return f"model.layers.{layer}.{rest}"
