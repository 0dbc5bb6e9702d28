"""Sweeps: one simulation for each combination of values, in as many processes as asked."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from msgspec import structs

from sagellm.load.report import Objective
from sagellm.simulation.figures import SimulationSummary, summarise
from sagellm.simulation.simulation_run import SimulatedRun, SimulationPoint, simulate

SPEEDUP = "speedup"  # the axis that is no option of the graph: how fast the workload is played


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """A simulation, the values that distinguish it in its sweep, and what is measured."""

    values: Mapping[str, Any]
    point: SimulationPoint
    objective: Objective | None = None
    prices: Mapping[str, float] = field(default_factory=dict)


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
    return summarise(run_of(point), point.objective, point.prices)


def run_of(point: SweepPoint) -> SimulatedRun:
    return simulate(point.point)


def measure_all(
    points: Sequence[SweepPoint],
    num_processes: int,
    prepare: Callable[[], None],
    on_end: Callable[[], None],
) -> list[SimulationSummary]:
    """Measure every point, in order. `prepare` runs first in each process: it imports what graphs
    use. `on_end` is called after each point.
    """
    if num_processes <= 1 or len(points) <= 1:
        found = []
        for point in points:
            found.append(measure(point))
            on_end()
        return found
    context = multiprocessing.get_context("spawn")  # a fork would copy threads of libraries
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=prepare) as pool:
        running = [pool.submit(measure, point) for point in points]
        for one in running:
            one.add_done_callback(lambda _: on_end())
        return [one.result() for one in running]
