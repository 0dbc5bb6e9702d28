"""A pre-norm decoder with gated MLP as a kernel graph: what all families here share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels.attention import Rope
from sagellm.graphs.models.assembly import Assembly, Wire


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
Mixer: TypeAlias = Callable[[Assembly, Decoder, int, Wire], Wire]


def decoder_graph(shape: Decoder, mixer: Mixer | None = None) -> Graph:
    """The unfused kernel graph of one forward step of a ragged batch.

    `mixer` builds what tokens of a layer see of each other, where it is not attention in all.
    """
    build = Assembly(shape.family, shape.dtype)
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


def _mixed(build: Assembly, shape: Decoder, layer: int, rows: Wire, mixer: Mixer) -> Wire:
    """rows + mixer(norm(rows))."""
    name = f"layer{layer}"
    normed = _norm(build, shape, f"{name}_input_norm", _path(layer, "input_layernorm"), rows)
    out = mixer(build, shape, layer, normed)
    return build.add(f"{name}_attention_add", "add", {"a": rows, "b": out})


def attention(build: Assembly, shape: Decoder, layer: int, normed: Wire) -> Wire:
    """Softmax attention with rotated queries and keys: the Mixer of most layers."""
    name = f"layer{layer}"
    q = _heads(build, shape, layer, "q", normed)
    k = _heads(build, shape, layer, "k", normed)
    v = _project(build, shape, layer, "v", normed)
    build.thread(f"{name}_kv_write", "kv_write", {"k": k, "v": v}, ("slots",), **_kv(shape, layer))
    mixed = build.thread(
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


def _mlp(build: Assembly, shape: Decoder, layer: int, rows: Wire) -> Wire:
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


def _head(build: Assembly, shape: Decoder, rows: Wire) -> Wire:
    """Logits of the wanted rows alone: they are chosen before the last norm."""
    chosen = build.step_input("logit_rows")
    rows = build.add("logit_rows", "select_rows", {"in": rows, "rows": chosen})
    rows = _norm(build, shape, "final_norm", "model.norm", rows)
    path = "model.embed_tokens" if shape.tie_embeddings else "lm_head"
    return linear(build, "lm_head", path, rows, (shape.hidden_size, shape.vocab_size), False)


def _heads(build: Assembly, shape: Decoder, layer: int, role: str, rows: Wire) -> Wire:
    """Queries or keys: projected, normalised where the family does, rotated."""
    name = f"layer{layer}_{role}"
    heads = _project(build, shape, layer, role, rows)
    if shape.qk_norm:
        weight = _path(layer, f"self_attn.{role}_norm.weight")
        options = {"weight": weight, "size": shape.head_dim, "epsilon": shape.epsilon}
        heads = build.add(f"{name}_norm", "rms_norm", {"in": heads}, **options)
    wires = {"in": heads, "positions": build.step_input("positions")}
    return build.add(f"{name}_rope", "rope", wires, **build.record(shape.rope))


def _project(build: Assembly, shape: Decoder, layer: int, role: str, rows: Wire) -> Wire:
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
    build: Assembly, name: str, path: str, rows: Wire, sizes: tuple[int, int], bias: bool
) -> Wire:
    """A linear of the weight `path`, `sizes` in and out."""
    options: dict[str, object] = {"in_features": sizes[0], "out_features": sizes[1]}
    if bias:
        options["bias"] = f"{path}.bias"
    return build.add(name, "linear", {"in": rows}, weight=f"{path}.weight", **options)


def _norm(build: Assembly, shape: Decoder, name: str, path: str, rows: Wire) -> Wire:
    options = {"weight": f"{path}.weight", "size": shape.hidden_size, "epsilon": shape.epsilon}
    return build.add(name, "rms_norm", {"in": rows}, **options)


def _kv(shape: Decoder, layer: int) -> dict[str, object]:
    return {"layer": layer, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}


def _path(layer: int, rest: str) -> str:
    return f"model.layers.{layer}.{rest}"
