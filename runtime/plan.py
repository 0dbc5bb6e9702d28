"""A plan: the operators of a checked stream graph, built and wired, for any executor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph, Node
from sagellm.graphs.rules.resources import unrouted_nodes
from sagellm.graphs.vocabulary import Vocabulary
from sagellm.runtime.engine.port import Engine
from sagellm.runtime.operator import Logic, Service, Setup, Target
from sagellm.runtime.options import read_options
from sagellm.runtime.resolver import Resolver
from sagellm.runtime.user_code import kind_of, sentence

_LOGIC = ("initial", "on")
_SERVICE = (
    "concurrency", "holds", "capacity", "on_item", "on_events", "on_signal", "recall", "discard",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What an executor runs. `engines` maps an engine's name to its replicas."""

    graph: Graph
    logic: Mapping[str, Logic[Any]]
    services: Mapping[str, Service]
    replicas: dict[str, int]
    engines: dict[str, tuple[Engine, ...]] = field(default_factory=dict)
    hears: Mapping[str, frozenset[str]] = field(default_factory=dict)  # kinds of feedback
    queues: frozenset[str] = frozenset()  # the operators in which requests wait
    seed: int = 0

    @property
    def all_engines(self) -> tuple[Engine, ...]:
        """The replicas of every engine."""
        return tuple(engine for replicas in self.engines.values() for engine in replicas)

    def add(self, name: str, engine: Engine) -> int:
        """One more replica of an engine; its number. Whoever runs the plan makes room for it."""
        self.engines[name] = (*self.engines[name], engine)
        for node in self.nodes_of(name):
            self.replicas[node] = len(self.engines[name])
        return len(self.engines[name]) - 1

    def nodes_of(self, engine: str) -> tuple[str, ...]:
        """The operators that an engine works for."""
        return tuple(node for node in self.services if self.engine_name(node) == engine)

    def is_routed(self, engine: str) -> bool:
        """Whether somebody chooses a replica of it for each request, whichever way that comes."""
        return not set(self.nodes_of(engine)) & unrouted_nodes(self.graph)

    def engine_name(self, node: str) -> str | None:
        name = self.graph.node(node).attrs.get("engine")
        return name if isinstance(name, str) else None

    def ancestors(self, node: str) -> tuple[str, ...]:
        """The nodes upstream of `node`, nearest first."""
        found: dict[str, None] = {}
        level = [node]
        for name in level:
            for edge in self.graph.inputs(name):
                if not edge.feedback and edge.source not in found and edge.source != SOURCE:
                    found[edge.source] = None
                    level.append(edge.source)
        return tuple(found)

    def entrance(self, node: str) -> "str | Edge":
        """Where a request goes in again that an engine of `node` lost: at the nearest operator
        upstream that queues, or else over the edge to the first of the operators that place it.
        """
        for name in (node, *self.ancestors(node)):
            if name in self.queues:
                return name
        edge = self._request_edge(node)
        while edge.source in self.logic and "health" in self.hears[edge.source]:
            edge = self._edge_to(edge.source)
        return edge

    def _request_edge(self, node: str) -> Edge:
        """The edge over which requests come to `node`, or to the prefill before it."""
        edge = self._edge_to(node)
        while edge.source in self.services:
            edge = self._edge_to(edge.source)
        return edge

    def _edge_to(self, node: str) -> Edge:
        return next(edge for edge in self.graph.inputs(node) if not edge.feedback)

    def hearers(self, node: str, kind: str) -> tuple[str, ...]:
        """The logic operators that feedback of `node` reaches: those upstream that hear the kind,
        nearest first, and those that a feedback edge leads to.
        """
        led = tuple(edge.target for edge in self.graph.outputs(node) if edge.feedback)
        reached = dict.fromkeys((*self.ancestors(node), *led))
        return tuple(
            name for name in reached if name in self.logic and kind in self.hears.get(name, ())
        )


def plan(
    graph: Graph,
    resolver: Resolver,
    engines: Mapping[str, tuple[Engine, ...]],
    *,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    encode: Callable[[str], tuple[int, ...]] | None = None,
    seed: int = 0,
) -> Plan:
    """Build the operators of a graph that `check` has passed. Raises GraphError."""
    replicas = {node.name: _num_replicas(node, engines) for node in graph.nodes}
    made = build_operators(graph, resolver, replicas, functions or {}, encode, seed)
    services = {name: one for name, one in made.items() if isinstance(one, Service)}
    logic = {name: one for name, one in made.items() if not isinstance(one, Service)}
    hears = {node.name: resolver.operator(node.op).spec.hears for node in graph.nodes}
    queues = frozenset(node.name for node in graph.nodes if resolver.operator(node.op).spec.queues)
    return Plan(graph, logic, services, replicas, dict(engines), hears, queues, seed)


def build_operators(
    graph: Graph,
    resolver: Resolver,
    replicas: Mapping[str, int],
    functions: Mapping[str, Callable[..., Any]],
    encode: Callable[[str], tuple[int, ...]] | None = None,
    seed: int = 0,
) -> "dict[str, Logic[Any] | Service]":
    """Every operator by name. Raises GraphError with all options that contradict each other,
    which only their operators know.
    """
    made: dict[str, Logic[Any] | Service] = {}
    mistakes: list[Diagnostic] = []
    vocabulary = resolver.vocabulary
    for node in graph.nodes:
        module = resolver.operator(node.op)
        targets = targets_of(graph, node, vocabulary, replicas)
        setup = Setup(node.name, targets, functions, encode, seed)
        path = ("operators", node.name)
        try:
            made[node.name] = module.build(read_options(module.spec.options, node.attrs), setup)
        except ValueError as error:
            mistakes.append(Diagnostic("bad-options", path, str(error)))
            continue
        except Exception as error:  # of the user's own code
            raised = f"{node.op}: build raised {type(error).__name__}"
            mistakes.append(Diagnostic("bad-operator", path, sentence(raised, error)))
            continue
        missing = _missing(made[node.name])
        if missing:
            what = f"{node.op}: build returned {kind_of(made[node.name])}, which has no {missing}"
            mistakes.append(Diagnostic("bad-operator", path, what))
    if mistakes:
        raise GraphError(tuple(mistakes))
    return made


def _missing(operator: object) -> str:
    """What an operator lacks, of `Service` where it has `on_item`, else of `Logic`."""
    kind = _SERVICE if hasattr(operator, "on_item") else _LOGIC
    return ", ".join(name for name in kind if not hasattr(operator, name))


def _num_replicas(node: Node, engines: Mapping[str, tuple[Engine, ...]]) -> int:
    name = node.attrs.get("engine")
    return len(engines[name]) if isinstance(name, str) and name in engines else 1


def targets_of(
    graph: Graph, node: Node, vocabulary: Vocabulary, replicas: Mapping[str, int]
) -> tuple[Target, ...]:
    """Engine operators downstream, as far as the next operator of the same op."""
    found: dict[str, Target] = {}
    level = [node.name]
    seen = {node.name}
    for name in level:
        for edge in graph.outputs(name):
            if edge.target == SINK or edge.target in seen or edge.feedback:
                continue
            seen.add(edge.target)
            after = graph.node(edge.target)
            if after.op == node.op:
                continue
            if vocabulary[after.op].engine:
                engine = str(after.attrs.get("engine", ""))
                found[after.name] = Target(after.name, replicas[after.name], engine)
            level.append(edge.target)
    return tuple(found.values())
