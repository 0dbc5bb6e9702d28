"""Graphs of modelled engines, run in simulated time and, to compare, under trio's mock clock."""

from dataclasses import dataclass, field
from io import BytesIO
from random import Random

import trio
import trio.testing
from msgspec.structs import replace

from sagellm.extensions import RESOLVER
from sagellm.graphs.text.codec import to_msgpack
from sagellm.graphs.text.yaml import load
from sagellm.runtime.core.decision_log import DecisionReader, DecisionWriter, Header
from sagellm.runtime.engine.kinds.modelled import ModelledOptions, open_modelled
from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.messages import NORMAL, PRIORITIES, EngineReplica, Request, Stamps, TokenEvent
from sagellm.runtime.plan import plan
from sagellm.runtime.sampling import Sampling
from sagellm.runtime.simulation.executor import SimulationExecutor
from sagellm.runtime.simulation.links import Links
from sagellm.runtime.simulation.opening import open_simulated
from sagellm.runtime.simulation.prompts import TraceHasher, TracePrompt
from sagellm.runtime.simulation.timeline import Timeline
from sagellm.tracing.critical_path import request_paths

JOINT = """
sagellm: 1
name: joint
engines:
  g: {kind: modelled, model: null}
operators:
  admission: {op: admission, max_queued: 100000}
  sort:      {op: policy_sort, policy: fifo}
  route:     {op: route, strategy: load_balanced}
  generate:  {op: generate, engine: g}
  metrics:   {op: metrics_sink}
edges:
  - source -> admission -> sort -> route -> generate -> metrics -> sink
"""
PD = """
sagellm: 1
name: pd
engines:
  p: {kind: modelled, model: null}
  d: {kind: modelled, model: null}
operators:
  admission: {op: admission, max_queued: 100000}
  sort:      {op: policy_sort, policy: fifo}
  split:     {op: pd_split, min_uncached_tokens: 32}
  route:     {op: route, strategy: load_balanced}
  prefill:   {op: prefill, engine: p}
  transfer:  {op: kv_transfer}
  decode:    {op: decode, engine: d}
  route_aggregated: {op: route, strategy: load_balanced}
  generate:  {op: generate, engine: d}
  metrics:   {op: metrics_sink}
edges:
  - source -> admission -> sort -> split
  - split.disaggregated -> route -> prefill -> transfer -> decode -> metrics -> sink
  - split.aggregated -> route_aggregated -> generate -> metrics
"""
OPTIONS = ModelledOptions(
    model="null",
    num_blocks=4096,
    max_num_seqs=32,
    prefill_token_s=1e-4,
    decode_step_s=0.01,
    decode_row_s=1e-4,
    context_token_s=1e-8,
    kv_bytes_per_s=1e10,
    prefix_caching=False,
)


@dataclass(frozen=True)
class Planned:
    at_s: float
    num_prompt: int
    num_output: int
    block_ids: tuple[int, ...] = ()
    priority: int = NORMAL


@dataclass
class Seen:
    """What reached the sink for one request."""

    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0
    end: str = ""


@dataclass
class Outcome:
    seen: dict[str, Seen] = field(default_factory=dict)
    events: list = field(default_factory=list)

    def deliver(self, now, item):
        assert isinstance(item, TokenEvent)
        seen = self.seen.setdefault(item.request_id, Seen())
        if item.num_tokens and seen.first_s is None:
            seen.first_s = now
        seen.num_tokens += item.num_tokens
        if item.finish_reason:
            seen.last_s, seen.end = now, item.finish_reason

    def record(self, now, event, effects):
        self.events.append((now, event, effects))


def random_workload(number, rate, *, seed=1, prompt=1000, output=100):
    """Requests of a Poisson process with exponential lengths."""
    draw, at_s, planned = Random(seed), 0.0, []
    for _ in range(number):
        at_s += draw.expovariate(rate)
        lengths = (1 + int(draw.expovariate(1 / mean)) for mean in (prompt, output))
        num_prompt, num_output = lengths
        planned.append(Planned(at_s, min(num_prompt, 6000), min(num_output, 2000)))
    return planned


def preempting(text):
    """A graph whose critical requests take the places of background work."""
    sort = "{op: policy_sort, policy: priority, preempts: {critical: low}"
    return text.replace("{op: policy_sort, policy: fifo", sort)


def background_workload(seconds, *, load=1.5, seed=3):
    """Background work at `load` times what two engines of 8 places serve, and a critical request
    every second. An answer takes about 2.2 s of a place.
    """
    draw, at_s, planned = Random(seed), 0.0, []
    while at_s < seconds:
        at_s += draw.expovariate(load * 16 / 2.2)
        num_output = 150 + draw.randrange(100)
        planned.append(Planned(at_s, 200, num_output, priority=PRIORITIES["background"]))
    critical = PRIORITIES["critical"]
    planned += [Planned(0.5 + at_s, 200, 20, priority=critical) for at_s in range(int(seconds))]
    return sorted(planned, key=lambda one: one.at_s)


def request_of(number, planned):
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=TracePrompt(number, planned.num_prompt, planned.block_ids),
        sampling=Sampling(max_tokens=planned.num_output, ignore_eos=True, seed=1),
        stamps=Stamps(arrived_s=planned.at_s),
        priority=planned.priority,
    )


class Simulation:
    """A graph in simulated time. `run` plays a workload to its end."""

    def __init__(self, text, options=OPTIONS, *, replicas=2, block_len=0):
        graph = load(text, file="graph.yaml").graph
        self.timeline, hasher, self.outcome = Timeline(), TraceHasher(), Outcome()
        self.links = Links(self.timeline, dict.fromkeys(graph.engines, options.kv_bytes_per_s))
        self.engines = {
            name: tuple(
                open_simulated(
                    options,
                    EngineReplica(name, number),
                    self.timeline,
                    self.links,
                    hasher,
                    block_len=block_len,
                )
                for number in range(replicas)
            )
            for name in graph.engines
        }
        facts = {name: every[0].facts for name, every in self.engines.items()}
        counts = dict.fromkeys(graph.engines, replicas)
        ready = plan(graph, RESOLVER, counts, facts=facts, hasher=hasher)
        self.executor = SimulationExecutor(
            ready,
            lambda item: self.outcome.deliver(self.timeline.now, item),
            self.timeline,
            engines=self.engines,
            record=self.outcome.record,
        )

    def at(self, planned, number):
        self.timeline.at(planned.at_s, lambda: self.executor.arrive(request_of(number, planned)))

    def nodes(self, engine):
        """The operators that use an engine."""
        return self.executor.plan.nodes_of(engine)

    def run(self, workload):
        for number, planned in enumerate(workload):
            self.at(planned, number)
        self.timeline.run()
        self.executor.core.ledger.check()
        assert self.executor.core.is_at_rest
        for engine in (one for every in self.engines.values() for one in every):
            assert engine.load.num_leased_blocks == 0
        return self.outcome


def live(text, workload, options=OPTIONS, *, replicas=2):
    """The outcome of the same graph under trio's mock clock, with engines that step."""
    outcome = Outcome()

    async def main():
        graph = load(text, file="graph.yaml").graph
        engines = {
            name: tuple(open_modelled(options, name=name, replica=n) for n in range(replicas))
            for name in graph.engines
        }
        facts = {name: every[0].facts for name, every in engines.items()}
        ready = plan(graph, RESOLVER, dict.fromkeys(graph.engines, replicas), facts=facts)
        executor = TasksExecutor(
            ready,
            lambda item: outcome.deliver(trio.current_time(), item),
            engines=engines,
            record=outcome.record,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(executor.run)
            for number, planned in enumerate(workload):
                await trio.sleep_until(planned.at_s)
                request = request_of(number, planned)
                ids = tuple(request.prompt_token_ids)
                nursery.start_soon(executor.submit, replace(request, prompt_token_ids=ids))
            await executor.idle()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return outcome


def decision_log_of(outcome, text):
    """The events of a run as a decision log."""
    file = BytesIO()
    header = Header(graph=to_msgpack(Simulation(text).executor.plan.graph), engines={})
    writer = DecisionWriter(file, header, 1 << 30)
    for decision in outcome.events:
        writer.record(*decision)
    file.seek(0)
    return file


def logged_paths(outcome, text):
    return list(request_paths(DecisionReader(decision_log_of(outcome, text))))
