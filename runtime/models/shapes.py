"""Public models as sizes without files: modelled engines take their names as `model:`."""

from dataclasses import replace

from sagellm.graphs.models import ExpertFacts, ModelFacts
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models import ModelError
from sagellm.runtime.models.folder import BUILT_IN, ModelFolder, resolve_model


def _dense(
    family: str,
    *,
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    longest: int,
    head_dim: int = 0,
    is_tied: bool = False,
    has_biases: bool = False,
) -> ModelFacts:
    """The facts of a decoder with gated linears, in bfloat16."""
    head_dim = head_dim or hidden // heads
    width, kv_width = heads * head_dim, kv_heads * head_dim
    biases = width + 2 * kv_width if has_biases else 0  # of queries, keys and values
    layer = 2 * hidden * (width + kv_width) + 3 * hidden * intermediate
    tables = vocab * hidden * (1 if is_tied else 2)
    return ModelFacts(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=longest,
        dtype="bfloat16",
        tie_embeddings=is_tied,
        sliding_window=None,
        eos_token_ids=(),
        num_parameters=layers * (layer + biases + 2 * hidden) + hidden + tables,
    )


def _mixture(dense: ModelFacts, *, intermediate: int, num_experts: int, chosen: int) -> ModelFacts:
    """A decoder without feed-forward layers, with experts instead, and a router for them."""
    of_one = 3 * dense.hidden_size * intermediate * dense.num_layers
    experts = ExpertFacts(num_experts, chosen, num_experts * of_one)
    routers = dense.num_layers * dense.hidden_size * num_experts
    total = dense.num_parameters + routers + experts.num_parameters
    return replace(dense, num_parameters=total, experts=experts)


SHAPES = {
    "llama-3-8b": _dense(
        "llama",
        vocab=128256,
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        longest=8192,
    ),
    "llama-3-70b": _dense(
        "llama",
        vocab=128256,
        hidden=8192,
        intermediate=28672,
        layers=80,
        heads=64,
        kv_heads=8,
        longest=8192,
    ),
    "qwen2.5-7b": _dense(
        "qwen2",
        vocab=152064,
        hidden=3584,
        intermediate=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        longest=32768,
        has_biases=True,
    ),
    "qwen2.5-72b": _dense(
        "qwen2",
        vocab=152064,
        hidden=8192,
        intermediate=29568,
        layers=80,
        heads=64,
        kv_heads=8,
        longest=32768,
        has_biases=True,
    ),
    "mistral-7b": _dense(
        "mistral",
        vocab=32000,
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        longest=32768,
    ),
    "mixtral-8x7b": _mixture(
        _dense(
            "mixtral",
            vocab=32000,
            hidden=4096,
            intermediate=0,
            layers=32,
            heads=32,
            kv_heads=8,
            longest=32768,
        ),
        intermediate=14336,
        num_experts=8,
        chosen=2,
    ),
    "qwen3-30b-a3b": _mixture(
        _dense(
            "qwen3_moe",
            vocab=151936,
            hidden=2048,
            intermediate=0,
            layers=48,
            heads=32,
            kv_heads=4,
            longest=40960,
            head_dim=128,
        ),
        intermediate=768,
        num_experts=128,
        chosen=8,
    ),
}


def resolve_shape(name: str) -> ModelFolder:
    """The model of a modelled engine: a name of SHAPES, or whatever `resolve_model` finds.

    Raises ModelError, with the nearest name, and UnsupportedModel.
    """
    if name in SHAPES:
        return ModelFolder(name, None, SHAPES[name], hash=name)
    if name not in BUILT_IN and "/" not in name:
        close = nearest(name, list(SHAPES))
        try:
            return resolve_model(name)
        except ModelError:
            if close is None:
                raise
            raise ModelError(
                f"model {name!r} is not built in, a shape, a folder, or a Hub id (owner/name)",
                f"did you mean {close}?",
            ) from None
    return resolve_model(name)
