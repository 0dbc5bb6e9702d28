"""Model builders, which turn a parsed config.json into the kernel graph of one forward step; and
the facts of a model that other packages need.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from sagellm.graphs.diagnostics import UnsupportedModel
from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels import KVGroup, kv_groups
from sagellm.graphs.kernels.memory_layout import weight_shapes
from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config, stored_quantisation
from sagellm.graphs.models.decoder import Decoder
from sagellm.graphs.models.encoder import (
    EmbedderShape,
    EmbeddingHead,
    Encoder,
    embedder_graph,
    embedder_shape,
    is_encoder,
    known_embedders,
)
from sagellm.graphs.models.family import (
    FAMILIES,
    ModelFamily,
    find_family,
    known_architectures,
    read_decoder,
    register_model_family,
)

__all__ = [
    "FAMILIES",
    "Config",
    "Decoder",
    "EmbeddingHead",
    "ExpertFacts",
    "ModelFacts",
    "ModelFamily",
    "UnsupportedModel",
    "build",
    "check",
    "facts",
    "read_decoder",
    "register_model_family",
]


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """The experts of a mixture: each token takes `num_chosen` of `num_experts` in every layer.
    `num_parameters`: of all experts of all layers.
    """

    num_experts: int
    num_chosen: int
    num_parameters: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes, limits and memory of a model.

    `max_model_len`: tokens of prompt and output. `sliding_window`: None unless all layers have the
    same window. `weight_bits`: bits per weight, including its share of scales and zeros, if weights
    are stored quantised; None if they are floats. `kv_groups`: what layers keep between steps;
    empty: keys and values of all tokens in all layers. `experts`: None for a dense model.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    dtype: str
    tie_embeddings: bool
    sliding_window: int | None
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    weight_bits: float | None = None
    kv_groups: tuple[KVGroup, ...] = ()
    experts: ExpertFacts | None = None


def build(config: Config, head: EmbeddingHead | None = None) -> Graph:
    """Build the kernel graph of one forward step of a ragged batch, without fusions and types.

    `head`: that of a model that embeds; None: the model generates. Raises UnsupportedModel for an
    architecture or a field that sagellm would compute wrongly.
    """
    if head is not None:
        return embedder_graph(_embedder_shape(config), head)
    family = _family(config)
    return family.graph(family.shape(config))


def facts(config: Config, head: EmbeddingHead | None = None) -> ModelFacts:
    """The facts of a model: sizes, limits and memory. Raises UnsupportedModel."""
    if head is not None:
        shape = _embedder_shape(config)
        return _facts_of(config, shape, embedder_graph(shape, head))
    family = _family(config)
    decoder = family.shape(config)
    return _facts_of(config, decoder, family.graph(decoder))


def check(config: Config, head: EmbeddingHead | None = None) -> None:
    """Raise UnsupportedModel if `facts` would, but without building a graph of all layers."""
    shape = _embedder_shape(config) if head is not None else _family(config).shape(config)
    _facts_of(config, shape, Graph("unbuilt", "kernel"))


def _architecture(config: Config, known: Iterable[str]) -> str:
    named = config.get("architectures")
    name = named[0] if isinstance(named, list | tuple) and named else named
    if not isinstance(name, str):
        fix = "name one of " + ", ".join(known)
        raise UnsupportedModel("it names no architecture", field="architectures", fix=fix)
    return name


def _embedder_shape(config: Config) -> EmbedderShape:
    name = _architecture(config, known_embedders())
    shape = embedder_shape(name, config)
    if shape is None:
        fix = f"use a model of one of {', '.join(known_embedders())}"
        cause = f"architecture {name} is not built into sagellm for embeddings"
        raise UnsupportedModel(cause, field="architectures", fix=fix)
    return shape


def _family(config: Config) -> ModelFamily:
    """The family of a config. Raises UnsupportedModel.

    The error does not propose the nearest name: an unknown architecture is not a typing error, and
    the nearest name is a different model.
    """
    name = _architecture(config, known_architectures())
    family = find_family(name)
    if family is None and is_encoder(name):
        cause = f"architecture {name} embeds texts, and generates none"
        fix = "give its engine `kind: embedding`, and embed by an operator `embed`"
        raise UnsupportedModel(cause, field="architectures", fix=fix)
    if family is None:
        known = ", ".join(known_architectures())
        fix = f"use a model of one of {known}, or install a package that offers the architecture"
        cause = f"architecture {name} is not built into sagellm"
        raise UnsupportedModel(cause, field="architectures", fix=fix)
    return family


def _facts_of(config: Config, shape: EmbedderShape, graph: Graph) -> ModelFacts:
    """Collect the facts of a config, of the `shape` that was read from it, and of the `graph` that
    was built from the shape. Raises UnsupportedModel.
    """
    stored = stored_quantisation(config)
    return ModelFacts(
        family=shape.family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=len(shape.windows),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_model_len=shape.max_model_len
        if isinstance(shape, Encoder)
        else read.whole(config, "max_position_embeddings", 2048),
        dtype=shape.dtype,
        tie_embeddings=shape.tie_embeddings,
        sliding_window=shape.windows[0] if len(set(shape.windows)) == 1 else None,
        eos_token_ids=_eos(config, shape.vocab_size),
        num_parameters=_num_parameters(graph),
        weight_bits=stored.weight_bits if stored else None,
        kv_groups=kv_groups(graph),
    )


def _num_parameters(graph: Graph) -> int:
    """The number of stored parameters. Tied embeddings count once."""
    return sum(map(prod, weight_shapes(graph).values()))


def _eos(config: Config, vocab_size: int) -> tuple[int, ...]:
    """The end-of-text tokens, without ids outside the vocabulary, which are never sampled."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(type(token) is int for token in ids):  # isinstance would accept true
        fix = "give one token id or a list of them"
        raise UnsupportedModel(f"{value!r} is not a token id", field="eos_token_id", fix=fix)
    return tuple(token for token in ids if 0 <= token < vocab_size)
