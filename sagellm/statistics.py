"""The statistics and the health of an open graph, as immutable records."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagellm.operators.metrics_sink import statistics as sink_statistics
from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.port import EngineHealth, EngineLoad

if TYPE_CHECKING:
    from sagellm.runtime.cluster.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts and latencies since the session opened.

    Operator `metrics_sink` measures latencies: they are None before its first measurement.
    """

    elapsed_s: float
    num_requests: int  # each choice of a request counts
    num_open: int
    ended: Mapping[str, int]  # finish reason -> number of choices
    num_tokens: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    peak_kv_ratio: float  # highest share of leased blocks that any pool has had
    num_preemptions: int
    engines: Mapping[str, tuple[EngineLoad, ...]]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0


def statistics_of(executor: TasksExecutor, *, elapsed_s: float) -> Statistics:
    ledger = executor.core.ledger
    loads = {
        name: tuple(engine.load for engine in replicas)
        for name, replicas in executor.engines.items()
    }
    every = [load for replicas in loads.values() for load in replicas]
    sinks = [node.name for node in executor.plan.graph.nodes if node.op == "metrics_sink"]
    seen = sink_statistics(executor.core.logic_graph.cells[sinks[0]].state) if sinks else None
    return Statistics(
        elapsed_s=elapsed_s,
        num_requests=ledger.num_accepted,
        num_open=ledger.num_open,
        ended=dict(ledger.ended),
        num_tokens=ledger.num_tokens,
        ttft_p50_s=seen.ttft_p50_s if seen else None,
        ttft_p99_s=seen.ttft_p99_s if seen else None,
        itl_p50_s=seen.itl_p50_s if seen else None,
        itl_p99_s=seen.itl_p99_s if seen else None,
        peak_kv_ratio=max((_peak(load) for load in every), default=0.0),
        num_preemptions=sum(load.num_preemptions for load in every),
        engines=loads,
    )


def _peak(load: EngineLoad) -> float:
    return load.peak_leased_blocks / load.num_blocks if load.num_blocks else 0.0


@dataclass(frozen=True, slots=True)
class Health:
    """Whether an open graph makes progress.

    `num_open` counts choices that have not ended. `engines` has one record for each replica.
    `missing` is a text about the engines that have no serving worker and that the graph cannot
    route around; it is empty if there are none.
    """

    num_open: int
    is_stopped: bool  # the graph has ended or failed, and accepts no more requests
    engines: Mapping[str, tuple[EngineHealth, ...]]
    missing: str = ""

    @property
    def is_hung(self) -> bool:
        """Whether any replica has work and makes no progress."""
        return any(engine.is_hung for replicas in self.engines.values() for engine in replicas)


def health_of(executor: TasksExecutor, supervisor: "Supervisor | None" = None) -> Health:
    engines = {
        name: tuple(engine.health for engine in replicas)
        for name, replicas in executor.engines.items()
    }
    plan, found = executor.core.plan, supervisor.missing if supervisor is not None else {}
    missing = "; ".join(why for name, why in found.items() if not plan.can_avoid(name))
    return Health(executor.core.ledger.num_open, executor.is_stopped, engines, missing)
