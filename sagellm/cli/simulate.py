"""`sagellm simulate`: runs a graph in simulated time, over a trace."""

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from sagellm.cli.errors import Failure, simulation_failure
from sagellm.cli.graph_argument import (
    Assignments,
    Imports,
    choose_graph,
    parse_assignments,
)
from sagellm.cli.plotting import plotter, request_progress
from sagellm.cli.replay_options import ReplayOptions, read_requests
from sagellm.graphs.ir import Graph as FrozenGraph
from sagellm.load.report import Objective
from sagellm.load.traces import FORMATS_FIX, PlannedRequest
from sagellm.opening.decisions import DecisionFile
from sagellm.opening.sources import graph_file
from sagellm.runtime.simulation.timeline import SimulationError
from sagellm.simulation.faults import ReplicaFault
from sagellm.simulation.figures import (
    SimulationSummary,
    over_seeds,
    show,
    show_sweep,
    summarise,
    write_csv,
)
from sagellm.simulation.simulation_run import SimulationPoint, simulate
from sagellm.simulation.sweep import SPEEDUP, SweepPoint, UserImport, measure_all, sweep_points

_POSITIVE, _COUNT = Number(gt=0), Number(gte=1)
_WIDTH = 200
_PLOTS = "sagellm.simulation.pictures"
_ESTIMATED = ("ttft_ms.p50", "ttft_ms.p99", "tpot_ms.p50", "goodput_rps", "requests_per_s")


@Parameter(name="*", group="Workload")
@dataclass(frozen=True, kw_only=True)
class SimulatedLoad:
    """The requests, and when they arrive."""

    trace: str
    """A trace (docs/serving.md lists the formats), or synthetic:rate=8,requests=1000,..."""

    num_requests: Annotated[int | None, Parameter(validator=_COUNT)] = None
    """Only the first so many requests."""

    replay: ReplayOptions = field(default_factory=ReplayOptions)
    """The changes of the trace."""


@Parameter(name="*", group="Results")
@dataclass(frozen=True, kw_only=True)
class SimulationResults:
    """The objective, and the results that are printed and written."""

    slo_ttft: Annotated[float | None, Parameter(validator=_POSITIVE)] = None
    """Goodput: the first token within so many seconds."""

    slo_itl: Annotated[float | None, Parameter(validator=_POSITIVE)] = None
    """Goodput: a mean of so many seconds for each token after the first."""

    price: tuple[str, ...] = ()
    """The price of a replica's hour, as ENGINE=2.5; may be repeated [default: 1]."""

    csv: Path | None = None
    """A file with one line for each request; of several seeds, those of the first."""

    plot: Path | None = None
    """A picture: distributions, requests over time and phases (of the first seed); of a sweep,
    goodput and TTFT.
    """

    decisions: Path | None = None
    """A log of every decision, for `sagellm replay`."""

    json: bool = False
    """Print the figures as JSON: one object, or for a sweep a list."""

    @property
    def objective(self) -> Objective | None:
        if self.slo_ttft is None and self.slo_itl is None:
            return None
        return Objective(self.slo_ttft, self.slo_itl)


def run(
    graph: str,
    /,
    *,
    load: SimulatedLoad,
    set_: Assignments = (),
    import_: Imports = (),
    profile: str = "",
    seeds: Annotated[int, Parameter(validator=_COUNT)] = 1,
    sweep: tuple[str, ...] = (),
    processes: Annotated[int, Parameter(validator=_COUNT)] = 1,
    link_latency: Annotated[float, Parameter(validator=Number(gte=0, lt=3600))] = 0.0,
    fault: tuple[str, ...] = (),
    results: SimulationResults = SimulationResults(),
) -> int:
    """Run a graph in simulated time: its own core and operators, over models of its engines.

    Equal arguments give equal figures on any machine.

    Parameters
    ----------
    graph
        A graph file, or a shipped graph.
    set_
        Change an option of the graph, as sort.policy=fifo; may be repeated.
    profile
        The cost model of engines that compute: a name, or a file (docs/profiles.md).
    seeds
        Run with so many seeds, of random decisions and of step times within the spread of a
        measured profile, and give means with standard deviations and intervals.
    sweep
        Run with each of several values, as sort.policy=fifo,slo_aware or speedup=1,2,4. May be
        repeated: then every combination runs.
    processes
        Run so many points of a sweep at a time.
    link_latency
        Seconds before a transfer of KV blocks begins.
    fault
        Let a replica die, as g:1@30+5: replica 1 of engine g, at 30 s, back 5 s later. May be
        repeated.
    """
    _check(seeds, sweep, processes, results)
    plots = None if results.plot is None else _plotter(results.plot)
    chosen, _ = choose_graph(graph, None, import_)
    workload = read_load(load)
    decisions = None if results.decisions is None else DecisionFile(results.decisions)
    point = SimulationPoint(
        chosen.document,
        workload,
        parse_assignments(set_),
        profile,
        link_latency_s=link_latency,
        faults=tuple(map(_fault, fault)),
        decisions=decisions,
    )
    base = SweepPoint({}, point, results.objective, _prices(results.price, chosen.ir.engines))
    with simulation_failures(graph):
        if sweep:
            points = list(sweep_points(base, _axes(sweep)))
            imports = user_imports(graph, chosen.ir, import_)
            _run_sweep(points, processes, imports, results, plots)
        else:
            _run_seeds(base, seeds, results, plots)
    return 0


def read_load(load: SimulatedLoad) -> list[PlannedRequest]:
    """The requests of a simulation. Raises Failure."""
    try:
        return read_requests(load.trace, load.replay)[: load.num_requests]
    except OSError as error:
        raise Failure(f"{error.strerror}", FORMATS_FIX, load.trace) from None


def _run_sweep(
    points: list[SweepPoint],
    processes: int,
    imports: list[UserImport],
    results: SimulationResults,
    plots: Any,
) -> None:
    with request_progress(len(points), "simulations") as advance:
        found = measure_all(points, processes, imports, lambda: advance(None))
    _show_sweep(points, found, results)
    if plots is not None:
        plots.plot_sweep(results.plot, [dict(one.values) for one in points], found)


def user_imports(name: str, graph: FrozenGraph, given: tuple[str, ...]) -> list[UserImport]:
    """The imports of a graph, for another process, each with the folder of its path."""
    own = graph.attrs.get("imports", ())
    folder = str(graph_file(name).parent)
    found = [(str(one), folder) for one in own] if isinstance(own, tuple) else []
    return found + [(one, str(Path.cwd())) for one in given]


def _run_seeds(base: SweepPoint, seeds: int, results: SimulationResults, plots: Any) -> None:
    summaries: list[SimulationSummary] = []
    began_s = time.perf_counter()
    with request_progress(seeds * len(base.point.workload)) as advance:
        for seed in range(seeds):
            found = simulate(replace(base.point, seed=seed), advance)
            summaries.append(summarise(found, base.objective, base.prices))
            if results.csv is not None and not seed:
                write_csv(results.csv, found.requests)
            if plots is not None and not seed:
                plots.plot_run(results.plot, found.requests, base.objective)
    _show(summaries, time.perf_counter() - began_s, results)


def _show(summaries: list[SimulationSummary], took_s: float, results: SimulationResults) -> None:
    estimates = over_seeds(summaries) if len(summaries) > 1 else {}
    if results.json:
        whole = {**msgspec.to_builtins(summaries[0]), "seeds": len(summaries)}
        if estimates:
            whole["estimates"] = msgspec.to_builtins(estimates)
        print(msgspec.json.encode(whole).decode())
        return
    console = Console(highlight=False, soft_wrap=True)
    show(console, summaries[0], took_s / len(summaries))
    for name in _ESTIMATED:
        if name in estimates:
            one = estimates[name]
            interval = f"{one.low:.2f} to {one.high:.2f}"
            console.print(
                f"{name}: {one.mean:.2f} +- {one.deviation:.2f}, {interval} over the seeds"
            )


def _show_sweep(
    points: Sequence[SweepPoint], summaries: list[SimulationSummary], results: SimulationResults
) -> None:
    if results.json:
        whole = [
            {"values": dict(point.values), **msgspec.to_builtins(summary)}
            for point, summary in zip(points, summaries, strict=True)
        ]
        print(msgspec.json.encode(whole).decode())
        return
    # A file or a pipe has no width: there, no column is cut.
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(highlight=False, soft_wrap=True, width=width)
    show_sweep(console, [one.values for one in points], summaries)


def _check(seeds: int, sweep: tuple[str, ...], processes: int, results: SimulationResults) -> None:
    """Raise Failure for options that contradict each other, or have no effect."""
    if processes > 1 and not sweep:
        raise Failure("--processes runs points of a sweep, and there is none", "add --sweep")
    for path in (results.csv, results.plot, results.decisions):
        if path is not None and not path.resolve().parent.is_dir():
            raise Failure("there is no such folder", "make it first", str(path.parent))
    several = "--seeds" if seeds > 1 else "--sweep" if sweep else ""
    if seeds > 1 and sweep:
        raise Failure("--seeds and --sweep both ask for several runs", "leave one out")
    if results.decisions is not None and several:
        raise Failure(f"--decisions is of one run, and {several} asks for several", "leave one out")
    if results.csv is not None and sweep:
        raise Failure("--csv has the requests of one run, and --sweep makes several", "use --json")


def _plotter(path: Path) -> ModuleType:
    """The module that draws. Raises Failure without matplotlib, and for an unknown suffix."""
    plots = plotter(_PLOTS)
    if path.suffix.lower().lstrip(".") not in plots.PICTURES:
        cause = f"--plot {path}: there is no picture of this kind"
        raise Failure(cause, f"end its name in {' or '.join(plots.PICTURES)}")
    return plots


def _axes(sweep: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """The values of each axis. Raises Failure for one without values."""
    axes: dict[str, tuple[Any, ...]] = {}
    for one in sweep:
        name, _, values = one.partition("=")
        each = [value for value in values.split(",") if value]
        if name in axes:
            raise Failure(f"--sweep {name} is given twice", "list all its values in one")
        if not name or not each or (name != SPEEDUP and "." not in name):
            fix = "write NAME.OPTION=VALUE,VALUE or speedup=1,2"
            raise Failure(f"--sweep {one} does not say what is swept", fix)
        if name == SPEEDUP:
            axes[name] = tuple(_positive(value, one) for value in each)
        else:
            axes[name] = tuple(parse_assignments((f"{name}={value}",))[name] for value in each)
    return axes


_SECONDS = r"\d+(?:\.\d+)?"
_FAULT = re.compile(
    rf"(?P<engine>[^:@+]+):(?P<replica>\d+)@(?P<at_s>{_SECONDS})\+(?P<for_s>{_SECONDS})"
)


def _fault(text: str) -> ReplicaFault:
    """The fault that an option names. Raises Failure."""
    found = _FAULT.fullmatch(text)
    if found is None:
        fix = "write ENGINE:REPLICA@SECONDS+SECONDS, as g:1@30+5"
        raise Failure(f"--fault {text} cannot be read", fix)
    times = float(found["at_s"]), float(found["for_s"])
    return ReplicaFault(found["engine"], int(found["replica"]), *times)


def _positive(text: str, option: str) -> float:
    number = _number(text)
    if number is None or number <= 0:
        raise Failure(f"--sweep {option}: {text} is not a speed", "give a number above 0")
    return number


def _prices(given: tuple[str, ...], engines: Mapping[str, object]) -> Mapping[str, float]:
    """The price of each engine. Raises Failure for one that the graph lacks, and for no number."""
    prices = {}
    for one in given:
        engine, _, text = one.partition("=")
        if engine not in engines:
            raise Failure(f"--price {one}: no such engine", f"there are {', '.join(engines)}")
        price = _number(text)
        if price is None or price < 0:
            raise Failure(f"--price {one}: {text} is not a price", "write ENGINE=NUMBER")
        prices[engine] = price
    return prices


def _number(text: str) -> float | None:
    """A finite number; None for any other text."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None


@contextmanager
def simulation_failures(graph: str) -> Iterator[None]:
    """Raise Failure for what cannot be simulated."""
    try:
        yield
    except SimulationError as error:
        raise simulation_failure(error, graph) from None
