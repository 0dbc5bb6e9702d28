"""Model families by architecture: the shipped ones, and those of packages and programs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sagellm.graphs.diagnostics import UnsupportedModel
from sagellm.graphs.ir import Graph
from sagellm.graphs.models import config as read
from sagellm.graphs.models.config import Config
from sagellm.graphs.models.decoder import Decoder, decoder_graph

GROUP = "sagellm.model_families"  # a group of entry points, each named by its architecture
_DEFAULT_WINDOW = 4096  # tokens; the default of transformers for Mistral and Qwen


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """All models of one architecture.

    `architecture`: the name in config.json. `shape` reads a config, and raises UnsupportedModel for
    a field that sagellm would compute wrongly. `graph` builds the kernel graph; a family whose
    layers differ from those of `decoder_graph` has its own builder.
    """

    architecture: str
    shape: Callable[[Config], Decoder]
    graph: Callable[[Decoder], Graph] = decoder_graph


def read_decoder(
    config: Config, family: str, *, windows: tuple[int | None, ...], **differs: Any
) -> Decoder:
    """Read the fields that all families share. Raises UnsupportedModel.

    `windows`: the sliding window of each layer; None: no window. `differs`: values for fields of
    Decoder in which the family differs from their defaults.
    """
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


def _llama(config: Config) -> Decoder:
    """Read a config of Llama 2, 3 or 3.2 (rope type "llama3")."""
    bias = read.flag(config, "attention_bias")
    return read_decoder(
        config,
        "llama",
        windows=read.same_windows(config, None),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=read.flag(config, "mlp_bias"),
    )


def _mistral(config: Config) -> Decoder:
    """Read a Mistral config: all layers have the window `sliding_window`; null: no window; absent:
    4096.
    """
    is_sliding = config.get("sliding_window", _DEFAULT_WINDOW) is not None
    window = read.whole(config, "sliding_window", _DEFAULT_WINDOW) if is_sliding else None
    return read_decoder(config, "mistral", windows=read.same_windows(config, window))


def _qwen2(config: Config) -> Decoder:
    """Read a config of Qwen2 or Qwen2.5, which have biases on queries, keys and values."""
    return read_decoder(config, "qwen2", windows=_qwen_windows(config), qkv_bias=True)


def _qwen3(config: Config) -> Decoder:
    """Read a Qwen3 config: queries and keys are normalised per head before the rotation."""
    bias = read.flag(config, "attention_bias")
    return read_decoder(
        {"head_dim": 128, **config},  # the default of transformers for Qwen3
        "qwen3",
        windows=_qwen_windows(config),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    is_sliding = read.flag(config, "use_sliding_window")
    window = read.whole(config, "sliding_window", _DEFAULT_WINDOW) if is_sliding else None
    return read.layer_windows(config, window)


# By architecture. Families that a program registers or that a package offers are added at run time.
FAMILIES: dict[str, ModelFamily] = {
    family.architecture: family
    for family in (
        ModelFamily("LlamaForCausalLM", _llama),
        ModelFamily("MistralForCausalLM", _mistral),
        ModelFamily("Qwen2ForCausalLM", _qwen2),
        ModelFamily("Qwen3ForCausalLM", _qwen3),
    )
}


_registered: dict[str, ModelFamily] = {}


def register_model_family(family: ModelFamily) -> None:
    """Add a family to this process. A worker process knows shipped and installed families only.

    Raises TypeError for another type, ValueError if the architecture has a family already. The same
    function of a reloaded module replaces the earlier one.
    """
    if not isinstance(family, ModelFamily):
        raise TypeError(f"a model family must be a ModelFamily, not {type(family).__name__}")
    name = family.architecture
    before = _registered.get(name)
    is_taken = name in FAMILIES if before is None else _home(before) != _home(family)
    if is_taken or entry_points(group=GROUP, name=name):
        raise ValueError(f"the architecture {name!r} has a model family already")
    FAMILIES[name] = _registered[name] = family


def architecture_of(config: Mapping[str, object]) -> str:
    """The first architecture that a config.json names; empty if there is none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list | tuple) and named else ""


def is_registered_here(architecture: str) -> bool:
    """Whether this process registered the family: worker processes do not know it."""
    return architecture in _registered


def _home(family: ModelFamily) -> tuple[str, str]:
    return family.shape.__module__, family.shape.__qualname__


def find_family(architecture: str) -> ModelFamily | None:
    """The family in the table, or else of an installed package, which is imported now; else None.

    Raises UnsupportedModel if the package's family cannot be loaded, or if several packages offer
    the architecture.
    """
    if architecture not in FAMILIES:
        offers = {entry.value: entry for entry in entry_points(group=GROUP, name=architecture)}
        if len(offers) > 1:
            cause = f"{architecture} is offered by {' and '.join(map(_package, offers.values()))}"
            raise UnsupportedModel(cause, field="architectures", fix="remove one of the packages")
        for entry in offers.values():
            FAMILIES[architecture] = _load(entry)
    return FAMILIES.get(architecture)


def known_architectures() -> tuple[str, ...]:
    """The architectures of the table, then those that installed packages offer."""
    return tuple(dict.fromkeys((*FAMILIES, *sorted(entry_points(group=GROUP).names))))


def _load(entry: EntryPoint) -> ModelFamily:
    fix = f"fix or remove {_package(entry)}"
    try:
        family = entry.load()
    except Exception as error:  # a package may raise anything while it is imported
        cause = f"the family {entry.value} cannot be loaded: {type(error).__name__}: {error}"
        raise UnsupportedModel(cause, field="architectures", fix=fix) from error
    if not isinstance(family, ModelFamily):
        cause = f"{entry.value} is no ModelFamily, but a {type(family).__name__}"
        raise UnsupportedModel(cause, field="architectures", fix=fix)
    if family.architecture != entry.name:
        cause = f"{entry.value} is a family of {family.architecture}, not of {entry.name}"
        raise UnsupportedModel(cause, field="architectures", fix=fix)
    return family


def _package(entry: EntryPoint) -> str:
    return f"package {entry.dist.name}" if entry.dist is not None else "an installed package"
