"""Simulated against measured: `python -m benchmarks.simulation_truth measure | compare`."""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec
import trio
from cyclopts import App, Parameter
from msgspec import structs

from benchmarks.command import run_command
from benchmarks.machine import describe
from benchmarks.shape import LLAMA15M
from benchmarks.weights import model_folder
from sagellm import Graph, Sampling
from sagellm.calibration.measuring import others_cpu_s
from sagellm.graphs.text.yaml import load_file
from sagellm.load.report import percentile
from sagellm.load.workload import BLOCK_LEN, PlannedRequest, Prompts, Replay, read_workload
from sagellm.session import Session
from sagellm.simulation.simulation_run import SimulationPoint, simulate

HERE = Path(__file__).parent
GRAPHS = {file.stem: file for file in sorted((HERE / "simulation" / "live").glob("*.yaml"))}
TRUTH = HERE / "results" / "simulation-truth.json"
LOADS = (0.3, 0.6, 0.9)
# How a trace is scaled to a model of 15M parameters on one core.
_CLIPPED = Replay(max_input_len=LLAMA15M.max_len - 256, max_output_len=200)
SCALES = {
    "azure": replace(_CLIPPED, scale_input_len=0.25, scale_output_len=0.25),
    "mooncake": replace(_CLIPPED, scale_input_len=0.1, scale_output_len=0.2),
}
BACKLOG = 300  # requests
APP = App(name="python -m benchmarks.simulation_truth", help=__doc__)

Figures: TypeAlias = dict[str, float]


class Times(NamedTuple):
    """The latencies of one request in seconds, from its arrival."""

    at_s: float
    ttft_s: float
    e2e_s: float


class Cell(msgspec.Struct, frozen=True):
    """The measurements of one cell. `others_cpus`: the CPUs that other programs used meanwhile.
    `requests`: arrival in seconds, tokens of prompt and answer, ids of shared blocks. `times`: TTFT
    and end-to-end time of each request in milliseconds; `again`: those of a second run.
    """

    graph: str
    trace: str
    load: float
    requests_per_s: float
    others_cpus: list[float]
    requests: list[tuple[float, int, int, list[int]]]
    times: list[tuple[float, float]]
    again: list[tuple[float, float]] = []

    @property
    def key(self) -> tuple[str, str, float]:
        return self.graph, self.trace, self.load

    @property
    def workload(self) -> list[PlannedRequest]:
        return [PlannedRequest(*one[:3], block_ids=tuple(one[3])) for one in self.requests]

    def measured(self, times: Sequence[tuple[float, float]]) -> list[Times]:
        pairs = zip(self.requests, times, strict=True)
        return [Times(one[0], ttft / 1e3, e2e / 1e3) for one, (ttft, e2e) in pairs]


class Truth(msgspec.Struct):
    """Measured cells, and how they were measured."""

    command: str
    date: str
    machine: dict[str, Any]
    cells: list[Cell]


@APP.command
def measure(
    traces: tuple[Path, ...],
    /,
    *,
    profile: str,
    graphs: Annotated[tuple[str, ...], Parameter(negative=())] = tuple(GRAPHS),
    loads: Annotated[tuple[float, ...], Parameter(negative=())] = LOADS,
    seconds: float = 20.0,
    repeats: int = 1,
    output: Path = TRUTH,
) -> None:
    """Play traces into a real session of the random 15M model, and keep the times of each request.

    A cell replaces the one that the output has, if other programs used less of the CPUs meanwhile.

    Parameters
    ----------
    traces
        Azure's CSV or Mooncake's JSON lines: the name says how lengths are scaled.
    profile
        Of this machine and model, which tells the rate of load 1.
    graphs
        Of benchmarks/simulation/live; all unless given.
    loads
        Shares of the rate at which a simulation serves a backlog.
    seconds
        How long requests arrive.
    repeats
        1, or 2: the difference of two live runs is the floor of all errors.
    output
        A JSON file.
    """
    for graph in graphs:
        for trace in traces:
            for load in loads:
                cell = measured_cell(graph, trace, load, profile, seconds, repeats)
                print(*cell.key, len(cell.requests), "requests, others", cell.others_cpus)
                keep(output, cell)


@APP.command
def compare(
    *, profile: str, truth: Path = TRUTH, seeds: int = 5, output: Path | None = None
) -> None:
    """Simulate every measured cell, and print the errors.

    Parameters
    ----------
    profile
        A name or a file.
    truth
        What `measure` has written.
    seeds
        Simulations of each cell, for the intervals; the first counts for the errors.
    output
        A JSON file for the figures.
    """
    found = [compared(cell, profile, seeds) for cell in read_truth(truth).cells]
    print("\n".join(table(found)))
    if output is not None:
        output.write_text(json.dumps({"profile": profile, "cells": found}, indent=2) + "\n")


def compared(cell: Cell, profile: str, seeds: int) -> dict[str, Any]:
    """One cell: measured, simulated, and the differences."""
    live = cell.measured(cell.times)
    runs = [simulated(cell.graph, cell.workload, profile, seed) for seed in range(seeds)]
    every = [figures(run) for run in runs]
    found: dict[str, Any] = {
        "graph": cell.graph,
        "trace": cell.trace,
        "load": cell.load,
        "requests": len(live),
        "measured": figures(live),
        "simulated": every[0],
        "over_seeds": {
            name: [min(one[name] for one in every), max(one[name] for one in every)]
            for name in every[0]
        },
        "errors": errors(live, runs[0]),
    }
    if cell.again:
        found["floor"] = errors(live, cell.measured(cell.again))
    return found


def measured_cell(
    graph: str, trace: Path, load: float, profile: str, seconds: float, repeats: int
) -> Cell:
    planned = scaled(trace)
    rate = load * capacity_rps(graph, planned, profile)
    workload = at_rate(planned, rate, seconds)
    runs = [trio.run(live_run, graph, workload) for _ in range(repeats)]
    return Cell(
        graph,
        kind_of(trace),
        load,
        round(rate, 3),
        [round(others, 3) for _, others in runs],
        [(one.at_s, one.input_len, one.output_len, list(one.block_ids)) for one in workload],
        *([in_ms(one) for one in times] for times, _ in runs),
    )


def in_ms(times: Times) -> tuple[float, float]:
    return round(1e3 * times.ttft_s, 2), round(1e3 * times.e2e_s, 2)


def kind_of(trace: Path) -> str:
    for name in SCALES:
        if name in trace.name:
            return name
    raise SystemExit(f"{trace.name}: no scale is known; there are {', '.join(SCALES)}")


def scaled(trace: Path) -> list[PlannedRequest]:
    """The requests of a trace with lengths that fit the model. Only whole blocks are shared."""
    return [
        structs.replace(one, block_ids=one.block_ids[: one.input_len // BLOCK_LEN])
        for one in SCALES[kind_of(trace)].apply(read_workload(str(trace)))
    ]


def capacity_rps(graph: str, planned: Sequence[PlannedRequest], profile: str) -> float:
    """The rate at which a backlog is served."""
    backlog = [structs.replace(one, at_s=0.0) for one in planned[:BACKLOG]]
    return len(backlog) / max(one.e2e_s for one in simulated(graph, backlog, profile, 0))


def at_rate(planned: Sequence[PlannedRequest], rate: float, seconds: float) -> list[PlannedRequest]:
    """The first requests, with the gaps of the trace, at a mean rate for some seconds."""
    num = max(10, round(rate * seconds))
    speed = planned[num - 1].at_s * rate / num
    return [structs.replace(one, at_s=round(one.at_s / speed, 5)) for one in planned[:num]]


def simulated(
    graph: str, workload: Sequence[PlannedRequest], profile: str, seed: int
) -> list[Times]:
    """The simulated requests. No file of the model is needed."""
    document = load_file(GRAPHS[graph])
    options = {
        "kind": "modelled",
        "model": "null",
        "profile": profile,
        "max_model_len": LLAMA15M.max_len,
    }
    names = document.graph.engines
    overrides = {f"{name}.{key}": value for name in names for key, value in options.items()}
    run = simulate(SimulationPoint(document, workload, overrides, seed=seed))
    return [Times(one.arrived_s, one.ttft_s or 0.0, one.e2e_s) for one in run.requests]


async def live_run(graph: str, workload: Sequence[PlannedRequest]) -> tuple[list[Times], float]:
    """Play a workload into a session, in an open loop. Also return the CPUs of other programs."""
    prompts = Prompts("ids", seed=1, vocab_size=LLAMA15M.vocab_size)
    found: dict[int, Times] = {}
    with models_of(graph) as models:
        async with Graph.load(GRAPHS[graph]).open(set=models) as session:
            await warm_up(session)
            tokens = [
                prompts.make(number, one.input_len, one.block_ids)
                for number, one in enumerate(workload)
            ]
            gc.collect()
            gc.freeze()  # as `sagellm` does
            began_s, others_s = trio.current_time() + 0.2, others_cpu_s()

            async def ask(number: int) -> None:
                planned = workload[number]
                times = await times_of(session, tokens[number], planned.output_len)
                found[number] = Times(
                    planned.at_s, *(one - began_s - planned.at_s for one in times)
                )

            async with trio.open_nursery() as nursery:
                token = trio.lowlevel.current_trio_token()

                def send(number: int) -> None:
                    token.run_sync_soon(nursery.start_soon, ask, number)

                offset_s = began_s - trio.current_time() + time.perf_counter()
                arrivals = [offset_s + one.at_s for one in workload]
                await trio.to_thread.run_sync(feed, arrivals, send)
            others = (others_cpu_s() - others_s) / (trio.current_time() - began_s)
    return [found[number] for number in range(len(workload))], others


def feed(arrivals: Sequence[float], send: Callable[[int], None]) -> None:
    """Send each request at its time, in seconds of `perf_counter`, from a thread, as a network
    would: a timer of the event loop would be late by up to a millisecond.
    """
    for number, at_s in enumerate(arrivals):
        time.sleep(max(0.0, at_s - time.perf_counter()))
        send(number)


@contextmanager
def models_of(graph: str) -> Iterator[dict[str, Any]]:
    """The models of the engines of a graph. Each has a folder of its own: engines of one folder
    in one process share a program, and take turns.
    """
    folder = model_folder(LLAMA15M)
    with tempfile.TemporaryDirectory() as place:
        found = {}
        for name in load_file(GRAPHS[graph]).graph.engines:
            own = Path(place) / name / folder.name
            own.parent.mkdir()
            own.symlink_to(folder)
            found[f"{name}.model"] = str(own)
        yield found


async def times_of(session: Session, prompt: Any, output_len: int) -> tuple[float, float]:
    """When the first and the last token of a request were read."""
    sampling = Sampling(max_tokens=output_len, ignore_eos=True)
    async with session.stream(prompt, sampling=sampling) as stream:
        await anext(stream)
        first_s = trio.current_time()
        async for _ in stream:
            pass
    return first_s, trio.current_time()


async def warm_up(session: Session) -> None:
    """Write every block of every pool: memory is slow when first written."""
    draw = Random("warm up")
    engines = [one for every in session.executor.engines.values() for one in every]
    num_tokens = max(one.facts.num_blocks * one.facts.block_size for one in engines)
    length = session.max_model_len - 2
    for _ in range(num_tokens // length + 1):
        await times_of(session, draw.choices(range(LLAMA15M.vocab_size), k=length), 2)


def figures(times: Sequence[Times]) -> Figures:
    """Latencies in milliseconds, and requests a second."""
    found = {}
    for name in ("ttft", "e2e"):
        ordered = sorted(1e3 * getattr(one, f"{name}_s") for one in times)
        for share in (0.5, 0.99):
            found[f"{name}_p{round(100 * share)}_ms"] = round(percentile(ordered, share), 2)
    elapsed_s = max(one.at_s + one.e2e_s for one in times) - times[0].at_s
    found["throughput_rps"] = round(len(times) / elapsed_s, 3)
    return found


def errors(real: Sequence[Times], other: Sequence[Times]) -> Figures:
    """The relative errors of the figures, and the medians of those of single requests."""
    before, after = figures(real), figures(other)
    found = {name: round(after[name] / before[name] - 1, 4) for name in before}
    pairs = list(zip(real, other, strict=True))
    found["each_ttft"] = round(median(abs(b.ttft_s / a.ttft_s - 1) for a, b in pairs), 4)
    found["each_e2e"] = round(median(abs(b.e2e_s / a.e2e_s - 1) for a, b in pairs), 4)
    return found


def table(cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The errors in Markdown; below each cell that was measured twice, the floor."""
    names = list(cells[0]["errors"]) if cells else []
    yield f"| graph | trace | load | requests | {' | '.join(names)} |"
    yield "|---" * (len(names) + 4) + "|"
    for cell in cells:
        shown = " | ".join(f"{cell['errors'][name]:+.1%}" for name in names)
        head = " | ".join(str(cell[name]) for name in ("graph", "trace", "load", "requests"))
        yield f"| {head} | {shown} |"
        if "floor" in cell:
            shown = " | ".join(f"{cell['floor'][name]:+.1%}" for name in names)
            yield f"| | | | live again | {shown} |"


def read_truth(file: Path) -> Truth:
    return msgspec.json.decode(file.read_bytes(), type=Truth)


def keep(output: Path, cell: Cell) -> None:
    """Write a cell beside the others of a file; one that was disturbed more is replaced."""
    cells = read_truth(output).cells if output.exists() else []
    before = {one.key: one for one in cells}
    old = before.get(cell.key)
    if old is None or max(cell.others_cpus) <= max(old.others_cpus):
        before[cell.key] = cell
    command = ["python -m benchmarks.simulation_truth", *map(short, sys.argv[1:])]
    ordered = [before[key] for key in sorted(before)]
    date = datetime.now(UTC).date().isoformat()
    machine = json.loads(json.dumps(describe()))  # texts of a class of torch become texts
    truth = Truth(" ".join(command), date, machine, ordered)
    output.write_bytes(msgspec.json.encode(truth) + b"\n")


def short(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if "/" in argument else argument


if __name__ == "__main__":
    sys.exit(run_command(APP))
