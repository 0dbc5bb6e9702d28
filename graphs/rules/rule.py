"""A rule and its input: a stream graph, its vocabulary, and the facts about its surroundings."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.ir import Edge, Graph, Node
from sagellm.graphs.vocabulary import NoOptions, OpSpec, Vocabulary, nearest


@dataclass(frozen=True, slots=True)
class EngineFactsView:
    """The known facts of one engine. Rules that need a fact skip an engine whose fact is None."""

    model_hash: str | None = None
    dtype: str | None = None
    quantization: str | None = None  # "none": the weights as stored
    kv_cache_dtype: str | None = None  # "auto": `dtype`
    block_size: int | None = None  # tokens
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_layers: int | None = None  # layers of one KV block
    max_model_len: int | None = None
    kv_pool_bytes: int | None = None  # the KV pool of one replica
    device: str = ""  # the device whose memory holds the pool
    memory_bytes: int | None = None  # memory of the device; None: as in `Facts`
    replicas: int | None = None  # None: the engine's option `replicas`, or 1
    capabilities: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class EngineKindView:
    """One kind of engine: the dataclass of its options, and its capabilities."""

    options: type
    capabilities: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about a graph's surroundings that its rules need. The caller collects them.

    `engine_kinds`: the kinds of engines by name; None skips the rules on options of engines.
    `executors`: the options' dataclass of each kind of executor. `names`: sets of names that users
    may extend, such as policies. An option whose field has the metadata {"names": "policies"} must
    be a name of the set `policies`. `is_simulated`: no executor of the graph will run it.
    """

    memory_bytes: int | None = None  # the memory that the KV pools of a device's engines share
    engines: Mapping[str, EngineFactsView] = field(default_factory=dict)
    functions: Collection[str] | None = None  # the names under which the user registered functions
    engine_kinds: Mapping[str, EngineKindView] | None = None
    executors: Mapping[str, type] = field(default_factory=lambda: {"tasks": NoOptions})
    names: Mapping[str, Collection[str]] = field(default_factory=dict)
    is_simulated: bool = False

    def engine(self, name: str) -> EngineFactsView:
        return self.engines.get(name, EngineFactsView())


@dataclass(frozen=True, slots=True)
class CheckContext:
    """A stream graph that is checked, with its vocabulary and facts."""

    graph: Graph
    vocabulary: Vocabulary
    facts: Facts

    def spec(self, name: str) -> OpSpec | None:
        """The spec of an operator; None for `source`, `sink` and unknown names."""
        for node in self.graph.nodes:
            if node.name == name:
                return self._spec_of(node)
        return None

    @property
    def specified(self) -> Iterator[tuple[Node, OpSpec]]:
        """The nodes whose op is known, with their specs."""
        for node in self.graph.nodes:
            spec = self._spec_of(node)
            if spec is not None:
                yield node, spec

    def _spec_of(self, node: Node) -> OpSpec | None:
        spec = self.vocabulary.get(node.op)
        return spec.with_options(node.attrs) if spec else None

    @property
    def forward(self) -> Iterator[tuple[int, Edge]]:
        """The edges that are not feedback, each with its index in the graph."""
        return ((n, edge) for n, edge in enumerate(self.graph.edges) if not edge.feedback)

    def engine_of(self, node: Node, spec: OpSpec) -> str | None:
        """The engine that a node uses; None if it uses none, or if the graph has no such engine."""
        name = node.attrs.get("engine")
        return (
            name if spec.engine and isinstance(name, str) and name in self.graph.engines else None
        )


Rule: TypeAlias = Callable[[CheckContext], Iterator[Diagnostic]]


def choice(name: object, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known name if one is near, else all known names."""
    names = sorted(known)
    close = nearest(str(name), names)
    if close is not None:
        return f"did you mean `{close}`?"
    return f"there are {', '.join(names)}" if names else "there are none"
