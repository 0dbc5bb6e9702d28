"""The kernel graphs of models that embed: encoders (BERT, XLM-R), and decoders with pooling.

Vectors are pooled from the rows of the last layer as in sentence-transformers (Reimers and Gurevych
2019, arXiv:1908.10084).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from sagellm.graphs.diagnostics import UnsupportedModel
from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels.token_mixers import Pooling
from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import (
    Decoder,
    KernelGraphBuilder,
    NodeOutlet,
    decoder_rows,
    final_norm,
    heads_of,
    linear,
    project,
)
from sagellm.graphs.models.family import FAMILIES

_MODEL = "model."  # how the weights of a decoder begin, unless the decoder was saved alone


@dataclass(frozen=True, slots=True)
class EmbeddingHead:
    """How a model that embeds makes a vector of the rows of its last layer.

    `is_unit`: vectors are scaled to length 1. `prefix`: how the stored names of all weights begin,
    before their names in the model alone.
    """

    pooling: Pooling
    is_unit: bool = True
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Encoder:
    """The sizes of an encoder. Weights are named as by HF.

    `num_positions`: rows of the position embedding. `first_position`: the row of the first token.
    `num_types`: rows of the type embedding.
    """

    family: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    epsilon: float
    num_positions: int
    num_types: int
    first_position: int = 0

    tie_embeddings = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer: none has one."""
        return (None,) * self.num_layers

    @property
    def max_model_len(self) -> int:
        return self.num_positions - self.first_position


# Fields of an encoder with an effect that is not built: field -> (values without effect, fix).
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "hidden_act": (("gelu", None), "only gelu is built for encoders"),
    "position_embedding_type": ((None, "absolute"), "use a model with absolute positions"),
    "is_decoder": ((None, False), "drop the field"),
    "add_cross_attention": ((None, False), "only encoders are built"),
    "embedding_size": ((None,), "use a model whose embeddings are as wide as its layers"),
}


def read_encoder(config: Config, family: str, *, first_position: int) -> Encoder:
    """Read the fields that BERT and its successors share. Raises UnsupportedModel."""
    for field, (accepted, fix) in _REFUSED.items():
        if config.get(field) not in accepted:
            raise UnsupportedModel(f"{config[field]!r} is not supported", field=field, fix=fix)
    read.refuse_unbuilt({**config, "hidden_act": None})
    if read.stored_quantisation(config) is not None:
        cause = "an encoder with quantised weights is not built"
        raise UnsupportedModel(cause, field="quantization_config", fix="give float weights")
    found = Encoder(
        family=family,
        dtype=read.dtype(config),
        vocab_size=read.whole(config, "vocab_size"),
        hidden_size=read.whole(config, "hidden_size"),
        intermediate_size=read.whole(config, "intermediate_size"),
        num_layers=read.num_layers(config),
        num_heads=read.whole(config, "num_attention_heads"),
        epsilon=read.number(config, "layer_norm_eps", 1e-12),
        num_positions=read.whole(config, "max_position_embeddings", 512),
        num_types=read.whole(config, "type_vocab_size", 2),
        first_position=first_position,
    )
    if found.hidden_size % found.num_heads:
        cause = f"{found.num_heads} heads do not divide hidden_size"
        raise UnsupportedModel(cause, field="num_attention_heads", fix="set a divisor")
    if found.max_model_len < 1:
        cause = f"{found.num_positions} positions leave none for a token"
        raise UnsupportedModel(cause, field="max_position_embeddings", fix="set the model's own")
    return found


def _bert(config: Config) -> Encoder:
    return read_encoder(config, "bert", first_position=0)


def _roberta(config: Config) -> Encoder:
    """Positions begin after that of padding (`create_position_ids_from_input_ids` of HF)."""
    first = read.whole(config, "pad_token_id", 1, least=0) + 1
    return read_encoder(config, "xlm-roberta", first_position=first)


def encoder_graph(shape: Encoder, head: EmbeddingHead) -> Graph:
    """Build the unfused kernel graph of one step: whole sequences in, one vector each out."""
    build = KernelGraphBuilder(shape.family, shape.dtype)
    rows = _embedded(build, shape)
    for layer in range(shape.num_layers):
        rows = _mixed(build, shape, layer, rows)
        rows = _mlp(build, shape, layer, rows)
    _pooled(build, head, rows)
    return _stored_as(build.graph, lambda name: head.prefix + name)


def decoder_embedder_graph(shape: Decoder, head: EmbeddingHead) -> Graph:
    """Build the unfused kernel graph of a decoder that embeds: whole sequences, and no KV pool."""
    build = KernelGraphBuilder(shape.family, shape.dtype)
    rows = decoder_rows(build, shape, _causal_mixer)
    _pooled(build, head, final_norm(build, shape, rows))
    return _stored_as(build.graph, lambda name: head.prefix + name.removeprefix(_MODEL))


def _stored_as(graph: Graph, stored: Callable[[str], str]) -> Graph:
    """The graph with the names under which a folder stores its weights."""

    def renamed(options: dict[str, object]) -> dict[str, object]:
        return {key: stored(str(value)) for key, value in options.items() if value is not None}

    nodes = tuple(
        node.with_attrs(
            **renamed({key: node.attrs[key] for key in ("weight", "bias") if key in node.attrs})
        )
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes)


def _pooled(build: KernelGraphBuilder, head: EmbeddingHead, rows: NodeOutlet) -> None:
    starts = build.step_input("query_starts")
    inlets = {"in": rows, "query_starts": starts}
    vectors = build.add("pool", "pool", inlets, mode=head.pooling)
    if head.is_unit:
        vectors = build.add("unit_norm", "unit_norm", {"in": vectors})
    build.sink("vectors", vectors)


def _embedded(build: KernelGraphBuilder, shape: Encoder) -> NodeOutlet:
    """Build norm(words + positions + types)."""
    tables = (
        ("word", "token_ids", shape.vocab_size, 0),
        ("position", "positions", shape.num_positions, shape.first_position),
        ("token_type", "token_types", shape.num_types, 0),
    )
    rows: NodeOutlet | None = None
    for name, numbers, count, first in tables:
        options = {"first": first} if first else {}
        found = build.add(
            f"{name}_embed",
            "embedding",
            {"in": build.step_input(numbers)},
            weight=f"embeddings.{name}_embeddings.weight",
            vocab_size=count,
            size=shape.hidden_size,
            dtype=shape.dtype,
            **options,
        )
        inlets = {"a": rows, "b": found} if rows is not None else {}
        rows = build.add(f"{name}_add", "add", inlets) if inlets else found
    assert rows is not None
    return _norm(build, shape, "embed_norm", "embeddings.LayerNorm", rows)


def _mixed(build: KernelGraphBuilder, shape: Encoder, layer: int, rows: NodeOutlet) -> NodeOutlet:
    """Build norm(rows + output(attention(rows)))."""
    name, path = f"layer{layer}", f"encoder.layer.{layer}.attention"
    sizes = shape.hidden_size, shape.hidden_size
    parts = {
        role[0]: linear(build, f"{name}_{role[0]}_proj", f"{path}.self.{role}", rows, sizes, True)
        for role in ("query", "key", "value")
    }
    mixed = build.add(
        f"{name}_attention",
        "packed_attention",
        {**parts, "query_starts": build.step_input("query_starts")},
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads,
        head_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
    )
    out = linear(build, f"{name}_o_proj", f"{path}.output.dense", mixed, sizes, True)
    total = build.add(f"{name}_attention_add", "add", {"a": out, "b": rows})
    return _norm(build, shape, f"{name}_attention_norm", f"{path}.output.LayerNorm", total)


def _mlp(build: KernelGraphBuilder, shape: Encoder, layer: int, rows: NodeOutlet) -> NodeOutlet:
    """Build norm(rows + down(gelu(up(rows))))."""
    name, path = f"layer{layer}", f"encoder.layer.{layer}"
    widen = shape.hidden_size, shape.intermediate_size
    up = linear(build, f"{name}_up_proj", f"{path}.intermediate.dense", rows, widen, True)
    active = build.add(f"{name}_gelu", "gelu", {"in": up})
    narrow = widen[::-1]
    down = linear(build, f"{name}_down_proj", f"{path}.output.dense", active, narrow, True)
    total = build.add(f"{name}_mlp_add", "add", {"a": down, "b": rows})
    return _norm(build, shape, f"{name}_mlp_norm", f"{path}.output.LayerNorm", total)


def _norm(
    build: KernelGraphBuilder, shape: Encoder, name: str, path: str, rows: NodeOutlet
) -> NodeOutlet:
    return build.add(
        name,
        "layer_norm",
        {"in": rows},
        weight=f"{path}.weight",
        bias=f"{path}.bias",
        size=shape.hidden_size,
        epsilon=shape.epsilon,
    )


def _causal_mixer(
    build: KernelGraphBuilder, shape: Decoder, layer: int, normed: NodeOutlet
) -> NodeOutlet:
    """Build softmax attention with rotated queries and keys among the rows of a step."""
    name = f"layer{layer}"
    q = heads_of(build, shape, layer, "q", normed)
    k = heads_of(build, shape, layer, "k", normed)
    v = project(build, shape, layer, "v", normed)
    mixed = build.add(
        f"{name}_attention",
        "packed_attention",
        {"q": q, "k": k, "v": v, "query_starts": build.step_input("query_starts")},
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
        causal=True,
        window=shape.windows[layer],
    )
    sizes = (shape.num_heads * shape.head_dim, shape.hidden_size)
    path = f"model.layers.{layer}.self_attn.o_proj"
    return linear(build, f"{name}_o_proj", path, mixed, sizes, shape.output_bias)


EmbedderShape: TypeAlias = Encoder | Decoder
# How config.json is read, by the architecture that it names.
ENCODERS: dict[str, Callable[[Config], Encoder]] = {
    "BertModel": _bert,
    "BertForMaskedLM": _bert,
    "RobertaModel": _roberta,
    "RobertaForMaskedLM": _roberta,
    "XLMRobertaModel": _roberta,
    "XLMRobertaForMaskedLM": _roberta,
}
_ALONE, _CAUSAL = (
    "Model",
    "ForCausalLM",
)  # the ends of a decoder's architecture, without and with head


def is_encoder(architecture: str) -> bool:
    """Whether models of an architecture embed, and do not generate."""
    return architecture in ENCODERS


def embedder_shape(architecture: str, config: Config) -> EmbedderShape | None:
    """The shape of a model that embeds; None for an unknown architecture. Raises
    UnsupportedModel.
    """
    if architecture in ENCODERS:
        return ENCODERS[architecture](config)
    causal = architecture
    if architecture.endswith(_ALONE):
        causal = architecture.removesuffix(_ALONE) + _CAUSAL
    family = FAMILIES.get(causal)
    return None if family is None else family.shape(config)


def embedder_graph(shape: EmbedderShape, head: EmbeddingHead) -> Graph:
    """The unfused kernel graph of a model that embeds."""
    if isinstance(shape, Encoder):
        return encoder_graph(shape, head)
    return decoder_embedder_graph(shape, head)


def known_embedders() -> tuple[str, ...]:
    """The architectures that embed."""
    return (*ENCODERS, *FAMILIES)
