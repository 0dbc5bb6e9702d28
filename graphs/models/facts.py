"""What the rest of the system needs to know of a model, read from its config alone."""

from dataclasses import dataclass

from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import Decoder
from sagellm.graphs.models.quantisation import stored_quantisation
from sagellm.graphs.models.unsupported import UnsupportedModel


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`max_model_len` in tokens; `sliding_window` only where every layer has it.

    `weight_bits`: of a linear's weight with its share of scales, where it is stored quantised.
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


def facts_of(config: Config, shape: Decoder) -> ModelFacts:
    """The facts of the model that `shape` was read from. Raises UnsupportedModel."""
    stored = stored_quantisation(config)
    return ModelFacts(
        family=shape.family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=len(shape.windows),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_model_len=read.whole(config, "max_position_embeddings", 2048),
        dtype=shape.dtype,
        tie_embeddings=shape.tie_embeddings,
        sliding_window=shape.windows[0] if len(set(shape.windows)) == 1 else None,
        eos_token_ids=_eos(config, shape.vocab_size),
        num_parameters=num_parameters(shape),
        weight_bits=stored.weight_bits if stored else None,
    )


def num_parameters(shape: Decoder) -> int:
    """Stored numbers, tied embeddings counted once."""
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    return embeddings + shape.hidden_size + len(shape.windows) * _layer_parameters(shape)


def _layer_parameters(shape: Decoder) -> int:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    weights = 2 * hidden * (query + key) + 3 * hidden * inner + 2 * hidden
    biases = (query + 2 * key) * shape.qkv_bias + hidden * shape.output_bias
    biases += (2 * inner + hidden) * shape.mlp_bias
    return weights + biases + 2 * shape.head_dim * shape.qk_norm


def _eos(config: Config, vocab_size: int) -> tuple[int, ...]:
    """Ids outside the vocabulary are left out: they are never sampled."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(type(token) is int for token in ids):  # true is no id
        fix = "give one token id or a list of them"
        raise UnsupportedModel(f"{value!r} is not a token id", field="eos_token_id", fix=fix)
    return tuple(token for token in ids if 0 <= token < vocab_size)
