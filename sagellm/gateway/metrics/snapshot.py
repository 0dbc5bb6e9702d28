"""A snapshot of the graph for one scrape, and constructors of metric families."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from sagellm.gateway.metrics.meters import Counts
from sagellm.graphs.sections import scaled_engines
from sagellm.runtime.cluster.child_process import BLAMES, Restarts
from sagellm.runtime.cluster.worker import Worker
from sagellm.runtime.containers import Buckets
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.experiments import ExperimentTally
from sagellm.runtime.executors.reading import Reading, Shares
from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.port import CountingSteps, Engine, EngineFacts, EngineHealth, EngineLoad

Labels: TypeAlias = Mapping[str, str]
Values: TypeAlias = Iterable[tuple[Labels, float]]


def counter(name: str, documentation: str, values: Values) -> Metric:
    """Return a counter family. `name` must not end with `_total`, which is added."""
    family = CounterMetricFamily(name, documentation)
    for labels, value in values:
        family.add_sample(f"{name}_total", dict(labels), value)
    return family


def gauge(name: str, documentation: str, values: Values) -> Metric:
    """Return a gauge family."""
    family = GaugeMetricFamily(name, documentation)
    for labels, value in values:
        family.add_sample(name, dict(labels), value)
    return family


def histogram(
    name: str,
    documentation: str,
    values: Iterable[tuple[Labels, Buckets]],
    only: Collection[float] | None = None,
) -> Metric:
    """Return a histogram family. `only`: the bounds to show, a subset of the buckets' bounds."""
    family = HistogramMetricFamily(name, documentation)
    for labels, buckets in values:
        passed = 0
        for bound, passed in buckets.cumulative():
            if only is not None and bound not in only and bound != float("inf"):
                continue
            family.add_sample(f"{name}_bucket", {**labels, "le": _text(bound)}, passed)
        family.add_sample(f"{name}_count", dict(labels), passed)
        family.add_sample(f"{name}_sum", dict(labels), buckets.total)
    return family


def _text(bound: float) -> str:
    """Return a bound as Go formats it, because scrapers compare bounds as text."""
    return "+Inf" if bound == float("inf") else str(float(bound))


@runtime_checkable
class Replaceable(Protocol):
    """An engine in a worker process, which may be lost and replaced."""

    num_lives: int
    is_removed: bool

    @property
    def is_lost(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class EngineReading:
    """The state of one replica of an engine, at the time of a snapshot."""

    name: str
    replica: int
    facts: EngineFacts
    load: EngineLoad
    health: EngineHealth
    step_tokens: Buckets | None
    is_up: bool
    num_restarts: int
    is_ejected: bool
    num_ejections: int
    deaths: Mapping[str, int]  # blame -> deaths of the replica's workers
    is_failing: bool
    num_known_blocks: int  # cached prefix blocks that routers know

    @property
    def kv_usage(self) -> float:
        """The share of the pool's blocks that is leased, 0 to 1."""
        load = self.load
        return load.num_leased_blocks / load.num_blocks if load.num_blocks else 0.0


@dataclass(frozen=True, slots=True)
class ModelReading:
    """The state of one model, at the time of a snapshot.

    `name` is the first name of the model. `num_open` counts its open choices. An engine that serves
    two models is in both readings.
    """

    name: str
    num_open: int
    engines: tuple[EngineReading, ...]

    @property
    def num_running(self) -> int:
        return sum(engine.load.num_running for engine in self.engines)

    @property
    def num_waiting(self) -> int:
        """The open choices that no engine computes: they are in a queue or in a KV transfer."""
        return max(self.num_open - self.num_running, 0)

    @property
    def kv_usage(self) -> float:
        """The usage of the model's fullest KV pool, 0 to 1."""
        return max((engine.kv_usage for engine in self.engines), default=0.0)


@dataclass(frozen=True, slots=True)
class ShadowReading:
    """The shadow of an operator, at the time of a snapshot. `kind`: what it decides about."""

    node: str
    kind: str
    num_decisions: int
    is_off: bool


@dataclass(frozen=True, slots=True)
class ScalingReading:
    """An engine whose number of replicas an operator changes. `changes`: their number, by reason.

    `num_ready`: replicas that are up.
    """

    engine: str
    num_wanted: int
    num_ready: int
    changes: Mapping[str, int]
    num_failed: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a graph at one moment, read on the session's loop.

    `counts` are by model name. `shares` are by the node and the replica of an operator.
    """

    graph: str
    models: tuple[ModelReading, ...]
    counts: Mapping[str, Counts]
    reading: Reading
    shares: Mapping[tuple[str, int], Shares]
    engines: tuple[EngineReading, ...]
    graph_lag: Buckets
    num_migrated: int
    migration_gaps: Buckets
    shadows: tuple[ShadowReading, ...] = ()
    tallies: tuple[ExperimentTally, ...] = ()
    scalings: tuple[ScalingReading, ...] = ()


def read_shadows(core: Core) -> tuple[ShadowReading, ...]:
    """Return one reading for each operator with a shadow."""
    found = core.experiments
    if found is None:
        return ()
    return tuple(
        ShadowReading(node, kind, found.num_decisions(node), found.fault(node) is not None)
        for node, kind in found.shadows.items()
    )


def read_tallies(core: Core) -> tuple[ExperimentTally, ...]:
    """Return copies of the tallies of arms and shadows."""
    found = core.experiments
    return () if found is None else tuple(one.copy() for one in found.tallies.values())


def read_engines(
    executor: TasksExecutor, workers: Iterable[Worker] = ()
) -> tuple[EngineReading, ...]:
    """Return one reading for each replica that was not removed."""
    lives = {(worker.engine_name, worker.replica): worker.restarts for worker in workers}
    return tuple(
        _reading(name, replica, engine, executor.core, lives.get((name, replica)))
        for name, replicas in executor.engines.items()
        for replica, engine in enumerate(replicas)
        if not (isinstance(engine, Replaceable) and engine.is_removed)
    )


def read_scalings(
    executor: TasksExecutor, engines: Collection[EngineReading]
) -> tuple[ScalingReading, ...]:
    """Return one reading for each engine that an operator scales."""
    found = []
    for name in scaled_engines(executor.plan.graph):
        meter = executor.core.meter.scaling(name)
        replicas = [one for one in engines if one.name == name]
        wanted, ready = meter.num_wanted or len(replicas), sum(one.is_up for one in replicas)
        found.append(ScalingReading(name, wanted, ready, dict(meter.changes), meter.num_failed))
    return tuple(found)


def _reading(
    name: str, replica: int, engine: Engine, core: Core, lives: Restarts | None
) -> EngineReading:
    outliers = core.outliers
    # Copied: another thread may read the snapshot while the engine counts on.
    steps = engine.step_tokens.copy() if isinstance(engine, CountingSteps) else None
    worker = engine if isinstance(engine, Replaceable) else None
    return EngineReading(
        name,
        replica,
        engine.facts,
        engine.load,
        engine.health,
        steps,
        is_up=worker is None or not worker.is_lost,
        num_restarts=0 if worker is None else worker.num_lives - 1,
        is_ejected=outliers.is_ejected((name, replica)),
        num_ejections=outliers.num_ejections.get((name, replica), 0),
        deaths={blame: lives.deaths[blame] for blame in BLAMES} if lives else {},
        is_failing=lives is not None and lives.is_failing,
        num_known_blocks=core.prefixes.num_blocks_of(name, replica),
    )
