"""A plan: the built operators of a checked stream graph, and queries on their connections."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Graph, Node
from sagellm.graphs.rules.deployment import unrouted_nodes
from sagellm.graphs.sections import served_models
from sagellm.graphs.vocabulary import PREFILLED, REQUEST, OpSpec, Port, Vocabulary
from sagellm.runtime.feedback import Topology
from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.operator import EncodeText, Logic, Service, Setup, Target
from sagellm.runtime.port import EngineFacts
from sagellm.runtime.prefixes import MAX_PREFIX_BLOCKS, Hasher, hash_secret
from sagellm.runtime.resolver import Resolver
from sagellm.runtime.shadow import Shadowed, build_operator
from sagellm.runtime.user_code import failure_text, kind_of

CACHE = "cache"  # the feedback kind of prefix indexes
_LOGIC = ("initial", "on")
_SERVICE = (
    "concurrency", "holds", "capacity", "on_item", "on_events", "on_signal", "recall", "discard",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """The operators, engines and topology that an executor runs. Immutable.

    The core replaces its plan when replicas are added or removed; each change raises `epoch`.
    `engines`: by engine, the number of replicas so far, including removed replicas; replica numbers
    are 0 ... number - 1. The executor owns the engines themselves.
    """

    graph: Graph
    logic: Mapping[str, Logic[Any]]
    services: Mapping[str, Service]
    engines: Mapping[str, int] = field(default_factory=dict)
    specs: Mapping[str, OpSpec] = field(default_factory=dict)  # by node
    seed: int = 0
    removed: frozenset[EngineReplica] = frozenset()  # replicas that will not come back
    epoch: int = 0
    facts: Mapping[str, EngineFacts] = field(default_factory=dict)  # by engine, if known
    block_key: bytes = b""  # the secret of block hashes

    @property
    def max_prefix_blocks(self) -> int:
        """The most prefix block hashes that the core keeps."""
        executor = self.graph.attrs.get("executor")
        given = executor.get("max_prefix_blocks") if isinstance(executor, FrozenMap) else None
        return given if isinstance(given, int) else MAX_PREFIX_BLOCKS

    def reads_cache(self, engine: str) -> bool:
        """Whether any operator subscribes to the prefix blocks of an engine."""
        return any(CACHE in self.subscribes(name) for name in self.cache_readers(engine))

    def cache_readers(self, engine: str) -> tuple[str, ...]:
        """The operators that get the prefix blocks of an engine if any operator subscribes to them.

        These are all logic operators upstream whose specs name "cache".
        """
        upstream = (name for node in self.nodes_of(engine) for name in self._reached(node))
        logic = (name for name in dict.fromkeys(upstream) if name in self.logic)
        return tuple(name for name in logic if CACHE in self.spec(name).subscribes)

    def only_shadows_read(self, engine: str) -> bool:
        """Whether shadows, and no live operator, subscribe to the prefix blocks of an engine."""
        readers = [(name, self.logic[name]) for name in self.cache_readers(engine)]
        live = (
            one.live_subscribes if isinstance(one, Shadowed) else self.subscribes(name)
            for name, one in readers
        )
        return self.reads_cache(engine) and not any(CACHE in kinds for kinds in live)

    @property
    def topology(self) -> Topology:
        """The replicas of all engines, as an input for operators."""
        return Topology(self.epoch, dict(self.engines), self.removed)

    def with_replica(self, engine: str) -> "Plan":
        """The plan with one more replica of an engine; its number is the previous count."""
        return replace(self, engines={**self.engines, engine: self.engines[engine] + 1})

    def num_replicas(self, node: str) -> int:
        """The number of replicas of an operator so far: that of its engine, or 1 without engine."""
        return self.engines.get(self.engine_name(node) or "", 1)

    def spec(self, node: str) -> OpSpec:
        """The spec of an operator; an empty spec if the plan was built without one."""
        return self.specs.get(node) or OpSpec(node)

    def nodes_of(self, engine: str) -> tuple[str, ...]:
        """The operators that use an engine."""
        return tuple(node for node in self.services if self.engine_name(node) == engine)

    def is_routed(self, engine: str) -> bool:
        """Whether a router chooses the replica of an engine on every path to it."""
        return not set(self.nodes_of(engine)) & unrouted_nodes(self.graph)

    def can_avoid(self, engine: str) -> bool:
        """Whether requests can take another path while no replica of an engine is up.

        For each operator that uses the engine, some operator upstream must subscribe to "health"
        and have an outlet that does not lead to the engine.
        """
        nodes = self.nodes_of(engine)
        return bool(nodes) and all(self._can_avoid(node, set(nodes)) for node in nodes)

    def _can_avoid(self, node: str, nodes: set[str]) -> bool:
        return any(
            name in self.logic
            and "health" in self.spec(name).subscribes
            and any(not nodes & set(self._descendants(edge)) for edge in self._outlets(name))
            for name in self.ancestors(node)
        )

    def _outlets(self, node: str) -> tuple[Edge, ...]:
        """The edges out of an operator; empty if it has one outlet only."""
        edges = tuple(edge for edge in self.graph.outputs(node) if not edge.feedback)
        return edges if len({edge.outlet for edge in edges}) > 1 else ()

    def _descendants(self, edge: Edge) -> tuple[str, ...]:
        """All nodes that are reached through an edge."""
        found = {edge.target: None}
        level = [edge.target]
        for name in level:
            for after in self.graph.outputs(name) if name != SINK else ():
                if not after.feedback and after.target not in found:
                    found[after.target] = None
                    level.append(after.target)
        return tuple(found)

    def engine_name(self, node: str) -> str | None:
        """The name of the engine that an operator uses, or None."""
        name = self.graph.node(node).attrs.get("engine")
        return name if isinstance(name, str) else None

    @property
    def last_engine_nodes(self) -> tuple[str, ...]:
        """The operators with an engine that have no other operator with an engine downstream."""
        nodes = [node for node in self.services if self.engine_name(node)]
        before = {name for node in nodes for name in self.ancestors(node)}
        return tuple(node for node in nodes if node not in before)

    @property
    def decoders(self) -> dict[str, str]:
        """For each operator that takes requests, the decode operator where it reserves credit.

        The decode operator is downstream, or uses the same engine. Operators with several
        candidates are left out.
        """
        decoders = tuple(name for name in self.services if self._decodes(name))
        found: dict[str, str] = {}
        for node in self.services:
            if _has(self.spec(node).inlets, REQUEST):
                edges, engine = self.graph.outputs(node), self.engine_name(node)
                after = {name for edge in edges for name in self._descendants(edge)}
                own = [one for one in decoders if one in after or self.engine_name(one) == engine]
                if len(own) == 1:
                    found[node] = own[0]
        return found

    def _decodes(self, node: str) -> bool:
        spec = self.spec(node)
        is_last = not _has(spec.outlets, PREFILLED)
        return spec.engine and is_last and _has(spec.inlets, PREFILLED)

    def ancestors(self, node: str) -> tuple[str, ...]:
        """The nodes upstream of `node`, nearest first."""
        found: dict[str, None] = {}
        level = [node]
        for name in level:  # grows while it is read: breadth first
            for edge in self.graph.inputs(name):
                if not edge.feedback and edge.source not in found and edge.source != SOURCE:
                    found[edge.source] = None
                    level.append(edge.source)
        return tuple(found)

    def entrance(self, node: str) -> "str | Edge":
        """The operator at which a request re-enters that was lost with an engine of `node`.

        The nearest operator upstream with a queue. Without a queue, the edge on which requests
        enter the routers (operators that subscribe to "health") before `node`.
        """
        for name in (node, *self.ancestors(node)):
            if self.spec(name).queues:
                return name
        edge = self._request_edge(node)
        while edge.source in self.logic and "health" in self.spec(edge.source).subscribes:
            edge = self._edge_to(edge.source)
        return edge

    def subscribers(self, node: str, kind: str) -> tuple[str, ...]:
        """The logic operators that get feedback of one kind from `node`.

        These are the subscribers upstream, nearest first, then subscribers at the end of feedback
        edges of `node`.
        """
        return tuple(name for name in self._reached(node) if kind in self.subscribes(name))

    def _reached(self, node: str) -> dict[str, None]:
        """The operators that feedback from a node can reach."""
        led = tuple(edge.target for edge in self.graph.outputs(node) if edge.feedback)
        return dict.fromkeys((*self.ancestors(node), *led))

    def subscribes(self, node: str) -> frozenset[str]:
        """The feedback kinds of an operator: its attribute `subscribes`, or else its spec's."""
        if node not in self.logic:
            return frozenset()
        kinds: frozenset[str] = getattr(self.logic[node], "subscribes", self.spec(node).subscribes)
        return kinds

    def _request_edge(self, node: str) -> Edge:
        """The edge on which requests come to `node`, or to the first service operator before it."""
        edge = self._edge_to(node)
        while edge.source in self.services:
            edge = self._edge_to(edge.source)
        return edge

    def _edge_to(self, node: str) -> Edge:
        return next(edge for edge in self.graph.inputs(node) if not edge.feedback)


def plan(
    graph: Graph,
    resolver: Resolver,
    engines: Mapping[str, int],
    *,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    encode: EncodeText | None = None,
    seed: int = 0,
    facts: Mapping[str, EngineFacts] | None = None,
    block_key: bytes | None = None,
    hasher: Hasher | None = None,
) -> Plan:
    """Build the operators of a graph that `check` has accepted. Raises GraphError.

    `engines`: the number of replicas of each engine. `facts`: the facts of each engine; without
    facts, the prefix blocks of an engine are not tracked. `block_key`: the secret of the engines'
    block hashes; None: the secret of this process. `hasher`: hashes prompts instead.
    """
    replicas = {node.name: _num_replicas(node, engines) for node in graph.nodes}
    hasher = hasher or Hasher(block_key or hash_secret())
    models = {one.key: one.engines for one in served_models(graph) if one.key}
    known = {} if functions is None else functions  # `or` would count what packages offer
    common = Setup("", (), known, encode, seed, facts or {}, models, hasher)
    made = build_operators(graph, resolver, replicas, common)
    services = {name: one for name, one in made.items() if isinstance(one, Service)}
    logic = {name: one for name, one in made.items() if not isinstance(one, Service)}
    specs = {node.name: resolver.operator(node.op).spec for node in graph.nodes}
    return Plan(
        graph,
        logic,
        services,
        dict(engines),
        specs,
        seed,
        facts=facts or {},
        block_key=hasher.key,
    )


def build_operators(
    graph: Graph,
    resolver: Resolver,
    replicas: Mapping[str, int],
    common: Setup,
) -> "dict[str, Logic[Any] | Service]":
    """Build every operator of a graph, and return them by name.

    `replicas`: the number of replicas by node. `common`: the parts of the setup that all operators
    share. Raises GraphError with all mistakes, including those that only `build` can find.
    """
    made: dict[str, Logic[Any] | Service] = {}
    mistakes: list[Diagnostic] = []
    vocabulary = resolver.vocabulary
    for node in graph.nodes:
        module = resolver.operator(node.op)
        targets = targets_of(graph, node, vocabulary, replicas)
        setup = replace(common, name=node.name, targets=targets)
        path = ("operators", node.name)
        try:
            made[node.name] = build_operator(module, node, setup)
        except GraphError as error:
            mistakes += error.diagnostics
            continue
        except ValueError as error:
            mistakes.append(Diagnostic("bad-options", path, str(error)))
            continue
        except Exception as error:  # raised by the user's own code
            raised = f"{node.op}: build raised {type(error).__name__}"
            mistakes.append(Diagnostic("bad-operator", path, failure_text(raised, error)))
            continue
        missing = _missing(made[node.name])
        if missing:
            what = f"{node.op}: build returned {kind_of(made[node.name])}, which has no {missing}"
            mistakes.append(Diagnostic("bad-operator", path, what))
    if mistakes:
        raise GraphError(tuple(mistakes))
    return made


def _has(ports: Iterable[Port], carries: str) -> bool:
    return any(port.carries == carries for port in ports)


def _missing(operator: object) -> str:
    """The members of Service (if the operator has `on_item`) or of Logic that it lacks."""
    kind = _SERVICE if hasattr(operator, "on_item") else _LOGIC
    return ", ".join(name for name in kind if not hasattr(operator, name))


def _num_replicas(node: Node, engines: Mapping[str, int]) -> int:
    name = node.attrs.get("engine")
    return engines.get(name, 1) if isinstance(name, str) else 1


def targets_of(
    graph: Graph, node: Node, vocabulary: Vocabulary, replicas: Mapping[str, int]
) -> tuple[Target, ...]:
    """The operators with engines downstream of a node, up to the next node of the same kind.

    A router uses them as targets: the next router of its kind has its own targets.
    """
    outlets: dict[str, set[str]] = {}  # by operator: the outlets of `node` that lead there
    near = {node.name}  # reached without passing a service operator
    level = [(edge.target, edge) for edge in graph.outputs(node.name)]
    for name, edge in level:  # grows while it is read: breadth first
        is_end = name == SINK or edge.feedback or graph.node(name).op == node.op
        if is_end or edge.outlet in outlets.setdefault(name, set()):
            continue
        outlets[name].add(edge.outlet)
        if edge.source in near and vocabulary[graph.node(name).op].role == "logic":
            near.add(name)
        level += [
            (after.target, replace(after, outlet=edge.outlet)) for after in graph.outputs(name)
        ]
    return tuple(
        Target(
            name,
            replicas[name],
            str(graph.node(name).attrs.get("engine", "")),
            any(edge.source in near for edge in graph.inputs(name)),
            frozenset(found),
            _has(vocabulary[graph.node(name).op].outlets, PREFILLED),
            graph.node(name).op,
        )
        for name, found in outlets.items()
        if found and vocabulary[graph.node(name).op].engine
    )
