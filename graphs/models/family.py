"""A model family: how its config.json is read, and what is asked of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sagellm.graphs.diagnostics import UnsupportedModel
from sagellm.graphs.ir import Graph
from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import Decoder, decoder_graph


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """`architecture` is the name in config.json; `shape` reads the config into a Decoder.

    `graph` builds the kernel graph of it: a family whose layers do not all attend has its own.
    """

    architecture: str
    shape: Callable[[Config], Decoder]
    graph: Callable[[Decoder], Graph] = decoder_graph


def read_decoder(
    config: Config, family: str, *, windows: tuple[int | None, ...], **differs: Any
) -> Decoder:
    """The Decoder that the fields common to all families say. Raises UnsupportedModel."""
    read.refuse_unbuilt(config)
    heads = read.whole(config, "num_attention_heads")
    kv_heads = read.whole(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        cause = f"{heads} heads do not share {kv_heads} KV heads evenly"
        raise UnsupportedModel(cause, field="num_key_value_heads", fix="set a divisor of the heads")
    return Decoder(
        family=family,
        dtype=read.dtype(config),
        vocab_size=read.whole(config, "vocab_size"),
        hidden_size=read.whole(config, "hidden_size"),
        intermediate_size=read.whole(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=read.head_dim(config),
        epsilon=read.number(config, "rms_norm_eps", 1e-6),
        rope=read.rope(config),
        tie_embeddings=read.flag(config, "tie_word_embeddings"),
        windows=windows,
        **differs,
    )
