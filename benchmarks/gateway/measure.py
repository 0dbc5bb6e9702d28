"""Microseconds of CPU per request and per SSE event: the gateway and the bare server in turns.

The gateway's own cost is what it adds to the graph, which is measured alone in the same run. The
bare server answers at the gateway's rate: a server that is busy all the time pays less for each
event than one that waits for the next step, whatever it does with them. Its cost flat out is a row
of its own.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from benchmarks.gateway import one_layer
from benchmarks.gateway.runs import CHUNKS, Figures, Load, median_of, run_once
from benchmarks.machine import describe

RESULTS = Path(__file__).parents[1] / "results"
GRAPH = Path(__file__).parent / "null.yaml"
APP = App(name="sagellm bench gateway", help=__doc__)
LOADS = (Load("whole", stream=False), Load("stream", stream=True))


@APP.default
def gateway(
    *,
    server: Annotated[tuple[str, ...], Parameter(negative=())] = ("hypercorn", "uvicorn"),
    only: Annotated[
        tuple[Literal["whole", "stream"], ...], Parameter(name="--load", negative=())
    ] = ("whole", "stream"),
    connections: int = 64,
    seconds: float = 5.0,
    rounds: int = 3,
    gateways: int = 0,
    llama_server: Path | None = None,
    output: Path = RESULTS,
) -> None:
    """Measure, print the table, and keep it as gateway.json.

    Parameters
    ----------
    server
        hypercorn, uvicorn; may be repeated.
    only
        whole, stream; may be repeated.
    connections
        Requests at a time.
    seconds
        Of each run.
    rounds
        Runs of each server and load, the gateway and the bare server in turns.
    gateways
        Processes that speak HTTP, before that of the graph; 0: none, as `sagellm serve` has it.
    llama_server
        llama.cpp's own HTTP server: its streams and the gateway's, with a model of one layer behind
        both, as further rows.
    output
        The folder for gateway.json, or gateway-processes.json where there are any.
    """
    loads = [load for load in LOADS if load.name in only]
    cells = [
        measure(name, load, connections, seconds, rounds, gateways)
        for name in server
        for load in loads
    ]
    record: dict[str, Any] = {
        "command": " ".join(["sagellm bench gateway", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "connections": connections,
        "gateways": gateways,
        "cells": cells,
    }
    shown = table(cells)
    if llama_server is not None:
        record["one_layer"] = one_layer.measure(llama_server, server, connections, seconds, rounds)
        shown += "\n\n" + one_layer.table(record["one_layer"])
    name = "gateway-processes.json" if gateways else "gateway.json"
    (output / name).write_text(json.dumps(record, indent=2) + "\n")
    print(shown)


def measure(
    server: str, load: Load, connections: int, seconds: float, rounds: int, gateways: int
) -> dict[str, Any]:
    """Measure one server with one load: the medians of all servers, and their ratios."""
    runs: dict[str, list[Figures]] = {"sagellm": [], "bare": [], "bare_flat_out": []}
    alone: list[float] = []
    for _ in range(rounds):
        alone.append(graph_alone(load, connections, seconds))
        pace_s = 0.0
        for name, found in runs.items():
            flat_out = name == "bare_flat_out"
            paced_s = 0.0 if flat_out else pace_s
            command = partial(_command, name, server, pace_s=paced_s, gateways=gateways)
            found.append(run_once(command, load, connections, seconds))
            pace_s = pace_s or connections / found[-1].rate
            print(f"{server} {load.name} {name}: {found[-1]}", file=sys.stderr)
    medians = {name: median_of(found) for name, found in runs.items()}
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
        "ratio_of_gateway_flat_out": round((ours - graph) / medians["bare_flat_out"][unit], 2),
    }


def graph_alone(load: Load, connections: int, seconds: float) -> float:
    """Microseconds of CPU for an event, or for a whole answer, without a gateway."""
    max_tokens = CHUNKS if load.stream else 1
    arguments = [str(connections), str(seconds), str(max_tokens)]
    command = [sys.executable, "-m", "benchmarks.gateway.alone", *arguments]
    seen = json.loads(subprocess.check_output(command))
    return float(seen["cpu_us"] / seen["events" if load.stream else "requests"])


def _command(name: str, server: str, port: int, *, pace_s: float, gateways: int) -> Sequence[str]:
    if name != "sagellm":
        bare = [sys.executable, "-m", "benchmarks.gateway.bare", server]
        return [*bare, str(port), str(CHUNKS), str(pace_s)]
    options = ["--port", str(port), "--server", server, "--served-model-name", "null"]
    options += ["--log-level", "warning", "--gateways", str(gateways)]
    return [sys.executable, "-m", "sagellm", "serve", str(GRAPH), *options]


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The cells as a table in Markdown."""
    lines = [
        "| server | unit | CPU us | of it the graph | the gateway | bare server | "
        "gateway / bare | all / bare | gateway / bare flat out | per s | bare per s | p99 ms | "
        "bare p99 ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        kind = "event" if cell["load"] == "stream" else "request"
        ours, bare = cell["sagellm"], cell["bare"]
        cpu, rate = f"cpu_us_per_{kind}", f"{kind}s_per_s"
        costs = (ours[cpu], cell["graph_alone_cpu_us"], cell["gateway_cpu_us"], bare[cpu])
        flat_out = cell["ratio_of_gateway_flat_out"]
        ratios = (cell["ratio_of_gateway"], cell["ratio_of_all"], flat_out, ours[rate], bare[rate])
        figures = (*costs, *ratios, ours["p99_ms"], bare["p99_ms"])
        lines.append(f"| {cell['server']} | {kind} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    APP()
