"""Microseconds of CPU per request and per SSE event: the gateway and the bare server in turns.

The gateway's own cost is what it adds to the graph, which is measured alone in the same run.
"""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from socket import create_server
from statistics import median
from typing import Annotated, Any
from urllib.error import URLError

import psutil
from cyclopts import App, Parameter

from benchmarks.machine import describe

RESULTS = Path(__file__).parents[1] / "results"
GRAPH = Path(__file__).parent / "null.yaml"
CHUNKS = 64
START_S = 60.0
APP = App(name="sagellm bench gateway", help=__doc__)


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of request: `stream` events of an answer, or one short answer as a whole."""

    name: str
    stream: bool

    @property
    def body(self) -> str:
        asked: dict[str, Any] = {"model": "null", "prompt": [1, 2, 3], "ignore_eos": True}
        return json.dumps(
            {**asked, "max_tokens": CHUNKS if self.stream else 1, "stream": self.stream}
        )


@dataclass(frozen=True, slots=True)
class Figures:
    """One run: CPU of the server's process over what it answered, and what its clients saw."""

    cpu_us_per_request: float
    cpu_us_per_event: float | None
    requests_per_s: float
    events_per_s: float | None
    p50_ms: float
    p99_ms: float


LOADS = (Load("whole", stream=False), Load("stream", stream=True))


@APP.default
def gateway(
    *,
    server: Annotated[tuple[str, ...], Parameter(negative=())] = ("hypercorn", "uvicorn"),
    connections: int = 64,
    seconds: float = 5.0,
    rounds: int = 3,
    output: Path = RESULTS,
) -> None:
    """Measure, print the table, and keep it as gateway.json.

    Parameters
    ----------
    server
        hypercorn, uvicorn; may be repeated.
    connections
        Requests at a time.
    seconds
        Of each run.
    rounds
        Runs of each server and load, the gateway and the bare server in turns.
    output
        The folder for gateway.json.
    """
    cells = [measure(name, load, connections, seconds, rounds) for name in server for load in LOADS]
    record = {
        "command": " ".join(["sagellm bench gateway", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "connections": connections,
        "cells": cells,
    }
    (output / "gateway.json").write_text(json.dumps(record, indent=2) + "\n")
    print(table(cells))


def measure(
    server: str, load: Load, connections: int, seconds: float, rounds: int
) -> dict[str, Any]:
    """One server and load: medians of both, and their ratio."""
    runs: dict[str, list[Figures]] = {"sagellm": [], "bare": []}
    alone: list[float] = []
    for _ in range(rounds):
        alone.append(graph_alone(load, connections, seconds))
        for name, found in runs.items():
            found.append(run_once(name, server, load, connections, seconds))
            print(f"{server} {load.name} {name}: {found[-1]}", file=sys.stderr)
    medians = {name: _median(found) for name, found in runs.items()}
    unit = "cpu_us_per_event" if load.stream else "cpu_us_per_request"
    ours, bare, graph = medians["sagellm"][unit], medians["bare"][unit], round(median(alone), 2)
    return {
        "server": server,
        "load": load.name,
        **medians,
        "graph_alone_cpu_us": graph,
        "gateway_cpu_us": round(ours - graph, 2),
        "ratio_of_gateway": round((ours - graph) / bare, 2),
        "ratio_of_all": round(ours / bare, 2),
    }


def graph_alone(load: Load, connections: int, seconds: float) -> float:
    """Microseconds of CPU an event, or a request, without a gateway."""
    max_tokens = CHUNKS if load.stream else 1
    arguments = [str(connections), str(seconds), str(max_tokens)]
    command = [sys.executable, "-m", "benchmarks.gateway.alone", *arguments]
    seen = json.loads(subprocess.check_output(command))
    return float(seen["cpu_us"] / seen["events" if load.stream else "requests"])


def run_once(name: str, server: str, load: Load, connections: int, seconds: float) -> Figures:
    """Start the server, warm it up, load it, stop it."""
    with served(name, server) as (process, port):
        _load(port, connections, 1.0, load)
        before = _cpu_s(process)
        seen = _load(port, connections, seconds, load)
        cpu_us = 1e6 * (_cpu_s(process) - before)
    if seen["failed"]:
        raise RuntimeError(f"{name} under {server}: {seen['failed']} requests failed")
    events = seen["events"] if load.stream else 0
    return Figures(
        cpu_us_per_request=cpu_us / seen["requests"],
        cpu_us_per_event=cpu_us / events if events else None,
        requests_per_s=seen["requests"] / seen["seconds"],
        events_per_s=events / seen["seconds"] if events else None,
        p50_ms=seen["p50_ms"],
        p99_ms=seen["p99_ms"],
    )


@contextmanager
def served(name: str, server: str) -> Iterator[tuple[psutil.Process, int]]:
    """A server in a process of its own, until the block ends."""
    port = _free_port()
    process = subprocess.Popen(_command(name, server, port))
    try:
        _wait_until_ready(port, process)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()


def _command(name: str, server: str, port: int) -> Sequence[str]:
    if name == "bare":
        return [sys.executable, "-m", "benchmarks.gateway.bare", server, str(port), str(CHUNKS)]
    options = ["--port", str(port), "--server", server, "--served-model-name", "null"]
    options += ["--log-level", "warning"]
    return [sys.executable, "-m", "sagellm", "serve", str(GRAPH), *options]


def _load(port: int, connections: int, seconds: float, load: Load) -> dict[str, Any]:
    arguments = [str(port), str(connections), str(seconds), load.body]
    command = [sys.executable, "-m", "benchmarks.gateway.load", *arguments]
    seen: dict[str, Any] = json.loads(subprocess.check_output(command))
    return seen


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _free_port() -> int:
    with create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_until_ready(port: int, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"no server answered on port {port}")


def _median(found: Sequence[Figures]) -> dict[str, Any]:
    runs = [asdict(figures) for figures in found]
    return {
        name: None if runs[0][name] is None else round(median(run[name] for run in runs), 2)
        for name in runs[0]
    }


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    lines = [
        "| server | unit | CPU us | of it the graph | the gateway | bare server | "
        "gateway / bare | all / bare | per s | bare per s | p99 ms | bare p99 ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        kind = "event" if cell["load"] == "stream" else "request"
        ours, bare = cell["sagellm"], cell["bare"]
        cpu, rate = f"cpu_us_per_{kind}", f"{kind}s_per_s"
        costs = (ours[cpu], cell["graph_alone_cpu_us"], cell["gateway_cpu_us"], bare[cpu])
        ratios = (cell["ratio_of_gateway"], cell["ratio_of_all"], ours[rate], bare[rate])
        figures = (*costs, *ratios, ours["p99_ms"], bare["p99_ms"])
        lines.append(f"| {cell['server']} | {kind} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    APP()
