"""Simulated against measured: `python -m benchmarks.simulation_truth`."""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any, NamedTuple

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
from sagellm.runtime.engine.costs.profile import read_profile
from sagellm.runtime.models.folder import resolve_model
from sagellm.session import Session
from sagellm.simulation.simulation_run import SimulationPoint, simulate

HERE = Path(__file__).parent
GRAPHS = {file.stem: file for file in sorted((HERE / "simulation" / "live").glob("*.yaml"))}
LOADS = (0.3, 0.6, 0.9)
# How a trace is scaled to a model of 15M parameters on one core.
SCALES = {
    "azure": Replay(scale_input_len=0.25, scale_output_len=0.25, max_output_len=200),
    "mooncake": Replay(scale_input_len=0.1, scale_output_len=0.2, max_output_len=200),
}
MOST_OTHERS = 0.08  # CPUs: above, a live run is repeated
OURS = LLAMA15M.name
APP = App(name="python -m benchmarks.simulation_truth", help=__doc__)


class Times(NamedTuple):
    """One request, in seconds after the first arrival: planned, first token and last token."""

    at_s: float
    first_s: float
    ended_s: float

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.at_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.at_s


class Live(NamedTuple):
    """A live run. `others`: the CPUs that other programs used meanwhile."""

    times: list[Times]
    others: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What is equal in all cells. `tries`: the most live runs, until other programs are quiet."""

    model: str
    profile: str
    seconds: float
    seeds: int
    repeats: int
    tries: int


@APP.default
def truth(
    traces: tuple[Path, ...],
    /,
    *,
    profile: str,
    model: str = OURS,
    graphs: Annotated[tuple[str, ...], Parameter(negative=())] = tuple(GRAPHS),
    loads: Annotated[tuple[float, ...], Parameter(negative=())] = LOADS,
    seconds: float = 30.0,
    seeds: int = 5,
    repeats: int = 1,
    tries: int = 2,
    output: Path | None = None,
) -> None:
    """Play traces into a real session, simulate them, and compare each request.

    Cells that the output has already are replaced, others are kept: a run may measure a part.

    Parameters
    ----------
    traces
        Azure's CSV or Mooncake's JSON lines: the name says how lengths are scaled.
    profile
        Of this machine and model, as `sagellm calibrate` writes it.
    model
        llama15m, or a model as `sagellm run` takes it.
    graphs
        Of benchmarks/simulation/live; all unless given.
    loads
        Shares of the rate at which the simulation serves a backlog.
    seconds
        How long requests arrive.
    seeds
        Simulations of each cell, for the intervals.
    repeats
        Live runs of each cell; of two, the difference is the floor of all errors.
    tries
        Further live runs, while other programs use the CPUs; the quietest counts.
    output
        A JSON file.
    """
    name = str(model_folder(LLAMA15M)) if model == OURS else model
    setting = Setting(name, profile, seconds, seeds, repeats, tries)
    for graph in graphs:
        for trace in traces:
            for load in loads:
                found = compare(setting, graph, trace, load)
                print(line(found), flush=True)
                if output is not None:
                    keep(output, setting, found)


def compare(setting: Setting, graph: str, trace: Path, load: float) -> dict[str, Any]:
    """One cell: measured, simulated, and their differences."""
    planned = scaled(setting, trace)
    capacity = capacity_rps(setting, graph, planned)
    workload = at_rate(planned, load * capacity, setting.seconds)
    runs = [simulated(setting, graph, workload, seed) for seed in range(setting.seeds)]
    played = [quietest(setting, graph, workload) for _ in range(setting.repeats)]
    lives = [one.times for one in played]
    found = {
        "graph": graph,
        "trace": kind_of(trace),
        "load": load,
        "requests": len(workload),
        "requests_per_s": round(load * capacity, 2),
        "others_cpus": [round(one.others, 3) for one in played],
        "measured": figures(lives[0]),
        "simulated": figures(runs[0]),
        "over_seeds": intervals([figures(run) for run in runs]),
        "errors": errors(lives[0], runs[0]),
    }
    if setting.repeats > 1:
        found["floor"] = errors(lives[0], lives[1])
    return found


def kind_of(trace: Path) -> str:
    for name in SCALES:
        if name in trace.name:
            return name
    raise SystemExit(f"{trace.name}: no scale is known; there are {', '.join(SCALES)}")


def quietest(setting: Setting, graph: str, workload: Sequence[PlannedRequest]) -> Live:
    """The live run that other programs disturbed least; further runs only if they did."""
    found: list[Live] = []
    while not found or (found[-1].others > MOST_OTHERS and len(found) < setting.tries):
        found.append(trio.run(measured, setting, graph, workload))
    return min(found, key=lambda live: live.others)


def scaled(setting: Setting, trace: Path) -> list[PlannedRequest]:
    """The requests of a trace with lengths that fit the model. Only whole blocks are shared."""
    longest = resolve_model(setting.model).facts.max_model_len
    changes = replace(SCALES[kind_of(trace)], max_input_len=longest - 256)
    return list(changes.apply(read_workload(str(trace))))


def capacity_rps(setting: Setting, graph: str, planned: Sequence[PlannedRequest]) -> float:
    """The rate at which a backlog of 300 requests is served."""
    backlog = [structs.replace(one, at_s=0.0) for one in planned[:300]]
    ended = [one.ended_s for one in simulated(setting, graph, backlog, 0)]
    return len(backlog) / max(ended)


def at_rate(planned: Sequence[PlannedRequest], rate: float, seconds: float) -> list[PlannedRequest]:
    """The first requests, with the gaps of the trace, at a mean rate for some seconds."""
    num = max(10, round(rate * seconds))
    chosen = planned[:num]
    speed = chosen[-1].at_s / (num / rate)
    return [structs.replace(one, at_s=one.at_s / speed) for one in chosen]


def simulated(
    setting: Setting, graph: str, workload: Sequence[PlannedRequest], seed: int
) -> list[Times]:
    document = load_file(GRAPHS[graph])
    overrides = {f"{name}.model": setting.model for name in document.graph.engines}
    point = SimulationPoint(document, workload, overrides, setting.profile, seed=seed)
    run = simulate(point)
    found = []
    for one in run.requests:
        assert one.first_s is not None
        found.append(Times(one.arrived_s, one.first_s, one.ended_s))
    return found


async def measured(setting: Setting, graph: str, workload: Sequence[PlannedRequest]) -> Live:
    """Play a workload into a session, in an open loop."""
    vocab_size = resolve_model(setting.model).facts.vocab_size
    prompts = Prompts("ids", seed=1, vocab_size=vocab_size)
    found: list[Times] = [Times(0.0, 0.0, 0.0)] * len(workload)
    with models_of(setting, graph) as models:
        async with Graph.load(GRAPHS[graph]).open(set=models) as session:
            await warm_up(session, vocab_size)
            tokens = [
                prompts.make(number, one.input_len, one.block_ids[: one.input_len // BLOCK_LEN])
                for number, one in enumerate(workload)
            ]
            gc.collect()
            gc.freeze()  # as `sagellm` does
            began_s, others_s = trio.current_time() + 0.2, others_cpu_s()

            async def ask(number: int) -> None:
                output_len = workload[number].output_len
                first_s, ended_s = await times_of(session, tokens[number], output_len)
                at_s = workload[number].at_s
                found[number] = Times(at_s, first_s - began_s, ended_s - began_s)

            async with trio.open_nursery() as nursery:
                token = trio.lowlevel.current_trio_token()

                def send(number: int) -> None:
                    token.run_sync_soon(nursery.start_soon, ask, number)

                offset_s = began_s - trio.current_time() + time.perf_counter()
                arrivals = [offset_s + one.at_s for one in workload]
                await trio.to_thread.run_sync(feed, arrivals, send)
            others = (others_cpu_s() - others_s) / (trio.current_time() - began_s)
    return Live(found, others)


def feed(arrivals: Sequence[float], send: Callable[[int], None]) -> None:
    """Send each request at its time, in seconds of `perf_counter`, from a thread, as a network
    would: a timer of the event loop would be late by up to a millisecond.
    """
    for number, at_s in enumerate(arrivals):
        time.sleep(max(0.0, at_s - time.perf_counter()))
        send(number)


@contextmanager
def models_of(setting: Setting, graph: str) -> Iterator[dict[str, Any]]:
    """The models of the engines of a graph. Each has a folder of its own: engines of one folder
    in one process share a program, and take turns.
    """
    folder = resolve_model(setting.model).path
    assert folder is not None
    with tempfile.TemporaryDirectory() as place:
        found = {}
        for name in load_file(GRAPHS[graph]).graph.engines:
            (Path(place) / name).mkdir()
            own = Path(place) / name / folder.name
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


async def warm_up(session: Session, vocab_size: int) -> None:
    """Write every block of every pool: memory is slow when first written."""
    draw = Random("warm up")
    engines = [one for every in session.executor.engines.values() for one in every]
    num_tokens = max(one.facts.num_blocks * one.facts.block_size for one in engines)
    length = session.max_model_len - 2
    for _ in range(num_tokens // length + 1):
        await times_of(session, draw.choices(range(vocab_size), k=length), 2)


def figures(times: Sequence[Times]) -> dict[str, float]:
    """Latencies in milliseconds, and requests a second."""
    found = {}
    for name in ("ttft", "e2e"):
        ordered = sorted(1e3 * getattr(one, f"{name}_s") for one in times)
        for share in (0.5, 0.99):
            found[f"{name}_p{round(100 * share)}_ms"] = round(percentile(ordered, share), 2)
    elapsed_s = max(one.ended_s for one in times) - times[0].at_s
    found["throughput_rps"] = round(len(times) / elapsed_s, 3)
    return found


def errors(real: Sequence[Times], other: Sequence[Times]) -> dict[str, float]:
    """The relative errors of the figures, and the medians of those of single requests."""
    before, after = figures(real), figures(other)
    found = {name: round(after[name] / before[name] - 1, 4) for name in before}
    pairs = list(zip(real, other, strict=True))
    found["each_ttft"] = round(median(abs(b.ttft_s / a.ttft_s - 1) for a, b in pairs), 4)
    found["each_e2e"] = round(median(abs(b.e2e_s / a.e2e_s - 1) for a, b in pairs), 4)
    return found


def intervals(every: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """The least and the largest of each figure over the seeds."""
    return {
        name: [min(one[name] for one in every), max(one[name] for one in every)]
        for name in every[0]
    }


def line(cell: dict[str, Any]) -> str:
    """A cell as a line of text."""
    shown = [f"{name} {value:+.1%}" for name, value in cell["errors"].items()]
    floor = [f"{name} {value:+.1%}" for name, value in cell.get("floor", {}).items()]
    name = f"{cell['graph']} {cell['trace']} {cell['load']} ({cell['requests']} requests)"
    text = f"{name}, others {cell['others_cpus']}: {', '.join(shown)}"
    return text + (f"\n    live again: {', '.join(floor)}" if floor else "")


def keep(output: Path, setting: Setting, found: dict[str, Any]) -> None:
    """Write a cell to a file, beside the other cells that it has."""
    before = json.loads(output.read_text())["cells"] if output.exists() else []
    kept = [one for one in before if key_of(one) != key_of(found)]
    profile = read_profile(setting.profile)
    record = {
        "command": " ".join(["python -m benchmarks.simulation_truth", *map(short, sys.argv[1:])]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "profile": {"name": profile.name, "machine": profile.machine, "made_on": profile.made_on},
        "cells": sorted([*kept, found], key=key_of),
    }
    output.write_text(json.dumps(record, indent=2) + "\n")


def key_of(cell: dict[str, Any]) -> tuple[str, str, float]:
    return cell["graph"], cell["trace"], cell["load"]


def short(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if "/" in argument else argument


if __name__ == "__main__":
    sys.exit(run_command(APP))
