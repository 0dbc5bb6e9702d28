"""`sagellm explain`: what bounds a graph, with a simulation to confirm each claim."""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sagellm.cli.errors import Failure
from sagellm.cli.graph_argument import (
    Assignments,
    Imports,
    choose_graph,
    engine_failures,
    parse_assignments,
)
from sagellm.cli.plotting import request_progress
from sagellm.cli.simulate import SimulatedLoad, read_load, simulation_failures, user_imports
from sagellm.planning.bottlenecks import Explanation, ResourceGain, explain
from sagellm.planning.service_level import PlanError, ServiceLevel, parse_service_level
from sagellm.simulation.figures import SimulationSummary
from sagellm.simulation.simulation_run import SimulationPoint
from sagellm.simulation.sweep import MeasurePoints, SweepPoint, UserImport, measure_all

_WIDTH = 200


def run(
    graph: str,
    /,
    *,
    slo: str,
    load: SimulatedLoad,
    set_: Assignments = (),
    import_: Imports = (),
    profile: str = "",
    processes: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    json: bool = False,
) -> int:
    """Say what bounds the goodput of a graph on a trace.

    The graph is simulated as it is, and again with each of its resources doubled: arithmetic,
    memory bandwidth, KV capacity, limits of a step, replicas, links. The resources are listed by
    what they gain.

    Parameters
    ----------
    graph
        A graph file, as `sagellm plan --output` writes, or a shipped graph.
    slo
        Bounds in seconds, as ttft=2,tpot=0.05.
    set_
        Change an option of the graph, as sort.policy=fifo; may be repeated.
    profile
        The cost model of engines that compute: a name, or a file (docs/profiles.md).
    processes
        Run so many simulations at a time.
    json
        Print one JSON object.
    """
    level = read_service_level(slo)
    chosen, _ = choose_graph(graph, None, import_)
    workload = read_load(load)
    point = SimulationPoint(chosen.document, workload, parse_assignments(set_), profile)
    imports = user_imports(graph, chosen.ir, import_)
    with simulation_failures(graph), engine_failures(graph):
        found = explained(SweepPoint({}, point, level.objective), level, processes, imports)
    if json:
        print(msgspec.json.encode(explanation_fields(found)).decode())
    else:
        show_explanation(wide_console(), found)
    return 0


def read_service_level(text: str) -> ServiceLevel:
    """The level that `--slo` names. Raises Failure."""
    with plan_failures():
        return parse_service_level(text)


@contextmanager
def plan_failures(where: str = "") -> Iterator[None]:
    """Raise Failure for what cannot be planned."""
    try:
        yield
    except PlanError as error:
        raise Failure(str(error), error.fix, where) from None


def explained(
    point: SweepPoint, level: ServiceLevel, processes: int, imports: Sequence[UserImport] = ()
) -> Explanation:
    """The bounds of a point, with changed profiles in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="sagellm-explain-") as folder:
        return explain(point, level, measurer(processes, imports), Path(folder))


def measurer(processes: int, imports: Sequence[UserImport] = ()) -> MeasurePoints:
    """A function that simulates points, and shows its progress on stderr."""

    def measure(points: Sequence[SweepPoint]) -> list[SimulationSummary]:
        with request_progress(len(points), "simulations") as advance:
            return measure_all(points, processes, imports, lambda: advance(None))

    return measure


def wide_console() -> Console:
    """A console that cuts no column of a table in a file or a pipe, which have no width."""
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(highlight=False, soft_wrap=True, width=width)


def show_explanation(console: Console, found: Explanation) -> None:
    """Print what bounds the graph, and a line for each resource."""
    attained = found.summary.slo_attainment or 0.0
    console.print(f"attained:  {attained:.1%}, {found.summary.goodput_rps or 0.0:.2f} requests/s")
    missed = ", ".join(f"{name.upper()} {share:.1%}" for name, share in found.missed.items())
    console.print(f"missed:    {missed} of requests")
    phases = ", ".join(f"{name} {ms:.1f}" for name, ms in found.summary.phases_ms.items())
    console.print(f"phases:    {phases} ms on average")
    console.print(f"bound by:  {verdict(found)}", markup=False)
    names = ("resource", "change", "goodput", "attained", "p99", "as simulated")
    table = Table(*names, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for one in found.effects:
        table.add_row(*_row(one))
    console.print(table)


def verdict(found: Explanation) -> str:
    """The bound of the graph, in one line."""
    bound = found.bound
    if bound is None:
        return "no resource alone: twice as much of any gains less than 1 %"
    change = f"{bound.change.resource} ({bound.change.evidence or bound.change.change})"
    if bound.gain > 0:
        return f"{change}: {bound.change.change} gives {bound.gain:+.1%} goodput"
    return (
        f"{change}: {bound.change.change} gives {-bound.relief:+.0%} of the worst p99, no goodput"
    )


def _row(one: ResourceGain) -> Iterable[str]:
    change, attained = one.change, one.summary.slo_attainment or 0.0
    gains = f"{one.gain:+.1%}", f"{attained:.1%}", f"{-one.relief:+.1%}"
    return change.resource, change.change, *gains, change.evidence


def explanation_fields(found: Explanation) -> dict[str, object]:
    """An explanation as JSON."""
    return {
        "attained": found.summary.slo_attainment,
        "goodput_rps": found.summary.goodput_rps,
        "missed": found.missed,
        "phases_ms": found.summary.phases_ms,
        "bound_by": found.bound.change.resource if found.bound else None,
        "resources": [
            {
                "resource": one.change.resource,
                "change": one.change.change,
                "evidence": one.change.evidence,
                "goodput_gain": one.gain,
                "latency_relief": one.relief,
                "attained": one.summary.slo_attainment,
                "goodput_rps": one.summary.goodput_rps,
            }
            for one in found.effects
        ],
    }
