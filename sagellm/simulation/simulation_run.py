"""Runs one simulation: a graph and a workload in, a record of each request and the engines out."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from sagellm.extensions import RESOLVER
from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.graphs.sections import (
    MODELLED,
    ReplicaBounds,
    engine_kind,
    scaled_engines,
)
from sagellm.graphs.text.yaml import Document
from sagellm.load.workload import BLOCK_LEN, PlannedRequest
from sagellm.opening.checking import check_graph
from sagellm.opening.decisions import DecisionFile, recording
from sagellm.opening.graph_engines import engine_options, num_replicas
from sagellm.opening.sources import override
from sagellm.runtime.core.effects import Noted
from sagellm.runtime.engine.kinds.modelled import ModelledOptions
from sagellm.runtime.handover import Phases, phases_of
from sagellm.runtime.messages import (
    NORMAL,
    PRIORITIES,
    Answer,
    EngineReplica,
    Forked,
    Item,
    Request,
    Stamps,
    TokenEvent,
)
from sagellm.runtime.notes import Assignment
from sagellm.runtime.plan import Plan, plan
from sagellm.runtime.port import Engine
from sagellm.runtime.registry import FUNCTIONS, read_options
from sagellm.runtime.sampling import Sampling
from sagellm.runtime.simulation.engine import SimulatedEngine
from sagellm.runtime.simulation.executor import SimulatedScaling, SimulationExecutor
from sagellm.runtime.simulation.links import Links
from sagellm.runtime.simulation.opening import OnEngineRun, open_simulated
from sagellm.runtime.simulation.prompts import PromptHasher, TraceHasher, TracePrompt
from sagellm.runtime.simulation.timeline import SimulationError, Timeline, few_collections
from sagellm.simulation.faults import ReplicaFault, plan_fault, refuse_overlaps
from sagellm.tracing.critical_path import RequestPath
from sagellm.tracing.operator_budgets import followed

# What a record has of its planned request.
_KNOWN = ("input_len", "output_len", "priority", "user_id", "slo_ttft_s", "cost_budget")
_COLLECT_EVERY = 20_000  # requests between two collections of garbage, which take long each


@dataclass(frozen=True, slots=True)
class SimulationPoint:
    """One simulation. `overrides`: options of the graph. `profile`: the profile of engines that
    are not modelled; empty: such engines are refused. `link_latency_s`: of a transfer of KV blocks.
    `on_run`: is called with the steps of each engine.
    """

    document: Document
    workload: Sequence[PlannedRequest]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    profile: str = ""
    seed: int = 0
    link_latency_s: float = 0.0
    faults: tuple[ReplicaFault, ...] = ()
    decisions: DecisionFile | None = None
    on_run: OnEngineRun | None = None


@dataclass(slots=True)
class SimulatedRequest:
    """One request, in seconds of simulated time. `end`: its finish reason; empty: it never ended.
    `slo_ttft_s`: its own objective. `cost_budget`: its value; None: 1.
    """

    number: int
    arrived_s: float
    input_len: int
    output_len: int
    first_s: float | None = None
    ended_s: float = 0.0
    num_tokens: int = 0
    num_cached_tokens: int = 0
    end: str = ""
    code: str = ""
    phases: Phases = field(default_factory=Phases)
    priority: int = NORMAL
    user_id: str = ""
    slo_ttft_s: float | None = None
    cost_budget: float | None = None
    arm: str = ""  # of the last `ab_split` on its way

    @property
    def is_ok(self) -> bool:
        return self.end in ("length", "stop")

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """The mean seconds per token after the first; None for fewer than two tokens."""
        if self.first_s is None or self.num_tokens < 2:
            return None
        return (self.ended_s - self.first_s) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """The outcome of one simulation. `engines`: every replica that there was, with its model.
    `links`: between them. `begun_s`: the first arrival; `elapsed_s`: from there to the last event.
    `counts`: by engine, each (time, number of replicas from then on). `preempted`: requests put
    back for others, by class of priority. `paths`: of all requests, if the graph has a section
    `budgets`.
    """

    requests: Sequence[SimulatedRequest]
    engines: Mapping[str, tuple[SimulatedEngine, ...]]
    links: Links
    begun_s: float
    elapsed_s: float
    counts: Mapping[str, Sequence[tuple[float, int]]]
    preempted: Mapping[str, int] = field(default_factory=dict)
    graph: Graph = Graph("")  # noqa: RUF009 (immutable)
    paths: Sequence[RequestPath] = ()

    def replica_s(self, engine: str) -> float:
        """The time of all replicas of an engine, in seconds."""
        end_s, total = self.begun_s + self.elapsed_s, 0.0
        changes = [*self.counts[engine], (end_s, 0)]
        for (since_s, count), (until_s, _) in pairwise(changes):
            total += count * max(min(until_s, end_s) - max(since_s, self.begun_s), 0.0)
        return total


def simulate(
    point: SimulationPoint, on_end: Callable[[SimulatedRequest], None] = lambda request: None
) -> SimulatedRun:
    """Run a simulation to its end. `on_end` is called with each request that has ended.

    Raises GraphError, SimulationError, and OSError for a decision log that cannot be written.
    """
    graph, timeline = modelled_graph(point), Timeline()
    hasher = TraceHasher() if point.decisions is None else PromptHasher()
    speeds = {name: _options(graph, name).kv_bytes_per_s for name in graph.engines}
    links = Links(timeline, speeds, latency_s=point.link_latency_s)
    open_replica = _opener(graph, point, timeline, links, hasher)
    engines = {
        name: tuple(open_replica(EngineReplica(name, n)) for n in range(num_replicas(graph, name)))
        for name in graph.engines
    }
    facts = {name: every[0].facts for name, every in engines.items()}
    counts = {name: len(every) for name, every in engines.items()}
    made = partial(plan, graph, RESOLVER, counts, functions=FUNCTIONS, seed=point.seed)
    ready = made(facts=facts, hasher=hasher)
    _refuse_unmodelled(ready, point)
    with recording(point.decisions, ready, float("inf")) as record:
        results = Recorder(timeline, on_end)
        executor = SimulationExecutor(
            ready, results.deliver, timeline, engines=engines, record=record
        )
        executor.on_note = results.note
        scaling = SimulatedScaling(executor, _bounds(graph), open_replica)
        executor.scale = scaling.begin
        paths = followed(executor)
        source = WorkloadSource(executor, point.workload, results)
        for fault in point.faults:
            plan_fault(executor, engines, fault)
        with few_collections():
            source.start()
            timeline.run()
    executor.core.ledger.check()
    last_s = max((one.ended_s for one in results.requests), default=0.0)
    first_s = point.workload[0].at_s if point.workload else 0.0
    num_preempted = executor.core.preemption.num_preempted
    return SimulatedRun(
        results.requests,
        {name: _simulated(every) for name, every in executor.engines.items()},
        links,
        first_s,
        last_s - first_s,
        scaling.counts,
        {name: num_preempted[one] for name, one in PRIORITIES.items() if num_preempted[one]},
        graph,
        paths,
    )


def _simulated(engines: Sequence[Engine]) -> tuple[SimulatedEngine, ...]:
    return tuple(one for one in engines if isinstance(one, SimulatedEngine))


def _bounds(graph: Graph) -> dict[str, ReplicaBounds]:
    """The bounds of the engines whose replicas an operator scales."""
    scaled = scaled_engines(graph)
    return {name: read_options(ReplicaBounds, given) for name, (_, given) in scaled.items()}


def _opener(
    graph: Graph, point: SimulationPoint, timeline: Timeline, links: Links, hasher: PromptHasher
) -> Callable[[EngineReplica], SimulatedEngine]:
    """A function that opens one replica of an engine."""
    options = {name: _options(graph, name) for name in graph.engines}
    block_len = BLOCK_LEN if any(one.block_ids for one in point.workload) else 0
    return lambda place: open_simulated(
        options[place.engine],
        place,
        timeline,
        links,
        hasher,
        block_len=block_len,
        seed=point.seed,
        on_run=point.on_run,
    )


def modelled_graph(point: SimulationPoint) -> Graph:
    """The checked graph of a point, with only modelled engines, on the executor `tasks`.

    Raises GraphError, and SimulationError for an engine without a cost model.
    """
    graph = override(point.document.graph, point.overrides)
    kinds = {engine_kind(engine) for engine in graph.engines.values()}
    if point.profile and kinds == {MODELLED}:
        message = f"--profile {point.profile}: every engine has a cost model of its own"
        raise SimulationError(message, "leave --profile out, or set NAME.profile")
    changes = dict(point.overrides)
    for name in graph.engines:
        kind = engine_kind(graph.engines[name])
        if kind != MODELLED and not point.profile:
            raise SimulationError(
                f"engine {name}: kind {kind} has no cost model",
                f"give --profile NAME or FILE, or --set {name}.kind=modelled and its costs",
            )
        if kind != MODELLED:
            changes |= {f"{name}.kind": MODELLED, f"{name}.profile": point.profile}
    document = Document(_on_tasks(point.document.graph), point.document.positions)
    return check_graph(document, RESOLVER, FUNCTIONS, changes, is_simulated=True)


def _on_tasks(graph: Graph) -> Graph:
    """The graph without the links and processes of its executor."""
    before = graph.attrs.get("executor")
    known = dict(before) if isinstance(before, FrozenMap) else {}
    kept = {name: known[name] for name in ("max_prefix_blocks",) if name in known}
    executor = FrozenMap({"kind": "tasks", **kept})
    return replace(graph, attrs=FrozenMap({**graph.attrs, "executor": executor}))


def _options(graph: Graph, name: str) -> ModelledOptions:
    options = engine_options(graph, name)
    assert isinstance(options, ModelledOptions)
    return options


def _refuse_unmodelled(ready: Plan, point: SimulationPoint) -> None:
    """Raise SimulationError for an operator that waits for something without a model, and for what
    a point asks of a graph that cannot have it.
    """
    refuse_overlaps(point.faults)
    if point.link_latency_s and not any(node.op == "kv_transfer" for node in ready.graph.nodes):
        raise SimulationError("--link-latency: this graph moves no KV blocks", "leave it out")
    for name in ready.services:
        spec = ready.spec(name)
        if not spec.engine and spec.name != "kv_transfer":
            raise SimulationError(
                f"operator {name}: {spec.name} waits for an async function, whose time is unknown",
                "give it a plain function, or leave it out",
            )


class WorkloadSource:
    """Sends the requests of a workload into a simulation, each at its time."""

    def __init__(
        self,
        executor: SimulationExecutor,
        workload: Sequence[PlannedRequest],
        results: "Recorder",
    ) -> None:
        self.num_arrived = 0
        self._executor = executor
        self._workload = workload
        self._results = results

    def start(self) -> None:
        if self._workload:
            self._executor.timeline.at(self._workload[0].at_s, self._arrive)

    def _arrive(self) -> None:
        number, planned = self.num_arrived, self._workload[self.num_arrived]
        self.num_arrived += 1
        if self.num_arrived < len(self._workload):
            self._executor.timeline.at(self._workload[self.num_arrived].at_s, self._arrive)
        if not self.num_arrived % _COLLECT_EVERY:
            gc.collect(1)
        self._results.open(number, planned)
        self._executor.arrive(request_of(number, planned))


def request_of(number: int, planned: PlannedRequest) -> Request:
    """The request of a planned one, which arrives at its time."""
    return Request(
        request_id=str(number),
        prompt_token_ids=TracePrompt(  # type: ignore[arg-type]  # a tuple that is made when read
            number, planned.input_len, planned.block_ids, BLOCK_LEN
        ),
        sampling=Sampling(max_tokens=planned.output_len, ignore_eos=True, seed=number),
        stamps=Stamps(arrived_s=planned.at_s),
        user_id=planned.user_id,
        priority=planned.priority,
        slo_ttft_s=planned.slo_ttft_s,
        model=planned.model,
        cost_budget=planned.cost_budget,
    )


class Recorder:
    """Keeps a record of each request, as its tokens reach the sink."""

    def __init__(self, timeline: Timeline, on_end: Callable[[SimulatedRequest], None]) -> None:
        self.requests: list[SimulatedRequest] = []
        self._timeline = timeline
        self._on_end = on_end

    def open(self, number: int, planned: PlannedRequest) -> None:
        known = {name: getattr(planned, name) for name in _KNOWN}
        self.requests.append(SimulatedRequest(number, planned.at_s, **known))

    def note(self, noted: Noted) -> None:
        if isinstance(noted.note, Assignment):
            self.requests[int(noted.note.request_id)].arm = noted.note.label

    def deliver(self, item: Item | Forked) -> None:
        if not isinstance(item, TokenEvent | Answer):
            return
        record = self.requests[int(item.request_id)]
        if item.num_tokens and record.first_s is None:
            record.first_s = self._timeline.now
        record.num_tokens += item.num_tokens
        record.num_cached_tokens = max(record.num_cached_tokens, item.num_cached_tokens)
        if item.finish_reason is not None:
            record.ended_s, record.end = self._timeline.now, item.finish_reason
            record.code, record.phases = item.code, phases_of(item.stamps)
            self._on_end(record)
