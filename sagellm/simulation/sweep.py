"""Sweeps: one simulation for each combination of values, in as many processes as asked.

`python -m sagellm.simulation.sweep` is one of these processes: a point on stdin, figures on stdout.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from msgspec import structs

from sagellm.extensions import import_named
from sagellm.graphs.text.codec import from_msgpack, to_msgpack
from sagellm.graphs.text.yaml import Document
from sagellm.load.report import Objective
from sagellm.load.traces import PlannedRequest
from sagellm.runtime.simulation.timeline import SimulationError
from sagellm.simulation.faults import ReplicaFault
from sagellm.simulation.figures import SimulationSummary, summarise
from sagellm.simulation.simulation_run import (
    SimulationPoint,
    modelled_graph,
    simulate,
)

UserImport: TypeAlias = tuple[str, str]  # the user's module or file, and the folder of its path
_SHARES_OF_PROCESS = 4  # so that none waits long for the slowest
SPEEDUP = "speedup"  # the axis that is no option of the graph: how fast the workload is played


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """A simulation, the values that distinguish it in its sweep, and what is measured."""

    values: Mapping[str, Any]
    point: SimulationPoint
    objective: Objective | None = None
    prices: Mapping[str, float] = field(default_factory=dict)


# Simulates points, in order.
MeasurePoints: TypeAlias = Callable[[Sequence[SweepPoint]], list[SimulationSummary]]


def sweep_points(base: SweepPoint, axes: Mapping[str, Sequence[Any]]) -> Iterator[SweepPoint]:
    """The points of all combinations of the values of `axes`, by option of the graph or SPEEDUP."""
    for chosen in product(*axes.values()):
        values = dict(zip(axes, chosen, strict=True))
        overrides = {name: value for name, value in values.items() if name != SPEEDUP}
        point = replace(base.point, overrides={**base.point.overrides, **overrides})
        if SPEEDUP in values:
            speedup = float(values[SPEEDUP])
            workload = [structs.replace(one, at_s=one.at_s / speedup) for one in point.workload]
            point = replace(point, workload=workload)
        yield replace(base, values=values, point=point)


def measure(point: SweepPoint) -> SimulationSummary:
    return summarise(simulate(point.point), point.objective, point.prices)


def measure_all(
    points: Sequence[SweepPoint],
    num_processes: int,
    imports: Sequence[UserImport],
    on_end: Callable[[], None],
) -> list[SimulationSummary]:
    """Measure every point, in order. `imports`: the user's code that graphs use. `on_end` is called
    after each point. Raises the errors of `simulate`.
    """
    for point in points:
        modelled_graph(point.point)  # a wrong point is refused before any runs
    if num_processes == 1:
        return [_ended(measure(point), on_end) for point in points]
    with ThreadPoolExecutor(num_processes) as threads:
        shares = _shares(points, num_processes)
        running = [threads.submit(_measure_elsewhere, share, imports) for share in shares]
        return [_ended(summary, on_end) for one in running for summary in one.result()]


def _shares(points: Sequence[SweepPoint], num_processes: int) -> Iterator[Sequence[SweepPoint]]:
    """The points of each process, in order: one each, or several where there are many, because a
    process takes time to start.
    """
    size = ceil(len(points) / (num_processes * _SHARES_OF_PROCESS))
    yield from (points[start : start + size] for start in range(0, len(points), size))


def _ended(summary: SimulationSummary, on_end: Callable[[], None]) -> SimulationSummary:
    on_end()
    return summary


class _Job(msgspec.Struct):
    """A point for another process, with the user's code."""

    imports: list[UserImport]
    graph: bytes
    workload: list[PlannedRequest]
    overrides: dict[str, Any]
    profile: str
    seed: int
    link_latency_s: float
    faults: list[ReplicaFault]
    objective: Objective | None
    prices: dict[str, float]


def _measure_elsewhere(
    points: Sequence[SweepPoint], imports: Sequence[UserImport]
) -> list[SimulationSummary]:
    """MeasurePoints points in a process of its own."""
    jobs = [_job(one, imports) for one in points]
    command = [sys.executable, "-m", "sagellm.simulation.sweep"]
    done = subprocess.run(
        command, input=msgspec.msgpack.encode(jobs), stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise SimulationError(f"the process of a point ended with code {done.returncode}")
    return msgspec.msgpack.decode(done.stdout, type=list[SimulationSummary])


def _job(point: SweepPoint, imports: Sequence[UserImport]) -> _Job:
    one = point.point
    return _Job(
        list(imports),
        to_msgpack(one.document.graph),
        list(one.workload),
        dict(one.overrides),
        one.profile,
        one.seed,
        one.link_latency_s,
        list(one.faults),
        point.objective,
        dict(point.prices),
    )


def _work(content: bytes) -> bytes:
    """MeasurePoints the points of jobs, and return their figures."""
    jobs = msgspec.msgpack.decode(content, type=list[_Job])
    return msgspec.msgpack.encode([measure(_point(job)) for job in jobs])


def _point(job: _Job) -> SweepPoint:
    for name, folder in job.imports:
        import_named(name, Path(folder))
    point = SimulationPoint(
        Document(from_msgpack(job.graph), {}),
        job.workload,
        job.overrides,
        job.profile,
        job.seed,
        job.link_latency_s,
        tuple(job.faults),
    )
    return SweepPoint({}, point, job.objective, job.prices)


if __name__ == "__main__":
    sys.stdout.buffer.write(_work(sys.stdin.buffer.read()))
