"""What the checks may know of the world around a graph; the caller finds it out, not they."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from sagellm.graphs.vocabulary import NoOptions


@dataclass(frozen=True, slots=True)
class EngineFactsView:
    """One engine of the graph, as far as it is known; None skips the rules that ask for it."""

    model_hash: str | None = None
    dtype: str | None = None
    quantization: str | None = None  # "none" for weights as they are stored
    block_size: int | None = None  # tokens
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_layers: int | None = None  # of one KV block
    max_model_len: int | None = None
    kv_pool_bytes: int | None = None  # of one replica
    device: str = ""  # whose memory the pool is in
    memory_bytes: int | None = None  # of that device, as its pool was sized for; None: of `Facts`
    replicas: int | None = None  # None: the engine's option `replicas`, or 1
    capabilities: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class EngineKindView:
    """One kind of engine: the dataclass of its options, and what an engine of it can do."""

    options: type
    capabilities: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Facts:
    """The surroundings that a graph is checked against.

    `engine_kinds` are the kinds of engines by name; None skips the rules on their options.
    `executors` maps a kind of executor to the dataclass of its options. `names` holds the known
    names of an open set, such as policies: an option whose field has metadata
    {"names": "policies"} must be one of them.
    """

    memory_bytes: int | None = None  # shared by the KV pools of engines on one device
    engines: Mapping[str, EngineFactsView] = field(default_factory=dict)
    functions: Collection[str] | None = None  # the user's, by registered name
    engine_kinds: Mapping[str, EngineKindView] | None = None
    executors: Mapping[str, type] = field(default_factory=lambda: {"tasks": NoOptions})
    names: Mapping[str, Collection[str]] = field(default_factory=dict)

    def engine(self, name: str) -> EngineFactsView:
        return self.engines.get(name, EngineFactsView())
